"""The files of an evaluation that the gate, the registry and a later comparison read; no images are needed again."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from vlmdiff.core.errors import InputError
from vlmdiff.evaluation.bootstrap import Resampled
from vlmdiff.evaluation.decision import Decisions
from vlmdiff.evaluation.metrics import Results

JUDGED, RESULTS, SAMPLES, SCORES, CONTENT = EVIDENCE = (
    "judged.json",
    "metrics.json",
    "samples.npz",
    "scores.parquet",
    "report.json",
)


@dataclass(frozen=True)
class Evidence:
    """What the gate judges a model by.

    results, resampled: the metrics and their bootstrap samples; scores: the verdict on each image, as in `Judged`, with
    `image_id`, `class_name` and the columns of `Decisions.of`; test_set: a hash of the test images, their labels,
    masks and AU-PRO's limit; latency_ms: the median time of one image; size_mb: the detector's folder in 10^6 bytes.
    """

    results: Results
    resampled: Resampled
    scores: pd.DataFrame
    test_set: str
    latency_ms: float
    size_mb: float

    @classmethod
    def read(cls, folder: Path) -> "Evidence":
        """Read what `Judged.write` wrote. Raises InputError if a file is missing or invalid."""
        try:
            facts = json.loads((folder / JUDGED).read_text(encoding="utf-8"))
            measures = facts["test_set"], float(facts["latency_ms"]), float(facts["size_mb"])
        except FileNotFoundError:
            raise InputError(f"{folder / JUDGED} does not exist. Run `vlmdiff evaluate` first") from None
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{folder / JUDGED} is not valid ({error!r}). Run `vlmdiff evaluate` again") from error
        return cls(
            Results.read(folder / RESULTS), Resampled.load(folder / SAMPLES), read_scores(folder / SCORES), *measures
        )

    @cached_property
    def decisions(self) -> Decisions:
        """The verdicts on the test images."""
        return Decisions.of(self.scores)


def read_scores(file: Path) -> pd.DataFrame:
    """Read the table of `Judged.scores`. Raises InputError if the file is missing or invalid."""
    try:
        scores = pd.read_parquet(file)
        missing = {"image_id", "class_name", "defect", "is_anomalous", "score", "verdict"} - set(scores.columns)
        if missing:
            raise ValueError(f"it has no column {min(missing)}")
        if len(bad := scores[~np.isfinite(scores["score"])]):
            raise ValueError(f"the score of image {bad['image_id'].iloc[0]} is not a finite number")
    except FileNotFoundError:
        raise InputError(f"{file} does not exist. Run `vlmdiff evaluate` first") from None
    except (ValueError, OSError) as error:
        raise InputError(f"{file} is not valid ({error}). Run `vlmdiff evaluate` again") from error
    return scores
