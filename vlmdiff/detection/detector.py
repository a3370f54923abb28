"""`Detector`: photographs in, scores, verdicts and anomaly maps out."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice, repeat
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pydantic import model_validator
from scipy import ndimage

from vlmdiff.core.device import pick_device
from vlmdiff.core.errors import InputError
from vlmdiff.core.files import read_json, write_json
from vlmdiff.core.params import BackboneFeatures, Latents, Section
from vlmdiff.core.params import Detection as DetectionParams
from vlmdiff.data.images import fit
from vlmdiff.detection.anomaly_map import SMALLEST_POOLED, compare, enlarge, image_scores, smooth
from vlmdiff.detection.calibration import Calibration, conformal_threshold
from vlmdiff.detection.features import spaces
from vlmdiff.model.backbone import Backbone
from vlmdiff.model.pipeline import VLMDiffPipeline, load_pipeline

SETTINGS = "detector.json"
Photograph = np.ndarray | Image.Image


class Settings(Section):
    """The content of detector.json."""

    detection: DetectionParams
    calibration: Calibration
    class_captions: dict[str, str] | None = None

    @model_validator(mode="after")
    def _each_kind_of_features_has_its_scale(self):
        if len(self.calibration.scales) != len(self.detection.features):
            raise ValueError("calibration.scales needs one value for each of detection.features")
        return self

    @classmethod
    def read(cls, folder: Path) -> "Settings":
        """Read a detector's settings. Raises InputError if the folder has none, or a value is out of range."""
        if not (file := folder / SETTINGS).is_file():
            raise InputError(
                f"{folder} is not a detector's folder, it has no {SETTINGS}: name one that `vlmdiff evaluate` wrote"
            )
        return read_json(file, cls)


@dataclass(frozen=True)
class Region:
    """A connected part of the map above the threshold: its box (x1, y1 exclusive), area in pixels, highest value."""

    x0: int
    y0: int
    x1: int
    y1: int
    area: int
    peak: float


@dataclass(frozen=True)
class Detection:
    """What a detector says of one photograph. Score, map and peaks are in [0, 1); the threshold is 0.5.

    anomaly_map: float32 (S, S); reconstruction: uint8 (S, S, 3), the photograph as if it were normal. S is the model's
    resolution, to which the photograph is resized.
    """

    score: float
    is_anomalous: bool
    anomaly_map: np.ndarray
    regions: list[Region]
    reconstruction: np.ndarray

    def at(self, threshold: float) -> "Detection":
        """Return the same photograph judged at another threshold: is_anomalous and the regions follow it."""
        is_anomalous = self.score > threshold
        # Where the score is not the map's maximum, a normal image's map may exceed the threshold.
        regions = find_regions(self.anomaly_map, threshold) if is_anomalous else []
        return replace(self, is_anomalous=is_anomalous, regions=regions)

    def scaled_regions(self, width: int, height: int) -> list[Region]:
        """Return the regions in the photograph's own pixels, `width` x `height`."""
        x, y = width / self.anomaly_map.shape[1], height / self.anomaly_map.shape[0]
        return [
            Region(round(r.x0 * x), round(r.y0 * y), round(r.x1 * x), round(r.y1 * y), round(r.area * x * y), r.peak)
            for r in self.regions
        ]


class Detector:
    """A pipeline, how its reconstructions are compared with the photographs, and what is normal for it.

    class_captions: a caption for each class, for a detector whose parameters say `captions: class`.
    """

    def __init__(
        self,
        pipeline: VLMDiffPipeline,
        params: DetectionParams,
        calibration: Calibration | None = None,
        class_captions: Mapping[str, str] | None = None,
    ):
        size = pipeline.config.image_size
        if params.image_score == "pooled_max" and size < SMALLEST_POOLED:
            raise InputError(
                f"image_score: pooled_max needs a model of at least {SMALLEST_POOLED} pixels, not {size}: use max"
            )
        self.pipeline = pipeline
        self.params = params
        self.calibration = calibration
        self.class_captions = class_captions
        self.spaces = spaces(params.features, pipeline)
        self._decodes = any(not isinstance(features, Latents) for features in params.features)

    @classmethod
    def from_pretrained(cls, folder: Path | str, device: str = "auto") -> "Detector":
        """Load what `save_pretrained` wrote. Nothing in the folder runs, and nothing outside of it is read.

        Raises InputError if the folder is not a detector's, or a value in it is out of range.
        """
        folder = Path(folder)
        settings = Settings.read(folder)
        inside = {path.name for path in folder.iterdir() if path.is_dir() and not path.is_symlink()}
        features = []
        for i, entry in enumerate(settings.detection.features):
            if isinstance(entry, BackboneFeatures):
                if entry.model not in inside:
                    where = f"{folder / SETTINGS}, detection.features.{i}.model"
                    raise InputError(f"{where}: {entry.model!r} is not a folder inside {folder}. Restore the folder.")
                entry = entry.model_copy(update={"model": str(folder / entry.model), "revision": None})
            features.append(entry)
        params = settings.detection.model_copy(update={"features": tuple(features)})
        pipeline = load_pipeline(folder, pick_device(device))
        return cls(pipeline, params, settings.calibration, settings.class_captions)

    def save_pretrained(self, folder: Path | str) -> None:
        """Write a `DiffusionPipeline` folder in safetensors, with the detector's settings and its backbones."""
        folder = Path(folder)
        self.pipeline.save_pretrained(folder)
        detection = self.params.model_dump(mode="json")
        saved: dict[tuple[str, str | None], str] = {}
        for entry, written in zip(self.params.features, detection["features"], strict=True):
            if isinstance(entry, BackboneFeatures):
                name = saved.setdefault((entry.model, entry.revision), f"backbone_{len(saved)}")
                written |= {**Backbone.save(entry, folder / name), "model": name}
        facts = {
            "detection": detection,
            "calibration": asdict(self.calibrated()),
            "class_captions": self.class_captions,
        }
        write_json(folder / SETTINGS, facts)

    def calibrate(
        self, normal: Sequence[Photograph], batch_size: int = 32, captions: Sequence[str] | None = None
    ) -> np.ndarray:
        """Learn what difference is normal from normal photographs that training does not see.

        normal and captions: as for `detect`. Returns the photographs' scores (N,), as `detect` gives them from now on.
        """
        found = [(maps, expected) for maps, expected, _ in self._differences(normal, batch_size, captions)]
        differences, deviations = (np.concatenate(maps) for maps in zip(*found, strict=True))
        typical = float(np.sqrt(np.square(deviations).mean()))
        differences = self._relative(differences, deviations, typical)
        scales = differences.mean(axis=(0, 2, 3))
        scores = image_scores(self._combine(differences, scales), self.params.image_score)
        threshold = conformal_threshold(scores, self.params.false_alarm_rate)
        self.calibration = Calibration(
            deviation=typical,
            scales=scales.tolist(),
            threshold=threshold,
            images=len(scores),
            false_alarm_rate=self.params.false_alarm_rate,
        )
        return normalised(scores, threshold)

    def captions_of(self, classes: Iterable[str]) -> list[str]:
        """Return the captions by which a detector of `captions: class` judges images of these classes.

        Raises InputError if the detector judges otherwise or does not know a class.
        """
        if self.params.captions != "class":
            raise InputError(f"this detector judges by captions: {self.params.captions}, not by class: name no class")
        known = self.class_captions or {}
        classes = list(classes)
        if unknown := sorted(set(classes) - known.keys()):
            raise InputError(f"this detector does not know the class {unknown[0]!r}, only {', '.join(sorted(known))}")
        return [known[name] for name in classes]

    def detect(
        self, images: Sequence[Photograph], batch_size: int = 32, captions: Sequence[str] | None = None
    ) -> list[Detection]:
        """Judge photographs.

        images: arrays, uint8 (H, W, 3), or PIL images in any mode, of any size. captions: one for each image where the
        parameters say `captions: image` (its own) or `class` (`captions_of` its class), else None. The batch of an
        image and its place there change its result by rounding at most. Raises InputError for an image of another
        type, and where captions are missing or not wanted.
        """
        if captions is not None and len(captions) != len(images):
            raise InputError(f"{len(captions)} captions for {len(images)} images: give one for each image, or none")
        return list(self.stream(images, batch_size, captions))

    def stream(
        self, images: Iterable[Photograph], batch_size: int = 32, captions: Iterable[str] | None = None
    ) -> Iterator[Detection]:
        """Judge photographs as `detect` does, with no more than one batch of them in memory."""
        calibration = self.calibrated()
        for differences, deviations, rebuilt in self._differences(images, batch_size, captions):
            raw = self._combine(self._relative(differences, deviations, calibration.deviation), calibration.scales)
            maps, scores = (
                normalised(values, calibration.threshold)
                for values in (raw, image_scores(raw, self.params.image_score))
            )
            for anomaly_map, score, reconstruction in zip(maps, scores.tolist(), rebuilt, strict=True):
                yield Detection(score, False, anomaly_map, [], reconstruction).at(0.5)

    def reconstruct(
        self, latents: torch.Tensor, images: torch.Tensor, seed: int, captions: Sequence[str] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return latents (B, C, h, w) of photographs (B, 3, S, S) in [0, 1] as if they were normal, one draw of them.

        The second value is the deviations (B, h, w) that the network expects, None where it has not learned them.
        """
        options = self.params.model_dump(include={"noise_level", "steps", "guidance", "spacing", "solver"})
        return self.pipeline.reconstruct(latents, images, captions, seed=seed, **options)

    def calibrated(self) -> Calibration:
        """Return the calibration. Raises InputError if there is none."""
        if self.calibration is None:
            raise InputError("this detector has no threshold yet: call calibrate() with normal images")
        return self.calibration

    @torch.no_grad()
    def _differences(
        self, images: Iterable[Photograph], batch_size: int, captions: Iterable[str] | None
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield, for each batch, how far photographs lie from the mean of their samples, by kind of features
        (B, F, S, S); the deviation that is expected there, (B, S, S); and one sample, uint8 (B, S, S, 3).
        """
        params, size = self.params, self.pipeline.config.image_size
        if (captions is None) != (params.captions == "none"):
            raise InputError(
                f"this detector judges by captions: {params.captions}, so it needs "
                + ("a caption for each image" if captions is None else "images without captions")
            )
        pairs = zip(images, repeat(None), strict=False) if captions is None else zip(images, captions, strict=True)
        for batch in batches(pairs, batch_size):
            x = torch.stack([to_tensor(image, size) for image, _ in batch]).to(self.pipeline.device)
            texts = None if captions is None else [caption for _, caption in batch]
            clean = self.pipeline.encode_images(x)
            before = [extract(x, clean) for extract, _ in self.spaces]
            samples, expected, rebuilt, shown = [], [], x, np.empty(0)
            for sample in range(params.samples):
                latents, deviation = self.reconstruct(clean, x, params.seed + sample, texts)
                # Where only latents are compared, one sample is decoded, to be shown.
                if sample == 0 or self._decodes:
                    rebuilt = self.pipeline.decode_latents(latents)
                if sample == 0:
                    shown = (rebuilt * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
                samples.append([extract(rebuilt, latents) for extract, _ in self.spaces])
                # Without a learned deviation, every place counts the same.
                expected.append(torch.ones_like(latents[:, 0]) if deviation is None else deviation)
            maps = []
            for i, (_, distance) in enumerate(self.spaces):
                mean = [
                    torch.stack(layer).mean(dim=0) for layer in zip(*(sample[i] for sample in samples), strict=True)
                ]
                maps.append(compare(before[i], mean, distance, size, params.align_corners))
            deviations = enlarge(torch.stack(expected).mean(dim=0), size, params.align_corners)
            yield torch.stack(maps, dim=1).cpu().numpy(), deviations.cpu().numpy(), shown

    def _relative(self, differences: np.ndarray, deviations: np.ndarray, typical: float) -> np.ndarray:
        """Divide differences (B, F, S, S) by the expected deviations (B, S, S), where the parameters ask for it."""
        floor = self.params.deviation_floor
        return differences if floor is None else differences / (deviations / typical + floor)[:, None]

    def _combine(self, differences: np.ndarray, scales: Sequence[float]) -> np.ndarray:
        """Reduce (B, F, S, S) to (B, S, S): each kind of features on its normal scale, weighted, summed, smoothed."""
        weights = np.array([features.weight for features in self.params.features]) / np.maximum(scales, 1e-12)
        return smooth(np.einsum("bfhw,f->bhw", differences, weights), self.params.smoothing)


def normalised(values: np.ndarray, threshold: float) -> np.ndarray:
    """Return values from 0 on as float32 in [0, 1): the threshold becomes 0.5."""
    return (values / (values + threshold)).astype(np.float32)


def batches(items: Iterable, size: int) -> Iterator[list]:
    """Yield lists of `size` items; the last one may be shorter."""
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


def find_regions(anomaly_map: np.ndarray, threshold: float = 0.5) -> list[Region]:
    """Return the 8-connected parts of a map (H, W) above the threshold, the highest peak first."""
    labels, _ = ndimage.label(anomaly_map > threshold, np.ones((3, 3)))
    regions = []
    for label, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        inside = labels[rows, columns] == label
        peak = float(anomaly_map[rows, columns][inside].max())
        regions.append(Region(columns.start, rows.start, columns.stop, rows.stop, int(inside.sum()), peak))
    return sorted(regions, key=lambda region: -region.peak)


def to_tensor(image: Photograph, size: int) -> torch.Tensor:
    """Return a photograph at the model's size as floats (3, size, size) in [0, 1]."""
    return torch.from_numpy(fit(image, size)).permute(2, 0, 1).float() / 255
