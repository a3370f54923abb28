"""The manifest: a Parquet file with one row per image. Equal images give equal bytes."""

from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from vlmdiff.core.errors import InputError, explained
from vlmdiff.core.files import atomic_path

SPLITS = ("train", "validation", "test")
SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),  # sha256 of the file's bytes
        pa.field("path", pa.string(), nullable=False),  # relative to the dataset's root
        pa.field("class_name", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),  # train, validation or test
        pa.field("is_anomalous", pa.bool_(), nullable=False),
        pa.field("defect", pa.string()),
        pa.field("mask_path", pa.string()),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("mode", pa.string(), nullable=False),
        pa.field("problem", pa.string()),  # why the image cannot be read
    ]
)


def with_none(frame: pd.DataFrame) -> pd.DataFrame:
    """Return `frame` with None for missing values, where pandas may have NaN."""
    for column in ("defect", "mask_path", "problem"):
        frame[column] = frame[column].astype(object).where(frame[column].notna(), None)
    return frame


def across_splits(frame: pd.DataFrame) -> pd.Series:
    """Return, for each row, the path of an image with the same bytes in a later split, None if there is none."""
    rank = frame["split"].map({split: i for i, split in enumerate(SPLITS)})
    last = frame.assign(rank=rank).sort_values("rank", kind="stable").drop_duplicates("image_id", keep="last")
    last = last.set_index("image_id")
    later = frame["image_id"].map(last["rank"]) > rank
    return frame["image_id"].map(last["path"]).where(later, None)


def write(frame: pd.DataFrame, path: Path) -> None:
    """Write a manifest atomically."""
    table = pa.Table.from_pandas(frame, schema=SCHEMA, preserve_index=False).replace_schema_metadata()
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary)


def read(path: Path) -> pd.DataFrame:
    """Read a manifest; missing values are None. Raises InputError if the file is missing or not a manifest."""
    if not path.is_file():
        raise InputError(f"{path} does not exist. Run vlmdiff prepare first.")
    with explained(path, "Run vlmdiff prepare again, or restore the file by `dvc checkout`"):
        table = pq.read_table(path)
        frame = table.to_pandas()
    if table.schema.names != SCHEMA.names or table.schema.types != SCHEMA.types:
        raise InputError(f"{path} is not a manifest of this version. Run vlmdiff prepare again.")
    return with_none(frame)
