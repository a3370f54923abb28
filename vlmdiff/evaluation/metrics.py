"""Image and pixel metrics of each class, their mean over classes, and metrics.json."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlmdiff.core.errors import InputError
from vlmdiff.core.files import write_json
from vlmdiff.evaluation.aupro import Ranking, area, check_limit, collect, rank

# Key in metrics.json to display name, in the order of all tables.
METRICS = {
    "au_pro": "AU-PRO",
    "image_auroc": "image AUROC",
    "image_ap": "image AP",
    "image_f1_max": "image F1-max",
    "pixel_auroc": "pixel AUROC",
    "pixel_ap": "pixel AP",
    "pixel_f1_max": "pixel F1-max",
}
DIGITS = 6
# `dvc metrics diff` sorts keys by name: this one comes after "mean", which matters most.
PER_CLASS = "per_class"


@dataclass(frozen=True)
class Results:
    """`classes` maps each class to its metrics by their keys in METRICS, in [0, 1], NaN if not defined."""

    classes: dict[str, dict[str, float]]

    @property
    def mean(self) -> dict[str, float]:
        """Each metric's mean over the classes that define it, or NaN if none does."""
        return {metric: _mean([values[metric] for values in self.classes.values()]) for metric in METRICS}

    @property
    def left_out(self) -> dict[str, list[str]]:
        """The classes that the mean of a metric omits, by metric."""
        left_out: dict[str, list[str]] = {}
        for name, values in self.classes.items():
            for metric in METRICS:
                if math.isnan(values[metric]):
                    left_out.setdefault(metric, []).append(name)
        return left_out

    def as_dict(self) -> dict[str, dict]:
        """Return the means and the classes, rounded to six digits, None if not defined, as `write` writes them."""
        # The mean of the rounded values, so that reading and writing again does not change it.
        rounded = Results({name: _round(values) for name, values in self.classes.items()})
        classes = {name: _nulls(values) for name, values in rounded.classes.items()}
        return {"mean": _nulls(_round(rounded.mean)), PER_CLASS: classes}

    def write(self, path: Path) -> None:
        """Write metrics.json."""
        write_json(path, self.as_dict())

    @classmethod
    def read(cls, path: Path) -> "Results":
        """Read what `write` wrote. Raises InputError if the file is missing or invalid."""
        try:
            classes = json.loads(Path(path).read_text(encoding="utf-8"))[PER_CLASS]
            return cls({name: _numbers(values) for name, values in classes.items()})
        except FileNotFoundError:
            raise InputError(f"{path} does not exist. Run vlmdiff evaluate first.") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is not a metrics file ({error!r}). Run vlmdiff evaluate again.") from error


def evaluate_classes(
    class_names: Sequence[str],
    maps: Sequence[np.ndarray],
    masks: Sequence[np.ndarray | None],
    image_scores: Sequence[float],
    max_fpr: float = 0.3,
    ids: Sequence[str] | None = None,
    is_anomalous: Sequence[bool] | None = None,
) -> Results:
    """Compute the metrics of N images from their classes, maps and masks (as in `aupro`), and image scores.

    Higher scores are more anomalous. Pixel metrics omit images whose mask is None (unknown), and anomalous images whose
    mask marks nothing: nobody knows where their defect is. `is_anomalous` is the truth of whole images, by default
    whether the mask has an anomalous pixel; `ids` name the images in errors. Metrics are defined as in scikit-learn,
    and NaN for a class without normal or without anomalous samples. Classes are sorted by name. Raises InputError if a
    score or a map is not finite, or if the inputs differ in length or shape.
    """
    check_limit(max_fpr)
    ids = [f"image {index}" for index in range(len(class_names))] if ids is None else ids
    scores = np.asarray(image_scores, np.float64)
    truth = np.asarray([mask is None or np.any(mask) for mask in masks] if is_anomalous is None else is_anomalous, bool)
    lengths = {len(class_names), len(maps), len(masks), len(scores), len(truth), len(ids)}
    if len(lengths) > 1:
        raise InputError(f"classes, maps, masks, scores, labels and ids differ in length: {sorted(lengths)}.")
    if not np.isfinite(scores).all():
        index = int(np.argmin(np.isfinite(scores)))
        raise InputError(f"the score of {ids[index]} is {scores[index]}. Every score must be finite.")

    classes = {}
    for name, members in group(class_names).items():
        known = {i: mask for i in members if (mask := masks[i]) is not None and (np.any(mask) or not truth[i])}
        pixels = collect([maps[i] for i in known], list(known.values()), [ids[i] for i in known])
        pixel_ranking = rank(*pixels)
        anomalous, normal = scores[members][truth[members]], scores[members][~truth[members]]
        image_ranking = rank(anomalous, np.ones(len(anomalous)), normal)
        values = {
            "au_pro": area(pixel_ranking, max_fpr),
            **{f"image_{metric}": value for metric, value in _detection_metrics(image_ranking).items()},
            **{f"pixel_{metric}": value for metric, value in _detection_metrics(pixel_ranking).items()},
        }
        classes[name] = {metric: values[metric] for metric in METRICS}
    return Results(classes)


def group(class_names: Sequence[str]) -> dict[str, list[int]]:
    """Return the indices of each class's images, with classes sorted by name."""
    members: dict[str, list[int]] = {name: [] for name in sorted(set(class_names))}
    for index, name in enumerate(class_names):
        members[name].append(index)
    return members


def precision(ranking: Ranking) -> np.ndarray:
    """Return, for each ranked sample, the share of anomalous ones among all that score at least as high."""
    return ranking.hits / (ranking.hits + ranking.at_or_above)


def _detection_metrics(ranking: Ranking) -> dict[str, float]:
    if ranking.one_sided:
        return {"auroc": math.nan, "ap": math.nan, "f1_max": math.nan}
    # The best threshold is the score of an anomalous sample: any other only adds false alarms.
    f1 = 2 * ranking.hits / (ranking.anomalous + ranking.hits + ranking.at_or_above)
    return {"auroc": area(ranking.uniform()), "ap": float(precision(ranking).mean()), "f1_max": float(f1.max())}


def _mean(values: list[float]) -> float:
    defined = [value for value in values if not math.isnan(value)]
    return sum(defined) / len(defined) if defined else math.nan


def _round(values: dict[str, float]) -> dict[str, float]:
    return {metric: round(value, DIGITS) for metric, value in values.items()}


def _nulls(values: dict[str, float]) -> dict[str, float | None]:
    return {metric: None if math.isnan(value) else value for metric, value in values.items()}


def _numbers(values: dict[str, float | None]) -> dict[str, float]:
    return {metric: math.nan if (value := values[metric]) is None else float(value) for metric in METRICS}
