"""Pixel curves and histograms of image scores by class: as rows for DVC plots and as SVG."""

import io
import re
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd

from vlmdiff.core.files import write_json
from vlmdiff.evaluation.aupro import Ranking, check_limit, collect, curve, rank, thin
from vlmdiff.evaluation.metrics import DIGITS, group, precision

Rows = list[dict[str, str | float]]
Curves = dict[str, Rows]
BINS = 40
# Placeholder colours. `_svg` replaces them by variables of the page's style sheet, for light, dark and print.
HUES = ("#0067b1", "#d1600a", "#16825b", "#b0357f", "#7a5cc4", "#8a6a00", "#0b8a99", "#6b6f76")
# The curve over all classes together, beside those of the classes.
TOGETHER = "all classes together"
DASHES = ("solid", (0, (5, 2)), (0, (1.5, 2)), (0, (6, 2, 1.5, 2)))
SOFT, RULE, GOOD, BAD, INK = ("#010101", "#020202", "#030303", "#040404", "#050505")
NAMES = {SOFT: "soft", RULE: "rule", GOOD: "good", BAD: "bad", INK: "ink"} | {
    hue: f"h{i}" for i, hue in enumerate(HUES)
}
STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "lines.linewidth": 1.3,
    **dict.fromkeys(("font.size", "axes.titlesize"), 8),
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), SOFT),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), RULE),
    **dict.fromkeys(("text.parse_math", "axes.spines.top", "axes.spines.right"), False),
}


def curves(
    class_names: Sequence[str], maps: Sequence[np.ndarray], masks: Sequence[np.ndarray | None], max_fpr: float = 0.3
) -> Curves:
    """Return the rows of the pixel curves `pro`, `roc` and `precision_recall`, at most 200 per class and curve.

    A row holds the `class_name` and a point: (fpr, pro) up to `max_fpr`, (fpr, tpr), or (recall, precision). Input and
    errors are those of `aupro`; images whose mask is None are omitted. A class without normal or without anomalous
    pixels has no rows.
    """
    check_limit(max_fpr)
    rows: Curves = {"pro": [], "roc": [], "precision_recall": []}
    for name, members in group(class_names).items():
        known = {i: mask for i in members if (mask := masks[i]) is not None}
        ranking = rank(*collect([maps[i] for i in known], list(known.values())))
        rows["pro"] += _rows(name, ("fpr", "pro"), curve(ranking, max_fpr))
        rows["roc"] += _rows(name, ("fpr", "tpr"), curve(ranking.uniform()))
        rows["precision_recall"] += _rows(name, ("recall", "precision"), _precision_recall(ranking))
    return rows


def write_plots(folder: Path, rows: Curves) -> None:
    """Write each curve's rows as `folder`/NAME.json, for `dvc plots`."""
    for name, points in rows.items():
        write_json(Path(folder) / f"{name}.json", points)


def histograms(scores: pd.DataFrame) -> Rows:
    """Count the good and the defective images of each class in BINS equal parts of the scores' range [0, 1].

    `scores` has one row per image, with `class_name`, `is_anomalous` and `score`.
    """
    rows: Rows = []
    for (name, is_anomalous), part in scores.groupby(["class_name", "is_anomalous"]):
        truth = "defective" if is_anomalous else "good"
        counts, edges = np.histogram(part["score"], BINS, (0, 1))
        rows += [
            {"class_name": str(name), "truth": truth, "score": round(float(left), DIGITS), "images": int(count)}
            for count, left in zip(counts, edges[:-1], strict=True)
        ]
    return rows


def decision_curves(scores: pd.DataFrame) -> Rows:
    """Return what any threshold on the image scores finds: rows of `class_name`, `false_alarm_rate` and `recall`.

    `scores` is as in `histograms`. There are at most 200 rows per class and for TOGETHER, none without normal or
    without anomalous images.
    """
    rows: Rows = []
    parts = [(TOGETHER, scores), *scores.groupby("class_name")]
    for name, part in parts:
        truth, values = part["is_anomalous"].to_numpy(bool), part["score"].to_numpy(np.float64)
        ranking = rank(values[truth], np.ones(truth.sum()), values[~truth])
        rows += _rows(str(name), ("false_alarm_rate", "recall"), curve(ranking.uniform()))
    return rows


def draw_decision(rows: Rows, points: dict[str, tuple[float, float]], names: Sequence[str]) -> str:
    """Draw the curves of `decision_curves` as SVG, up to a false-alarm rate of 0.3.

    points: false-alarm rate and recall at the threshold, by class and for TOGETHER; they are marked.
    """
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE | {"svg.hashsalt": "decision"}):
        figure, axes = plt.subplots(figsize=(3.4, 3.0), layout="tight")
        for i, name in [*enumerate(names), (-1, TOGETHER)]:
            line = [(row["false_alarm_rate"], row["recall"]) for row in rows if row["class_name"] == name]
            if not line:
                continue
            colour = INK if i < 0 else HUES[i % len(HUES)]
            style = "solid" if i < 0 else DASHES[i // len(HUES) % len(DASHES)]
            axes.plot(
                *zip(*line, strict=True),
                color=colour,
                linestyle=style,
                linewidth=2.2 if i < 0 else STYLE["lines.linewidth"],
                gid="together" if i < 0 else f"line c{i}",
            )
            if name in points:
                axes.plot(*points[name], "o", color=colour, markersize=6 if i < 0 else 4, clip_on=False, zorder=3)
        if not rows:
            axes.text(0.5, 0.5, "not defined for any class", ha="center", transform=axes.transAxes)
        axes.set(xlabel="false-alarm rate", ylabel="recall", xlim=(0, 0.3), ylim=(0, 1.02))
        axes.grid(linewidth=0.6)
        return _svg(figure)


def draw_costs(costs: pd.DataFrame) -> str:
    """Draw the curve of `Decisions.cost_curve` over the threshold as SVG, with its two parts and the threshold 0.5."""
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE | {"svg.hashsalt": "costs"}):
        figure, axes = plt.subplots(figsize=(3.4, 3.0), layout="tight")
        steps = pd.concat([costs, costs.tail(1).assign(threshold=1.0)])
        for column, colour, width in (("misses", BAD, 1.3), ("false_alarms", GOOD, 1.3), ("cost", INK, 2.2)):
            axes.step(steps["threshold"], steps[column], where="post", color=colour, linewidth=width)
        axes.axvline(0.5, color=INK, linewidth=0.8)
        axes.set(xlabel="threshold", ylabel="expected cost of an image", xlim=(0, 1), ylim=(0, None))
        axes.grid(linewidth=0.6)
        return _svg(figure)


def draw_curve(rows: Rows, names: Sequence[str], x: str, y: str, x_label: str, y_label: str) -> str:
    """Draw one line per class as SVG, for a page that defines the colours. `names` orders the classes."""
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE | {"svg.hashsalt": y_label}):
        figure, axes = plt.subplots(figsize=(3.4, 3.0), layout="tight")
        for i, name in enumerate(names):
            points = [(row[x], row[y]) for row in rows if row["class_name"] == name]
            if points:
                style = DASHES[i // len(HUES) % len(DASHES)]
                axes.plot(*zip(*points, strict=True), color=HUES[i % len(HUES)], linestyle=style, gid=f"line c{i}")
        if not rows:
            axes.text(0.5, 0.5, "not defined for any class", ha="center", transform=axes.transAxes)
        axes.set(xlabel=x_label, ylabel=y_label, ylim=(0, 1.02), xlim=(0, max((row[x] for row in rows), default=1)))
        axes.grid(linewidth=0.6)
        return _svg(figure)


def draw_histograms(rows: Rows, names: Sequence[str], columns: int = 4) -> str:
    """Draw one panel per class as SVG: good images upwards, defective ones downwards, and the threshold."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    names = [name for name in names if any(row["class_name"] == name for row in rows)]
    lines = max(-(-len(names) // columns), 1)
    with plt.rc_context(STYLE | {"svg.hashsalt": "scores"}):
        size = (2.6 * columns, 1.5 * lines)
        figure, axes = plt.subplots(lines, columns, figsize=size, sharex=True, squeeze=False, layout="tight")
        for axis in axes.flat[len(names) :]:
            axis.set_axis_off()
        for axis, name in zip(axes.flat, names, strict=False):
            for truth, colour, sign in (("good", GOOD, 1), ("defective", BAD, -1)):
                found = [row for row in rows if row["class_name"] == name and row["truth"] == truth]
                places, counts = ([row[key] for row in found] for key in ("score", "images"))
                axis.bar(places, sign * np.array(counts), 1 / BINS, align="edge", color=colour)
            axis.axvline(0.5, color=INK, linewidth=0.8)
            axis.axhline(0, color=RULE, linewidth=0.8)
            # A dollar sign in a name is no formula.
            axis.set_title(name, parse_math=False)
            axis.set(xlim=(0, 1), xticks=(0, 0.5, 1))
            axis.yaxis.set_major_locator(MaxNLocator(4, integer=True))
            axis.yaxis.set_major_formatter(lambda tick, _: f"{abs(tick):g}")
            axis.tick_params(axis="x", labelbottom=True)
        return _svg(figure)


def draw_distributions(
    then: np.ndarray, now: np.ndarray, weights: np.ndarray, label: str, threshold: float | None = None
) -> str:
    """Draw two histograms of shares as SVG: `then` (N,) with `weights`, filled, and `now` (M,) as a line."""
    import matplotlib.pyplot as plt

    edges = np.histogram_bin_edges(np.concatenate([then, now]), BINS // 2).tolist()
    weights = weights / weights.sum() if weights.sum() else np.full(len(then), 1 / len(then))
    with plt.rc_context(STYLE | {"svg.hashsalt": label}):
        figure, axes = plt.subplots(figsize=(3.4, 2.0), layout="tight")
        axes.hist(then, edges, weights=weights, color=RULE)
        axes.hist(now, edges, weights=np.full(len(now), 1 / len(now)), histtype="step", color=HUES[0], linewidth=1.5)
        if threshold is not None:
            axes.axvline(threshold, color=INK, linewidth=0.8)
        axes.set(xlabel=label, ylabel="share")
        return _svg(figure)


def _svg(figure) -> str:
    """Return a figure as an `svg` element for HTML, without namespaces and metadata, with named colours."""
    import matplotlib.pyplot as plt

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    plt.close(figure)
    root = ElementTree.fromstring(buffer.getvalue())
    for element in root.iter():
        for child in [child for child in element if child.tag.endswith("}metadata")]:
            element.remove(child)
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        if element.get("id", "").startswith("line "):
            element.set("class", element.attrib.pop("id"))
        elif "clipPath" not in element.tag and element.tag != "path":
            # Unused ids would repeat on a page with several drawings.
            element.attrib.pop("id", None)
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    text = ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)
    return re.sub("|".join(NAMES), lambda found: f"var(--{NAMES[found[0]]})", text)


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
