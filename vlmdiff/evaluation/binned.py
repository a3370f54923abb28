"""Metrics of binned scores: with the scores of a bin as ties, and the lowest and highest possible values.

Counts are (..., B), with bins from the highest scores down. Metrics are (...), NaN if one kind has no samples.
"""

import numpy as np
from scipy.special import digamma

Range = tuple[np.ndarray, np.ndarray]


def area(normal: np.ndarray, shares: np.ndarray, max_fpr: float) -> np.ndarray:
    """Return the area under the summed `shares` over the false positive rate up to `max_fpr`, divided by it."""
    before, _, inside, width = _boxes(normal, shares, max_fpr)
    ramp = np.divide(inside, 2 * width, out=np.zeros_like(width), where=width > 0)
    return _under((before + shares * ramp) * inside, normal, max_fpr)


def area_range(normal: np.ndarray, shares: np.ndarray, max_fpr: float) -> Range:
    """Return the bounds of `area`: within a bin, the curve rises anywhere between two known corners."""
    before, reached, inside, _ = _boxes(normal, shares, max_fpr)
    return _under(before * inside, normal, max_fpr), _under(reached * inside, normal, max_fpr)


def _under(parts: np.ndarray, normal: np.ndarray, max_fpr: float) -> np.ndarray:
    return np.where(normal.any(axis=-1), np.sum(parts, axis=-1) / max_fpr, np.nan)


def _boxes(normal: np.ndarray, shares: np.ndarray, max_fpr: float) -> tuple[np.ndarray, ...]:
    with np.errstate(invalid="ignore", divide="ignore"):
        width = normal / normal.sum(axis=-1, keepdims=True)
    reached = np.cumsum(shares, axis=-1)
    return reached - shares, reached, np.clip(max_fpr - (np.cumsum(width, axis=-1) - width), 0, width), width


def detection(anomalous: np.ndarray, normal: np.ndarray) -> dict[str, np.ndarray]:
    """Return AUROC, average precision and best F1 as defined in scikit-learn."""
    hits, alarms, positives, negatives = _sums(anomalous, normal)
    with np.errstate(invalid="ignore", divide="ignore"):
        auroc = np.sum(anomalous * (negatives - alarms + normal / 2), axis=-1) / (positives * negatives)[..., 0]
        precision = np.divide(hits, hits + alarms, out=np.zeros_like(hits), where=hits > 0)
        ap = np.sum(anomalous * precision, axis=-1) / positives[..., 0]
        f1 = np.max(2 * hits / (positives + hits + alarms), axis=-1, initial=0)
    return _defined({"auroc": auroc, "ap": ap, "f1_max": f1}, positives, negatives)


def detection_range(anomalous: np.ndarray, normal: np.ndarray) -> dict[str, Range]:
    """Return the bounds of `detection`.

    At best, the anomalous samples of a bin tie above its normal ones. At worst, they lie below them, all different.
    """
    hits, alarms, positives, negatives = _sums(anomalous, normal)
    before = alarms - normal
    with np.errstate(invalid="ignore", divide="ignore"):
        pairs = (positives * negatives)[..., 0]
        auroc = [np.sum(anomalous * (negatives - passed), axis=-1) / pairs for passed in (alarms, before)]
        # The sum of hits / (hits + alarms) over a bin's anomalous samples reduces to a sum of reciprocals.
        reciprocals = digamma(hits + alarms + 1) - digamma(hits - anomalous + alarms + 1)
        worst = np.sum(anomalous - alarms * reciprocals, axis=-1) / positives[..., 0]
        precision = np.divide(hits, hits + before, out=np.zeros_like(hits), where=hits > 0)
        best = np.sum(anomalous * precision, axis=-1) / positives[..., 0]
        f1 = [np.max(2 * hits / (positives + hits + passed), axis=-1, initial=0) for passed in (alarms, before)]
    values = {"auroc": auroc, "ap": [worst, best], "f1_max": f1}
    low, high = (_defined({name: pair[i] for name, pair in values.items()}, positives, negatives) for i in (0, 1))
    return {name: (low[name], high[name]) for name in values}


def _sums(anomalous: np.ndarray, normal: np.ndarray) -> tuple[np.ndarray, ...]:
    hits, alarms = (np.cumsum(counts, axis=-1, dtype=np.float64) for counts in (anomalous, normal))
    none = np.zeros((*hits.shape[:-1], 1))
    return hits, alarms, *(sums[..., -1:] if sums.shape[-1] else none for sums in (hits, alarms))


def _defined(values: dict[str, np.ndarray], positives: np.ndarray, negatives: np.ndarray) -> dict[str, np.ndarray]:
    both = (positives * negatives)[..., 0] > 0
    return {name: np.where(both, value, np.nan) for name, value in values.items()}
