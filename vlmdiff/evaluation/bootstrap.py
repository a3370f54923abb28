"""Bootstrap over test images: how much the metrics of a model, or of a pair, depend on the choice of images.

The images of a class are drawn with replacement, good and defective ones separately, so that every sample has both
(Efron and Tibshirani, 1993). One image fewer than available is drawn of each kind, because drawing all underestimates
the variance, which matters for few images (Rao and Wu, 1988). The metrics of a sample are computed from the images'
counts by bin, weighted by how often each image was drawn, so each pixel is read only once.
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
# Samples computed at once, so that their counts fit into the processor's cache.
CHUNK = 64
GROUPS = 1024
Samples = dict[str, np.ndarray]  # by metric, (S,)
# Average precision depends on false positive rates of this order.
SMALL_RATE = 1e-4


@dataclass(frozen=True)
class Statistics:
    """The counts of a class's N images that the bootstrap needs.

    `normal` and `anomalous` (N, G) count an image's pixels in each group of scores, from the highest down. `overlap`
    (N, G) holds the shares of its regions there, `regions` (N,) their number. `scores` and `is_anomalous` are (N,).
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
        """Count maps and masks, as in `aupro`. Pixel metrics omit the images that `StreamingMetrics.add` omits."""
        pairs = [
            (anomaly_map, None if truth and not np.any(mask) else mask)
            for anomaly_map, mask, truth in zip(maps, masks, is_anomalous, strict=True)
        ]
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
        return cls(parts[0], parts[1], parts[2], regions, np.asarray(scores, float), np.asarray(is_anomalous, bool))

    def metrics(self, weights: np.ndarray, max_fpr: float) -> Samples:
        """Return each metric (S,) for weights (S, N) of the images."""
        weights = weights.astype(np.float32)
        normal, anomalous, overlap = (
            (weights @ part).astype(np.float64) for part in (self.normal, self.anomalous, self.overlap)
        )
        with np.errstate(invalid="ignore", divide="ignore"):
            shares = overlap / (weights @ self.regions)[:, None]
        # Images with the same score form one group.
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
        """Return each metric of `samples` resampled sets. Every model gets the same draws of the same images."""
        check_limit(max_fpr)
        rng = np.random.default_rng([seed, zlib.crc32(class_name.encode())])
        weights = repetitions(rng, self.is_anomalous, samples)
        parts = [self.metrics(weights[i : i + CHUNK], max_fpr) for i in range(0, samples, CHUNK)]
        return {metric: np.concatenate([part[metric] for part in parts]) for metric in METRICS}


@dataclass(frozen=True)
class Resampled:
    """The metrics of the samples, by class."""

    classes: dict[str, Samples]

    @cached_property
    def mean(self) -> Samples:
        """The mean of each metric in each sample, over the classes that define it, or NaN if none does."""
        return {metric: self._mean(metric) for metric in METRICS}

    def _mean(self, metric: str) -> np.ndarray:
        defined = [found[metric] for found in self.classes.values() if np.isfinite(found[metric]).all()]
        return np.mean(defined, axis=0) if defined else np.array([math.nan])

    def interval(self, metric: str, class_name: str | None = None, level: float = 0.95) -> tuple[float, float]:
        """Return the central interval of the samples of a class or of the mean, NaN if the metric is not defined."""
        values = (self.mean if class_name is None else self.classes[class_name])[metric]
        tail = (1 - level) / 2
        low, high = np.quantile(values, [tail, 1 - tail])
        return float(low), float(high)

    def __sub__(self, other: "Resampled") -> "Resampled":
        """Return the paired difference to another model on the same images and seed, for the classes of both."""
        return Resampled(
            {
                name: {metric: value - other.classes[name][metric] for metric, value in found.items()}
                for name, found in self.classes.items()
                if name in other.classes
            }
        )

    def lower_bound(self, metric: str, confidence: float) -> float:
        """Return the value that the mean over classes exceeds in that share of the samples, NaN if not defined."""
        return float(np.quantile(self.mean[metric], 1 - confidence))

    def save(self, path: Path) -> None:
        """Write the samples as .npz, for later comparison with another model."""
        names = np.array(list(self.classes), dtype=np.str_)
        samples = [[found[metric] for metric in METRICS] for found in self.classes.values()]
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, classes=names, metrics=list(METRICS), samples=np.array(samples, np.float32))

    @classmethod
    def load(cls, path: Path) -> "Resampled":
        """Read what `save` wrote. Raises InputError if the file is missing or invalid."""
        try:
            with np.load(path, allow_pickle=False) as file:
                names, metrics, samples = (file[key] for key in ("classes", "metrics", "samples"))
            if list(metrics) != list(METRICS) or samples.shape[:2] != (len(names), len(METRICS)):
                raise ValueError("other metrics")
        except FileNotFoundError:
            raise InputError(f"{path} does not exist. Run vlmdiff evaluate first.") from None
        except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(f"{path} has no bootstrap samples ({error}). Run vlmdiff evaluate again.") from error
        return cls({str(n): dict(zip(METRICS, s, strict=True)) for n, s in zip(names, samples, strict=True)})

    def intervals(self, level: float = 0.95) -> dict[str, Any]:
        """Return the intervals as `write` writes them."""

        def rows(name: str | None) -> dict[str, list[float] | None]:
            found = {metric: self.interval(metric, name, level) for metric in METRICS}
            return {
                key: None if math.isnan(low) else [round(low, DIGITS), round(high, DIGITS)]
                for key, (low, high) in found.items()
            }

        return {"level": level, "mean": rows(None), PER_CLASS: {name: rows(name) for name in self.classes}}

    def write(self, path: Path, level: float = 0.95) -> None:
        """Write intervals.json: the mean, then each class, null if a metric is not defined."""
        write_json(path, self.intervals(level))


def repetitions(rng: np.random.Generator, strata: np.ndarray, samples: int) -> np.ndarray:
    """Return how often each of N images is drawn in each sample, (samples, N). Images of a stratum stand for it only.

    strata: (N,), of any type that can be sorted.
    """
    weights = np.zeros((samples, len(strata)))
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        count = max(len(members) - 1, 1)
        weights[:, members] = rng.multinomial(count, np.full(len(members), 1 / len(members)), samples)
    return weights


def _groups(counts: Counts) -> np.ndarray:
    """Return the group of each bin; 0 has the highest scores.

    Each occupied bin is a group if there are at most GROUPS. Otherwise groups are narrow where the curves rise.
    """
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
