"""The manifest: a row an image, in a Parquet file that is the same bytes for the same images."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from vlmdiff.console import track
from vlmdiff.data.images import decode, resolve
from vlmdiff.data.layouts import LAYOUTS, Record
from vlmdiff.errors import InputError
from vlmdiff.files import atomic_path
from vlmdiff.params import Prepare

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


def build(params: Prepare, root: Path) -> pd.DataFrame:
    """List, hash and decode every image under `root`; columns as in SCHEMA, sorted by path.

    An image that cannot be read is listed with its `problem`, for the data contract to judge. Of each class's normal
    training images the share `validation_fraction`, at least one, is held out as split "validation": those with the
    lowest hash, so that images that come later hardly move others.

    Raises InputError where the root is missing or empty, is not of the layout, or a path leaves it.
    """
    if not root.is_dir():
        raise InputError(f"{root} is not a folder: set prepare.root to the dataset's")
    records = sorted(LAYOUTS[params.layout](root, params.test_fraction))
    if not records:
        raise InputError(f"{root} holds no images: layout {params.layout} expects a folder a class in it")
    for record in records:
        for path in (record.path, record.mask_path):
            if path is not None:
                resolve(root, path)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        facts = pool.map(lambda record: _look(root, record, params.max_pixels), records)
        looked = list(track(facts, "read images", total=len(records)))
    frame = pd.DataFrame(
        [{**record._asdict(), **facts} for record, facts in zip(records, looked, strict=True)],
        columns=SCHEMA.names,
    )
    candidates = frame[(frame["split"] == "train") & ~frame["is_anomalous"]]
    for _, rows in candidates.groupby("class_name"):
        count = max(1, round(params.validation_fraction * len(rows)))
        frame.loc[rows.sort_values("image_id").index[:count], "split"] = "validation"
    return _with_none(frame)


def _with_none(frame: pd.DataFrame) -> pd.DataFrame:
    """What is absent is None, whatever pandas makes of it."""
    for column in ("defect", "mask_path", "problem"):
        frame[column] = frame[column].astype(object).where(frame[column].notna(), None)
    return frame


def _look(root: Path, record: Record, max_pixels: int) -> dict[str, str | int | None]:
    file = resolve(root, record.path)
    facts = {"width": 0, "height": 0, "mode": "", "problem": None}
    try:
        image = decode(file, max_pixels)
        facts |= {"width": image.width, "height": image.height, "mode": image.mode}
    except InputError as error:
        facts["problem"] = str(error)
    with file.open("rb") as stream:
        return {"image_id": hashlib.file_digest(stream, "sha256").hexdigest(), **facts}


def write(frame: pd.DataFrame, path: Path) -> None:
    """Write a manifest, atomically."""
    table = pa.Table.from_pandas(frame, schema=SCHEMA, preserve_index=False).replace_schema_metadata()
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary)


def read(path: Path) -> pd.DataFrame:
    """Read a manifest; what is absent is None. Raises InputError where the file is missing or something else."""
    if not path.is_file():
        raise InputError(f"{path} does not exist: run the prepare stage first")
    try:
        table = pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise InputError(f"{path} is not a Parquet file: {error}") from error
    if table.schema.names != SCHEMA.names or table.schema.types != SCHEMA.types:
        raise InputError(f"{path} is not a manifest of this version: run the prepare stage again")
    return _with_none(table.to_pandas())
