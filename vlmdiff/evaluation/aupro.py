"""Exact AU-PRO, the area under the per-region overlap curve, and the ranking of pixels that it needs.

Definition: Bergmann et al., "The MVTec Anomaly Detection Dataset", IJCV 2021. A threshold on the anomaly maps gives a
false positive rate over all normal pixels and an overlap with each anomalous region. The curve is the mean overlap over
the false positive rate. AU-PRO is the area up to `max_fpr`, divided by `max_fpr`.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from vlmdiff.core.errors import InputError

EIGHT_CONNECTED = np.ones((3, 3), bool)
CURVE_POINTS = 200


class Pixels(NamedTuple):
    """Scores of anomalous pixels, their shares of the mean overlap (they sum to 1), and scores of normal pixels."""

    anomalous: np.ndarray
    shares: np.ndarray
    normal: np.ndarray


class Ranking(NamedTuple):
    """Anomalous samples from the highest score down, with their ranks among all samples. Equal scores share a rank.

    `hits` counts the anomalous samples that score at least as high, `above` the normal ones that score higher,
    `at_or_above` the normal ones that score at least as high. `anomalous` and `normal` are the totals. `shares` are
    weights.
    """

    shares: np.ndarray
    hits: np.ndarray
    above: np.ndarray
    at_or_above: np.ndarray
    anomalous: int
    normal: int

    @property
    def one_sided(self) -> bool:
        """True if there is no anomalous or no normal sample."""
        return not (self.anomalous and self.normal)

    def uniform(self) -> "Ranking":
        """Return the same ranks with equal shares: the mean overlap becomes the true positive rate."""
        return self._replace(shares=np.full(len(self.hits), 1 / max(self.anomalous, 1)))


def aupro(maps: Sequence[np.ndarray], masks: Sequence[np.ndarray], max_fpr: float = 0.3) -> float:
    """Return the area under the per-region overlap curve up to a rate of `max_fpr`, divided by `max_fpr`, in [0, 1].

    `maps` are N anomaly maps (H, W) of finite scores; higher is more anomalous. `masks` are the ground truths, non-zero
    where anomalous. Sizes may differ between images. Regions are 8-connected. The curve runs through (0, 0) and the
    points of all distinct scores, is linear in between and interpolated at the limit, so only the order of the scores
    matters. A perfect map has 1; chance, as a constant map, has `max_fpr` / 2.

    The result is NaN if there is no anomalous region or no normal pixel. Raises InputError if a map is not finite,
    shapes differ, or the limit is outside (0, 1].
    """
    check_limit(max_fpr)
    return area(rank(*collect(maps, masks), max_fpr), max_fpr)


def check_limit(max_fpr: float) -> None:
    if not 0 < max_fpr <= 1:
        raise InputError(f"max_fpr is {max_fpr}. It must be above 0 and at most 1.")


def collect(maps: Sequence[np.ndarray], masks: Sequence[np.ndarray], names: Sequence[str] | None = None) -> Pixels:
    """Split all pixels into anomalous and normal ones. `names` identify the maps in errors."""
    if len(maps) != len(masks):
        raise InputError(f"{len(maps)} anomaly maps, but {len(masks)} masks. Give one mask per map.")
    anomalous, sizes, normal = [np.empty(0, np.float32)], [np.empty(0)], [np.empty(0, np.float32)]
    regions = 0
    for index, (scores, mask) in enumerate(zip(maps, masks, strict=True)):
        scores, mask = check_map(scores, mask, str(index) if names is None else f"of {names[index]}")
        if not mask.any():
            normal.append(scores.ravel())
            continue
        labels, count = regions_of(mask)
        regions += count
        sizes.append(np.bincount(labels)[labels].astype(float))
        anomalous.append(scores[mask])
        normal.append(scores[~mask])
    return Pixels(np.concatenate(anomalous), 1 / (np.concatenate(sizes) * regions), np.concatenate(normal))


def check_map(scores: np.ndarray, mask: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return both as arrays (H, W), float and bool. Raises InputError, with `name`, as `aupro` does."""
    scores, mask = np.asarray(scores), np.asarray(mask).astype(bool, copy=False)
    if scores.dtype not in (np.float32, np.float64):
        scores = scores.astype(np.float64)
    if scores.ndim != 2 or scores.shape != mask.shape:
        raise InputError(f"anomaly map {name} has shape {scores.shape}, its mask {mask.shape}. Give both as (H, W).")
    if not np.isfinite(scores).all():
        raise InputError(f"anomaly map {name} holds NaN or infinity. Every score must be finite.")
    return scores, mask


def regions_of(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the region, from 1, of each anomalous pixel in raster order, and the number of regions."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    labels, count = ndimage.label(box, EIGHT_CONNECTED)
    return labels[box], count


def rank(anomalous: np.ndarray, shares: np.ndarray, normal: np.ndarray, max_fpr: float = 1.0) -> Ranking:
    """Rank anomalous scores, with their shares, among normal ones. Reorders `normal` in place, because it is large.

    Only the share `max_fpr` of the highest normal scores is sorted. Anomalous scores below them are dropped: they add
    no area up to that rate.
    """
    total = len(anomalous)
    # Sort the normal scores by value, not by index: numpy is much faster at that.
    cut = len(normal) - math.ceil(max_fpr * len(normal))
    tied = 0
    if cut > 0:
        normal.partition(cut)
        tied = np.count_nonzero(normal[:cut] == normal[cut])
        kept = anomalous >= normal[cut]
        anomalous, shares = anomalous[kept], shares[kept]
    top = normal[max(cut, 0) :]
    top.sort()

    order = np.argsort(anomalous)
    rising = anomalous[order]
    hits = len(rising) - np.searchsorted(rising, rising, side="left")
    above = len(top) - np.searchsorted(top, rising, side="right")
    at_or_above = len(top) - np.searchsorted(top, rising, side="left")
    if tied:
        at_or_above[rising == top[0]] += tied
    return Ranking(shares[order][::-1], hits[::-1], above[::-1], at_or_above[::-1], total, len(normal))


def area(ranking: Ranking, max_fpr: float = 1.0) -> float:
    """Return the area under the summed shares over the false positive rate up to `max_fpr`, divided by `max_fpr`.

    This is AU-PRO with region shares, and the area under the ROC curve with uniform shares; NaN if one-sided. In closed
    form, a sample adds its share to the curve at its false positive rate or, if normal samples have the same score,
    along a ramp over their rates. The area of each share depends only on its own place.
    """
    if ranking.one_sided:
        return math.nan
    start = ranking.above / ranking.normal
    width = (ranking.at_or_above - ranking.above) / ranking.normal
    inside = np.clip(max_fpr - start, 0, width)
    after = np.maximum(max_fpr - start - width, 0)
    ramp = np.divide(inside**2, 2 * width, out=np.zeros_like(width), where=width > 0)
    return float(np.sum(ranking.shares * (ramp + after)) / max_fpr)


def curve(ranking: Ranking, max_fpr: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Return rates up to `max_fpr` and the summed shares at each, thinned: the curve of `area`."""
    if ranking.one_sided:
        return np.empty(0), np.empty(0)
    last = np.flatnonzero(ranking.hits == np.arange(1, len(ranking.hits) + 1))
    reached = np.concatenate([[0.0], np.cumsum(ranking.shares)[last]])
    rates = np.stack([ranking.above[last], ranking.at_or_above[last]], axis=1).ravel() / ranking.normal
    x = np.concatenate([[0.0], rates, [1.0]])
    y = np.concatenate([[0.0], np.stack([reached[:-1], reached[1:]], axis=1).ravel(), reached[-1:]])
    inside = x <= max_fpr
    x, y = np.append(x[inside], max_fpr), np.append(y[inside], np.interp(max_fpr, x, y))
    chosen = thin(x / max_fpr + y)
    return x[chosen], y[chosen]


def thin(position: np.ndarray, points: int = CURVE_POINTS) -> np.ndarray:
    """Return the indices of at most `points` entries of the rising `position`, evenly spaced, with both ends."""
    if len(position) <= points:
        return np.arange(len(position))
    wanted = np.linspace(position[0], position[-1], points)
    return np.unique(np.searchsorted(position, wanted).clip(max=len(position) - 1))
