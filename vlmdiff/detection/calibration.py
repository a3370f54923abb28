"""When a score is an alarm: a threshold from normal images alone."""

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Calibration:
    """What is usual in a normal image, and the threshold on the combined, smoothed map.

    deviation: the root mean square of what the network expects; scales: in each kind of features, the mean difference.
    images: how many normal images it rests on; false_alarm_rate: the share of normal images it may call anomalous.
    """

    deviation: float
    scales: list[float]
    threshold: float
    images: int
    false_alarm_rate: float


def conformal_threshold(scores: np.ndarray, false_alarm_rate: float) -> float:
    """The split conformal quantile of normal scores (n,): the ceil((n + 1)(1 - rate))-th smallest.

    A new normal image from the same source exceeds it with probability at most `false_alarm_rate` (Vovk et al., 2005).
    Fewer than 1 / rate - 1 images cannot support the rate: then the largest score is returned, whose rate is
    1 / (n + 1).
    """
    rank = math.ceil((len(scores) + 1) * (1 - false_alarm_rate))
    return float(np.sort(scores)[min(rank, len(scores)) - 1])
