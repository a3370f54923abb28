"""Read and write captions.jsonl: one object per line, sorted by image, so that equal captions give equal bytes."""

import json
from pathlib import Path

import pandas as pd

from vlmdiff.core.errors import InputError, explained
from vlmdiff.core.files import atomic_path

COLUMNS = ["image_id", "path", "class_name", "split", "caption"]


def write_captions(frame: pd.DataFrame, path: Path) -> None:
    """Write image_id, path, class_name, split and caption of each row that has a caption."""
    rows = frame.loc[frame["caption"].notna(), COLUMNS].sort_values("image_id").to_dict("records")
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def read_captions(path: Path) -> dict[str, str]:
    """Return the captions by image_id. Raises InputError if the file does not exist."""
    if not path.is_file():
        raise InputError(f"{path} does not exist. Run vlmdiff caption first.")
    with explained(path, "Run vlmdiff caption again, or restore the file by `dvc checkout`"):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if not rows:
            raise ValueError("no captions")
        return {row["image_id"]: row["caption"] for row in rows}
