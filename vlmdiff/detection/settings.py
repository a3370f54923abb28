"""`Settings`: what a detector's folder says of it, read without its networks."""

from pathlib import Path
from typing import Any

from pydantic import model_validator

from vlmdiff.core.errors import InputError
from vlmdiff.core.files import read_json
from vlmdiff.core.params import Detection, Section
from vlmdiff.detection.calibration import Calibration

SETTINGS = "detector.json"
# The kinds of evidence, in order.
KINDS = "reconstruction", "retrieval"


class Settings(Section):
    """The content of detector.json."""

    detection: Detection
    calibration: Calibration
    class_captions: dict[str, str] | None = None

    @model_validator(mode="before")
    @classmethod
    def _earlier_releases(cls, facts: Any) -> Any:
        if not isinstance(facts, dict):
            return facts
        if isinstance(calibration := facts.get("calibration"), dict):
            facts = facts | {"calibration": Calibration.one_threshold(calibration)}
        if isinstance(detection := facts.get("detection"), dict):
            # Detectors of earlier releases draw the noise of each sample independently, and subtract no level.
            detection = {"antithetic": False} | detection
            if isinstance(retrieval := detection.get("retrieval"), dict):
                detection |= {"retrieval": {"level": 0.0} | retrieval}
            facts = facts | {"detection": detection}
        return facts

    @model_validator(mode="after")
    def _each_kind_of_features_has_its_scale(self):
        if len(self.calibration.scales) != len(self.detection.features):
            raise ValueError("calibration.scales needs one value for each of detection.features")
        return self

    @model_validator(mode="after")
    def _retrieval_is_calibrated(self):
        asked, learned = self.detection.retrieval is not None, self.calibration.retrieval is not None
        if asked != learned or len(self.calibration.tails or ()) != (len(KINDS) if asked else 0):
            raise ValueError("calibration has `retrieval` and two `tails` if detection.retrieval is set, else neither")
        return self

    @model_validator(mode="after")
    def _each_product_has_its_statistics(self):
        detection = self.detection
        several = 1 if detection.score_smoothing in (None, detection.smoothing) else 2
        if self.calibration.weight < 1 or detection.retrieval is None:
            # Where retrieval does not carry everything, each kind of features and retrieval count too.
            several += len(detection.features) + (detection.retrieval is not None)
        lengths = {len(row) for one in self.calibration.products.values() for row in (one.levels, one.spreads)}
        # Detectors of earlier releases judge by the map alone.
        if not self.calibration.products or lengths not in ({1}, {several}):
            raise ValueError("calibration.products needs a level and a spread of each statistic of each product")
        return self

    @classmethod
    def read(cls, folder: Path) -> "Settings":
        """Read a detector's settings. Raises InputError if the folder has none, or a value is out of range."""
        if not (file := folder / SETTINGS).is_file():
            raise InputError(
                f"{folder} is not a detector's folder, it has no {SETTINGS}: name one that `vlmdiff evaluate` wrote"
            )
        return read_json(file, cls)
