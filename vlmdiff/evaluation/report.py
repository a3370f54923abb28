"""The report: one HTML file that needs neither a network nor a script, and the pictures in it."""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from vlmdiff.errors import InputError
from vlmdiff.evaluation.bootstrap import Resampled
from vlmdiff.evaluation.metrics import METRICS, Results, group
from vlmdiff.evaluation.plots import Curves
from vlmdiff.files import atomic_path

# Truth and verdict to the heading of the examples that share them, in the report's order.
KINDS = {
    (True, False): "Missed",
    (False, True): "False alarms",
    (True, True): "Found",
    (False, False): "Passed",
}
CHARTS = {
    "pro": {"title": "Per-region overlap", "x": "fpr", "y": "pro"},
    "roc": {"title": "ROC", "x": "fpr", "y": "tpr"},
    "precision_recall": {"title": "Precision and recall", "x": "recall", "y": "precision"},
}
AXES = {
    "fpr": "false positive rate",
    "pro": "mean overlap",
    "tpr": "true positive rate",
    "recall": "recall",
    "precision": "precision",
}
# The file stays below 8 MB: base64 adds a third, the rest of the page little.
PICTURE_BYTES = 5_500_000
PICTURE_SIDE = 320


@dataclass(frozen=True)
class Example:
    """A judged photograph: truth and verdict, pictures as uint8 (H, W, 3), map and mask (None: not known) as (H, W).

    Sizes may differ: the report scales the map and the mask to the photograph.
    """

    path: str
    class_name: str
    defect: str
    score: float
    is_anomalous: bool
    verdict: bool
    image: np.ndarray
    reconstruction: np.ndarray
    anomaly_map: np.ndarray
    mask: np.ndarray | None
    caption: str | None = None


def pick_examples(
    class_names: Sequence[str],
    image_scores: Sequence[float],
    is_anomalous: Sequence[bool],
    verdicts: Sequence[bool],
    count: int = 3,
) -> list[int]:
    """Indices of photographs worth a look, at most `count` of each class and kind, in the report's order.

    The kinds are missed defects, lowest scores first; false alarms, highest first; and those rightly found
    and rightly passed, nearest to the median of their scores first.
    """
    scores = np.asarray(image_scores, float)
    picked = []
    for members in group(class_names).values():
        for kind in KINDS:
            found = np.array([i for i in members if (bool(is_anomalous[i]), bool(verdicts[i])) == kind], int)
            if not len(found):
                continue
            if kind == (True, False):
                key = scores[found]
            elif kind == (False, True):
                key = -scores[found]
            else:
                key = abs(scores[found] - np.median(scores[found]))
            picked += found[np.argsort(key, kind="stable")][:count].tolist()
    return picked


def heatmap(image: np.ndarray, anomaly_map: np.ndarray, vmax: float) -> np.ndarray:
    """Lay an anomaly map over its image, darkened and grey; image and result are uint8 (H, W, 3).

    The map (h, w) is scaled to the image. Scores from 0 to `vmax` run from clear to bright yellow on a
    perceptually even scale; higher ones stay there. Raises InputError for a map that is not finite.
    """
    import matplotlib

    if not np.isfinite(anomaly_map).all():
        raise InputError("the anomaly map holds NaN or infinity: every score must be finite")
    level = np.clip(anomaly_map / vmax, 0, 1) if vmax > 0 else np.zeros(anomaly_map.shape)
    level = _scale(level.astype(np.float32), image, Image.Resampling.BILINEAR)
    colour = matplotlib.colormaps["inferno"](level)[..., :3]
    opacity = level[..., None]
    blended = opacity * colour + (1 - opacity) * _dimmed(image)
    return np.rint(255 * blended).astype(np.uint8)


def write_report(
    out: Path,
    results: Results,
    resampled: Resampled,
    examples: Sequence[Example],
    curves: Curves,
    provenance: dict[str, Any],
) -> None:
    """Write the report to the file `out`: tables with intervals, curves and examples of `results`, what made them.

    `examples` keep their order within class and kind; `curves` come from `plots.curves`; `provenance` maps
    names to values, lists or dicts of the same. The same input gives the same bytes, fewer than 8 MB.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vlmdiff.evaluation"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("report.html").render(
        metrics=METRICS,
        results=results,
        interval=resampled.interval,
        charts=[_chart(curves[curve], list(results.classes), **chart) for curve, chart in CHARTS.items()],
        galleries=_galleries(examples),
        provenance=provenance,
    )
    with atomic_path(out) as temporary:
        temporary.write_text(html)


def write_heatmaps(folder: Path, examples: Sequence[Example]) -> None:
    """Write of each class the highest-scored anomalous example as `folder`/CLASS.png: photograph, map and truth."""
    folder.mkdir(parents=True)
    peaks = _peaks(examples)
    for name in sorted(peaks):
        found = [example for example in examples if example.class_name == name and example.is_anomalous]
        if not found:
            continue
        example = max(found, key=lambda example: example.score)
        height, width = example.image.shape[:2]
        row = [
            np.asarray(Image.fromarray(picture).resize((width, height)))
            for picture in _pictures(example, peaks[name]).values()
        ]
        Image.fromarray(_shrink(np.concatenate(row, axis=1), 4 * PICTURE_SIDE)).save(folder / f"{name}.png")


def _chart(rows: list[dict], names: list[str], title: str, x: str, y: str) -> dict[str, Any]:
    """A chart with each class's line in a square of side 100 that starts, as in SVG, at the top left."""
    x_max = max((row[x] for row in rows), default=1.0)
    lines = {}
    for index, name in enumerate(names):
        points = [(row[x] / x_max, row[y]) for row in rows if row["class_name"] == name]
        if points:
            lines[index] = " ".join(f"{100 * right:.2f},{100 - 100 * up:.2f}" for right, up in points)
    return {"title": title, "x": AXES[x], "y": AXES[y], "x_max": x_max, "lines": lines}


def _galleries(examples: Sequence[Example]) -> dict[str, dict[str, list[dict]]]:
    """Class to kind to examples, each with its pictures as data URLs."""
    peaks = _peaks(examples)
    pictures = _encode([_pictures(example, peaks[example.class_name]) for example in examples])

    galleries = {name: {heading: [] for heading in KINDS.values()} for name in peaks}
    for example, row in zip(examples, pictures, strict=True):
        heading = KINDS[example.is_anomalous, example.verdict]
        galleries[example.class_name][heading].append({"example": example, "pictures": row})
    return galleries


def _peaks(examples: Sequence[Example]) -> dict[str, float]:
    """The score at which a class's heatmaps are brightest."""
    peaks: dict[str, float] = {}
    for example in examples:
        peak = float(np.percentile(example.anomaly_map, 99.5))
        peaks[example.class_name] = max(peak, peaks.get(example.class_name, peak))
    return peaks


def _pictures(example: Example, vmax: float) -> dict[str, np.ndarray]:
    photograph = _shrink(example.image, PICTURE_SIDE)
    pictures = {
        "photograph": photograph,
        "reconstruction": example.reconstruction,
        "anomaly map": heatmap(photograph, example.anomaly_map, vmax),
    }
    if example.mask is not None:
        pictures["truth"] = _truth(photograph, example.mask)
    return pictures


def _encode(pictures: list[dict[str, np.ndarray]]) -> list[dict[str, str]]:
    """All pictures as WebP data URLs, as large as PICTURE_SIDE and PICTURE_BYTES for all together allow."""
    side, total = PICTURE_SIDE, math.inf
    while total > PICTURE_BYTES:
        encoded = [{label: _webp(picture, side) for label, picture in row.items()} for row in pictures]
        total = sum(len(data) for row in encoded for data in row.values())
        side = int(0.9 * side * math.sqrt(PICTURE_BYTES / max(total, 1)))
    return [
        {label: f"data:image/webp;base64,{base64.b64encode(data).decode()}" for label, data in row.items()}
        for row in encoded
    ]


def _webp(picture: np.ndarray, side: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(_shrink(picture, side)).save(buffer, "WEBP", quality=85)
    return buffer.getvalue()


def _shrink(picture: np.ndarray, side: int) -> np.ndarray:
    image = Image.fromarray(picture)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return np.asarray(image)


def _scale(values: np.ndarray, image: np.ndarray, resampling: Image.Resampling) -> np.ndarray:
    """`values` (h, w) at the size of `image`."""
    height, width = image.shape[:2]
    return np.asarray(Image.fromarray(values).resize((width, height), resampling))


def _truth(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The photograph inside the defect, outlined; darkened outside."""
    mask = _scale(mask.astype(bool), image, Image.Resampling.NEAREST)
    picture = np.where(mask[..., None], image / 255, _dimmed(image))
    outline = ndimage.binary_dilation(mask, np.ones((3, 3))) & ~mask
    picture[outline] = (0.3, 0.9, 1.0)
    return np.rint(255 * picture).astype(np.uint8)


def _dimmed(image: np.ndarray) -> np.ndarray:
    grey = image @ np.array([0.299, 0.587, 0.114]) / 255
    return np.repeat(0.5 * grey[..., None], 3, axis=2)
