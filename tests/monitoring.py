"""Made-up calibrations and days of photographs, for the tests of the monitor."""

import hashlib
from pathlib import Path

import numpy as np
import pandas as pd

from vlmdiff.core.files import write_json
from vlmdiff.production.monitor import STATISTICS

# Of each class the mean of score, brightness, contrast, sharpness, red, green, blue; the deviation is a twentieth.
CLASSES = {
    "bolt": (0.30, 120, 50, 900, 130, 115, 118),
    "cable": (0.35, 100, 40, 400, 90, 105, 100),
    "board": (0.42, 90, 45, 2000, 70, 100, 80),
}
IMAGES = 24


def photographs(seed: int, counts: dict[str, int], **factors: float) -> pd.DataFrame:
    """Rows with `class_name`, `score` and statistics of so many photographs of each class; `factors` by column."""
    rng, rows = np.random.default_rng(seed), []
    for name, count in counts.items():
        means = np.array(CLASSES[name])
        values = means * (1 + 0.05 * rng.standard_normal((count, len(means))))
        frame = pd.DataFrame(values, columns=["score", *STATISTICS[:6]]).assign(width=128.0, height=96.0)
        rows.append(frame.assign(class_name=name))
    frame = pd.concat(rows, ignore_index=True)
    for column, factor in factors.items():
        frame[column] *= factor
    return frame.assign(image_id=[f"{seed}-{i}" for i in range(len(frame))])


def write_model(folder: Path, classes: tuple[str, ...] = tuple(CLASSES), seed: int = 0) -> Path:
    """What the monitor reads of a detector's folder."""
    folder.mkdir()
    frame = photographs(seed, dict.fromkeys(classes, IMAGES))
    frame.to_parquet(folder / "reference.parquet")
    said = {"deviation": 1.0, "scales": [1.0], "threshold": 1.0, "images": len(frame), "false_alarm_rate": 0.05}
    write_json(folder / "detector.json", {"detection": {"features": [{"kind": "pixels"}]}, "calibration": said})
    return folder


def write_scores(file: Path, rows: pd.DataFrame, model: Path | str, day: int = 1) -> Path:
    """What `vlmdiff score` writes of these photographs, by a detector's folder or by one of that name."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(model, Path):
        model = f"sha256:{hashlib.sha256((model / 'detector.json').read_bytes()).hexdigest()[:16]}"
    # Each row has a path, even if the file does not exist.
    names = rows["image_id"].fillna(rows.index.to_series().map("gone-{}".format))
    frame = rows.drop(columns="class_name").assign(path=names + ".png", model=model)
    frame["is_anomalous"] = (frame["score"] > 0.5).astype("boolean").where(frame["score"].notna())
    frame["error"] = pd.Series(np.where(frame["score"].isna(), "cannot be decoded", None), dtype="string")
    frame["scored_at"] = pd.Timestamp(2026, 1, day, tz="UTC")
    frame.to_parquet(file)
    return file
