"""Dataset layouts. A layout is a function from the dataset's root to its records.

Some layouts follow the folders. The others read the lists that come with a dataset and check each row's paths. In some
datasets `label` says whether an image is anomalous, in others it is the class; here it only sets `is_anomalous`.
"""

import csv
import io
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

from vlmdiff.core.errors import InputError
from vlmdiff.core.files import read_json
from vlmdiff.core.params import Prepare
from vlmdiff.data.images import SUFFIXES, resolve
from vlmdiff.data.manifest import SPLITS
from vlmdiff.data.rules import check_name

GOOD = "good"
# In the root of a layout that has no place of its own for what people say of new images: these, in layout `folder`.
GIVEN = "feedback"


class Record(NamedTuple):
    """An image and its labels. Paths are relative to the root, with forward slashes.

    `split` is None if the dataset has no splits; the manifest then makes them. `defect` is None for a normal image.
    """

    path: str
    class_name: str
    split: str | None
    is_anomalous: bool
    defect: str | None = None
    mask_path: str | None = None


def mvtec_ad(root: Path, params: Prepare, good: str = GOOD) -> Iterator[Record]:
    """Read CLASS/train/good, CLASS/test/{good,DEFECT} and CLASS/ground_truth/DEFECT/STEM_mask.png (MVTec-AD, MPDD)."""
    for folder in _classes(root, params):
        if not (folder / "train" / good).is_dir():
            raise InputError(
                f"{folder} has no train/{good}. Layout {params.layout} needs CLASS/train/{good} and CLASS/test/*."
            )
        masks = _masks(folder / "ground_truth")
        # MVTec-AD numbers each folder from zero, so a mask belongs to the test image before the train image.
        for split in ("test", "train"):
            for kind in _folders(folder / split):
                for image in _images(kind):
                    yield _found(root, folder.name, split, kind.name, good, image, masks)
        _none_left(masks)


def btad(root: Path, params: Prepare) -> Iterator[Record]:
    """Read MVTec-AD's layout with `ok` for good and `ko` for defects. Masks are STEM.png or STEM.bmp (BTAD)."""
    return mvtec_ad(root, params, good="ok")


def mvtec_3d(root: Path, params: Prepare) -> Iterator[Record]:
    """Read the photos CLASS/{train,validation,test}/KIND/{rgb,gt}/STEM.png, not the depths in xyz (MVTec 3D-AD)."""
    for folder in _classes(root, params):
        if not (folder / "train" / GOOD / "rgb").is_dir():
            raise InputError(
                f"{folder} has no train/{GOOD}/rgb. Layout mvtec_3d needs CLASS/train/{GOOD}/rgb, CLASS/test/*/rgb."
            )
        for split in SPLITS:
            for kind in _folders(folder / split):
                masks = _by_stem(kind.name, _images(kind / "gt"))
                for image in _images(kind / "rgb"):
                    yield _found(root, folder.name, split, kind.name, GOOD, image, masks)
                _none_left(masks)


def folder(root: Path, params: Prepare) -> Iterator[Record]:
    """Read CLASS/good, CLASS/DEFECT and, optionally, masks CLASS/masks/DEFECT/STEM.png or STEM_mask.png."""
    for place in _folders(root):
        if not (place / GOOD).is_dir():
            raise InputError(f"{place} has no {GOOD}. Layout folder needs CLASS/{GOOD} and CLASS/DEFECT.")
        masks = _masks(place / "masks")
        for kind in _folders(place):
            if kind.name != "masks":
                for image in _images(kind):
                    yield _found(root, place.name, None, kind.name, GOOD, image, masks)
        _none_left(masks)


def table(root: Path, params: Prepare) -> Iterator[Record]:
    """Read the table `prepare.table.file` under the root, one row per image: CSV with a header, or Parquet (.parquet).

    Required columns: path, class_name, and either is_anomalous or label with the values false, normal, 0, true, anomaly
    or 1. Optional columns: defect, mask_path, and split (train, validation, test; set in every row). Other columns are
    ignored. Paths are relative to the root. Without a column split, the manifest makes the splits.
    """
    yield from _table(root, params.table.file, {name: name for name in TABLE_COLUMNS})


def visa(root: Path, params: Prepare) -> Iterator[Record]:
    """Read the images and masks that split_csv/{prepare.visa.split}.csv lists (VisA).

    Its columns are object (the class), split, label (normal or anomaly), image and mask. The two-class splits also list
    labelled anomalies for training; they are skipped, because training uses only normal images.
    """
    columns = {"path": "image", "class_name": "object", "split": "split", "label": "label", "mask_path": "mask"}
    for record in _table(root, Path("split_csv", f"{params.visa.split}.csv"), columns):
        if not (record.split == "train" and record.is_anomalous):
            yield record


def real_iad(root: Path, params: Prepare) -> Iterator[Record]:
    """Read the images IMAGES/CLASS/{OK,NG}/... that JSONS/CLASS.json lists, with all views listed (Real-IAD).

    JSONS is realiad_jsons (all views of an object), realiad_jsons_sv (a single view), or realiad_jsons_fuiad_0.1, ...
    (fully unsupervised: training contains anomalous images, which are marked as such; the data contract rejects them).
    """
    jsons, images = params.real_iad.jsons, params.real_iad.images
    files = sorted(resolve(root, jsons.as_posix()).glob("*.json"))
    if not files:
        raise InputError(f"{root / jsons} has no CLASS.json. Set prepare.real_iad.jsons to their folder.")
    for file in files:
        content = read_json(file, _RealIad)
        for split in ("train", "test"):
            for i, row in enumerate(getattr(content, split)):
                where = f"{file}, {split}.{i}"
                if row.category != file.stem:
                    raise InputError(
                        f"{where}: category is {row.category!r}, but the file is for {file.stem!r}. Fix one of them."
                    )
                path, mask = (
                    name and PurePosixPath(images, content.meta.prefix, name).as_posix()
                    for name in (row.image_path, row.mask_path)
                )
                defect = None if row.anomaly_class == content.meta.normal_class else row.anomaly_class
                yield _listed(root, where, path, file.stem, split, defect is not None, defect, mask)


def coco_ad(root: Path, params: Prepare) -> Iterator[Record]:
    """Read the COCO 2017 images that meta_20_{prepare.coco_ad.split}.json lists (COCO-AD).

    Each of the four splits marks 20 other classes of the 80 as anomalous. The file maps train and test to classes, and
    each class to rows with img_path, mask_path (both relative to the root), cls_name, specie_name (the kind of defect)
    and anomaly (0 or 1). This follows a description of the format; it is untested on the published files.
    """
    file = resolve(root, f"meta_20_{params.coco_ad.split}.json")
    if not file.is_file():
        raise InputError(f"{file} does not exist. This layout reads its images from it.")
    content = read_json(file, _CocoAd)
    for split in ("train", "test"):
        for class_name, rows in getattr(content, split).items():
            for i, row in enumerate(rows):
                where = f"{file}, {split}.{class_name}.{i}"
                if row.cls_name != class_name:
                    raise InputError(
                        f"{where}: cls_name is {row.cls_name!r}, but the list is for {class_name!r}. Fix one of them."
                    )
                defect = (row.specie_name or "anomaly") if row.anomaly else None
                yield _listed(root, where, row.img_path, class_name, split, row.anomaly, defect, row.mask_path)


def given(root: Path, params: Prepare) -> Iterator[Record]:
    """Read what people said of new images, where the layout has no place of its own for it."""
    if params.layout not in ("folder", "mvtec_ad") and (root / GIVEN).is_dir():
        for record in folder(root / GIVEN, params):
            mask = record.mask_path and f"{GIVEN}/{record.mask_path}"
            split = "test" if record.is_anomalous else "train"
            yield record._replace(path=f"{GIVEN}/{record.path}", mask_path=mask, split=split)


Layout = Callable[[Path, Prepare], Iterator[Record]]
LAYOUTS: dict[str, Layout] = {
    # The prepare stage makes these two, in MVTec-AD's layout.
    "demo": mvtec_ad,
    "cifar": mvtec_ad,
    "folder": folder,
    "table": table,
    "mvtec_ad": mvtec_ad,
    "mvtec_3d": mvtec_3d,
    "btad": btad,
    "visa": visa,
    "real_iad": real_iad,
    "coco_ad": coco_ad,
}

# Masks of these datasets number regions or kinds (a VisA mask may hold 0, 1 and 6): all non-zero pixels are anomalous.
LABEL_MAPS = {"visa", "real_iad", "coco_ad"}


def _found(root: Path, class_name: str, split: str | None, kind: str, good: str, image: Path, masks: dict) -> Record:
    """Return the record of an image in a folder named after its `kind`, and remove its mask from `masks`."""
    mask: Path | None = masks.pop((kind, image.stem), None)
    path, mask_path = image.relative_to(root).as_posix(), mask.relative_to(root).as_posix() if mask else None
    return Record(path, class_name, split, kind != good, None if kind == good else kind, mask_path)


def _classes(root: Path, params: Prepare) -> list[Path]:
    return [path for path in _folders(root) if path.name != GIVEN or params.layout == "mvtec_ad"]


def _folders(place: Path) -> list[Path]:
    return sorted(path for path in _entries(place) if path.is_dir() and not path.name.startswith("."))


def _images(place: Path) -> list[Path]:
    found = sorted(path for path in _entries(place) if path.suffix.lower() in SUFFIXES and path.name[0] != ".")
    for path in found:
        if not path.is_file():
            raise InputError(f"{path} is not a regular file, and a link leads to none. Replace or remove it.")
    return found


def _entries(place: Path) -> Iterator[Path]:
    return place.iterdir() if place.is_dir() else iter(())


def _masks(place: Path) -> dict[tuple[str, str], Path]:
    """Return the masks by kind of defect and stem of their image."""
    masks = {}
    for kind in _folders(place):
        masks |= _by_stem(kind.name, _images(kind))
    return masks


def _by_stem(kind: str, files: Iterable[Path]) -> dict[tuple[str, str], Path]:
    """Return masks by kind and stem of their image. Raises InputError if an image has two."""
    masks: dict[tuple[str, str], Path] = {}
    for mask in files:
        key = (kind, mask.stem.removesuffix("_mask"))
        if (other := masks.setdefault(key, mask)) is not mask:
            raise InputError(f"{other} and {mask} are masks of one image: keep one, with all that is marked")
    return masks


def _none_left(masks: dict[tuple[str, str], Path]) -> None:
    if masks:
        names = ", ".join(str(mask) for mask in list(masks.values())[:10])
        raise InputError(f"{len(masks)} mask(s) have no image: {names}. Restore the images or remove the masks.")


def _listed(
    root: Path,
    where: str,
    path: str,
    class_name: str,
    split: str | None,
    is_anomalous: bool,
    defect: str | None,
    mask_path: str | None,
) -> Record:
    """Return the record of the row at `where`. Raises InputError if a file is missing or the class name is invalid."""
    try:
        check_name(class_name, "class")
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    for name in (path, mask_path or None):
        try:
            # isfile rejects the empty path, which resolves to the root. Unlike pathlib, os.path takes any name.
            if name is not None and not os.path.isfile(resolve(root, name)):
                raise InputError(f"{name!r} is not a file under {root}. Restore it or remove the row.")
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
    mask = PurePosixPath(mask_path).as_posix() if mask_path else None
    return Record(PurePosixPath(path).as_posix(), class_name, split, is_anomalous, defect, mask)


TABLE_COLUMNS = ("path", "class_name", "split", "is_anomalous", "label", "defect", "mask_path")
ANOMALOUS = {"normal": False, "false": False, "0": False, "anomaly": True, "true": True, "1": True}


def _table(root: Path, relative: Path, columns: dict[str, str]) -> Iterator[Record]:
    """Yield the records of a table. `columns` maps our names to the table's column names."""
    file = resolve(root, relative.as_posix())
    if not file.is_file():
        raise InputError(f"{file} does not exist. This layout reads its images from it.")
    header, rows = read_table(file)
    for name in ("path", "class_name"):
        if columns[name] not in header:
            raise InputError(f"{file} has no column {columns[name]!r}. Its columns are {', '.join(header)}.")
    truths = [columns[name] for name in ("is_anomalous", "label") if columns.get(name) in header]
    if len(truths) != 1:
        raise InputError(f"{file}: needs one of the columns is_anomalous and label. It has {', '.join(header)}.")
    for where, row in rows:
        values = {name: row.get(column, "") for name, column in columns.items()}
        is_anomalous = ANOMALOUS.get(row[truths[0]].lower())
        if is_anomalous is None:
            raise InputError(
                f"{where}: {truths[0]} is {row[truths[0]]!r}, not one of {', '.join(ANOMALOUS)}. "
                f"If it is the class, use the column {columns['class_name']}."
            )
        split = values["split"] if columns.get("split") in header else None
        if split is not None and split not in SPLITS:
            raise InputError(f"{where}: split is {split!r}, not one of {', '.join(SPLITS)}.")
        defect = values.get("defect", "")
        if defect and is_anomalous != (defect != GOOD):
            raise InputError(f"{where}: {truths[0]} is {row[truths[0]]!r}, but defect is {defect!r}. Fix one of them.")
        kind = (defect or "anomaly") if is_anomalous else None
        path, class_name, mask_path = (values[name] for name in ("path", "class_name", "mask_path"))
        yield _listed(root, where, path, class_name, split, is_anomalous, kind, mask_path)


def read_table(file: Path) -> tuple[list[str], Iterator[tuple[str, dict[str, str]]]]:
    """Return the columns of a CSV or Parquet (.parquet) table, and an iterator over its rows with their places.

    Missing values are empty strings. Raises InputError if the file is not a table or repeats a column, and, while
    iterating, if a row has too few or too many cells.
    """
    rows = _parquet_rows(file) if file.suffix.lower() == ".parquet" else _csv_rows(file)
    _, header = next(rows, (None, []))
    if twice := {name for name in header if header.count(name) > 1}:
        raise InputError(f"{file}: repeated column {', '.join(sorted(twice))}. Keep one.")
    return header, _named(header, rows)


def _named(header: list[str], rows: Iterator[tuple[str, list[str]]]) -> Iterator[tuple[str, dict[str, str]]]:
    for where, cells in rows:
        if not cells:
            continue  # an empty line
        if len(cells) != len(header):
            raise InputError(f"{where}: {len(cells)} cells for {len(header)} columns. The row may be truncated.")
        yield where, dict(zip(header, cells, strict=True))


def _csv_rows(file: Path) -> Iterator[tuple[str, list[str]]]:
    data = file.read_bytes()
    try:
        # Spreadsheets write a byte-order mark.
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{file}, line {line}: not UTF-8 ({error}). Save the file as UTF-8.") from error
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        for cells in reader:
            yield f"{file}, line {reader.line_num}", cells
    except csv.Error as error:
        raise InputError(f"{file}, line {reader.line_num}: not CSV ({error}). Fix the line.") from error


def _parquet_rows(file: Path) -> Iterator[tuple[str, list[str]]]:
    try:
        content = pq.ParquetFile(file).read()
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file}: not a complete Parquet file ({error}). Restore it.") from error
    yield str(file), content.column_names
    for i, values in enumerate(zip(*(column.to_pylist() for column in content.columns), strict=True)):
        yield f"{file}, row {i}", ["" if value is None else str(value) for value in values]


class _RealIad(BaseModel):
    class Meta(BaseModel):
        normal_class: str
        prefix: str

    class Row(BaseModel):
        category: str
        anomaly_class: str
        image_path: str
        mask_path: str | None = None

    meta: Meta
    train: list[Row]
    test: list[Row]


class _CocoAd(BaseModel):
    class Row(BaseModel):
        img_path: str
        mask_path: str | None = None
        cls_name: str
        specie_name: str = ""
        anomaly: bool

    train: dict[str, list[Row]]
    test: dict[str, list[Row]]
