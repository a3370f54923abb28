"""Where the stages read and write, relative to the workspace (the folder of dvc.yaml)."""

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

# What people said of photographs; a log, which no stage reads.
FEEDBACK = Path("data/feedback.jsonl")

# What must outlive a crash: DVC deletes a stage's outputs before it runs the stage.
CAPTION_STORE = Path(".cache/captions/captions.sqlite")
TRAINING_STATE = Path(".cache/train")
# What was fetched from the registry, by run; and what its models are on other test images than theirs.
REGISTRY_CACHE = Path(".cache/registry")
JUDGED_AGAIN = Path(".cache/judged")
