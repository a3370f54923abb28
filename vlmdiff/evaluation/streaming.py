"""`StreamingMetrics`: every metric from one pass over the images, in memory that does not grow with their number.

Scores are counted in bins, which are the same for all data: so counts of shards add up, in any order, to the very
counts of the whole. What the order of scores within a bin may change is bounded, and the bound is told.
"""

import math
from collections import defaultdict
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from vlmdiff.core.errors import InputError
from vlmdiff.core.files import atomic_path
from vlmdiff.evaluation import binned
from vlmdiff.evaluation.aupro import check_limit, check_map, regions_of
from vlmdiff.evaluation.metrics import METRICS, Results

# A float32's sign, its exponent between these, and the first 13 bits of its mantissa make its bin: scores of a bin
# differ by an 8,192nd of themselves. Smaller ones share one bin, larger ones the last; a detector's are in [0, 1).
MANTISSA, LOWEST, HIGHEST = 13, -24, 8
HALF = (HIGHEST - LOWEST) << MANTISSA
BINS = 2 * HALF
# A region's overlap is counted in integers, which add up alike in any order: at most 2 ** 27 regions a class.
WHOLE = 1 << 36
# Of these integers, and of sums.
ROUNDING = 1e-10


def bins_of(scores: np.ndarray) -> np.ndarray:
    """The bin of each finite score, in the order of the scores: int32, of the same shape."""
    if scores.dtype != np.float32:
        scores = np.clip(scores, -np.finfo(np.float32).max, np.finfo(np.float32).max).astype(np.float32)
    bits = np.ascontiguousarray(scores).view(np.int32)
    # In place: memory of a size that is new to the process costs more than what is computed.
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
    """Of one class: how many pixels and images of each kind fall into each bin, and the overlap with regions there.

    16 MiB, whatever has been counted.
    """

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
    """Metrics of images that are judged one by one, as `evaluate_classes` has them, to within a bound that is told.

    Whatever parts the images are shared out into and in whatever order these are merged, the result is the same to the
    last bit.
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
        """Count an image: its map (H, W) and mask as in `aupro`, its score.

        A mask of None is not known: pixel metrics leave the image out. is_anomalous: by default whether the mask has an
        anomalous pixel. Raises InputError, with `name`, for scores that are not finite and for shapes that differ.
        """
        if not math.isfinite(image_score):
            raise InputError(f"the score {name} is {image_score}: every score must be finite")
        truth = (mask is None or np.any(mask)) if is_anomalous is None else is_anomalous
        if mask is not None:
            anomaly_map, mask = check_map(anomaly_map, mask, name)
        counts = self.classes[class_name]
        (counts.anomalous_images if truth else counts.normal_images)[bins_of(np.array([image_score]))] += 1
        if mask is None:
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
        """Count what another has counted. Raises InputError where its limit is another."""
        if other.max_fpr != self.max_fpr:
            raise InputError(f"metrics up to rates of {self.max_fpr} and {other.max_fpr} do not add up")
        for name, counts in other.classes.items():
            self.classes[name].add(counts)

    def results(self) -> Results:
        """The metrics of each class, classes in the order of their names; scores of a bin are taken as ties."""
        return Results({name: self._values(_Falling(self.classes[name])) for name in self._names})

    def errors(self) -> dict[str, dict[str, float]]:
        """How far each metric of `results` may be from that of the very scores; NaN where it is not defined."""
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
        """Write the counts, for `load` elsewhere."""
        arrays: dict[str, np.ndarray] = {"max_fpr": np.array(self.max_fpr), "names": np.array(self._names, np.str_)}
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
        """Read what `save` wrote. Raises InputError where the file is none of it."""
        try:
            with np.load(file, allow_pickle=False) as arrays:
                metrics = cls(float(arrays["max_fpr"]))
                for index, name in enumerate(arrays["names"].tolist()):
                    counts = metrics.classes[name] = Counts()
                    counts.regions = int(arrays[f"{index}.regions"])
                    for key, array in counts.arrays().items():
                        array[arrays[f"{index}.{key}.bins"]] = arrays[f"{index}.{key}"]
        except (OSError, EOFError, BadZipFile, ValueError, KeyError, IndexError) as error:
            raise InputError(f"{file} holds no counts of scores ({error!r})") from error
        return metrics


class _Falling:
    """Counts of the bins in which anything is, from the highest scores down, as vlmdiff/evaluation/binned.py has them.

    regions: normal pixels, shares of the mean overlap. kinds: anomalous and normal ones, of pixels and of images.
    """

    def __init__(self, counts: Counts):
        normal, overlap = _falling(counts.normal, counts.overlap)
        self.regions = normal, overlap / (WHOLE * counts.regions) if counts.regions else np.full(len(overlap), math.nan)
        self.kinds = {
            "pixel": _falling(counts.anomalous, counts.normal),
            "image": _falling(counts.anomalous_images, counts.normal_images),
        }


def _add_overlap(into: np.ndarray, bins: np.ndarray, labels: np.ndarray) -> None:
    """Add each region's share in each bin; a region's shares add up to WHOLE.

    bins, labels: of each anomalous pixel its bin and its region, from 1.
    """
    # By region, and in it from the highest bin down.
    pairs, pixels = np.unique(labels.astype(np.int64) * BINS + (BINS - 1 - bins), return_counts=True)
    regions, where = np.divmod(pairs, BINS)
    area = np.bincount(labels)
    before = np.cumsum(area) - area
    reached = np.cumsum(pixels) - before[regions]
    # Rounded where the curve has got to, no bin's rounding adds to another's.
    shares = np.diff((reached * WHOLE + area[regions] // 2) // area[regions], prepend=0)
    first = np.flatnonzero(np.diff(regions, prepend=0))
    shares[first[1:]] += WHOLE
    np.add.at(into, BINS - 1 - where, shares)


def _falling(*counts: np.ndarray) -> list[np.ndarray]:
    """Counts of the bins in which anything is, from the highest scores down."""
    some = np.flatnonzero(np.any(np.stack([array != 0 for array in counts]), axis=0))[::-1]
    return [array[some] for array in counts]
