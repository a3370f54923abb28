"""When a score is an alarm: a threshold from normal images alone."""

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Calibration:
    """What is usual in a normal image, and the threshold on the combined, smoothed map.

    deviation: the root mean square of what the network expects; scales: in each kind of features, the mean difference.
    images: how many normal images it rests on; false_alarm_rate: the share of normal images that was to be called
    anomalous at most. f1_optimal: the score in [0, 1), the threshold's being 0.5, from which on calling an image
    anomalous had the best F1 on the test images; None where none of these had a defect.
    """

    deviation: float
    scales: list[float]
    threshold: float
    images: int
    false_alarm_rate: float
    f1_optimal: float | None = None

    @property
    def guarantee(self) -> float:
        """What a new normal image's chance of an alarm is at most, over calibrations of this many images.

        It lies up to 1 / (images + 1) below `false_alarm_rate`; above it only where there are too few images for that.
        """
        return (self.images + 1 - self._rank) / (self.images + 1)

    def rate_range(self, level: float = 0.9) -> tuple[float, float]:
        """Where the rate of one calibration lies in the middle `level` of all of this many images.

        Where scores have no ties it is distributed as Beta(n + 1 - rank, rank) (Vovk, 2012, on conditional validity).
        """
        tails = ((1 - level) / 2, (1 + level) / 2)
        low, high = stats.beta.ppf(tails, self.images + 1 - self._rank, self._rank)
        return float(low), float(high)

    @property
    def _rank(self) -> int:
        return conformal_rank(self.images, self.false_alarm_rate)


def conformal_rank(images: int, false_alarm_rate: float) -> int:
    """Which of so many normal scores, from the smallest on, is the threshold."""
    # A product that is whole but for its last bits, such as 20 x 0.95, must not be rounded up.
    return min(math.ceil(round((images + 1) * (1 - false_alarm_rate), 9)), images)


def conformal_threshold(scores: np.ndarray, false_alarm_rate: float) -> float:
    """The split conformal quantile of normal scores (n,): the ceil((n + 1)(1 - rate))-th smallest.

    A new normal image from the same source exceeds it with probability at most `false_alarm_rate` (Vovk et al., 2005).
    Fewer than 1 / rate - 1 images cannot support the rate: then the largest score is returned, whose rate is
    1 / (n + 1).
    """
    return float(np.sort(scores)[conformal_rank(len(scores), false_alarm_rate) - 1])


def f1_optimal(scores: np.ndarray, is_anomalous: np.ndarray) -> float | None:
    """The score from which on calling an image anomalous has the best F1; None where none is, or all are."""
    scores, truth = np.asarray(scores, np.float64), np.asarray(is_anomalous, bool)
    if truth.all() or not truth.any():
        return None
    order = np.argsort(-scores, kind="stable")
    found, called = np.cumsum(truth[order]), np.arange(1, len(scores) + 1)
    # Only where the next score is another one can a threshold part them.
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    f1 = 2 * found[ends] / (called[ends] + truth.sum())
    return float(scores[order][ends[np.argmax(f1)]])
