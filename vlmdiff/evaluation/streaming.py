"""`StreamingMetrics`: all metrics from one pass over the images, in constant memory.

Scores are counted in fixed bins, so the counts of shards add up, in any order, to the counts of the whole. The order of
scores within a bin is unknown; `errors` returns a bound for its effect.
"""

import math
from collections import defaultdict
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from vlmdiff.core.errors import InputError
from vlmdiff.core.files import atomic_path
from vlmdiff.evaluation import binned
from vlmdiff.evaluation.aupro import check_limit, check_map, regions_of
from vlmdiff.evaluation.metrics import METRICS, Results

# The bin of a float32 is its sign, its exponent within these limits and the first 13 bits of its mantissa: scores of a
# bin differ by at most 1/8192 of their value. Smaller ones share one bin, larger ones the last.
MANTISSA, LOWEST, HIGHEST = 13, -24, 8
HALF = (HIGHEST - LOWEST) << MANTISSA
BINS = 2 * HALF
# Region overlaps are integers, so that their sum does not depend on the order. Allows 2 ** 27 regions per class.
WHOLE = 1 << 36
# Rounding error of these integers and of sums.
ROUNDING = 1e-10


def bins_of(scores: np.ndarray) -> np.ndarray:
    """Return the bins of finite scores: int32, of the same shape, in the order of the scores."""
    if scores.dtype != np.float32:
        scores = np.clip(scores, -np.finfo(np.float32).max, np.finfo(np.float32).max).astype(np.float32)
    bits = np.ascontiguousarray(scores).view(np.int32)
    # In place: allocating memory costs more than the computation.
    bins = bits & 0x7FFFFFFF
    bins >>= 23 - MANTISSA
    bins -= ((127 + LOWEST) << MANTISSA) - 1
    np.maximum(bins, 0, out=bins)
    np.minimum(bins, HALF - 1, out=bins)
    if (negative := bits < 0).any():
        np.negative(bins, out=bins, where=negative)
    bins += HALF
    return bins


class Counts:
    """The pixels and images of one class in each bin, by kind, and the overlap with regions there. Takes 16 MiB."""

    def __init__(self) -> None:
        self.normal, self.anomalous, self.overlap = (np.zeros(BINS, np.int64) for _ in range(3))
        self.normal_images, self.anomalous_images = (np.zeros(BINS, np.uint32) for _ in range(2))
        self.regions = 0

    def arrays(self) -> dict[str, np.ndarray]:
        return {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}

    def add(self, other: "Counts") -> None:
        for name, array in self.arrays().items():
            array += getattr(other, name)
        self.regions += other.regions


class StreamingMetrics:
    """Compute the metrics of `evaluate_classes` image by image, within the bounds that `errors` returns.

    The result is the same, to the last bit, for any split of the images and any order of merging.
    """

    def __init__(self, max_fpr: float = 0.3):
        check_limit(max_fpr)
        self.max_fpr = max_fpr
        self.classes: defaultdict[str, Counts] = defaultdict(Counts)

    def add(
        self,
        class_name: str,
        anomaly_map: np.ndarray,
        mask: np.ndarray | None,
        image_score: float,
        is_anomalous: bool | None = None,
        name: str = "of an image",
    ) -> None:
        """Count an image from its map (H, W) and mask, as in `aupro`, and its score.

        Pixel metrics omit the image if its mask is None (unknown), or marks nothing though the image is anomalous.
        `is_anomalous` is by default whether the mask has an anomalous pixel. Raises InputError, with `name`, if a score
        is not finite or the shapes differ.
        """
        if not math.isfinite(image_score):
            raise InputError(f"the score {name} is {image_score}. Every score must be finite.")
        truth = (mask is None or np.any(mask)) if is_anomalous is None else is_anomalous
        if mask is not None:
            anomaly_map, mask = check_map(anomaly_map, mask, name)
        counts = self.classes[class_name]
        (counts.anomalous_images if truth else counts.normal_images)[bins_of(np.array([image_score]))] += 1
        if mask is None or (truth and not mask.any()):
            return
        bins = bins_of(anomaly_map)
        if not mask.any():
            np.add.at(counts.normal, bins.ravel(), 1)
            return
        inside = bins[mask]
        np.add.at(counts.normal, bins[~mask], 1)
        np.add.at(counts.anomalous, inside, 1)
        labels, regions = regions_of(mask)
        counts.regions += regions
        _add_overlap(counts.overlap, inside, labels)

    def merge(self, other: "StreamingMetrics") -> None:
        """Add the counts of `other`. Raises InputError if its `max_fpr` differs."""
        if other.max_fpr != self.max_fpr:
            raise InputError(f"cannot merge metrics with max_fpr {self.max_fpr} and {other.max_fpr}. Use one value.")
        for name, counts in other.classes.items():
            self.classes[name].add(counts)

    def results(self) -> Results:
        """Return the metrics of each class, sorted by name. Scores of a bin count as ties."""
        return Results({name: self._values(_Falling(self.classes[name])) for name in self._names})

    def errors(self) -> dict[str, dict[str, float]]:
        """Return the largest possible error of each metric of `results`, NaN if the metric is not defined."""
        return {name: self._errors(_Falling(self.classes[name])) for name in self._names}

    @property
    def _names(self) -> list[str]:
        return sorted(self.classes)

    def _values(self, counts: "_Falling") -> dict[str, float]:
        values = {"au_pro": binned.area(*counts.regions, self.max_fpr)}
        for kind, found in counts.kinds.items():
            values |= {f"{kind}_{metric}": value for metric, value in binned.detection(*found).items()}
        return {metric: float(values[metric]) for metric in METRICS}

    def _errors(self, counts: "_Falling") -> dict[str, float]:
        values = self._values(counts)
        ranges = {"au_pro": binned.area_range(*counts.regions, self.max_fpr)}
        for kind, found in counts.kinds.items():
            ranges |= {f"{kind}_{metric}": pair for metric, pair in binned.detection_range(*found).items()}
        return {
            metric: float(np.max(np.abs(np.subtract(ranges[metric], values[metric])))) + ROUNDING for metric in METRICS
        }

    def save(self, file: Path) -> None:
        """Write the counts to `file`, for `load`."""
        arrays: dict[str, Any] = {"max_fpr": np.array(self.max_fpr), "names": np.array(self._names, np.str_)}
        for index, name in enumerate(self._names):
            counts = self.classes[name]
            arrays[f"{index}.regions"] = np.array(counts.regions)
            for key, array in counts.arrays().items():
                where = np.flatnonzero(array)
                arrays[f"{index}.{key}.bins"], arrays[f"{index}.{key}"] = where, array[where]
        with atomic_path(file) as temporary, temporary.open("wb") as stream:
            np.savez_compressed(stream, **arrays)

    @classmethod
    def load(cls, file: Path) -> "StreamingMetrics":
        """Read what `save` wrote. Raises InputError if the file is missing or invalid."""
        try:
            with np.load(file, allow_pickle=False) as arrays:
                metrics = cls(float(arrays["max_fpr"]))
                for index, name in enumerate(arrays["names"].tolist()):
                    counts = metrics.classes[name] = Counts()
                    counts.regions = int(arrays[f"{index}.regions"])
                    for key, array in counts.arrays().items():
                        array[arrays[f"{index}.{key}.bins"]] = arrays[f"{index}.{key}"]
        except (OSError, EOFError, BadZipFile, ValueError, KeyError, IndexError) as error:
            raise InputError(f"{file} has no counts of scores ({error!r}). Write it with save.") from error
        return metrics


class _Falling:
    """Counts of the non-empty bins, from the highest scores down, as vlmdiff/evaluation/binned.py expects them.

    `regions` holds the normal pixels and the shares of the mean overlap, `kinds` the anomalous and the normal pixels
    and images.
    """

    def __init__(self, counts: Counts):
        normal, overlap = _falling(counts.normal, counts.overlap)
        self.regions = normal, overlap / (WHOLE * counts.regions) if counts.regions else np.full(len(overlap), math.nan)
        self.kinds = {
            "pixel": _falling(counts.anomalous, counts.normal),
            "image": _falling(counts.anomalous_images, counts.normal_images),
        }


def _add_overlap(into: np.ndarray, bins: np.ndarray, labels: np.ndarray) -> None:
    """Add each region's share in each bin. The shares of a region sum to WHOLE.

    `bins` and `labels` hold the bin and the region, from 1, of each anomalous pixel.
    """
    # Sorted by region, then from the highest bin down.
    pairs, pixels = np.unique(labels.astype(np.int64) * BINS + (BINS - 1 - bins), return_counts=True)
    regions, where = np.divmod(pairs, BINS)
    area = np.bincount(labels)
    before = np.cumsum(area) - area
    reached = np.cumsum(pixels) - before[regions]
    # Rounding the cumulative sums keeps the rounding errors of bins from adding up.
    shares = np.diff((reached * WHOLE + area[regions] // 2) // area[regions], prepend=0)
    first = np.flatnonzero(np.diff(regions, prepend=0))
    shares[first[1:]] += WHOLE
    np.add.at(into, BINS - 1 - where, shares)


def _falling(*counts: np.ndarray) -> list[np.ndarray]:
    """Return the counts of the non-empty bins, from the highest scores down."""
    some = np.flatnonzero(np.any(np.stack([array != 0 for array in counts]), axis=0))[::-1]
    return [array[some] for array in counts]
