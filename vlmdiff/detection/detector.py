"""`Detector`: photographs in, scores, verdicts and anomaly maps out."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage

from vlmdiff.detection.calibration import Calibration, conformal_threshold
from vlmdiff.detection.features import spaces
from vlmdiff.device import pick_device
from vlmdiff.errors import InputError
from vlmdiff.files import write_json
from vlmdiff.model.pipeline import VLMDiffPipeline, load_pipeline
from vlmdiff.params import Detection as DetectionParams

SETTINGS = "detector.json"


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
    """What a detector says of one photograph; score, map and peaks are in [0, 1), 0.5 is the threshold.

    anomaly_map: float32 (S, S); reconstruction: uint8 (S, S, 3), the photograph as if it were normal; S is the model's
    resolution, to which the photograph was resized.
    """

    score: float
    is_anomalous: bool
    anomaly_map: np.ndarray
    regions: list[Region]
    reconstruction: np.ndarray

    def scaled_regions(self, width: int, height: int) -> list[Region]:
        """The regions in pixels of the photograph as it came, `width` x `height`."""
        x, y = width / self.anomaly_map.shape[1], height / self.anomaly_map.shape[0]
        return [
            Region(
                round(r.x0 * x),
                round(r.y0 * y),
                round(r.x1 * x),
                round(r.y1 * y),
                round(r.area * x * y),
                r.peak,
            )
            for r in self.regions
        ]


class Detector:
    """A pipeline, how its reconstructions are compared with the photographs, and what is normal for it."""

    def __init__(self, pipeline: VLMDiffPipeline, params: DetectionParams, calibration: Calibration | None = None):
        self.pipeline = pipeline
        self.params = params
        self.calibration = calibration
        self.spaces = spaces(params.features, pipeline)

    @classmethod
    def from_pretrained(cls, folder: Path | str, device: str = "auto") -> "Detector":
        """Load what `save_pretrained` wrote. Raises InputError where the folder is not a detector's."""
        folder = Path(folder)
        settings = folder / SETTINGS
        if not settings.is_file():
            raise InputError(
                f"{folder} is not a detector's folder: it has no {SETTINGS} (the evaluate stage writes it)"
            )
        facts = json.loads(settings.read_text())
        pipeline = load_pipeline(folder, pick_device(device))
        return cls(pipeline, DetectionParams.model_validate(facts["detection"]), Calibration(**facts["calibration"]))

    def save_pretrained(self, folder: Path | str) -> None:
        """A `DiffusionPipeline` folder in safetensors, and in it the detector's settings."""
        self.pipeline.save_pretrained(folder)
        facts = {"detection": self.params.model_dump(mode="json"), "calibration": asdict(self._calibrated())}
        write_json(Path(folder) / SETTINGS, facts)

    def calibrate(self, normal: Sequence[np.ndarray], batch_size: int = 32) -> None:
        """Learn from normal images that training never saw (uint8 (H, W, 3)) what difference is normal."""
        differences = np.concatenate([maps for maps, _ in self._differences(normal, batch_size)])
        scales = differences.mean(axis=(0, 2, 3))
        scores = self._combine(differences, scales).max(axis=(1, 2))
        threshold = conformal_threshold(scores, self.params.false_alarm_rate)
        self.calibration = Calibration(
            scales=scales.tolist(),
            threshold=threshold,
            images=len(scores),
            false_alarm_rate=self.params.false_alarm_rate,
        )

    def detect(self, images: Sequence[np.ndarray], batch_size: int = 32) -> list[Detection]:
        """Judge photographs: uint8 (H, W, 3) of any size, or PIL images.

        Every image is judged by itself: neither its batch nor its place in it changes its result beyond rounding.
        """
        return list(self.stream(images, batch_size))

    def stream(self, images: Iterable[np.ndarray], batch_size: int = 32) -> Iterator[Detection]:
        """As `detect`, a batch at a time: as many images as one likes in the memory of one batch."""
        calibration = self._calibrated()
        for differences, rebuilt in self._differences(images, batch_size):
            raw = self._combine(differences, calibration.scales)
            maps = (raw / (raw + calibration.threshold)).astype(np.float32)
            for anomaly_map, reconstruction in zip(maps, rebuilt, strict=True):
                score = float(anomaly_map.max())
                yield Detection(score, score > 0.5, anomaly_map, find_regions(anomaly_map), reconstruction)

    def reconstruct(self, images: torch.Tensor, seed: int) -> torch.Tensor:
        """Photographs (B, 3, S, S) in [0, 1] as if they were normal, one draw of them."""
        params = self.params
        return self.pipeline(images, noise_level=params.noise_level, steps=params.steps, seed=seed).images

    def _calibrated(self) -> Calibration:
        if self.calibration is None:
            raise InputError("this detector knows no threshold yet: call calibrate() with normal images")
        return self.calibration

    @torch.no_grad()
    def _differences(self, images: Iterable[np.ndarray], batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """A batch at a time: a map a kind of features (B, F, S, S), and one reconstruction, uint8 (B, S, S, 3)."""
        params, size = self.params, self.pipeline.config.image_size
        for batch in batches(images, batch_size):
            x = torch.stack([to_tensor(image, size) for image in batch]).to(self.pipeline.device)
            before = [extract(x) for extract, _ in self.spaces]
            total = torch.zeros(len(x), len(self.spaces), size, size, device=x.device)
            for sample in range(params.samples):
                rebuilt = self.reconstruct(x, params.seed + sample)
                if sample == 0:
                    shown = (rebuilt * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
                for i, (extract, distance) in enumerate(self.spaces):
                    for a, b in zip(before[i], extract(rebuilt), strict=True):
                        total[:, i] += resize(distance(a, b), size) / (len(before[i]) * params.samples)
            yield total.cpu().numpy(), shown

    def _combine(self, differences: np.ndarray, scales: Sequence[float]) -> np.ndarray:
        """(B, F, S, S) to (B, S, S): each kind of features on its normal scale, weighted, summed and smoothed."""
        weights = np.array([features.weight for features in self.params.features]) / np.maximum(scales, 1e-12)
        total = np.einsum("bfhw,f->bhw", differences, weights)
        sigma = self.params.smoothing
        return ndimage.gaussian_filter(total, sigma=(0, sigma, sigma)) if sigma > 0 else total


def batches(items: Iterable, size: int) -> Iterator[list]:
    """Lists of `size` items, the last one shorter."""
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


def find_regions(anomaly_map: np.ndarray) -> list[Region]:
    """The 8-connected parts of a map (H, W) above 0.5, the highest peak first."""
    labels, _ = ndimage.label(anomaly_map > 0.5, np.ones((3, 3)))
    regions = []
    for label, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        inside = labels[rows, columns] == label
        peak = float(anomaly_map[rows, columns][inside].max())
        regions.append(Region(columns.start, rows.start, columns.stop, rows.stop, int(inside.sum()), peak))
    return sorted(regions, key=lambda region: -region.peak)


def resize(maps: torch.Tensor, size: int) -> torch.Tensor:
    """(B, h, w) to (B, size, size), bilinear."""
    return F.interpolate(maps[:, None], size=(size, size), mode="bilinear", align_corners=False)[:, 0]


def to_tensor(image: np.ndarray | Image.Image, size: int) -> torch.Tensor:
    """A photograph, uint8 (H, W, 3) or PIL, as float (3, size, size) in [0, 1]."""
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image)
    image = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
