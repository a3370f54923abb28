"""The manifest: a Parquet file with one row per image. Equal images give equal bytes."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from vlmdiff.core.console import track
from vlmdiff.core.errors import InputError
from vlmdiff.core.files import atomic_path, open_regular, sha256
from vlmdiff.core.params import Prepare
from vlmdiff.data import cifar, demo
from vlmdiff.data.images import decode, resolve
from vlmdiff.data.layouts import GOOD, LAYOUTS, Record

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
    """List, hash and decode every image under `root`. The columns are those of SCHEMA, the rows are sorted by path.

    An unreadable image is listed with its `problem`; the data contract judges it. If the dataset has no splits, all
    anomalous images and the share `test_fraction` of each class's normal images form the test split. If a class has no
    validation split, the share `validation_fraction` of its normal training images, at least one, forms it. Both shares
    take the images with the lowest hashes, so that adding images moves few others.

    Raises InputError if the root is missing, empty or not in the layout, or if a path leaves it.
    """
    records = _records(params, root)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        facts = pool.map(lambda record: _look(root / record.path, params.max_pixels), records)
        looked = list(track(facts, "read images", total=len(records)))
    frame = pd.DataFrame(
        [{**record._asdict(), **facts} for record, facts in zip(records, looked, strict=True)], columns=SCHEMA.names
    )
    _split(frame, params)
    return _with_none(frame)


def outline(params: Prepare) -> pd.DataFrame:
    """Return the manifest without opening images: the columns of Record, and the path as image_id.

    Images that the stage would make (`demo`, `cifar`) are listed, not made. Without hashes, the splits that `build`
    makes hold other images, but as many of each class. Raises InputError as `build` does.
    """
    match params.layout:
        case "demo":
            sizes = params.demo.model_dump(include={"train", "test_good", "test_per_defect"})
            records = [_to_be_made(*name, has_masks=True) for name in demo.listed(**sizes)]
        case "cifar":
            names = (path.parts for path, _ in cifar.listed(params.root, params.cifar.normal))
            records = [_to_be_made(*name, has_masks=False) for name in names]
        case _:
            records = _records(params, params.root)
    frame = pd.DataFrame(records, columns=Record._fields)
    frame.insert(0, "image_id", frame["path"])
    _split(frame, params)
    return frame


def _to_be_made(class_name: str, split: str, kind: str, file: str | int, has_masks: bool) -> Record:
    path, is_anomalous = f"{class_name}/{split}/{kind}/{file}", kind != GOOD
    return Record(path, class_name, split, is_anomalous, *((kind, path if has_masks else None) if is_anomalous else ()))


def _records(params: Prepare, root: Path) -> list[Record]:
    if not root.is_dir():
        raise InputError(f"{root} is not a folder. Set prepare.root to the dataset's folder.")
    records = sorted(LAYOUTS[params.layout](root, params), key=lambda record: record.path)
    if not records:
        raise InputError(f"{root} has no images in layout {params.layout}. See vlmdiff/data/layouts.py.")
    for record in records:
        for path in (record.path, record.mask_path):
            if path is not None:
                resolve(root, path)
    return records


def _split(frame: pd.DataFrame, params: Prepare) -> None:
    """Make the splits that the dataset lacks."""
    normal, without = ~frame["is_anomalous"], frame["split"].isna()
    frame["split"] = frame["split"].where(~without, np.where(normal, "train", "test"))
    for _, rows in frame[without & normal].groupby("class_name"):
        frame.loc[_lowest(rows, round(params.test_fraction * len(rows))), "split"] = "test"
    has_validation = frame["class_name"].isin(frame.loc[frame["split"] == "validation", "class_name"])
    for _, rows in frame[(frame["split"] == "train") & normal & ~has_validation].groupby("class_name"):
        frame.loc[_lowest(rows, max(1, round(params.validation_fraction * len(rows)))), "split"] = "validation"


def _lowest(rows: pd.DataFrame, count: int) -> pd.Index:
    return rows.sort_values("image_id", kind="stable").index[:count]


def _with_none(frame: pd.DataFrame) -> pd.DataFrame:
    """Return `frame` with None for missing values, where pandas may have NaN."""
    for column in ("defect", "mask_path", "problem"):
        frame[column] = frame[column].astype(object).where(frame[column].notna(), None)
    return frame


def _look(file: Path, max_pixels: int) -> dict[str, str | int | None]:
    """Return an image's hash, size and mode, or the problem with it. Open the file once."""
    with open_regular(file) as stream:
        facts = {"image_id": sha256(stream)}
        stream.seek(0)
        try:
            image = decode(stream, max_pixels, name=str(file))
        except InputError as error:
            return {**facts, "width": 0, "height": 0, "mode": "", "problem": str(error)}
    return {**facts, "width": image.width, "height": image.height, "mode": image.mode, "problem": None}


def write(frame: pd.DataFrame, path: Path) -> None:
    """Write a manifest atomically."""
    table = pa.Table.from_pandas(frame, schema=SCHEMA, preserve_index=False).replace_schema_metadata()
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary)


def read(path: Path) -> pd.DataFrame:
    """Read a manifest; missing values are None. Raises InputError if the file is missing or not a manifest."""
    if not path.is_file():
        raise InputError(f"{path} does not exist. Run vlmdiff prepare first.")
    try:
        table = pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise InputError(f"{path} is not a Parquet file ({error}). Run vlmdiff prepare again.") from error
    if table.schema.names != SCHEMA.names or table.schema.types != SCHEMA.types:
        raise InputError(f"{path} is not a manifest of this version. Run vlmdiff prepare again.")
    return _with_none(table.to_pandas())
