"""How good the verdicts are: what a model finds and what it raises in vain at its own threshold, and what that costs.

The metrics of `metrics.py` rank images and pixels within a class. Those here judge the answer that a person gets: over
all images together, by class, by kind of defect and by size of defect. Intervals of shares are exact (Clopper and
Pearson, 1934), those of other metrics come from the bootstrap.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from vlmdiff.core.params import Costs, Decision
from vlmdiff.evaluation.aupro import regions_of
from vlmdiff.evaluation.bootstrap import SAMPLES, repetitions
from vlmdiff.evaluation.metrics import DIGITS, PER_CLASS, group

# Key to display name, in the order of all tables. The two rates are false-alarm rates on the test images.
DECISION = {
    "recall": "recall",
    "false_alarm_rate": "false-alarm rate",
    "precision": "precision",
    "f1": "F1",
    "balanced_accuracy": "balanced accuracy",
    "recall_at_1": "recall at 1 % false alarms",
    "recall_at_5": "recall at 5 % false alarms",
    "region_recall": "regions found",
    "image_auroc": "image AUROC",
    "image_ap": "image AP",
}
RATES = {"recall_at_1": 0.01, "recall_at_5": 0.05}
# A class has its ranking metrics already. A kind or a size of defect has no normal images of its own.
OF_CLASS = tuple(DECISION)[:8]
OF_DEFECTS = ("recall", "recall_at_1", "recall_at_5", "region_recall", "image_auroc")
# Keys in metrics.json: `dvc metrics diff` sorts them by name, so what matters most comes first.
POOLED, PER_CLASS_DECISION, PER_DEFECT, PER_SIZE = "decision", f"{PER_CLASS}_decision", "per_defect", "per_size"
COST = "expected_cost"
# Sizes of defects, in percent of the image's area.
SIZES = (0.3, 1, 3, 10)
SIZE_NAMES = (
    f"below {SIZES[0]:g} %",
    *(f"{low:g} to {high:g} %" for low, high in pairwise(SIZES)),
    f"{SIZES[-1]:g} % and more",
)
LEVEL = 0.95
# Numbers of an array that the bootstrap holds at once, whatever the number of images.
CELLS = 1 << 16
Row = dict[str, Any]  # by metric: a number, or one for each sample
Groups = dict[str, dict[str, Row]]


def regions_found(mask: np.ndarray, marked: np.ndarray) -> tuple[list[float], list[bool]]:
    """Return each region's share of the image's pixels, and whether one of its pixels is marked.

    mask, marked: bool (H, W), the truth and what the verdict shows. Regions are those of AU-PRO: 8-connected.
    """
    if not mask.any():
        return [], []
    labels, count = regions_of(mask)
    areas = np.bincount(labels, minlength=count + 1)[1:]
    hits = np.bincount(labels, marked[mask], count + 1)[1:]
    return (areas / mask.size).tolist(), (hits > 0).tolist()


@dataclass(frozen=True)
class Decisions:
    """A model's verdicts on N test images, and the R regions of their defects.

    class_names, defects, is_anomalous, scores, alarms: (N,). region_image, region_area, region_found: (R,), the index
    of the region's image, the region's share of the image's pixels, and whether the verdict marks a part of it.
    """

    class_names: np.ndarray
    defects: np.ndarray
    is_anomalous: np.ndarray
    scores: np.ndarray
    alarms: np.ndarray
    region_image: np.ndarray
    region_area: np.ndarray
    region_found: np.ndarray

    @classmethod
    def of(cls, table: pd.DataFrame) -> "Decisions":
        """Read a table with a row for each image: class_name, defect, is_anomalous, score, verdict.

        `regions` and `regions_found` hold a list for each image, as `regions_found` returns them. Tables of earlier
        releases have no such columns; then no region is known.
        """
        areas, found = (
            table[name].tolist() if name in table else [[]] * len(table) for name in ("regions", "regions_found")
        )
        return cls(
            table["class_name"].to_numpy(str),
            table["defect"].fillna("").to_numpy(str),
            table["is_anomalous"].to_numpy(bool),
            table["score"].to_numpy(np.float64),
            table["verdict"].to_numpy(bool),
            np.repeat(np.arange(len(table)), [len(part) for part in areas]),
            np.concatenate([np.empty(0), *areas]).astype(np.float64),
            np.concatenate([np.empty(0), *found]).astype(bool),
        )

    @cached_property
    def groups(self) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]]:
        """The groups of metrics.json by key and name: indices of their defective and normal images and their regions.

        A defect's size is that of all its regions in an image. A region counts in the group of its own size.
        """
        truth, every = self.is_anomalous, np.arange(len(self.scores))
        good, bad, regions = np.flatnonzero(~truth), np.flatnonzero(truth), np.arange(len(self.region_image))

        def part(members: np.ndarray, normal: np.ndarray | None = None):
            inside = np.isin(every, members)
            own = np.flatnonzero(inside & ~truth) if normal is None else normal
            return np.flatnonzero(inside & truth), own, np.flatnonzero(inside[self.region_image])

        classes = {name: part(np.array(members)) for name, members in group(self.class_names.tolist()).items()}
        kinds = [f"{a}/{b}" for a, b in zip(self.class_names[bad], self.defects[bad], strict=True)]
        defects = {name: part(bad[members], good) for name, members in group(kinds).items()}
        areas = np.bincount(self.region_image, self.region_area, len(every))
        size, size_of_region = (np.digitize(100 * area, SIZES) for area in (areas, self.region_area))
        known = truth & (areas > 0)
        sizes = {
            name: (np.flatnonzero(known & (size == i)), good, np.flatnonzero(size_of_region == i))
            for i, name in enumerate(SIZE_NAMES)
        }
        sizes = {name: found for name, found in sizes.items() if len(found[0]) or len(found[2])}
        pooled = {POOLED: (bad, good, regions)}
        return {POOLED: pooled, PER_CLASS_DECISION: classes, PER_DEFECT: defects, PER_SIZE: sizes}

    @cached_property
    def metrics(self) -> Groups:
        """The metrics of each group, in [0, 1], NaN if not defined. The pooled ones form a group of one."""
        return {
            key: {name: {metric: float(value[0]) for metric, value in row.items()} for name, row in rows.items()}
            for key, rows in self.weighted(np.ones((1, len(self.scores)))).items()
        }

    def weighted(self, weights: np.ndarray) -> Groups:
        """Return the metrics as arrays (S,), for weights (S, N) of the images."""
        found: Groups = {}
        for key, groups in self.groups.items():
            metrics = {POOLED: tuple(DECISION), PER_CLASS_DECISION: OF_CLASS}.get(key, OF_DEFECTS)
            found[key] = {}
            for name, members in groups.items():
                values = self._values(weights, *members, alone=metrics is not OF_DEFECTS)
                found[key][name] = {metric: values[metric] for metric in metrics}
        return found

    def _values(
        self, weights: np.ndarray, bad: np.ndarray, good: np.ndarray, regions: np.ndarray, alone: bool
    ) -> dict[str, np.ndarray]:
        """Return the metrics of a group; `alone`: also those that need normal images of its own."""
        defective, normal = weights[:, bad], weights[:, good]
        above, at_or_above = _ranked(self.scores[bad], self.scores[good], normal)
        total = normal.sum(axis=1, keepdims=True)
        with np.errstate(invalid="ignore", divide="ignore"):
            shares = (above + at_or_above) / (2 * total)
        of_image = weights[:, self.region_image[regions]]
        values = {
            "recall": _mean(defective, self.alarms[bad]),
            "region_recall": _mean(of_image, self.region_found[regions]),
            "image_auroc": 1 - _mean(defective, shares),
        }
        for metric, rate in RATES.items():
            # Counts are whole numbers; the rate times their sum is not exact.
            reached = np.where(total > 0, at_or_above <= rate * total + 1e-9, np.nan)
            values[metric] = _mean(defective, reached)
        if alone:
            hits, alarms = (part @ self.alarms[of].astype(float) for part, of in ((defective, bad), (normal, good)))
            positives, negatives = defective.sum(axis=1), total[:, 0]
            _, found = _ranked(self.scores[bad], self.scores[bad], defective)
            with np.errstate(invalid="ignore", divide="ignore"):
                values["false_alarm_rate"] = alarms / negatives
                values["precision"] = hits / (hits + alarms)
                values["f1"] = np.where(positives > 0, 2 * hits / (positives + hits + alarms), np.nan)
                values["balanced_accuracy"] = (values["recall"] + 1 - values["false_alarm_rate"]) / 2
                ap = _mean(defective, np.where(defective > 0, found / (found + at_or_above), 0))
            values["image_ap"] = np.where(negatives > 0, ap, np.nan)
        return values

    def counts(self) -> Groups:
        """Return, for each group, [found, all] defective images and regions, and [alarms, all] normal images."""

        def row(bad: np.ndarray, good: np.ndarray, regions: np.ndarray) -> Row:
            parts = {"defective": self.alarms[bad], "normal": self.alarms[good], "regions": self.region_found[regions]}
            return {name: [int(hit.sum()), len(hit)] for name, hit in parts.items()}

        return {key: {name: row(*members) for name, members in rows.items()} for key, rows in self.groups.items()}

    def intervals(self, level: float = LEVEL, samples: int = SAMPLES, seed: int = 0) -> Groups:
        """Return the interval of each metric of each group, as pairs, NaN if the metric is not defined.

        Shares of images have Clopper-Pearson intervals. Regions of one image share its verdict. So their interval is
        that of fewer, independent ones: as if all regions of an image had one fate (Kish, 1965). Other metrics have
        bootstrap intervals: images of a class are drawn as in `bootstrap.py`. For a recall at a rate, the interval also
        covers the Clopper-Pearson interval of that share, because the bootstrap does not doubt a share of 0 or 1.
        """
        drawn: dict[tuple[str, str, str], list[np.ndarray]] = {}
        for weights in self._draws(samples, seed):
            for key, rows in self.weighted(weights).items():
                for name, row in rows.items():
                    for metric in row.keys() - {"recall", "false_alarm_rate", "precision", "region_recall"}:
                        drawn.setdefault((key, name, metric), []).append(row[metric])
        found: Groups = {}
        counts = self.counts()
        for key, rows in self.metrics.items():
            found[key] = {}
            for name, row in rows.items():
                *_, regions = self.groups[key][name]
                (hits, positives), (alarms, negatives) = (counts[key][name][kind] for kind in ("defective", "normal"))
                exact = {
                    "recall": (hits, positives),
                    "false_alarm_rate": (alarms, negatives),
                    "precision": (hits, hits + alarms),
                    "region_recall": _independent(self.region_found[regions], self.region_image[regions]),
                }
                found[key][name] = {}
                for metric, value in row.items():
                    if metric in exact:
                        pair = clopper_pearson(*exact[metric], level)
                    else:
                        pair = _central(np.concatenate(drawn[key, name, metric]), value, level)
                    if metric in RATES and not math.isnan(value):
                        share = clopper_pearson(round(value * positives), positives, level)
                        pair = min(pair[0], share[0]), max(pair[1], share[1])
                    found[key][name][metric] = pair
        return found

    def _draws(self, samples: int, seed: int) -> Iterator[np.ndarray]:
        """Yield weights (S, N) of resampled images, in parts of about CELLS numbers."""
        rng = np.random.default_rng(seed)
        _, classes = np.unique(self.class_names, return_inverse=True)
        strata, size = 2 * classes + self.is_anomalous, max(CELLS // max(len(classes), 1), 1)
        for start in range(0, samples, size):
            yield repetitions(rng, strata, min(size, samples - start))

    def expected_cost(self, costs: Costs, defect_rate: float) -> float:
        """Return the expected cost of an image at the model's threshold, in the unit of `costs`."""
        row = self.metrics[POOLED][POOLED]
        return _cost(row["recall"], row["false_alarm_rate"], costs, defect_rate)[0]

    def cost_curve(self, costs: Costs, defect_rate: float) -> pd.DataFrame:
        """Return the expected cost of an image at each threshold that tells scores apart, and its two parts.

        Columns: `threshold`, from 0 on; `cost`, the sum of `misses` and `false_alarms`. A score above the threshold is
        an alarm. Empty if there is no defective or no normal image.
        """
        bad, good = np.sort(self.scores[self.is_anomalous]), np.sort(self.scores[~self.is_anomalous])
        columns = ["threshold", "cost", "misses", "false_alarms"]
        if not (len(bad) and len(good)):
            return pd.DataFrame(columns=columns, dtype=float)
        thresholds = np.unique(np.concatenate([[0.0], bad, good]))
        recall, alarms = (1 - np.searchsorted(part, thresholds, "right") / len(part) for part in (bad, good))
        return pd.DataFrame(dict(zip(columns, (thresholds, *_cost(recall, alarms, costs, defect_rate)), strict=True)))


def clopper_pearson(found: float, total: float, level: float = LEVEL) -> tuple[float, float]:
    """Return the exact central interval of a share of `found` in `total`, NaN if `total` is 0.

    It holds the true share with at least the probability `level`.
    """
    if not total:
        return math.nan, math.nan
    tail = (1 - level) / 2
    low = stats.beta.ppf(tail, found, total - found + 1) if found > 0 else 0.0
    high = stats.beta.isf(tail, found + 1, total - found) if found < total else 1.0
    return float(low), float(high)


def upper_bound(found: int, total: int, confidence: float) -> float:
    """Return the share that the true one exceeds with at most the probability 1 - `confidence`, NaN without images."""
    return clopper_pearson(found, total, 2 * confidence - 1)[1]


def mcnemar(lost: int, won: int) -> float:
    """Return the exact one-sided p-value (McNemar, 1947) of "worse" for paired verdicts.

    lost, won: the images that only the other model gets right, and only this one. Of equal models, each such image
    falls to either side by a coin.
    """
    return float(stats.binom.sf(lost - 1, lost + won, 0.5))


def summarise(decisions: Decisions, params: Decision = Decision(), samples: int = SAMPLES) -> dict[str, Any]:
    """Return what a report shows, as JSON: for each group its metrics, intervals and counts, None if not defined."""
    intervals, counts = decisions.intervals(samples=samples), decisions.counts()
    summary: dict[str, Any] = {"level": LEVEL}
    for key, rows in decisions.metrics.items():
        summary[key] = {
            name: {
                "metrics": {metric: _null(value) for metric, value in row.items()},
                "intervals": {
                    metric: None if math.isnan(low) else [_null(low), _null(high)]
                    for metric, (low, high) in intervals[key][name].items()
                },
                "counts": counts[key][name],
            }
            for name, row in rows.items()
        }
    summary[POOLED] = summary[POOLED][POOLED]
    if params.costs:
        summary[POOLED]["metrics"][COST] = _null(decisions.expected_cost(params.costs, params.defect_rate))
    return summary


def values_of(summary: dict[str, Any], what: str = "metrics") -> dict[str, Any]:
    """Return the metrics of a summary, or its intervals, as metrics.json and intervals.json hold them."""
    parts = {
        key: {n: row[what] for n, row in summary[key].items()} for key in (PER_CLASS_DECISION, PER_DEFECT, PER_SIZE)
    }
    return {POOLED: summary[POOLED][what], **parts}


def _ranked(scores: np.ndarray, others: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return, for D scores, the weight of those `others` (G,) that are above, and at or above: (S, D).

    weights: (S, G).
    """
    order = np.argsort(others)
    reached = np.cumsum(np.pad(weights[:, order], ((0, 0), (1, 0))), axis=1)
    below, up_to = (reached[:, np.searchsorted(others[order], scores, side)] for side in ("left", "right"))
    return reached[:, -1:] - up_to, reached[:, -1:] - below


def _mean(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the weighted mean (S,) of values (D,) or (S, D), NaN without weight."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return (weights * values).sum(axis=1) / weights.sum(axis=1)


def _central(values: np.ndarray, value: float, level: float) -> tuple[float, float]:
    """Return the central interval of samples, NaN if the metric is not defined. Samples without a value count not."""
    values = values[~np.isnan(values)]
    if math.isnan(value) or not len(values):
        return math.nan, math.nan
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _independent(found: np.ndarray, image: np.ndarray) -> tuple[float, float]:
    """Return the number of found regions and of all, as many as are independent if those of an image are alike."""
    if not len(found):
        return 0.0, 0.0
    sizes = np.bincount(image)
    total = sizes.sum() ** 2 / np.square(sizes).sum()
    return float(found.mean() * total), float(total)


def _cost(recall, false_alarm_rate, costs: Costs, defect_rate: float) -> tuple[Any, Any, Any]:
    misses = defect_rate * costs.miss * (1 - recall)
    false_alarms = (1 - defect_rate) * costs.false_alarm * false_alarm_rate
    return misses + false_alarms, misses, false_alarms


def _null(value: float) -> float | None:
    return None if math.isnan(value) else round(value, DIGITS)
