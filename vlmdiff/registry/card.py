"""The model card: what those who deploy a model must know of it, as Markdown that travels with it."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import jinja2
import pandas as pd

from vlmdiff.core import params as p
from vlmdiff.core import workspace as w
from vlmdiff.data import manifest
from vlmdiff.data.images import FORMATS
from vlmdiff.detection.decoded import HEATMAP_SIDE
from vlmdiff.detection.detector import SETTINGS
from vlmdiff.evaluation.judging import Evidence
from vlmdiff.evaluation.metrics import METRICS, PER_CLASS
from vlmdiff.evaluation.report import read_content
from vlmdiff.registry import served

# Of a class; the means are given of every metric.
CLASS_METRICS = ("au_pro", "image_auroc", "pixel_auroc")


def model_card(params: p.Params, by_class: bool = True) -> str:
    """The card of the evaluated model of this workspace, the same for the same model; it has no date.

    by_class: with the table of classes. Raises InputError where the evaluation's files are missing.
    """
    content, evidence = read_content(w.EVALUATION), Evidence.read(w.EVALUATION)
    frame = manifest.read(w.MANIFEST)
    test, detector = frame[frame["split"] == "test"], json.loads((w.DETECTOR / SETTINGS).read_text())
    side = json.loads((w.DETECTOR / "model_index.json").read_text())["image_size"]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vlmdiff.registry"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"text": _text, "number": _number}
    card = environment.get_template("model_card.md").render(
        name=params.registry.model_name,
        by_class=by_class,
        metrics=METRICS,
        class_metrics=CLASS_METRICS,
        results=content["results"],
        intervals=content["intervals"],
        classes=content["results"][PER_CLASS],
        counts=_counts(frame),
        total=_count(frame),
        defects=test.loc[test["is_anomalous"], ["class_name", "defect"]].drop_duplicates().shape[0],
        alarms=content["alarms"],
        provenance=content["provenance"],
        detection=detector["detection"],
        side=side,
        photograph=[int(test[key].median()) for key in ("width", "height")],
        latency_ms=evidence.latency_ms,
        size_mb=evidence.size_mb,
        parts=list(_parts(params)),
        served=served,
        formats=FORMATS,
        heatmap_side=HEATMAP_SIDE,
    )
    # MLflow's page shows a table without space between its columns.
    return re.sub(r" \| (?!---)", " | &ensp;", card)


def _count(frame: pd.DataFrame) -> dict[str, int]:
    test = frame[frame["split"] == "test"]
    splits = {split: int((frame["split"] == split).sum()) for split in ("train", "validation")}
    return splits | {"good": int((~test["is_anomalous"]).sum()), "defective": int(test["is_anomalous"].sum())}


def _counts(frame: pd.DataFrame) -> dict[str, dict[str, int]]:
    return {name: _count(rows) for name, rows in frame.groupby("class_name")}


def _parts(params: p.Params) -> Iterator[tuple[str, str, str, bool]]:
    """What others made: for what it is used, its name, its revision, and whether the model has weights of it."""

    def part(use: str, source: p.Pretrained, inside: bool = True) -> tuple[str, str, str, bool]:
        # A folder of this machine says nothing elsewhere, but for its own name.
        name = f"the folder {Path(source.model).name}" if Path(source.model).is_dir() else source.model
        return use, name, source.revision or "none", inside

    captioner, first, text = params.caption.captioner, params.first_stage, params.encode.text_encoder
    if isinstance(captioner, p.VisionLanguageModel):
        yield part("captions of the training images", captioner, inside=False)
    if isinstance(captioner, p.Endpoint):
        yield "captions of the training images", captioner.model, "as its endpoint had it", False
    if first.kind == "backbone":
        yield part("latent space: its features", first.backbone)
    if first.pretrained:
        yield part("latent space: the autoencoder that it began as", first.pretrained)
    if first.perceptual:
        yield part("loss of the latent space's training", first.perceptual, inside=False)
    if isinstance(text, p.PretrainedTextEncoder):
        yield part("text encoder", text)
    if params.train.pretrained:
        yield part("denoiser that it began as", params.train.pretrained)
    for features in params.evaluate.detection.features:
        if isinstance(features, p.BackboneFeatures):
            yield part("features in which photograph and reconstruction are compared", features)


def _text(value: str) -> str:
    """Any text as Markdown that shows it and does nothing else."""
    return re.sub(r"([\\`*_{}\[\]<>|#~])", r"\\\1", " ".join(str(value).split()))


def _number(value: float | None, interval: list[float] | None = None) -> str:
    """A measure in [0, 1], with its interval."""
    if value is None:
        return "not defined"
    return f"{value:.3f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")
