"""Evaluate a detector on the test images, and write what the gate, the report and the registry read."""

import hashlib
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from vlmdiff.core.console import track
from vlmdiff.core.errors import InputError
from vlmdiff.core.files import sha256, write_json
from vlmdiff.core.params import Decision, Evaluate, Prepare
from vlmdiff.data.images import check_bytes, load_mask, load_rgb, resolve
from vlmdiff.data.statistics import image_statistics
from vlmdiff.detection.calibration import f1_optimal
from vlmdiff.detection.detection import Detection
from vlmdiff.detection.detector import Detector
from vlmdiff.detection.settings import KINDS
from vlmdiff.evaluation.bootstrap import Resampled, Statistics
from vlmdiff.evaluation.decision import Decisions, regions_found, summarise, values_of
from vlmdiff.evaluation.evidence import CONTENT, JUDGED, RESULTS, SAMPLES, SCORES
from vlmdiff.evaluation.metrics import Results, evaluate_classes
from vlmdiff.evaluation.plots import Curves, curves, decision_curves, histograms, write_plots
from vlmdiff.evaluation.report import (
    SAMPLE,
    WORST,
    Example,
    compose,
    pick_examples,
    render,
    worst_mistakes,
    write_heatmaps,
)

TIMED = 10
# Raised whenever masks are read otherwise: metrics by other masks are not compared.
MASKS = 2
# Beside the detector: statistics of the images that it was calibrated on.
REFERENCE = "reference.parquet"


@dataclass
class Judged:
    """The results of a detector on the test images, by class."""

    detector: Detector
    test_set: str
    latency_ms: float
    costs: Decision
    results: Results = field(default_factory=lambda: Results({}))
    resampled: Resampled = field(default_factory=lambda: Resampled({}))
    curves: Curves = field(default_factory=lambda: curves([], [], []))
    examples: list[Example] = field(default_factory=list)
    # Over all classes, the worst first.
    worst: list[Example] = field(default_factory=list)
    # One row per image: image_id, path, class_name, defect, is_anomalous, score, verdict, and of each region of its
    # defect, as lists: regions (its share of the image) and regions_found.
    scores: pd.DataFrame = field(default_factory=pd.DataFrame)
    # The results of each kind of evidence alone, if there are two, and the shares of retrieval that were tried.
    alone: dict[str, Results] = field(default_factory=dict)
    tried: list[dict[str, float]] = field(default_factory=list)
    # What it can find, as `detectable.content` gives it.
    detectable: dict[str, Any] | None = None

    def f1_optimal(self) -> float | None:
        """Return the threshold with the best F1 over all images, None if it is not defined."""
        return f1_optimal(self.scores["score"].to_numpy(), self.scores["is_anomalous"].to_numpy())

    def write(self, folder: Path, size_mb: float, provenance: dict[str, Any]) -> None:
        """Write metrics, intervals, samples, scores, curves, pictures and the report into the existing `folder`.

        size_mb: the size of the detector's folder; provenance: as in `report.compose`.
        """
        decision = summarise(Decisions.of(self.scores), self.costs)
        write_json(folder / RESULTS, self.results.as_dict() | values_of(decision))
        write_json(folder / "intervals.json", self.resampled.intervals() | values_of(decision, "intervals"))
        self.resampled.save(folder / SAMPLES)
        self.scores.to_parquet(folder / SCORES, index=False)
        drawn = {"scores": histograms(self.scores), "decision": decision_curves(self.scores)}
        write_plots(folder / "plots", self.curves | drawn)
        write_heatmaps(folder / "heatmaps", self.examples)
        measures = {"test_set": self.test_set, "latency_ms": round(self.latency_ms, 3), "size_mb": round(size_mb, 6)}
        write_json(folder / JUDGED, measures)
        content = compose(
            self.results,
            self.resampled,
            self.examples,
            self.curves,
            self.scores,
            self.detector.calibrated(),
            provenance,
            decision,
            self.worst,
            self.costs,
        )
        if self.alone:
            content["evidence"] = {
                "weight": self.detector.calibrated().weight,
                "alone": {kind: results.as_dict() for kind, results in self.alone.items()},
                "tried": self.tried,
            }
        if self.detectable:
            content["detectable"] = self.detectable
        write_json(folder / CONTENT, content)
        (folder / "report.html").write_text(render(content), encoding="utf-8")


def judge_images(
    detector: Detector, frame: pd.DataFrame, data: Prepare, texts: dict[str, str], params: Evaluate
) -> Judged:
    """Evaluate the test images of a manifest; the maps of only one class are in memory at a time.

    texts: captions by image_id, for the report and for a detector that uses captions. Raises InputError if an image
    cannot be read, or lacks a caption that the detector needs.
    """
    test = _test_images(frame)
    size = detector.pipeline.config.image_size
    prompts = detector_captions(detector, test, texts)
    images = _read(test["path"], data, size)
    stream = iter(track(detector.stream(images, params.batch_size, prompts, test["path"]), "judge", len(test)))
    hashed, latency = hash_test_set(frame, data, params.max_fpr), _latency_ms(detector, test, data, prompts)
    judged = Judged(detector, hashed, latency, params.decision)
    tables = []
    for name, part in test.groupby("class_name"):
        name, part = str(name), part.reset_index(drop=True)
        found = list(islice(stream, len(part)))
        maps = [detection.anomaly_map for detection in found]
        masks = [
            # The mask of an anomalous image without a mask file is unknown, not empty.
            (None if is_anomalous else np.zeros((size, size), bool))
            if mask is None
            else load_mask(resolve(data.image_root, mask), size, data.max_pixels)
            for mask, is_anomalous in zip(part["mask_path"], part["is_anomalous"], strict=True)
        ]
        classes, scores = [name] * len(part), [detection.score for detection in found]
        truths, verdicts = part["is_anomalous"].tolist(), [detection.is_anomalous for detection in found]
        paths = part["path"].tolist()
        results = evaluate_classes(classes, maps, masks, scores, params.max_fpr, paths, truths)
        judged.results.classes.update(results.classes)
        if detector.bank is not None:
            for i, kind in enumerate(KINDS):
                of_kind = [detection.evidence[i] for detection in found if detection.evidence is not None]
                of_scores = detector.image_scores(np.stack(of_kind)).tolist()
                results = evaluate_classes(classes, of_kind, masks, of_scores, params.max_fpr, paths, truths)
                judged.alone.setdefault(kind, Results({})).classes.update(results.classes)
        judged.resampled.classes[name] = Statistics.of(maps, masks, scores, truths).draw(name, params.max_fpr)
        for curve, points in curves(classes, maps, masks, params.max_fpr).items():
            judged.curves[curve] += points
        table = part[["image_id", "path", "class_name", "defect", "is_anomalous"]]
        regions = [
            ([], []) if mask is None else regions_found(mask, detection.marked)
            for mask, detection in zip(masks, found, strict=True)
        ]
        areas, hits = (pd.Series([row[i] for row in regions], dtype=object) for i in (0, 1))
        tables.append(table.assign(score=scores, verdict=verdicts, regions=areas, regions_found=hits))
        ids = part["image_id"].tolist()
        shown = pick_examples(ids, scores, truths, verdicts, params.examples)
        judged.examples += _examples(shown, part, found, masks, texts, data)
        mistakes = [one for one in pick_examples(ids, scores, truths, verdicts, WORST) if one[0] != SAMPLE]
        judged.worst = worst_mistakes([*judged.worst, *_examples(mistakes, part, found, masks, texts, data)])
    judged.scores = pd.concat(tables, ignore_index=True)
    return judged


def _examples(
    picked: list[tuple[str, int]],
    part: pd.DataFrame,
    found: list[Detection],
    masks: list[np.ndarray | None],
    texts: dict[str, str],
    data: Prepare,
) -> Iterator[Example]:
    """Yield what the report shows of the picked images of a class: pairs of kind and row of `part`."""
    for kind, i in picked:
        yield Example(
            path=part["path"][i],
            class_name=part["class_name"][i],
            defect=part["defect"][i] or "good",
            score=found[i].score,
            is_anomalous=bool(part["is_anomalous"][i]),
            verdict=found[i].is_anomalous,
            kind=kind,
            image=load_rgb(resolve(data.image_root, part["path"][i]), None, data.max_pixels),
            reconstruction=found[i].reconstruction,
            # A copy, not a view of its whole batch.
            anomaly_map=found[i].anomaly_map.copy(),
            mask=masks[i],
            caption=texts.get(part["image_id"][i]),
        )


def write_reference(folder: Path, held_out: pd.DataFrame, scores: np.ndarray, data: Prepare) -> None:
    """Write `folder`/REFERENCE, one row per calibration image: image_id, class_name, score, `image_statistics`.

    held_out: N rows of the manifest; scores: (N,). The statistics are those of the original images.
    """
    images = _read(held_out["path"], data, None)
    rows = [image_statistics(image) for image in track(images, "read held-out images", len(held_out))]
    frame = held_out[["image_id", "class_name"]].reset_index(drop=True).assign(score=scores.astype(np.float64))
    table = pa.Table.from_pandas(frame.join(pd.DataFrame(rows)), preserve_index=False)
    pq.write_table(table.replace_schema_metadata(), folder / REFERENCE)


def _test_images(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the test images of a manifest, sorted by class."""
    return frame[frame["split"] == "test"].sort_values("class_name", kind="stable", ignore_index=True)


def hash_test_set(frame: pd.DataFrame, data: Prepare, max_fpr: float) -> str:
    """Return a hash of the test images, their classes, labels and masks, how masks are read, and AU-PRO's limit."""
    rows = []
    for row in _test_images(frame).itertuples():
        digest = None
        if row.mask_path:
            mask = resolve(data.image_root, str(row.mask_path))
            check_bytes(mask.stat().st_size, data.max_pixels, str(mask))
            digest = sha256(mask)
        rows.append(json.dumps([row.class_name, row.image_id, bool(row.is_anomalous), digest]))
    return hashlib.sha256("\n".join([f"{max_fpr!r} {MASKS}", *sorted(rows)]).encode()).hexdigest()


def detector_captions(detector: Detector, rows: pd.DataFrame, texts: dict[str, str]) -> list[str] | None:
    """Return the captions that this detector needs for rows of a manifest, None if it needs none."""
    match detector.params.captions:
        case "none":
            return None
        case "image":
            return captions_of(rows, texts)
        case "class":
            return detector.captions_of(rows["class_name"])


def captions_of(rows: pd.DataFrame, texts: dict[str, str]) -> list[str]:
    """Return the captions of rows of a manifest. Raises InputError that names an image without a caption."""
    for image_id, path in zip(rows["image_id"], rows["path"], strict=True):
        if image_id not in texts:
            raise InputError(f"{path} has no caption: run the caption stage again")
    return [texts[image_id] for image_id in rows["image_id"]]


def _read(paths: pd.Series, data: Prepare, size: int | None) -> Iterator[np.ndarray]:
    for path in paths:
        yield load_rgb(resolve(data.image_root, path), size, data.max_pixels)


def _latency_ms(detector: Detector, test: pd.DataFrame, data: Prepare, prompts: Sequence[str] | None) -> float:
    """Return the median time of judging one image; the first call, which warms up, does not count."""
    times = []
    for i in range(min(len(test), TIMED + 1)):
        (image,) = _read(test["path"][i : i + 1], data, detector.pipeline.config.image_size)
        start = time.perf_counter()
        detector.detect([image], captions=prompts and [prompts[i]], names=test["path"][i : i + 1])
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[1:] or times) if times else math.nan
