"""The files and folders of a workspace, relative to the folder of dvc.yaml."""

from pathlib import Path

PARAMS = Path("params.yaml")
DVC_LOCK = Path("dvc.lock")

MADE = Path("data/made")
MANIFEST = Path("data/manifest.parquet")
CAPTIONS = Path("data/captions/captions.jsonl")
ENCODED = Path("data/encoded")

FIRST_STAGE = Path("models/first_stage")
PIPELINE = Path("models/vlmdiff")
DETECTOR = Path("models/detector")

DATA_REPORT = Path("reports/data")
CAPTION_REPORT = Path("reports/captions")
FIRST_STAGE_REPORT = Path("reports/first_stage")
TRAIN_REPORT = Path("reports/train")
EVALUATION = Path("reports/evaluation")
METRICS = EVALUATION / "metrics.json"
GATE = Path("reports/gate.json")
GATE_PAGE = Path("reports/gate.html")
SCORES = Path("reports/scores")
MONITOR = Path("reports/monitor")
SUSPECTS = Path("reports/suspects")
# The stages replace these folders and all that is in them.
WRITTEN = (MADE, CAPTIONS.parent, ENCODED, Path("models"), Path("reports"))

# A log of the feedback that people gave. No stage reads it.
FEEDBACK = Path("data/feedback.jsonl")
FEEDBACK_LOCK = Path(".cache/feedback.lock")

# These must survive a crash: DVC deletes the outputs of a stage before it runs the stage.
CAPTION_STORE = Path(".cache/captions/captions.sqlite")
TRAINING_STATE = Path(".cache/train")
# Downloads from the registry, by run; and evaluations of its models on other test images.
REGISTRY_CACHE = Path(".cache/registry")
JUDGED_AGAIN = Path(".cache/judged")
