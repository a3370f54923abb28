"""How far a metric depends on which images happened to be tested: bootstrap over images, of one model or of a pair.

The images of a class are drawn again with replacement, good and defective ones apart, so that no sample is without
either (Efron and Tibshirani, 1993); of each kind one fewer than there are, since as many would vary too little, which
tells where they are few (Rao and Wu, 1988). What a sample's metrics need are the images' counts by bin, weighted by
how often each was drawn: no pixel is looked at twice.
"""

import math
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vlmdiff.core.errors import InputError
from vlmdiff.core.files import atomic_path, write_json
from vlmdiff.evaluation import binned
from vlmdiff.evaluation.aupro import check_limit, regions_of
from vlmdiff.evaluation.metrics import DIGITS, METRICS, PER_CLASS
from vlmdiff.evaluation.streaming import Counts, StreamingMetrics, bins_of

SAMPLES = 1000
# So many are judged at a time: their counts fit into the processor's cache.
CHUNK = 64
GROUPS = 1024
Samples = dict[str, np.ndarray]  # by metric, (S,)
# Average precision looks at rates of this order.
SMALL_RATE = 1e-4


@dataclass(frozen=True)
class Statistics:
    """What the bootstrap needs of a class's N images, in their order.

    normal, anomalous: (N, G), an image's pixels in each group of scores, from the highest down; overlap: (N, G), the
    shares of its regions there, `regions` (N,) of them; scores, is_anomalous: (N,).
    """

    normal: np.ndarray
    anomalous: np.ndarray
    overlap: np.ndarray
    regions: np.ndarray
    scores: np.ndarray
    is_anomalous: np.ndarray

    @classmethod
    def of(
        cls,
        maps: Sequence[np.ndarray],
        masks: Sequence[np.ndarray | None],
        scores: Sequence[float],
        is_anomalous: Sequence[bool],
    ) -> "Statistics":
        """Count maps and masks, as in `aupro`; a mask of None is not known, and pixel metrics leave the image out."""
        pairs = list(zip(maps, masks, strict=True))
        counted = StreamingMetrics()
        for index, (anomaly_map, mask) in enumerate(pairs):
            counted.add("", anomaly_map, mask, 0.0, name=str(index))
        groups = _groups(counted.classes[""])
        size = int(groups.max()) + 1
        parts, regions = np.zeros((3, len(pairs), size), np.float32), np.zeros(len(pairs), np.float32)
        for row, (anomaly_map, mask) in enumerate(pairs):
            if mask is None:
                continue
            found, mask = groups[bins_of(anomaly_map)], np.asarray(mask, bool)
            parts[0, row] = np.bincount(found[~mask], minlength=size)
            if mask.any():
                inside, (labels, regions[row]) = found[mask], regions_of(mask)
                parts[1, row] = np.bincount(inside, minlength=size)
                parts[2, row] = np.bincount(inside, 1 / np.bincount(labels)[labels], size)
        return cls(*parts, regions, np.asarray(scores, np.float64), np.asarray(is_anomalous, bool))

    def metrics(self, weights: np.ndarray, max_fpr: float) -> Samples:
        """Each metric (S,) where the images count by these weights (S, N)."""
        weights = weights.astype(np.float32)
        normal, anomalous, overlap = (
            (weights @ part).astype(np.float64) for part in (self.normal, self.anomalous, self.overlap)
        )
        with np.errstate(invalid="ignore", divide="ignore"):
            shares = overlap / (weights @ self.regions)[:, None]
        # Images of the same score are one group.
        order = np.argsort(-self.scores, kind="stable")
        firsts = np.flatnonzero(np.diff(self.scores[order], prepend=np.inf))
        defective, good = (
            np.add.reduceat((weights * kind)[:, order], firsts, axis=1)
            for kind in (self.is_anomalous, ~self.is_anomalous)
        )
        values = {"au_pro": binned.area(normal, shares, max_fpr)}
        values |= {f"image_{name}": value for name, value in binned.detection(defective, good).items()}
        values |= {f"pixel_{name}": value for name, value in binned.detection(anomalous, normal).items()}
        return {metric: values[metric] for metric in METRICS}

    def draw(self, class_name: str, max_fpr: float = 0.3, samples: int = SAMPLES, seed: int = 0) -> Samples:
        """Draw the images again, so many times; of the same images the same ones are drawn for every model."""
        check_limit(max_fpr)
        rng = np.random.default_rng([seed, zlib.crc32(class_name.encode())])
        weights = np.zeros((samples, len(self.scores)))
        for kind in (False, True):
            members = np.flatnonzero(self.is_anomalous == kind)
            if len(members):
                count = max(len(members) - 1, 1)
                weights[:, members] = rng.multinomial(count, np.full(len(members), 1 / len(members)), samples)
        parts = [self.metrics(weights[i : i + CHUNK], max_fpr) for i in range(0, samples, CHUNK)]
        return {metric: np.concatenate([part[metric] for part in parts]) for metric in METRICS}


@dataclass(frozen=True)
class Resampled:
    """Metrics of the samples of each class that was drawn from."""

    classes: dict[str, Samples]

    @cached_property
    def mean(self) -> Samples:
        """In each sample, the mean over the classes that define a metric; NaN where none does."""
        return {metric: self._mean(metric) for metric in METRICS}

    def _mean(self, metric: str) -> np.ndarray:
        defined = [found[metric] for found in self.classes.values() if np.isfinite(found[metric]).all()]
        return np.mean(defined, axis=0) if defined else np.array([math.nan])

    def interval(self, metric: str, class_name: str | None = None, level: float = 0.95) -> tuple[float, float]:
        """The middle `level` of the samples of a class or of the mean; NaN where the metric is not defined."""
        values = (self.mean if class_name is None else self.classes[class_name])[metric]
        tail = (1 - level) / 2
        low, high = np.quantile(values, [tail, 1 - tail])
        return float(low), float(high)

    def __sub__(self, other: "Resampled") -> "Resampled":
        """The paired difference to another model, of the same images and the same seed, in the classes of both."""
        return Resampled(
            {
                name: {metric: value - other.classes[name][metric] for metric, value in found.items()}
                for name, found in self.classes.items()
                if name in other.classes
            }
        )

    def lower_bound(self, metric: str, confidence: float) -> float:
        """What the mean over classes exceeds in that share of the samples; NaN where it is not defined."""
        return float(np.quantile(self.mean[metric], 1 - confidence))

    def save(self, path: Path) -> None:
        """Write the samples as .npz, to be compared with another model's later."""
        names = np.array(list(self.classes), dtype=np.str_)
        samples = [[found[metric] for metric in METRICS] for found in self.classes.values()]
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, classes=names, metrics=list(METRICS), samples=np.array(samples, np.float32))

    @classmethod
    def load(cls, path: Path) -> "Resampled":
        """Read what `save` wrote. Raises InputError where the file is missing or is something else."""
        try:
            with np.load(path, allow_pickle=False) as file:
                names, metrics, samples = (file[key] for key in ("classes", "metrics", "samples"))
            if list(metrics) != list(METRICS) or samples.shape[:2] != (len(names), len(METRICS)):
                raise ValueError("other metrics")
        except FileNotFoundError:
            raise InputError(f"{path} does not exist: run `vlmdiff evaluate` first") from None
        except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
            raise InputError(f"{path} holds no bootstrap samples ({error}): run `vlmdiff evaluate`") from error
        return cls({str(n): dict(zip(METRICS, s, strict=True)) for n, s in zip(names, samples, strict=True)})

    def intervals(self, level: float = 0.95) -> dict[str, Any]:
        """What `write` writes."""

        def rows(name: str | None) -> dict[str, list[float] | None]:
            found = {metric: self.interval(metric, name, level) for metric in METRICS}
            return {
                key: None if math.isnan(low) else [round(low, DIGITS), round(high, DIGITS)]
                for key, (low, high) in found.items()
            }

        return {"level": level, "mean": rows(None), PER_CLASS: {name: rows(name) for name in self.classes}}

    def write(self, path: Path, level: float = 0.95) -> None:
        """Write intervals.json: of the mean, then of each class, null where a metric is not defined."""
        write_json(path, self.intervals(level))


def _groups(counts: Counts) -> np.ndarray:
    """The group of each bin, 0 the highest scores: its own where that many can be, else narrow where curves move."""
    normal, anomalous, overlap = (array[::-1] for array in (counts.normal, counts.anomalous, counts.overlap))
    occupied = np.cumsum((normal > 0) | (anomalous > 0))
    if occupied[-1] <= GROUPS:
        return np.maximum(occupied - 1, 0)[::-1]

    def reached(amounts: np.ndarray) -> np.ndarray:
        sums = np.cumsum(amounts, dtype=np.float64)
        return sums / max(sums[-1], 1)

    rate = reached(normal)
    small = np.log1p(rate / SMALL_RATE) / np.log1p(1 / SMALL_RATE)
    position = np.ceil((rate + small + reached(anomalous) + reached(overlap)) / 4 * GROUPS)
    return np.cumsum(np.diff(position, prepend=0) > 0)[::-1]
