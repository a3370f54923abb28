"""Calibrate the threshold for alarms on normal images only."""

import math
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import ConfigDict, Field
from scipy import stats

from vlmdiff.core.errors import InputError
from vlmdiff.core.params import Fraction, Positive, PositiveFloat

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


@dataclass(frozen=True)
class Calibration:
    """The typical values of normal images, and the threshold on the combined, smoothed map.

    `deviation` is the root mean square of the deviations that the network expects. `scales` holds the mean difference
    of each kind of features. `images` is the number of normal images used, `false_alarm_rate` the largest share of
    normal images that may be called anomalous. `weight` is the share of retrieval in the evidence, `retrieval` how its
    distances are distributed and `tails` the scales of reconstruction and retrieval; a detector without a bank of
    patches has neither. `f1_optimal` is the score in [0, 1), with the threshold at 0.5, that had
    the best F1 on the test images, or None if none of them had a defect.
    """

    __pydantic_config__ = FROM_FILE

    deviation: PositiveFloat
    scales: list[Annotated[float, Field(ge=0)]]
    threshold: PositiveFloat
    images: Positive
    false_alarm_rate: Fraction
    f1_optimal: Annotated[float, Field(ge=0, lt=1)] | None = None
    weight: Annotated[float, Field(ge=0, le=1)] = 0.0
    retrieval: Usual | None = None
    tails: list[PositiveFloat] | None = None

    @property
    def guarantee(self) -> float:
        """The upper bound of a new normal image's chance of an alarm, averaged over calibrations of this many images.

        It is up to 1 / (images + 1) below `false_alarm_rate`, and above it only with too few images for that rate.
        """
        return (self.images + 1 - self._rank) / (self.images + 1)

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
