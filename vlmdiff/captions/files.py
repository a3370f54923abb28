"""captions.jsonl: one object a line, sorted by image, the same bytes for the same captions."""

import json
from pathlib import Path

import pandas as pd

from vlmdiff.core.errors import InputError
from vlmdiff.core.files import atomic_path

COLUMNS = ["image_id", "path", "class_name", "split", "caption"]


def write_captions(frame: pd.DataFrame, path: Path) -> None:
    """Write image_id, path, class_name, split and caption of the rows of `frame` that have a caption."""
    rows = frame.loc[frame["caption"].notna(), COLUMNS].sort_values("image_id").to_dict("records")
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def read_captions(path: Path) -> dict[str, str]:
    """Captions by image_id. InputError where there is no such file."""
    if not path.is_file():
        raise InputError(f"{path} does not exist: run the caption stage first")
    with path.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return {row["image_id"]: row["caption"] for row in rows}
