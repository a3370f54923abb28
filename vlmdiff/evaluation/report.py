"""The report: one HTML page without scripts or external files, and its pictures."""

import base64
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from scipy import ndimage

from vlmdiff import __version__
from vlmdiff.core.errors import InputError
from vlmdiff.core.files import sha256
from vlmdiff.core.git import code_revision
from vlmdiff.core.params import Decision, Params
from vlmdiff.data.manifest import SPLITS
from vlmdiff.detection.calibration import Calibration
from vlmdiff.detection.heatmap import dimmed, heatmap, scaled
from vlmdiff.evaluation import pages
from vlmdiff.evaluation.aupro import thin
from vlmdiff.evaluation.bootstrap import Resampled
from vlmdiff.evaluation.decision import DECISION, PER_CLASS_DECISION, POOLED, Decisions
from vlmdiff.evaluation.detectable import said
from vlmdiff.evaluation.evidence import CONTENT
from vlmdiff.evaluation.metrics import DIGITS, METRICS, PER_CLASS, Results
from vlmdiff.evaluation.plots import (
    DASHES,
    HUES,
    TOGETHER,
    Curves,
    decision_curves,
    draw_costs,
    draw_curve,
    draw_decision,
    draw_histograms,
    histograms,
)
from vlmdiff.evaluation.verdict import Verdict

MISSED, FALSE_ALARMS, SAMPLE = KINDS = ("Missed", "False alarms", "A fair sample")
CHARTS = {
    "pro": ("Per-region overlap", "fpr", "pro"),
    "roc": ("ROC", "fpr", "tpr"),
    "precision_recall": ("Precision and recall", "recall", "precision"),
}
AXES = {
    "fpr": "false positive rate",
    "pro": "mean overlap",
    "tpr": "true positive rate",
    "recall": "recall",
    "precision": "precision",
}
Content = dict[str, Any]
# The page stays below 8 MB: base64 adds a third, and a comparison with a champion up to a half.
PICTURE_BYTES = 3_000_000
PICTURE_SIDE = 320
# The worst mistakes over all classes: how many of each kind, and the side and bytes of their small pictures.
WORST, TILE_SIDE, TILE_BYTES = 8, 160, 500_000
# The score at which their maps are brightest; the threshold is 0.5.
TILE_VMAX = 0.75


@dataclass(frozen=True)
class Example:
    """A judged image: label and verdict, pictures as uint8 (H, W, 3), map and mask (None: unknown) as (H, W).

    Sizes may differ: the report scales the map and the mask to the image.
    """

    path: str
    class_name: str
    defect: str
    score: float
    is_anomalous: bool
    verdict: bool
    kind: str
    image: np.ndarray
    reconstruction: np.ndarray
    anomaly_map: np.ndarray
    mask: np.ndarray | None
    caption: str | None = None


def pick_examples(
    ids: Sequence[str], scores: Sequence[float], is_anomalous: Sequence[bool], verdicts: Sequence[bool], count: int = 3
) -> list[tuple[str, int]]:
    """Choose the images of a class to show: pairs of kind and index, in the report's order.

    There are at most `count` missed defects, lowest scores first, and as many false alarms, highest scores first. A
    fair sample follows, which is the same for every model: the first good and the first defective images by their ids,
    which are hashes.
    """
    values, truth, alarms = np.asarray(scores, float), np.asarray(is_anomalous, bool), np.asarray(verdicts, bool)

    def first(members: np.ndarray, keys: np.ndarray) -> list[int]:
        found = np.flatnonzero(members)
        return found[np.argsort(keys[found], kind="stable")][:count].tolist()

    picked = [(MISSED, i) for i in first(truth & ~alarms, values)]
    picked += [(FALSE_ALARMS, i) for i in first(~truth & alarms, -values)]
    return picked + [(SAMPLE, i) for kind in (truth, ~truth) for i in first(kind, np.asarray(ids))]


def worst_mistakes(examples: Sequence[Example], count: int = WORST) -> list[Example]:
    """Return the worst `count` missed defects and as many false alarms, worst first, with small pictures.

    A missed defect is worse the lower its score, a false alarm the higher.
    """
    missed = sorted((one for one in examples if one.kind == MISSED), key=lambda one: one.score)
    alarms = sorted((one for one in examples if one.kind == FALSE_ALARMS), key=lambda one: -one.score)
    return [replace(one, image=_shrink(one.image, TILE_SIDE)) for one in missed[:count] + alarms[:count]]


def compose(
    results: Results,
    resampled: Resampled,
    examples: Sequence[Example],
    curves: Curves,
    scores: pd.DataFrame,
    calibration: Calibration,
    provenance: dict[str, Any],
    decision: dict[str, Any],
    worst: Sequence[Example] = (),
    costs: Decision | None = None,
) -> Content:
    """Return what a report shows, as JSON: pictures are data URLs, undefined values are None.

    `examples` keep their order within class and kind; `curves` come from `plots.curves`; `scores` has one row per
    image; `provenance` maps names to values, lists or dicts; `decision` comes from `decision.summarise`, `worst` from
    `worst_mistakes`. The same input gives the same content.
    """
    return {
        "results": results.as_dict(),
        "intervals": resampled.intervals(),
        "curves": curves,
        "scores": histograms(scores),
        "alarms": _alarms(scores, calibration) | {"chosen": bool(costs and costs.costs)},
        "galleries": _galleries(examples),
        "provenance": provenance,
        "decision": decision
        | {
            "curve": decision_curves(scores),
            "worst": _tiles(worst),
            "cost": _cost(scores, costs, calibration) if costs and costs.costs else None,
        },
    }


def provenance(params: Params, frame: pd.DataFrame, manifest_file: Path, captions: Path) -> dict[str, Any]:
    """Return what made a model: the data, captions and code, and the parameters of every stage."""
    counts = frame["split"].value_counts()
    return {
        "data": ", ".join(f"{counts.get(split, 0)} {split}" for split in SPLITS),
        "manifest": sha256(manifest_file),
        "captions": f"{params.caption.captioner.kind}, {sha256(captions)}",
        "vlmdiff": __version__,
        **code_revision(),
        **params.model_dump(mode="json", by_alias=True, exclude={"gate", "monitor", "registry"}),
    }


def read_content(folder: Path) -> Content:
    """Read what `compose` returned and an evaluation wrote. Raises InputError if it is missing or invalid."""
    try:
        content = json.loads((folder / CONTENT).read_text(encoding="utf-8"))
        if missing := {"results", "intervals", "curves", "scores", "alarms", "galleries", "provenance"} - set(content):
            raise KeyError(*missing)
    except FileNotFoundError:
        raise InputError(f"{folder / CONTENT} does not exist. Run `vlmdiff evaluate` first") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / CONTENT} is not valid ({error!r}). Run `vlmdiff evaluate` again") from error
    return content


def render(
    content: Content,
    verdict: Verdict | None = None,
    champion: Content | None = None,
    difference: Resampled | None = None,
) -> str:
    """Return the report as one HTML page of less than 8 MB: the gate's verdict, then the content from `compose`.

    champion: the champion's content, if the two were compared; difference: this model's bootstrap samples minus the
    champion's.
    """
    names = list(content["results"][PER_CLASS])
    return pages.page(
        "report.html",
        metrics=METRICS,
        content=content,
        names=names,
        undefined=any(value is None for values in content["results"][PER_CLASS].values() for value in values.values()),
        decision=_decision(content, names),
        charts={
            title: draw_curve(content["curves"][curve], names, x, y, AXES[x], AXES[y])
            for curve, (title, x, y) in CHARTS.items()
        },
        histograms=draw_histograms(content["scores"], names),
        detectable=_detectable(content, names),
        dashes=[" ".join(map(str, dash[1])) if dash != "solid" else "" for dash in DASHES],
        hues=len(HUES),
        verdict=verdict,
        comparison=_compare(content, champion, difference) if champion and difference else None,
    )


def _detectable(content: Content, names: list[str]) -> dict[str, Any] | None:
    """Return a chart of each kind of synthesised defect, and what is found of each class, in words."""
    if "detectable" not in content:
        return None
    facts = content["detectable"]
    charts = {}
    for kind, widths in facts["widths"].items():
        rows = [
            {"class_name": one["class_name"], "width": width, "share": share}
            for one in facts["classes"]
            for width, share in zip(widths, one["curve"][kind]["clear"], strict=True)
        ]
        charts[kind] = draw_curve(rows, names, "width", "share", f"width of a {kind} in pixels", "share found")
    return {"charts": charts, "words": {one["class_name"]: one for one in facts["classes"]}, "said": said}


def write_heatmaps(folder: Path, examples: Sequence[Example]) -> None:
    """Write the anomalous example with the highest score of each class as `folder`/CLASS.png."""
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


def _alarms(scores: pd.DataFrame, calibration: Calibration) -> dict[str, Any]:
    """Return what each threshold finds on the test images, and the guarantee of the calibrated one."""
    truth, values = scores["is_anomalous"].to_numpy(bool), scores["score"].to_numpy()

    def row(name: str, score: float, called: np.ndarray) -> dict[str, Any]:
        hits, alarms = int((called & truth).sum()), int((called & ~truth).sum())
        total = int(truth.sum())
        return {
            "name": name,
            "score": score,
            "found": [hits, total],
            "false_alarms": [alarms, len(truth) - total],
            "f1": 2 * hits / (total + hits + alarms) if total else None,
        }

    rows = [row("from normal images", 0.5, values > 0.5)]
    if calibration.f1_optimal is not None:
        rows.append(row("of the best F1", calibration.f1_optimal, values >= calibration.f1_optimal))
    return {
        "rows": rows,
        "images": calibration.images,
        "asked": calibration.false_alarm_rate,
        "guarantee": calibration.guarantee,
        "left_out": calibration.left_out,
        "range": list(calibration.rate_range()),
    }


def _decision(content: Content, names: list[str]) -> dict[str, Any] | None:
    """Return the names and drawings that the decision's section needs. Reports of earlier releases have none."""
    if (found := content.get("decision")) is None:
        return None
    rows = {TOGETHER: found[POOLED]} | found[PER_CLASS_DECISION]
    points = {
        name: (row["metrics"]["false_alarm_rate"], row["metrics"]["recall"])
        for name, row in rows.items()
        if None not in (row["metrics"]["false_alarm_rate"], row["metrics"]["recall"])
    }
    cost = found["cost"]
    return {
        "titles": DECISION,
        "chart": draw_decision(found["curve"], points, names),
        "costs": draw_costs(pd.DataFrame(cost["curve"])) if cost and cost["curve"] else None,
    }


def _cost(scores: pd.DataFrame, params: Decision, calibration: Calibration) -> dict[str, Any]:
    """Return the costs, the false-alarm rate chosen by them, the curve of the expected cost, and its lowest point."""
    assert params.costs
    curve = Decisions.of(scores).cost_curve(params.costs, params.defect_rate)
    kept = curve.iloc[thin(np.arange(len(curve), dtype=float))].round(DIGITS)
    least = curve.iloc[int(curve["cost"].to_numpy().argmin())].round(DIGITS).to_dict() if len(curve) else None
    return params.costs.model_dump() | {
        "defect_rate": params.defect_rate,
        "rate": calibration.false_alarm_rate,
        "curve": kept.to_dict("records"),
        "least": least,
    }


def _tiles(worst: Sequence[Example]) -> dict[str, list[dict[str, Any]]]:
    """Return the worst mistakes by kind, each with its two pictures as data URLs.

    All maps have one scale: scores have the same threshold everywhere.
    """
    pictures = _encode(
        [
            {
                "photograph": _truth(one.image, one.mask) if one.mask is not None and one.mask.any() else one.image,
                "anomaly map": heatmap(one.image, one.anomaly_map, TILE_VMAX),
            }
            for one in worst
        ],
        TILE_SIDE,
        TILE_BYTES,
    )
    tiles: dict[str, list[dict[str, Any]]] = {MISSED: [], FALSE_ALARMS: []}
    for one, row in zip(worst, pictures, strict=True):
        shown = {key: getattr(one, key) for key in ("path", "class_name", "defect", "score")}
        tiles[one.kind].append({**shown, "pictures": row})
    return tiles


def _compare(content: Content, champion: Content, difference: Resampled) -> dict[str, Any]:
    """Return both models' metrics by class, and pairs of pictures of the fair sample."""
    ours, theirs = content["results"], champion["results"]
    intervals = difference.intervals()

    def cells(values: dict, others: dict, spread: dict) -> dict[str, dict]:
        return {
            metric: {"ours": values[metric], "theirs": others[metric], "range": spread[metric]} for metric in METRICS
        }

    shared = [name for name in ours[PER_CLASS] if name in theirs[PER_CLASS]]
    classes = {
        name: cells(ours[PER_CLASS][name], theirs[PER_CLASS][name], intervals[PER_CLASS][name]) for name in shared
    }
    # Means over other classes would not be comparable.
    same = set(ours[PER_CLASS]) == set(theirs[PER_CLASS])
    mean = cells(ours["mean"], theirs["mean"], intervals["mean"]) if same else None
    pairs = {}
    for name in shared:
        found = {example["path"]: example for example in champion["galleries"].get(name, {}).get(SAMPLE, ())}
        pairs[name] = [
            (example, found[example["path"]])
            for example in content["galleries"].get(name, {}).get(SAMPLE, ())
            if example["path"] in found
        ]
    return {"classes": classes, "mean": mean, "pairs": pairs}


def _galleries(examples: Sequence[Example]) -> dict[str, dict[str, list[dict]]]:
    """Return class to kind to examples, each with its pictures as data URLs."""
    peaks = _peaks(examples)
    pictures = _encode([_pictures(example, peaks[example.class_name]) for example in examples])

    galleries = {name: {kind: [] for kind in KINDS} for name in peaks}
    for example, row in zip(examples, pictures, strict=True):
        shown = {
            key: getattr(example, key) for key in ("path", "defect", "score", "is_anomalous", "verdict", "caption")
        }
        galleries[example.class_name][example.kind].append({**shown, "pictures": row})
    return galleries


def _peaks(examples: Sequence[Example]) -> dict[str, float]:
    """Return the score at which the heatmaps of each class are brightest."""
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


def _encode(
    pictures: list[dict[str, np.ndarray]], side: int = PICTURE_SIDE, limit: int = PICTURE_BYTES
) -> list[dict[str, str]]:
    """Return all pictures as WebP data URLs, as large as `side` and `limit`, for all their bytes, allow."""
    total, encoded = math.inf, []
    while total > limit:
        encoded = [{label: _webp(picture, side) for label, picture in row.items()} for row in pictures]
        total = sum(len(data) for row in encoded for data in row.values())
        side = int(0.9 * side * math.sqrt(limit / max(total, 1)))
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


def _truth(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return the image with the defect outlined and the rest darkened."""
    mask = scaled(mask.astype(bool), image, Image.Resampling.NEAREST)
    picture = np.where(mask[..., None], image / 255, dimmed(image))
    outline = ndimage.binary_dilation(mask, np.ones((3, 3))) & ~mask
    picture[outline] = (0.3, 0.9, 1.0)
    return np.rint(255 * picture).astype(np.uint8)
