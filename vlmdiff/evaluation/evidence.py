"""The files of an evaluation that the gate, the registry and a later comparison read; no images are needed again."""

import json
from dataclasses import dataclass
from pathlib import Path

from vlmdiff.core.errors import InputError
from vlmdiff.evaluation.bootstrap import Resampled
from vlmdiff.evaluation.metrics import Results

JUDGED, RESULTS, SAMPLES, CONTENT = EVIDENCE = "judged.json", "metrics.json", "samples.npz", "report.json"


@dataclass(frozen=True)
class Evidence:
    """What the gate judges a model by.

    results, resampled: the metrics and their bootstrap samples; test_set: a hash of the test images, their labels,
    masks and AU-PRO's limit; latency_ms: the median time of one image; size_mb: the detector's folder in 10^6 bytes.
    """

    results: Results
    resampled: Resampled
    test_set: str
    latency_ms: float
    size_mb: float

    @classmethod
    def read(cls, folder: Path) -> "Evidence":
        """Read what `Judged.write` wrote. Raises InputError if a file is missing or invalid."""
        try:
            facts = json.loads((folder / JUDGED).read_text())
            measures = facts["test_set"], float(facts["latency_ms"]), float(facts["size_mb"])
        except FileNotFoundError:
            raise InputError(f"{folder / JUDGED} does not exist. Run `vlmdiff evaluate` first") from None
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{folder / JUDGED} is not valid ({error!r}). Run `vlmdiff evaluate` again") from error
        return cls(Results.read(folder / RESULTS), Resampled.load(folder / SAMPLES), *measures)
