"""`Detector`: photographs in, scores, verdicts and anomaly maps out."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count, islice, repeat
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vlmdiff.core.device import pick_device
from vlmdiff.core.errors import InputError, ModelError, explained
from vlmdiff.core.files import seal, write_json
from vlmdiff.core.params import BackboneFeatures, Latents
from vlmdiff.core.params import Detection as DetectionParams
from vlmdiff.data.images import fit
from vlmdiff.detection.anomaly_map import SMALLEST_POOLED, compare, enlarge, fuse, image_scores, normalised, smooth
from vlmdiff.detection.calibration import Calibration, Usual, standardise
from vlmdiff.detection.detection import Detection, Photograph
from vlmdiff.detection.features import spaces
from vlmdiff.detection.normals import Normal, Normals
from vlmdiff.detection.products import appearance
from vlmdiff.detection.retrieval import NormalPatches, PatchBank, PatchBanks, unit_length
from vlmdiff.detection.settings import SETTINGS, Settings
from vlmdiff.model.backbone import Backbone
from vlmdiff.model.feature_space import FeatureSpace
from vlmdiff.model.pipeline import VLMDiffPipeline, load_pipeline

NORMALS = "normals.safetensors"
# The features of one image differ less between two batches, as a share of the largest.
SAME = 0.05


class Detector:
    """A pipeline, how its reconstructions are compared with the photographs, and what is normal for it.

    class_captions: a caption for each class, for a detector whose parameters say `captions: class`. bank: patches of
    normal images, for one whose parameters say `retrieval`. normals: the images that it remembers. `learn` makes both.
    """

    def __init__(
        self,
        pipeline: VLMDiffPipeline,
        params: DetectionParams,
        calibration: Calibration | None = None,
        class_captions: Mapping[str, str] | None = None,
        bank: PatchBanks | None = None,
        normals: Normals | None = None,
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
        self.bank = bank
        self.normals = normals
        self.spaces = spaces(params.features, pipeline)
        self._decodes = any(not isinstance(features, Latents) for features in params.features)

    @classmethod
    def from_pretrained(cls, folder: Path | str, device: str = "auto") -> "Detector":
        """Load what `save_pretrained` wrote. Nothing in the folder runs, and nothing outside of it is read.

        Raises InputError if the folder is not a detector's, a value in it is out of range, or a file has changed since
        it was written.
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
        bank = None
        if params.retrieval:
            if not isinstance(pipeline.vae, FeatureSpace):
                where = f"{folder / SETTINGS}, detection.retrieval"
                raise InputError(f"{where}: the first stage here is not a vision backbone. Restore the folder.")
            size = sum(pipeline.vae.config.feature_channels)
            bank = PatchBanks.load(folder, params.retrieval, size, pipeline.device)
        # Detectors of earlier releases remember none.
        normals = Normals.load(folder / NORMALS) if (folder / NORMALS).exists() else None
        with explained(folder, "Run `vlmdiff evaluate` again, or restore the folder"):
            return cls(pipeline, params, settings.calibration, settings.class_captions, bank, normals)

    def save_pretrained(self, folder: Path | str) -> None:
        """Write a `DiffusionPipeline` folder in safetensors, with the detector's settings, backbones and bank.

        The hashes of all files in the folder are written too; `from_pretrained` refuses a file that has changed.
        """
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
        if self.bank is not None:
            self.bank.save(folder)
        if self.normals is not None:
            self.normals.save(folder / NORMALS)
        write_json(folder / SETTINGS, facts)
        seal(folder)

    @torch.no_grad()
    def learn(
        self, normal: Iterable[Photograph], images: Sequence[Normal], batch_size: int = 32, described: bool = False
    ) -> None:
        """Remember normal images, and keep patches of them where the parameters ask for retrieval.

        images: what is known of each. Those by which `calibrate` is to learn may be among them, if they come first and
        in the same order. described: their captions are those of `describe`, so that the caption of a new image can be
        compared with them.

        Raises InputError if retrieval has fewer than two images, or a first stage that is no vision backbone.
        """
        wanted, looks = self.params.retrieval, []
        if wanted is not None and not isinstance(self.pipeline.vae, FeatureSpace):
            raise InputError("evaluate.detection.retrieval needs first_stage.kind: backbone: set it to null")
        products, collected = [image.class_name for image in images], []
        if wanted is not None:
            collected = [NormalPatches(products, wanted, self.params.seed) for _ in range(1 + len(wanted.more_sizes))]
        for batch in batches(zip(normal, _names(None), strict=False), batch_size):
            clean, features = self._encode(self._tensors([image for image, _ in batch]))
            looks.append(appearance(clean))
            self._check([name for _, name in batch], "features", looks[-1].numpy())
            for bank, one in zip(collected, features, strict=True):
                bank.add(one)
        if collected:
            banks = []
            # Of one size after the other: what was collected is large.
            while collected:
                banks.append(PatchBank.fit(collected.pop(0)))
            self.bank = PatchBanks(banks)
        self.normals = Normals(images, torch.cat(looks), described)

    def calibrate(
        self,
        normal: Sequence[Photograph],
        batch_size: int = 32,
        captions: Sequence[str] | None = None,
        weigh: Callable[[np.ndarray], float] | None = None,
        in_bank: bool = False,
        names: Iterable[str] | None = None,
        products: Sequence[str] | None = None,
        rate: Callable[[np.ndarray, Sequence[str]], float] | None = None,
    ) -> np.ndarray:
        """Learn what difference is normal from normal photographs that the denoiser has not seen.

        normal, captions, names: as for `detect`. weigh: returns the share of retrieval, given the evidence (N, 2, S, S)
        of these photographs; without it, the share is that of the parameters, or one half. in_bank: the photographs are
        the first in the bank, so each is judged without its own patches; where retrieval alone is the evidence, the
        others that the bank has whole calibrate too. products: what each shows; without them, all are of one. rate:
        returns the false-alarm rate, given the standardised scores (N,) of these photographs and their products;
        without it, the rate is that of the parameters. Where it is given, every second image of a product chooses the
        rate, and the others alone set the thresholds, so that their promise holds. Returns the photographs' scores
        (N,), as `detect` would give them for a photograph that is new to it.

        Raises InputError if there are several products and `learn` has not seen them all, if `rate` is given and no
        product has two images, or if an image is not in its place in the bank.
        """
        shown, products = products, [""] * len(normal) if products is None else list(products)
        if len(set(products)) > 1 and not set(products) <= set(self.normals.products.names if self.normals else ()):
            raise InputError("several products are calibrated only after `learn` has seen images of each of them")
        own = range(len(normal)) if in_bank else None
        found = list(self._compare(normal, batch_size, captions, own, names, shown, in_bank))
        deviation = float(np.sqrt(np.square(np.concatenate([batch.deviations for batch in found])).mean()))
        relative = np.concatenate([self._relative(batch, deviation) for batch in found])
        learned = Calibration(
            deviation=deviation,
            scales=relative.mean(axis=(0, 2, 3)).tolist(),
            threshold=0.0,
            images=len(relative),
            false_alarm_rate=self.params.false_alarm_rate,
        )
        if self.bank is not None:
            distances = np.concatenate([batch.distances for batch in found if batch.distances is not None])
            learned = replace(learned, retrieval=Usual.of(distances))
        del relative
        parts = np.concatenate([self._parts(batch, learned) for batch in found])
        evidence = self._evidence(parts, learned)
        if self.bank is not None and self.params.retrieval:
            tails = [Usual.of(maps).tail for maps in evidence.swapaxes(0, 1)]
            evidence /= np.array(tails, np.float32)[:, None, None]
            self.calibration = learned = replace(learned, tails=tails)
            asked = self.params.retrieval.weight
            weight = asked if asked != "auto" else weigh(evidence) if weigh else 0.5
            learned = replace(learned, weight=weight)
        statistics = self._statistics(parts, fuse(evidence, learned.weight), learned)
        self._check([name for batch in found for name in batch.names], "score", statistics)
        if in_bank and learned.weight == 1 and self.bank is not None and self.normals is not None:
            # The denoiser, which has seen them, has no say.
            more = [i for i in self.bank.known if i >= len(normal)]
            statistics = np.concatenate([statistics, *(self._remembered(i, learned) for i in more)])
            products += [self.normals.images[i].class_name for i in more]
            learned = replace(learned, images=len(products))
        if rate is None:
            self.calibration, scores = learned.learn(statistics, products)
        else:
            scores = self._choose_rate(learned, statistics, products, rate)
        return scores[: len(normal)]

    def _choose_rate(
        self,
        learned: Calibration,
        statistics: np.ndarray,
        products: Sequence[str],
        rate: Callable[[np.ndarray, Sequence[str]], float],
    ) -> np.ndarray:
        """Set the calibration by a rate that every second image has chosen; return the scores (N,) of all."""
        of, chooses = np.array(products), _every_second(products)
        if not chooses.any():
            raise InputError("no product has two held-out normal images, by which costs could choose a threshold")
        theirs, names = statistics[chooses], of[chooses].tolist()
        self.calibration, _ = learned.learn(theirs, names)
        chosen = rate(standardise(theirs, names)[1], names)
        learned = replace(learned, false_alarm_rate=chosen, images=int((~chooses).sum()))
        scores = np.empty(len(of))
        self.calibration, scores[~chooses] = learned.learn(statistics[~chooses], of[~chooses].tolist())
        scores[chooses] = self.calibration.odds(self.calibration.standardised(theirs, names), names)
        return scores

    def _remembered(self, number: int, calibration: Calibration) -> np.ndarray:
        """Return the statistics (1, Q) of an image that the bank has whole, by retrieval alone."""
        distances = self._known([number])
        assert distances is not None and calibration.retrieval is not None and calibration.tails is not None
        small = torch.from_numpy(calibration.retrieval.positive(distances))
        maps = enlarge(small, self.pipeline.config.image_size, self.params.align_corners).numpy()
        raw = (smooth(maps, self.params.smoothing) / calibration.tails[1]).astype(np.float32)
        return self._statistics(maps[:, None], raw, calibration)

    def evidence(
        self,
        images: Iterable[Photograph],
        batch_size: int = 32,
        captions: Iterable[str] | None = None,
        without: Iterable[int] | None = None,
    ) -> np.ndarray:
        """Return how unusual each place of photographs is, by each kind of evidence (N, E, S, S), on its own scale.

        The kinds are those of `KINDS`; only a detector with a bank of patches has the second. `fuse` combines them.
        without: for each photograph, the number of an image of the bank whose patches do not count.
        """
        calibration = self.calibrated()
        found = self._compare(images, batch_size, captions, without)
        return np.concatenate([self._evidence(self._parts(batch, calibration), calibration) for batch in found])

    def standardised(
        self,
        images: Iterable[Photograph],
        products: Sequence[str],
        batch_size: int = 32,
        captions: Iterable[str] | None = None,
        without: Iterable[int] | None = None,
    ) -> np.ndarray:
        """Return the standardised scores (N,) of photographs of these products; `without` is as for `evidence`."""
        calibration, values = self.calibrated(), []
        for batch in self._compare(images, batch_size, captions, without):
            parts = self._parts(batch, calibration)
            raw = fuse(self._evidence(parts, calibration), calibration.weight)
            values.extend(self._statistics(parts, raw, calibration))
        return calibration.standardised(values, products)

    @torch.no_grad()
    def distances(
        self,
        images: Iterable[Photograph],
        without: Iterable[int] | None = None,
        batch_size: int = 32,
        same: bool = False,
    ) -> np.ndarray:
        """Return how far the patches of photographs are from the bank (N, h, w), without the denoiser.

        without: as for `evidence`. same: the photographs are the images of the bank that `without` numbers; what it
        knows of them is not computed again. Raises InputError for a detector without a bank.
        """
        if self.bank is None:
            raise InputError("this detector has no bank of patches: set evaluate.detection.retrieval")
        found, numbers = [], None if without is None else iter(without)
        for batch in batches(images, batch_size):
            own = None if numbers is None else list(islice(numbers, len(batch)))
            distances = self._known(own) if same else None
            if distances is None:
                clean, features = self._encode(self._tensors(batch))
                distances = self._distances(features, appearance(clean), [None] * len(batch), own)
            found.append(distances)
        return np.concatenate(found)

    def _distances(
        self, features: list[torch.Tensor], look: torch.Tensor, products: list[str | None], own: list[int] | None
    ) -> np.ndarray | None:
        """Return how far the features of images, from `_encode`, are from the bank (B, h, w), None if there is no bank.

        look: (B, F), of `appearance`; products: what each image shows; where it is None, its number in the bank, `own`,
        or its look tells.
        """
        if self.bank is None:
            return None
        if self.normals is None:
            shown = [""] * len(products)
        elif own is not None:
            shown = [self.normals.images[i].class_name for i in own]
        else:
            shown, _ = self.normals.products(look.numpy())
        names = [other if name is None else name for name, other in zip(products, shown, strict=True)]
        return self.bank(features, names, own).cpu().numpy()

    def _known(self, numbers: list[int] | None) -> np.ndarray | None:
        """Return the distances (B, h, w) of images that the bank has whole, None if it has not."""
        if self.bank is None or numbers is None or not self.bank.known.keys() >= set(numbers):
            return None
        return torch.stack([self.bank.known[number] for number in numbers]).cpu().numpy()

    def _check_same(self, look: torch.Tensor, numbers: list[int], names: list[str]) -> None:
        """Raise InputError if one of the images with this look (B, F) is not that of the bank with its number."""
        if self.normals is None:
            return
        remembered = self.normals.features[numbers].float()
        off = (look.cpu().float() - remembered).abs().amax(dim=1) > SAME * remembered.abs().amax(dim=1)
        for name, number, other in zip(names, numbers, off.tolist(), strict=True):
            if other:
                raise InputError(f"{name} is not the image that `learn` saw as number {number}: pass the same images")

    def image_scores(self, maps: np.ndarray) -> np.ndarray:
        """Return the scores (B,) of anomaly maps (B, S, S), by the parameters' `image_score`."""
        return image_scores(maps, self.params.image_score, self.params.top_share)

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
        self,
        images: Sequence[Photograph],
        batch_size: int = 32,
        captions: Sequence[str] | None = None,
        names: Iterable[str] | None = None,
        products: Iterable[str | None] | None = None,
    ) -> list[Detection]:
        """Judge photographs.

        images: arrays, uint8 (H, W, 3), or PIL images in any mode, of any size. captions: one for each image where the
        parameters say `captions: image` (its own) or `class` (`captions_of` its class), else None. The batch of an
        image and its place there change its result by rounding at most. names: what an error calls each image, by
        default its number. products: what each image shows, where it is known; otherwise it is recognised. Raises
        InputError for an image of another type, and where captions are missing or not wanted; ModelError where the
        model gives a value that is not finite.
        """
        if captions is not None and len(captions) != len(images):
            raise InputError(f"{len(captions)} captions for {len(images)} images: give one for each image, or none")
        return list(self.stream(images, batch_size, captions, names, products))

    def stream(
        self,
        images: Iterable[Photograph],
        batch_size: int = 32,
        captions: Iterable[str] | None = None,
        names: Iterable[str] | None = None,
        products: Iterable[str | None] | None = None,
    ) -> Iterator[Detection]:
        """Judge photographs as `detect` does, with no more than one batch of them in memory."""
        calibration = self.calibrated()
        for batch in self._compare(images, batch_size, captions, names=names, products=products):
            parts = self._parts(batch, calibration)
            evidence = self._evidence(parts, calibration)
            raw = fuse(evidence, calibration.weight)
            values = self._statistics(parts, raw, calibration)
            self._check(batch.names, "score", values)
            nearest, known = self._products(batch.features, batch.told)
            standardised = calibration.standardised(values, nearest)
            scores = calibration.odds(standardised, nearest)
            maps = normalised(raw, np.array([calibration.map_threshold(p) for p in nearest])[:, None, None])
            self._check(batch.names, "anomaly map", maps)
            certain = [product or None if sure else None for product, sure in zip(nearest, known, strict=True)]
            similar = self.normals.nearest(batch.features, certain) if self.normals else [None] * len(maps)
            for i, image in enumerate(batch.images):
                found = Detection(
                    score=float(scores[i]),
                    is_anomalous=False,
                    anomaly_map=maps[i],
                    regions=[],
                    reconstruction=batch.shown[i],
                    evidence=evidence[i] if self.bank is not None else None,
                    product=nearest[i] if known[i] else None,
                    p_value=calibration.p_value(standardised[i]),
                    normal_images=len(calibration.normal) or None,
                    review=self.params.review,
                    photograph=image,
                    size=image.size if isinstance(image, Image.Image) else (image.shape[1], image.shape[0]),
                    nearest=similar[i],
                    normals=self.normals,
                )
                yield found.at(0.5)

    def _products(self, features: torch.Tensor, given: Sequence[str | None]) -> tuple[list[str], list[bool]]:
        """Return the product by which each image is judged, and whether the image shows it.

        features: (B, F) of `appearance`. Raises InputError for a given product that is not known.
        """
        known = self.calibrated().products
        if unknown := sorted({name for name in given if name is not None} - known.keys()):
            raise InputError(f"this detector does not know the product {unknown[0]!r}, only {', '.join(sorted(known))}")
        if self.normals is None or known.keys() == {""}:
            only = next(iter(known))
            return [name or only for name in given], [True] * len(given)
        names, near = self.normals.products(features.numpy())
        told = [name is not None for name in given]
        return [a or b for a, b in zip(given, names, strict=True)], (near | np.array(told, bool)).tolist()

    def reconstruct(
        self, latents: torch.Tensor, images: torch.Tensor, sample: int, captions: Sequence[str] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return latents (B, C, h, w) of photographs (B, 3, S, S) in [0, 1] as if they were normal.

        The second value is the deviations (B, h, w) that the network expects, None where it has not learned them.
        sample: which of the parameters' `samples`. With `antithetic`, samples 2 k and 2 k + 1 have opposite noise
        (Hammersley and Morton, 1956, doi 10.1017/S0305004100031455).
        """
        options = self.params.model_dump(include={"noise_level", "steps", "guidance", "spacing", "solver"})
        draw, opposite = divmod(sample, 2) if self.params.antithetic else (sample, 0)
        seed = self.params.seed + draw
        return self.pipeline.reconstruct(latents, images, captions, seed=seed, opposite=bool(opposite), **options)

    def calibrated(self) -> Calibration:
        """Return the calibration. Raises InputError if there is none."""
        if self.calibration is None:
            raise InputError("this detector has no threshold yet: call calibrate() with normal images")
        return self.calibration

    @torch.no_grad()
    def _compare(
        self,
        images: Iterable[Photograph],
        batch_size: int,
        captions: Iterable[str] | None,
        without: Iterable[int] | None = None,
        names: Iterable[str] | None = None,
        products: Iterable[str | None] | None = None,
        same: bool = False,
    ) -> Iterator["_Compared"]:
        """Compare photographs with the mean of their samples, and with the bank, batch by batch.

        products: with whose patches they are compared; where it is None, their number in the bank or their appearance
        tells. same: the photographs are the images of the bank that `without` numbers, whose distances it may know.
        """
        params, size = self.params, self.pipeline.config.image_size
        if (captions is None) != (params.captions == "none"):
            raise InputError(
                f"this detector judges by captions: {params.captions}, so it needs "
                + ("a caption for each image" if captions is None else "images without captions")
            )
        pairs = zip(images, repeat(None), strict=False) if captions is None else zip(images, captions, strict=True)
        numbers, called = None if without is None else iter(without), _names(names)
        asked = repeat(None) if products is None else iter(products)
        for batch in batches(pairs, batch_size):
            given = [image for image, _ in batch]
            x = self._tensors(given)
            texts = None if captions is None else [caption for _, caption in batch]
            ours = list(islice(called, len(batch)))
            own = None if numbers is None else list(islice(numbers, len(batch)))
            told = list(islice(asked, len(batch)))
            distances = self._known(own) if same else None
            # Where they are known, the backbone need not run at the other sizes.
            clean, features = self._encode(x) if distances is None else (self.pipeline.encode_images(x), [])
            look = appearance(clean)
            if same and own:
                self._check_same(look, own, ours)
            if distances is None:
                distances = self._distances(features, look, told, own)
            before = [extract(x, clean) for extract, _ in self.spaces]
            samples, expected, rebuilt, shown = [], [], x, np.empty(0)
            for sample in range(params.samples):
                latents, deviation = self.reconstruct(clean, x, sample, texts)
                # Where only latents are compared, one sample is decoded, to be shown.
                if sample == 0 or self._decodes:
                    rebuilt = self.pipeline.decode_latents(latents)
                    self._check(ours, "reconstruction", rebuilt.flatten(1).sum(dim=1).cpu().numpy())
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
            differences = torch.stack(maps, dim=1).cpu().numpy()
            found = _Compared(ours, differences, deviations.cpu().numpy(), distances, shown, given, look, told)
            for what in ("differences", "deviations", "distances"):
                self._check(ours, what, getattr(found, what))
            yield found

    def _check(self, names: Sequence[str], what: str, values: np.ndarray | None) -> None:
        """Raise ModelError with the first image whose values (B, ...) are not all finite."""
        if values is None or np.isfinite(values).all():
            return
        name = names[int(np.argmin(np.isfinite(values).reshape(len(values), -1).all(axis=1)))]
        raise ModelError(
            f"{name}: the {what} by the model {self.pipeline.folder or ''} is not a finite number, so there is no "
            "verdict. Restore the model's folder, or train it again."
        )

    def _tensors(self, images: Sequence[Photograph]) -> torch.Tensor:
        size = self.pipeline.config.image_size
        return torch.stack([to_tensor(image, size) for image in images]).to(self.pipeline.device)

    def _encode(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return latents (B, C, h, w) of images and, for retrieval, the backbone's features (B, D, h, w) at each size.

        The backbone runs once for both. The features have length one.
        """
        if (wanted := self.params.retrieval) is None:
            return self.pipeline.encode_images(x), []
        vae, images = self.pipeline.vae, self.pipeline.normalize(x)
        features = vae.features(images)
        every = [features, *(vae.features(images, size) for size in wanted.more_sizes)]
        clean = vae.project(features) * vae.config.scaling_factor
        return clean, [unit_length(one, vae.config.feature_channels) for one in every]

    def _relative(self, batch: "_Compared", typical: float) -> np.ndarray:
        """Divide differences (B, F, S, S) by the expected deviations, where the parameters ask for it."""
        floor = self.params.deviation_floor
        return batch.differences if floor is None else batch.differences / (batch.deviations / typical + floor)[:, None]

    def _parts(self, batch: "_Compared", calibration: Calibration) -> np.ndarray:
        """Return maps (B, P, S, S), not yet smoothed: each kind of features on its normal scale, then the bank's."""
        relative = self._relative(batch, calibration.deviation)
        weights = np.array([features.weight for features in self.params.features])
        maps = relative * (weights / np.maximum(calibration.scales, 1e-12))[:, None, None].astype(relative.dtype)
        if batch.distances is None or calibration.retrieval is None:
            return maps
        small = torch.from_numpy(calibration.retrieval.positive(batch.distances))
        found = enlarge(small, maps.shape[-1], self.params.align_corners).numpy()
        return np.concatenate([maps, found[:, None].astype(maps.dtype)], axis=1)

    def _evidence(self, parts: np.ndarray, calibration: Calibration) -> np.ndarray:
        """Return maps (B, E, S, S): the reconstruction's, over all kinds of features, and the bank's if there is one.

        Both are smoothed, and divided by their tails if the calibration has these.
        """
        maps = smooth(self._kinds(parts), self.params.smoothing)
        return maps if calibration.tails is None else maps / np.array(calibration.tails, maps.dtype)[:, None, None]

    def _kinds(self, parts: np.ndarray) -> np.ndarray:
        """Return maps (B, E, S, S) by kind of evidence, of parts (B, P, S, S)."""
        count = len(self.params.features)
        return np.concatenate([parts[:, :count].sum(axis=1, keepdims=True), parts[:, count:]], axis=1)

    def _statistics(self, parts: np.ndarray, raw: np.ndarray, calibration: Calibration) -> np.ndarray:
        """Return the logarithms (B, Q) of what an image is judged by: several scores, that of the map last.

        parts: (B, P, S, S), from `_parts`; raw: (B, S, S), the map, from `fuse`. Before the map's comes its score at
        `score_smoothing`, if that is another, and before that those of all parts: what stands out in one kind of
        evidence alone may drown in the map. Where retrieval carries everything, the parts do not count.
        """
        found, params = [raw], self.params
        fine = params.smoothing if params.score_smoothing is None else params.score_smoothing
        known = next(iter(calibration.products.values()), None)
        # Detectors of earlier releases judge by the map alone.
        by_map = known is not None and len(known.levels) == 1
        if calibration.weight == 1 and calibration.tails is not None:
            # Retrieval carries everything, so that its map is the map.
            if not by_map and fine != params.smoothing:
                found = [smooth(parts[:, -1], fine) / np.float32(calibration.tails[1]), *found]
        elif not by_map:
            smoothed = smooth(parts, fine)
            if fine != params.smoothing:
                kinds = self._kinds(smoothed)
                tails = 1 if calibration.tails is None else np.array(calibration.tails, kinds.dtype)[:, None, None]
                found = [fuse(kinds / tails, calibration.weight), *found]
            if parts.shape[1] > 1 or fine != params.smoothing:
                found = [*smoothed.swapaxes(0, 1), *found]
        scores = np.stack([self.image_scores(np.ascontiguousarray(maps)) for maps in found], axis=1)
        return np.log(np.maximum(scores.astype(np.float64), 1e-12))


@dataclass(frozen=True)
class _Compared:
    """How far a batch of photographs lies from the means of their samples, and from the bank.

    names: (B,); differences: (B, F, S, S), by kind of features; deviations: (B, S, S), expected there; distances:
    (B, h, w), None without a bank; shown: uint8 (B, S, S, 3), one sample; images: as given; features: (B, F), for
    `Normals`; told: (B,), the products that were given.
    """

    names: list[str]
    differences: np.ndarray
    deviations: np.ndarray
    distances: np.ndarray | None
    shown: np.ndarray
    images: list[Photograph]
    features: torch.Tensor
    told: list[str | None]


def _names(names: Iterable[str] | None) -> Iterator[str]:
    """Yield what errors call images: their numbers where they have no names."""
    return iter(names) if names is not None else map("image {}".format, count())


def _every_second(products: Sequence[str]) -> np.ndarray:
    """Return a mask of every second image of each product, bool (N,); at most half of them."""
    seen: Counter[str] = Counter()
    mask = np.zeros(len(products), bool)
    for i, name in enumerate(products):
        mask[i] = seen[name] % 2 == 1
        seen[name] += 1
    return mask


def batches(items: Iterable, size: int) -> Iterator[list]:
    """Yield lists of `size` items; the last one may be shorter."""
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


def to_tensor(image: Photograph, size: int) -> torch.Tensor:
    """Return a photograph at the model's size as floats (3, size, size) in [0, 1]."""
    return torch.from_numpy(fit(image, size)).permute(2, 0, 1).float() / 255
