"""`StreamingMetrics`: every metric from one pass over the images, in memory that does not grow with their number.

Scores are counted in bins, which are the same for all data: so counts of shards add up, in any order, to the very
counts of the whole. What the order of scores within a bin may change is bounded, and the bound is told.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from scipy.special import digamma

from vlmdiff.errors import InputError
from vlmdiff.evaluation.aupro import check_limit, check_map, regions_of
from vlmdiff.evaluation.metrics import METRICS, Results
from vlmdiff.files import atomic_path

# A float32's sign, its exponent between these, and the first 12 bits of its mantissa make its bin: scores of a bin
# differ by a 4,096th of themselves. Smaller ones share one bin, larger ones the last.
MANTISSA, LOWEST, HIGHEST = 12, -44, 20
HALF = (HIGHEST - LOWEST) << MANTISSA
BINS = 2 * HALF
# A region's overlap is counted in integers, which add up alike in any order: at most 2 ** 27 regions a class.
WHOLE = 1 << 36
# Of the sums, and of overlaps that are rounded to integers.
ROUNDING = 1e-10


def bins_of(scores: np.ndarray) -> np.ndarray:
    """The bin of each finite score, in the order of the scores: int32, of the same shape."""
    single = np.clip(scores, -np.finfo(np.float32).max, np.finfo(np.float32).max).astype(np.float32, copy=False)
    bits = np.ascontiguousarray(single).view(np.int32)
    magnitude = (bits & 0x7FFFFFFF) >> (23 - MANTISSA)
    magnitude -= ((127 + LOWEST) << MANTISSA) - 1
    np.clip(magnitude, 0, HALF - 1, out=magnitude)
    np.negative(magnitude, out=magnitude, where=bits < 0)
    magnitude += HALF
    return magnitude


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
            _count(counts.normal, bins.ravel())
            return
        inside = bins[mask]
        _count(counts.normal, bins[~mask])
        _count(counts.anomalous, inside)
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
        return Results({name: {key: value for key, (value, _) in self._judge(name).items()} for name in self._names})

    def errors(self) -> dict[str, dict[str, float]]:
        """How far each metric of `results` may be from that of the very scores; NaN where it is not defined."""
        return {name: {key: error for key, (_, error) in self._judge(name).items()} for name in self._names}

    @property
    def _names(self) -> Sequence[str]:
        return sorted(self.classes)

    def _judge(self, name: str) -> dict[str, tuple[float, float]]:
        counts = self.classes[name]
        pixels = _detection(counts.anomalous, counts.normal)
        images = _detection(counts.anomalous_images, counts.normal_images)
        values = {
            "au_pro": _aupro(counts, self.max_fpr),
            **{f"pixel_{metric}": value for metric, value in pixels.items()},
            **{f"image_{metric}": value for metric, value in images.items()},
        }
        return {metric: values[metric] for metric in METRICS}

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


def _count(into: np.ndarray, bins: np.ndarray) -> None:
    if len(bins):
        low = int(bins.min())
        found = np.bincount(bins - low)
        into[low : low + len(found)] += found


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


def _aupro(counts: Counts, max_fpr: float) -> tuple[float, float]:
    """AU-PRO and how far it may be off: within a bin the curve rises somehow, in a box whose corners are known."""
    total = int(counts.normal.sum())
    if not (counts.regions and total):
        return math.nan, math.nan
    normal, overlap = _falling(counts.normal, counts.overlap)
    width = normal / total
    rates = np.concatenate([[0], np.cumsum(normal)[:-1]]) / total
    reached = np.cumsum(overlap) / (WHOLE * counts.regions)
    before = np.concatenate([[0], reached[:-1]])
    inside = np.clip(max_fpr - rates, 0, width)
    low, high = (float(np.sum(height * inside) / max_fpr) for height in (before, reached))
    share = np.divide(inside, width, out=np.zeros_like(width), where=width > 0)
    value = float(np.sum((before + (reached - before) * share / 2) * inside) / max_fpr)
    return value, max(high - value, value - low) + ROUNDING


def _detection(anomalous: np.ndarray, normal: np.ndarray) -> dict[str, tuple[float, float]]:
    """AUROC, average precision and best F1 of counts by bin, and how far each may be off."""
    positives, negatives = int(anomalous.sum(dtype=np.int64)), int(normal.sum(dtype=np.int64))
    if not (positives and negatives):
        return dict.fromkeys(("auroc", "ap", "f1_max"), (math.nan, math.nan))
    # Double holds each count exactly, and products of two to its precision.
    here, others = (counts.astype(np.float64) for counts in _falling(anomalous, normal))
    hits, alarms = np.cumsum(here), np.cumsum(others)
    hits_before, alarms_before = hits - here, alarms - others
    pairs = positives * negatives
    auroc = np.sum(here * (negatives - alarms_before - others / 2)) / pairs
    ties = np.sum(here * others) / 2 / pairs

    some = here > 0
    ap = np.sum(here[some] * hits[some] / (hits + alarms)[some]) / positives
    # At best all of a bin's anomalous scores are one, above the normal ones; at worst below them, each by itself: then
    # the sum over them of hits / (hits + alarms) is one of reciprocals.
    best = np.sum(here[some] * hits[some] / (hits + alarms_before)[some]) / positives
    reciprocals = digamma(hits + alarms + 1) - digamma(hits_before + alarms + 1)
    worst = np.sum((here - alarms * reciprocals)[some]) / positives

    f1 = np.max(2 * hits / (positives + hits + alarms))
    best_f1 = np.max(2 * hits / (positives + hits + alarms_before))
    return {
        "auroc": (float(auroc), float(ties) + ROUNDING),
        "ap": (float(ap), float(max(best - ap, ap - worst)) + ROUNDING),
        "f1_max": (float(f1), float(best_f1 - f1) + ROUNDING),
    }


def _falling(*counts: np.ndarray) -> list[np.ndarray]:
    """Counts of the bins in which anything is, from the highest scores down."""
    some = np.flatnonzero(np.any(np.stack([array != 0 for array in counts]), axis=0))[::-1]
    return [array[some] for array in counts]
