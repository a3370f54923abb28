"""How far a metric depends on which images happened to be tested: bootstrap over images, of one model or of a pair.

The images of a class are drawn again with replacement, good and defective ones apart, so that no sample is without
either (Efron and Tibshirani, 1993). What a sample's metrics need are the images' counts by bin, weighted by how often
each was drawn: no pixel is looked at twice.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vlmdiff.errors import InputError
from vlmdiff.evaluation import binned
from vlmdiff.evaluation.aupro import check_limit, check_map, regions_of
from vlmdiff.evaluation.metrics import METRICS
from vlmdiff.evaluation.streaming import BINS, bins_of

SAMPLES = 1000
GROUPS = 1024
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
        counted = [
            _count(anomaly_map, mask, str(index))
            for index, (anomaly_map, mask) in enumerate(zip(maps, masks, strict=True))
        ]
        regions = np.array([count for *_, count in counted], np.float64)
        totals = np.zeros((3, BINS))
        for *kinds, _ in counted:
            for total, (bins, amounts) in zip(totals, kinds, strict=True):
                np.add.at(total, bins, amounts)
        groups = _groups(*totals)
        parts = np.zeros((3, len(counted), groups.max() + 1), np.float32)
        for row, (*kinds, _) in enumerate(counted):
            for part, (bins, amounts) in zip(parts, kinds, strict=True):
                part[row] = np.bincount(groups[bins], amounts, part.shape[1])
        return cls(*parts, regions, np.asarray(scores, np.float64), np.asarray(is_anomalous, bool))

    def metrics(self, weights: np.ndarray, max_fpr: float) -> dict[str, np.ndarray]:
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


@dataclass(frozen=True)
class Resampled:
    """Metrics of samples: of each class and, under None, of their mean; by metric, (S,)."""

    samples: dict[str | None, dict[str, np.ndarray]]

    def interval(self, metric: str, class_name: str | None = None, level: float = 0.95) -> tuple[float, float]:
        """The middle `level` of the samples; NaN where the metric is not defined."""
        values = self.samples[class_name][metric]
        tail = (1 - level) / 2
        if not len(values) or np.isnan(values).any():
            return math.nan, math.nan
        low, high = np.quantile(values, [tail, 1 - tail])
        return float(low), float(high)

    def __sub__(self, other: "Resampled") -> "Resampled":
        """The paired difference to another model, of the same images and the same seed."""
        if self.samples.keys() != other.samples.keys():
            raise InputError("the two models were not judged on the same classes")
        return Resampled(
            {
                name: {metric: value - other.samples[name][metric] for metric, value in values.items()}
                for name, values in self.samples.items()
            }
        )


def resample(
    statistics: Mapping[str, Statistics], max_fpr: float = 0.3, samples: int = SAMPLES, seed: int = 0
) -> Resampled:
    """Draw each class's images again, so many times; of the same images the same ones are drawn for every model."""
    check_limit(max_fpr)
    drawn: dict[str | None, dict[str, np.ndarray]] = {}
    for index, name in enumerate(sorted(statistics)):
        of_class = statistics[name]
        rng = np.random.default_rng([seed, index])
        weights = np.zeros((samples, len(of_class.scores)))
        for kind in (False, True):
            members = np.flatnonzero(of_class.is_anomalous == kind)
            if len(members):
                weights[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), samples)
        drawn[name] = of_class.metrics(weights, max_fpr)
    with np.errstate(invalid="ignore"):
        drawn[None] = {metric: _mean([values[metric] for values in drawn.values()]) for metric in METRICS}
    return Resampled(drawn)


def _mean(values: list[np.ndarray]) -> np.ndarray:
    """Over the classes that define it."""
    defined = [value for value in values if np.isfinite(value).all()]
    return np.mean(defined, axis=0) if defined else np.full(len(values[0]) if values else 0, np.nan)


Amounts = tuple[np.ndarray, np.ndarray]


def _count(anomaly_map: np.ndarray, mask: np.ndarray | None, name: str) -> tuple[Amounts, Amounts, Amounts, int]:
    """Of an image the bins of normal pixels, of anomalous ones, of regions' shares, each with how much; its regions."""
    none = np.empty(0, np.int64), np.empty(0)
    if mask is None:
        return none, none, none, 0
    anomaly_map, mask = check_map(anomaly_map, mask, name)
    bins = bins_of(anomaly_map)
    if not mask.any():
        return _amounts(bins.ravel()), none, none, 0
    inside = bins[mask]
    labels, regions = regions_of(mask)
    return _amounts(bins[~mask]), _amounts(inside), (inside, 1 / np.bincount(labels)[labels]), regions


def _amounts(bins: np.ndarray) -> Amounts:
    if not len(bins):
        return np.empty(0, np.int64), np.empty(0)
    low = int(bins.min())
    counts = np.bincount(bins - low)
    some = np.flatnonzero(counts)
    return some + low, counts[some]


def _groups(normal: np.ndarray, anomalous: np.ndarray, overlap: np.ndarray) -> np.ndarray:
    """The group of each bin, 0 the highest scores: narrow where any of the curves moves."""

    def reached(amounts: np.ndarray) -> np.ndarray:
        sums = np.cumsum(amounts[::-1])
        return sums / max(sums[-1], 1e-30)

    rate = reached(normal)
    small = np.log1p(rate / SMALL_RATE) / np.log1p(1 / SMALL_RATE)
    position = (rate + small + reached(anomalous) + reached(overlap)) / 4
    _, groups = np.unique(np.ceil(position * GROUPS), return_inverse=True)
    return groups[::-1]
