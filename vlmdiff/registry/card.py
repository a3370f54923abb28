"""The model card: what people who deploy a model need to know, as Markdown that is part of the version."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import jinja2
import pandas as pd

from vlmdiff.core import params as p
from vlmdiff.core import workspace as w
from vlmdiff.core.errors import InputError
from vlmdiff.core.text import counted, markdown
from vlmdiff.data import manifest
from vlmdiff.data.images import FORMATS
from vlmdiff.detection.decoded import HEATMAP_SIDE
from vlmdiff.detection.settings import SETTINGS
from vlmdiff.evaluation.decision import DECISION, PER_CLASS_DECISION, PER_SIZE, POOLED
from vlmdiff.evaluation.detectable import said
from vlmdiff.evaluation.evidence import Evidence
from vlmdiff.evaluation.metrics import METRICS, PER_CLASS
from vlmdiff.evaluation.report import read_content
from vlmdiff.registry import served

# In the table of classes; the means are given for every metric.
CLASS_METRICS = ("au_pro", "image_auroc")
# Metrics of the verdicts that the card has no room for: MLflow limits the length of a description.
LEFT_OUT = ("balanced_accuracy", "image_ap")
# Characters of a version's description: MLflow on PostgreSQL takes no more.
DESCRIPTION = 5000
# Left out first of a description that is too long; the limits and the licences stay.
LEAST = ("Training data", "Use")
REST = "\n\n`model_card.md` in the model's artifacts has the rest.\n"


def model_card(params: p.Params, by_class: bool = True) -> str:
    """Return the card of this workspace's evaluated model. It has no date: the same model has the same card.

    by_class: include what is known of each class. Raises InputError if files of the evaluation are missing.
    """
    content, evidence = read_content(w.EVALUATION), Evidence.read(w.EVALUATION)
    if "decision" not in content:
        raise InputError(f"{w.EVALUATION} was written by an earlier release. Run `vlmdiff evaluate` again")
    frame = manifest.read(w.MANIFEST)
    test, detector = frame[frame["split"] == "test"], json.loads((w.DETECTOR / SETTINGS).read_text(encoding="utf-8"))
    side = json.loads((w.DETECTOR / "model_index.json").read_text(encoding="utf-8"))["image_size"]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vlmdiff.registry"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"text": markdown, "number": _number}
    card = environment.get_template("model_card.md").render(
        name=params.registry.model_name,
        by_class=by_class,
        metrics=METRICS,
        class_metrics=CLASS_METRICS,
        results=content["results"],
        intervals=content["intervals"],
        classes=content["results"][PER_CLASS],
        number_of={str(name): _count(rows) for name, rows in frame.groupby("class_name")},
        total=_count(frame),
        defects=test.loc[test["is_anomalous"], ["class_name", "defect"]].drop_duplicates().shape[0],
        alarms=content["alarms"],
        share=content["evidence"]["weight"] if "evidence" in content else None,
        decision={key: title for key, title in DECISION.items() if key not in LEFT_OUT},
        together=content["decision"][POOLED],
        decided=content["decision"][PER_CLASS_DECISION],
        sizes={name: row for name, row in content["decision"][PER_SIZE].items() if row["counts"]["defective"][1]},
        detectable=content.get("detectable"),
        found_of=said,
        provenance=content["provenance"],
        detection=detector["detection"],
        side=side,
        photograph=[int(test[key].median()) for key in ("width", "height")],
        latency_ms=evidence.latency_ms,
        size_mb=evidence.size_mb,
        parts=list(_parts(params)),
        served=served,
        counted=counted,
        formats=FORMATS,
        heatmap_side=HEATMAP_SIDE,
    )
    # MLflow's page shows tables without space between columns.
    return re.sub(r" \| (?!---)", " | &ensp;", card)


def description(params: p.Params) -> str:
    """Return the card for MLflow's page of a version: without its title, and without what is too long for it."""
    card = ""
    for by_class in (True, False):
        # The list of versions shows the first line, which says more than the title.
        card = model_card(params, by_class).partition("\n\n")[2]
        if len(card) <= DESCRIPTION:
            return card
    return shortened(card)


def shortened(card: str, limit: int = DESCRIPTION) -> str:
    """Return what fits into `limit` characters of a card without the sections LEAST, and where the rest is."""
    room, sections = limit - len(REST), re.split(r"(?m)^(?=## )", card)
    for name in LEAST:
        if len("".join(sections).rstrip()) > room:
            sections = [section for section in sections if not section.startswith(f"## {name}\n")]
    kept = "".join(sections).rstrip()
    if len(kept) > room:
        paragraphs = kept[:room].split("\n\n")[:-1]
        # Headings, and sentences that a list or a table ends, say nothing alone.
        while paragraphs and (paragraphs[-1].startswith("#") or paragraphs[-1].endswith((":", " for"))):
            paragraphs.pop()
        kept = "\n\n".join(paragraphs)
    return kept + REST


def _count(frame: pd.DataFrame) -> dict[str, int]:
    test = frame[frame["split"] == "test"]
    splits = {split: int((frame["split"] == split).sum()) for split in ("train", "validation")}
    return splits | {"good": int((~test["is_anomalous"]).sum()), "defective": int(test["is_anomalous"].sum())}


def _parts(params: p.Params) -> Iterator[tuple[str, str, str, bool]]:
    """Yield each part from others: its use, name, revision, and whether the model contains its weights."""

    def part(use: str, source: p.Pretrained | p.VisionLanguageModel, inside: bool = True) -> tuple[str, str, str, bool]:
        # The path of a local folder means nothing elsewhere: only its name.
        name = f"the folder {Path(source.model).name}" if Path(source.model).is_dir() else source.model
        return use, name, source.revision or "none", inside

    captioner, first, text = params.caption.captioner, params.first_stage, params.encode.text_encoder
    if isinstance(captioner, p.VisionLanguageModel):
        yield part("captions of the training images", captioner, inside=False)
    if isinstance(captioner, p.Endpoint):
        yield "captions of the training images", captioner.model, "chosen by its endpoint", False
    if first.kind == "backbone":
        yield part("latent space: its features", first.backbone)
    if first.pretrained:
        yield part("latent space: the autoencoder that was fine-tuned", first.pretrained)
    if first.perceptual:
        yield part("loss of the latent space's training", first.perceptual, inside=False)
    if isinstance(text, p.PretrainedTextEncoder):
        yield part("text encoder", text)
    if params.train.pretrained:
        yield part("denoiser: the weights before training", params.train.pretrained)
    for features in params.evaluate.detection.features:
        if isinstance(features, p.BackboneFeatures):
            yield part("features that compare image and reconstruction", features)


def _number(value: float | None, interval: list[float] | None = None) -> str:
    """Format a value in [0, 1] with its interval."""
    if value is None:
        return "not defined"
    return f"{value:.3f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")
