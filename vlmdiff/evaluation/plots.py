"""Pixel-level curves of each class, as rows that DVC plots and the report draws."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vlmdiff.evaluation.aupro import Ranking, check_limit, collect, curve, rank, thin
from vlmdiff.evaluation.metrics import DIGITS, group, precision
from vlmdiff.files import write_json

Curves = dict[str, list[dict[str, str | float]]]


def curves(
    class_names: Sequence[str],
    maps: Sequence[np.ndarray],
    masks: Sequence[np.ndarray | None],
    max_fpr: float = 0.3,
) -> Curves:
    """Rows of three curves over pixels, at most 200 a class: `pro`, `roc` and `precision_recall`.

    A row is the `class_name` and a point: (fpr, pro) up to `max_fpr`, (fpr, tpr), or (recall, precision).
    Input and errors are those of `aupro`, images without a mask (None) are left out; a class without normal or without
    anomalous pixels has no rows.
    """
    check_limit(max_fpr)
    rows: Curves = {"pro": [], "roc": [], "precision_recall": []}
    for name, members in group(class_names).items():
        known = [i for i in members if masks[i] is not None]
        ranking = rank(*collect([maps[i] for i in known], [masks[i] for i in known]))
        rows["pro"] += _rows(name, ("fpr", "pro"), curve(ranking, max_fpr))
        rows["roc"] += _rows(name, ("fpr", "tpr"), curve(ranking.uniform()))
        rows["precision_recall"] += _rows(name, ("recall", "precision"), _precision_recall(ranking))
    return rows


def write_plots(folder: Path, rows: Curves) -> None:
    """Write each curve's rows as `folder`/NAME.json, for `dvc plots`."""
    for name, points in rows.items():
        write_json(Path(folder) / f"{name}.json", points)


def _precision_recall(ranking: Ranking) -> tuple[np.ndarray, np.ndarray]:
    if ranking.one_sided:
        return np.empty(0), np.empty(0)
    recall = ranking.hits / ranking.anomalous
    chosen = thin(recall)
    return recall[chosen], precision(ranking)[chosen]


def _rows(class_name: str, axes: tuple[str, str], points: tuple[np.ndarray, np.ndarray]) -> list[dict]:
    return [
        {"class_name": class_name, axes[0]: round(float(x), DIGITS), axes[1]: round(float(y), DIGITS)}
        for x, y in zip(*points, strict=True)
    ]
