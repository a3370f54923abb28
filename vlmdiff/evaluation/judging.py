"""A detector on the test images: everything that the gate, the report and the registry know of a model."""

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
from vlmdiff.core.files import write_json
from vlmdiff.core.params import Evaluate, Prepare
from vlmdiff.data.images import load_mask, load_rgb, resolve
from vlmdiff.data.statistics import image_statistics
from vlmdiff.detection.calibration import f1_optimal
from vlmdiff.detection.detector import Detector
from vlmdiff.evaluation.bootstrap import Resampled, Statistics
from vlmdiff.evaluation.metrics import Results, evaluate_classes
from vlmdiff.evaluation.plots import Curves, curves, histograms, write_plots
from vlmdiff.evaluation.report import CONTENT, Example, compose, pick_examples, render, write_heatmaps

TIMED = 10
JUDGED, RESULTS, SAMPLES = "judged.json", "metrics.json", "samples.npz"
# What a model is judged by later, without its images.
EVIDENCE = (JUDGED, RESULTS, SAMPLES, CONTENT)
# Beside the detector: what the photographs that it was calibrated on are like.
REFERENCE = "reference.parquet"


@dataclass(frozen=True)
class Evidence:
    """What the gate judges a model by: see `Results` and `Resampled`; what it was judged on, what it costs.

    test_set: a hash of the test images, their truth and AU-PRO's limit; latency_ms: of one photograph, the median;
    size_mb: of the detector's folder, in 10^6 bytes.
    """

    results: Results
    resampled: Resampled
    test_set: str
    latency_ms: float
    size_mb: float

    @classmethod
    def read(cls, folder: Path) -> "Evidence":
        """Read what `Judged.write` wrote. Raises InputError where a file is missing or is something else."""
        try:
            facts = json.loads((folder / JUDGED).read_text())
            measures = facts["test_set"], float(facts["latency_ms"]), float(facts["size_mb"])
        except FileNotFoundError:
            raise InputError(f"{folder / JUDGED} does not exist: run `vlmdiff evaluate` first") from None
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{folder / JUDGED} is something else ({error!r}): run `vlmdiff evaluate`") from error
        return cls(Results.read(folder / RESULTS), Resampled.load(folder / SAMPLES), *measures)


@dataclass
class Judged:
    """A detector's results on the test images, class by class."""

    detector: Detector
    test_set: str
    latency_ms: float
    results: Results = field(default_factory=lambda: Results({}))
    resampled: Resampled = field(default_factory=lambda: Resampled({}))
    curves: Curves = field(default_factory=lambda: curves([], [], []))
    examples: list[Example] = field(default_factory=list)
    # A row an image: image_id, path, class_name, defect, is_anomalous, score, verdict.
    scores: pd.DataFrame = field(default_factory=pd.DataFrame)

    def f1_optimal(self) -> float | None:
        """The score from which on an alarm has the best F1 over all the images; None where that is not defined."""
        return f1_optimal(self.scores["score"].to_numpy(), self.scores["is_anomalous"].to_numpy())

    def write(self, folder: Path, size_mb: float, provenance: dict[str, Any]) -> None:
        """Into the existing `folder`: metrics, their intervals and samples, scores, curves, pictures, the report.

        size_mb: of the detector's folder; provenance: as in `report.compose`.
        """
        self.results.write(folder / RESULTS)
        self.resampled.write(folder / "intervals.json")
        self.resampled.save(folder / SAMPLES)
        self.scores.to_parquet(folder / "scores.parquet", index=False)
        write_plots(folder / "plots", self.curves | {"scores": histograms(self.scores)})
        write_heatmaps(folder / "heatmaps", self.examples)
        measures = {"test_set": self.test_set, "latency_ms": round(self.latency_ms, 3), "size_mb": round(size_mb, 6)}
        write_json(folder / JUDGED, measures)
        content = compose(
            self.results,
            self.resampled,
            self.examples,
            self.curves,
            self.scores,
            self.detector.calibration,
            provenance,
        )
        write_json(folder / CONTENT, content)
        (folder / "report.html").write_text(render(content))


def judge_images(
    detector: Detector, frame: pd.DataFrame, data: Prepare, texts: dict[str, str], params: Evaluate
) -> Judged:
    """Judge the test images of a manifest, holding the maps of one class at a time.

    texts: captions by image_id, for a detector that wants them and for the report. Raises InputError for an image that
    cannot be read, or lacks a caption that is wanted.
    """
    test = _test_images(frame)
    size = detector.pipeline.config.image_size
    prompts = detector_captions(detector, test, texts)
    images = _read(test["path"], data, size)
    stream = iter(track(detector.stream(images, params.batch_size, prompts), "judge", len(test)))
    hashed, latency = hash_test_set(frame, data, params.max_fpr), _latency_ms(detector, test, data, prompts)
    judged = Judged(detector, hashed, latency)
    tables = []
    for name, part in test.groupby("class_name"):
        part = part.reset_index(drop=True)
        found = list(islice(stream, len(part)))
        maps = [detection.anomaly_map for detection in found]
        masks = [
            # The mask of an anomalous image without one is not known, which is not the same as empty.
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
        judged.resampled.classes[name] = Statistics.of(maps, masks, scores, truths).draw(name, params.max_fpr)
        for curve, points in curves(classes, maps, masks, params.max_fpr).items():
            judged.curves[curve] += points
        table = part[["image_id", "path", "class_name", "defect", "is_anomalous"]]
        tables.append(table.assign(score=scores, verdict=verdicts))
        judged.examples += [
            Example(
                path=paths[i],
                class_name=name,
                defect=part["defect"][i] or "good",
                score=scores[i],
                is_anomalous=truths[i],
                verdict=verdicts[i],
                kind=kind,
                image=load_rgb(resolve(data.image_root, paths[i]), None, data.max_pixels),
                reconstruction=found[i].reconstruction,
                # A copy, not a view of its whole batch.
                anomaly_map=maps[i].copy(),
                mask=masks[i],
                caption=texts.get(part["image_id"][i]),
            )
            for kind, i in pick_examples(part["image_id"].tolist(), scores, truths, verdicts, params.examples)
        ]
    judged.scores = pd.concat(tables, ignore_index=True)
    return judged


def write_reference(folder: Path, held_out: pd.DataFrame, scores: np.ndarray, data: Prepare) -> None:
    """Write `folder`/REFERENCE, a row an image of calibration: image_id, class_name, score, `image_statistics`.

    held_out: the manifest's rows; scores: theirs, (N,). The statistics are of the photographs as they came.
    """
    images = _read(held_out["path"], data, None)
    rows = [image_statistics(image) for image in track(images, "look at held-out images", len(held_out))]
    frame = held_out[["image_id", "class_name"]].reset_index(drop=True).assign(score=scores.astype(np.float64))
    table = pa.Table.from_pandas(frame.join(pd.DataFrame(rows)), preserve_index=False)
    pq.write_table(table.replace_schema_metadata(), folder / REFERENCE)


def _test_images(frame: pd.DataFrame) -> pd.DataFrame:
    """The test images of a manifest, class by class."""
    return frame[frame["split"] == "test"].sort_values("class_name", kind="stable", ignore_index=True)


def hash_test_set(frame: pd.DataFrame, data: Prepare, max_fpr: float) -> str:
    """A hash of what is judged: each test image, its class and truth, its mask's bytes; and AU-PRO's limit."""
    rows = []
    for row in _test_images(frame).itertuples():
        mask = None if row.mask_path is None else resolve(data.image_root, row.mask_path).read_bytes()
        digest = mask and hashlib.sha256(mask).hexdigest()
        rows.append(json.dumps([row.class_name, row.image_id, bool(row.is_anomalous), digest]))
    return hashlib.sha256("\n".join([f"{max_fpr!r}", *sorted(rows)]).encode()).hexdigest()


def detector_captions(detector: Detector, rows: pd.DataFrame, texts: dict[str, str]) -> list[str] | None:
    """The captions by which this detector judges a manifest's rows; None where it judges without."""
    match detector.params.captions:
        case "none":
            return None
        case "image":
            return captions_of(rows, texts)
        case "class":
            return detector.captions_of(rows["class_name"])


def captions_of(rows: pd.DataFrame, texts: dict[str, str]) -> list[str]:
    """The captions of a manifest's rows. InputError naming an image that has none."""
    for image_id, path in zip(rows["image_id"], rows["path"], strict=True):
        if image_id not in texts:
            raise InputError(f"{path} has no caption: run the caption stage again")
    return [texts[image_id] for image_id in rows["image_id"]]


def _read(paths: pd.Series, data: Prepare, size: int | None) -> Iterator[np.ndarray]:
    for path in paths:
        yield load_rgb(resolve(data.image_root, path), size, data.max_pixels)


def _latency_ms(detector: Detector, test: pd.DataFrame, data: Prepare, prompts: Sequence[str] | None) -> float:
    """The median time that a photograph alone takes; the first, which finds nothing warm, does not count."""
    times = []
    for i in range(min(len(test), TIMED + 1)):
        (image,) = _read(test["path"][i : i + 1], data, detector.pipeline.config.image_size)
        start = time.perf_counter()
        detector.detect([image], captions=prompts and [prompts[i]])
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[1:] or times) if times else math.nan
