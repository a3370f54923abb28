"""Calibrate the threshold for alarms on normal images only."""

import bisect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import numpy as np
from pydantic import ConfigDict, Field
from scipy import optimize, special, stats

from vlmdiff.core.errors import InputError
from vlmdiff.core.params import Costs, Fraction, Positive, PositiveFloat
from vlmdiff.core.text import counted

# The ranges of the fields below hold for what is read from a file.
FROM_FILE = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class Usual:
    """The median of values on normal images, and the distance from it to their 99 % quantile, which is positive."""

    __pydantic_config__ = FROM_FILE

    median: float
    tail: PositiveFloat

    @classmethod
    def of(cls, values: np.ndarray) -> "Usual":
        """Measure values of any shape."""
        median, high = np.quantile(values, (0.5, 0.99))
        return cls(float(median), max(float(high - median), 1e-12))

    def positive(self, values: np.ndarray) -> np.ndarray:
        """Return values on this scale, made positive and kept in order: about 0.2 at the median, 1 at the tail."""
        return np.logaddexp(0, 4 * (values - self.median) / self.tail) / 4


# Of a constant statistic.
SMALLEST = 1e-6
# Standard deviations from the median beyond which an image is odd.
ODD = 2.5
# Standard deviations above the median beyond which a score is far out. Leaving such images out raises the rate of false
# alarms a little; with so many times the images that a rate takes, it still holds for distributions with heavy tails.
FAR_OUT, AMPLE = 6.0, 1.25
# Of its images, how many a product must have above its own threshold.
OWN = 10
# Degrees of freedom of what is assumed of products that are all alike.
MOST = 20.0


@dataclass(frozen=True)
class Scale:
    """How the statistics of a product's normal images are distributed.

    images: how many; levels, spreads: the mean and the standard deviation of each statistic's logarithm. threshold: the
    standardised score above which an image of the product is anomalous; None where that of all products holds.
    """

    __pydantic_config__ = FROM_FILE

    images: Positive
    levels: list[float]
    spreads: list[PositiveFloat]
    threshold: float | None = None

    def scores(self, values: np.ndarray) -> np.ndarray:
        """Return standardised scores (B,) of logarithms (B, Q): that of the most unusual statistic."""
        return ((values - np.array(self.levels)) / np.array(self.spreads)).max(axis=1)


class Prior:
    """What the variances (K, Q) of the products together say of each, by their degrees of freedom (K,).

    The empirical Bayes estimate of Smyth (2004, doi 10.2202/1544-6115.1027): the more alike the products' variances
    are, the more that of one is drawn towards the others'.
    """

    def __init__(self, variances: np.ndarray, freedom: np.ndarray):
        half, variances = freedom[:, None] / 2, np.maximum(variances, SMALLEST**2)
        logs = np.log(variances) - special.digamma(half) + np.log(half)
        alike = len(logs) < 2
        # How much more the logarithms differ than those of equal variances would.
        more = np.zeros(logs.shape[1]) if alike else logs.var(axis=0, ddof=1) - special.polygamma(1, half).mean(axis=0)
        degrees = np.array([MOST if extra <= special.polygamma(1, MOST / 2) else _degrees(extra) for extra in more])
        # One product alone says nothing of others.
        self.freedom = np.zeros(logs.shape[1]) if alike else degrees
        self.variance = np.exp(logs.mean(axis=0) + special.digamma(degrees / 2) - np.log(degrees / 2))

    def scale(self, values: np.ndarray) -> Scale:
        """Return the scale of a product by logarithms (n, Q), n at least 1.

        The variance is that of a new image: the level is not known exactly either.
        """
        n, values = len(values), drawn_in(values)
        own = values.var(axis=0, ddof=1) if n > 1 else self.variance
        freedom = max(n - 1, 1e-9)
        variance = (freedom * own + self.freedom * self.variance) / (freedom + self.freedom) * (1 + 1 / n)
        return Scale(n, values.mean(axis=0).tolist(), np.maximum(np.sqrt(variance), SMALLEST).tolist())


def robust_deviation(values: np.ndarray) -> np.ndarray:
    """Return 1.4826 times the median absolute deviation of values (n, ...), which normal ones have as deviation."""
    return 1.4826 * np.median(np.abs(values - np.median(values, axis=0)), axis=0)


def drawn_in(values: np.ndarray) -> np.ndarray:
    """Return values (n, Q) with those of odd images drawn in to ODD standard deviations from the median.

    An odd one among a product's normal images would hide its defects. Where more than half of the values are the same,
    all are kept.
    """
    median = np.median(values, axis=0)
    far = ODD * robust_deviation(values)
    far = np.where(far > 0, far, np.inf)
    return np.clip(values, median - far, median + far)


def _degrees(more: float) -> float:
    """Return the degrees of freedom whose log variances vary that much, by trigamma(degrees / 2) = more."""
    # SciPy's annotation covers its full_output too.
    # pyrefly: ignore[bad-return]
    return 2 * optimize.brentq(lambda x: special.polygamma(1, x) - more, 1e-4, MOST)


def standardise(values: np.ndarray, classes: Sequence[str]) -> tuple[dict[str, Scale], np.ndarray]:
    """Return the scale of each product, and standardised scores (N,).

    values: logarithms (N, Q) of the statistics of normal images; classes: their products. Each score is by the scale
    that the other images give, so that it is distributed as that of a new image.
    """
    of, names = np.array(classes), sorted(set(classes))
    members = {name: np.flatnonzero(of == name) for name in names}
    several = [i for i in members.values() if len(i) > 1]
    if several:
        variances = np.stack([drawn_in(values[i]).var(axis=0, ddof=1) for i in several])
        prior = Prior(variances, np.array([len(i) - 1.0 for i in several]))
    else:
        prior = Prior(values.var(axis=0)[None], np.ones(1))
    scores = np.zeros(len(of))
    for i in members.values():
        for one in i:
            # An image without another of its product is compared with all others.
            if len(others := np.setdiff1d(i if len(i) > 1 else np.arange(len(of)), [one])):
                scores[one] = prior.scale(values[others]).scores(values[one : one + 1])[0]
    return {name: prior.scale(values[i]) for name, i in members.items()}, scores


@dataclass(frozen=True)
class Calibration:
    """What is usual for normal images, by product, and the score above which an image is anomalous.

    deviation: the root mean square of the deviations that the network expects. scales: the mean difference of each kind
    of features. threshold: a standardised score (`Scale.scores`). images: the number of normal images that set it,
    left_out: that of those that are too far out for it (`that_count`). false_alarm_rate: the largest share of normal
    images that may be called anomalous. weight: the share of retrieval in the evidence, retrieval: how its distances
    are distributed, tails: the scales of reconstruction and retrieval; a detector without a bank of patches has
    neither. products: by name. slope: what a standard deviation adds to a score's log odds. normal: the standardised
    scores of the normal images, sorted. f1_optimal: the score in [0, 1), with the threshold at 0.5, that had the best
    F1 on the test images, or None if none of them had a defect.
    """

    __pydantic_config__ = FROM_FILE

    deviation: PositiveFloat
    scales: list[Annotated[float, Field(ge=0)]]
    threshold: float
    images: Positive
    false_alarm_rate: Fraction
    f1_optimal: Annotated[float, Field(ge=0, lt=1)] | None = None
    weight: Annotated[float, Field(ge=0, le=1)] = 0.0
    retrieval: Usual | None = None
    tails: list[PositiveFloat] | None = None
    products: dict[str, Scale] = field(default_factory=dict)
    slope: PositiveFloat = 1.0
    normal: list[float] = field(default_factory=list)
    left_out: Annotated[int, Field(ge=0)] = 0

    @classmethod
    def one_threshold(cls, facts: dict[str, Any]) -> dict[str, Any]:
        """Return the fields of a file of an earlier release, which had one threshold on the map for all products."""
        threshold = facts.get("threshold")
        if "products" in facts or not isinstance(threshold, int | float):
            return facts
        if not 0 < threshold < math.inf:
            raise ValueError("calibration.threshold must be a number above 0")
        scale = {"images": facts.get("images", 1), "levels": [math.log(threshold)], "spreads": [1.0]}
        return facts | {"threshold": 0.0, "products": {"": scale}}

    def learn(self, values: np.ndarray, classes: Sequence[str]) -> tuple["Calibration", np.ndarray]:
        """Return this calibration with the products and the threshold, and the scores (N,) of the images.

        values: logarithms (N, Q) of the statistics of normal images, the map's last; classes: their products.
        """
        products, normal = standardise(values, classes)
        counts = that_count(normal, self.false_alarm_rate)
        threshold, own = thresholds(normal[counts], np.array(classes)[counts].tolist(), self.false_alarm_rate)
        products = {name: replace(scale, threshold=own.get(name)) for name, scale in products.items()}
        # Of the map: scores are about as far from 0.5 as the map is.
        slope = float(np.mean([scale.spreads[-1] for scale in products.values()]))
        learned = replace(
            self,
            threshold=threshold,
            images=int(counts.sum()),
            left_out=int((~counts).sum()),
            products=products,
            slope=slope,
            normal=np.sort(normal).tolist(),
        )
        return learned, learned.odds(normal, classes)

    def limit(self, product: str) -> float:
        """Return the standardised score above which an image of a product is anomalous."""
        own = self.products[product].threshold
        return self.threshold if own is None else own

    def map_threshold(self, product: str) -> float:
        """Return the value above which a place of the map of an image of a product is anomalous."""
        scale = self.products[product]
        return math.exp(scale.levels[-1] + scale.spreads[-1] * self.limit(product))

    def standardised(self, values: Iterable[np.ndarray], products: Sequence[str]) -> np.ndarray:
        """Return the standardised scores (B,) of images of these products, from logarithms (Q,) of their statistics."""
        return np.array([self.products[p].scores(row[None])[0] for p, row in zip(products, values, strict=True)])

    def odds(self, standardised: np.ndarray, products: Sequence[str]) -> np.ndarray:
        """Return scores in [0, 1] of standardised ones (B,): 0.5 at the limit of the image's product."""
        limits = np.array([self.limit(product) for product in products])
        return special.expit(self.slope * (standardised - limits))

    def p_value(self, standardised: float) -> float | None:
        """Return the share of normal images that are as unusual, itself included; None if their scores are unknown."""
        n = len(self.normal)
        return (1 + n - bisect.bisect_left(self.normal, standardised)) / (n + 1) if n else None

    @property
    def guarantee(self) -> float:
        """The upper bound of a new normal image's chance of an alarm, averaged over calibrations of this many images.

        It is up to 1 / (images + 1) below `false_alarm_rate`, and above it only with too few images for that rate.
        """
        return (self.images + 1 - self._rank) / (self.images + 1)

    @property
    def shortfall(self) -> str | None:
        """What to do where the images are too few to promise `false_alarm_rate`, None where they are enough."""
        if self.guarantee <= self.false_alarm_rate + 1e-9:
            return None
        enough, many = math.ceil(round(1 / self.false_alarm_rate - 1, 9)), counted(self.images, "normal image")
        return (
            f"a threshold by {many} promises a false-alarm rate of {self.guarantee:.1%} at best, not "
            f"{self.false_alarm_rate:.1%}: it takes {enough} or more (add photographs, or hold out more of "
            f"them), or evaluate.detection.false_alarm_rate of {math.ceil(1000 * self.guarantee) / 1000:g} or more"
        )

    def rate_range(self, level: float = 0.9) -> tuple[float, float]:
        """Return the central interval, of probability `level`, of the false alarm rate of one such calibration.

        Without ties between scores, the rate is distributed as Beta(n + 1 - rank, rank) (Vovk, 2012, on conditional
        validity).
        """
        tails = ((1 - level) / 2, (1 + level) / 2)
        low, high = stats.beta.ppf(tails, self.images + 1 - self._rank, self._rank)
        return float(low), float(high)

    @property
    def _rank(self) -> int:
        return conformal_rank(self.images, self.false_alarm_rate)


def conformal_rank(images: int, false_alarm_rate: float) -> int:
    """Return the rank of the threshold among the normal scores; 1 is the smallest score."""
    # Round first: a product such as 20 x 0.95 may exceed its whole number by rounding error.
    return min(math.ceil(round((images + 1) * (1 - false_alarm_rate), 9)), images)


def conformal_threshold(scores: np.ndarray, false_alarm_rate: float) -> float:
    """Return the split conformal quantile of normal scores (n,): the ceil((n + 1)(1 - rate))-th smallest.

    A new normal image from the same source exceeds it with probability at most `false_alarm_rate` (Vovk et al., 2005).
    With fewer than 1 / rate - 1 images, the result is the largest score, whose rate is 1 / (n + 1). Raises InputError
    if a score is not finite.
    """
    if not np.isfinite(scores).all():
        raise InputError("the score of a normal image is not a finite number, so there is no threshold")
    return float(np.sort(scores)[conformal_rank(len(scores), false_alarm_rate) - 1])


def that_count(scores: np.ndarray, false_alarm_rate: float) -> np.ndarray:
    """Return which of the scores (n,) of normal images set a threshold, bool (n,).

    All do, unless the threshold would be the score of an image that is far out: with few images, a single odd one would
    hide every defect. Then those that are far out do not, if the others are ample for the rate. A score is far out more
    than FAR_OUT of `robust_deviation` above the median.
    """
    spread = robust_deviation(scores)
    near = scores <= np.median(scores) + FAR_OUT * spread
    hides = conformal_threshold(scores, false_alarm_rate) > scores[near].max(initial=-np.inf)
    ample = math.ceil(round(AMPLE * (1 / false_alarm_rate - 1), 9))
    return near if spread > 0 and hides and near.sum() >= ample else np.ones(len(scores), bool)


def thresholds(normal: np.ndarray, classes: Sequence[str], false_alarm_rate: float) -> tuple[float, dict[str, float]]:
    """Return the threshold on standardised scores for all products, and those of products with enough images.

    normal: the scores (N,) of normal images; classes: their products.
    """
    of, own = np.array(classes), {}
    # Of fewer images, a product's own threshold would depend on a few odd ones.
    enough = math.ceil(round(OWN / false_alarm_rate, 9))
    names, counts = np.unique(of, return_counts=True)
    for name, count in zip(names.tolist(), counts, strict=True):
        if len(names) > 1 and count >= enough:
            own[name] = conformal_threshold(normal[of == name], false_alarm_rate)
    return conformal_threshold(normal, false_alarm_rate), own


def least_cost_rate(
    normal: np.ndarray,
    classes: Sequence[str],
    defective: np.ndarray,
    products: Sequence[str],
    costs: Costs,
    share: float,
) -> float:
    """Return the false-alarm rate whose thresholds have the least expected cost; of equal ones, the lowest.

    normal, defective: standardised scores (N,) and (D,); classes, products: what the images show; share: that of images
    that have a defect. The rates tried are those that N images can promise, 1 / (N + 1) and its multiples.
    """
    of, best, found = np.array(products), math.inf, math.nan
    for rank in range(1, len(normal) + 1):
        rate = rank / (len(normal) + 1)
        common, own = thresholds(normal, classes, rate)
        missed = np.mean(defective <= np.array([own.get(name, common) for name in of]))
        cost = share * costs.miss * missed + (1 - share) * costs.false_alarm * rate
        if cost < best - 1e-12:
            best, found = cost, rate
    return found


def f1_optimal(scores: np.ndarray, is_anomalous: np.ndarray) -> float | None:
    """Return the threshold on `scores` with the best F1, or None if no image or every image is anomalous."""
    scores, truth = np.asarray(scores, np.float64), np.asarray(is_anomalous, bool)
    if truth.all() or not truth.any():
        return None
    order = np.argsort(-scores, kind="stable")
    found, called = np.cumsum(truth[order]), np.arange(1, len(scores) + 1)
    # A threshold can only separate different scores.
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    f1 = 2 * found[ends] / (called[ends] + truth.sum())
    return float(scores[order][ends[np.argmax(f1)]])
