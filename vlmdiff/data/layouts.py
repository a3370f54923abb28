"""How datasets lie on disk. A layout is one function from the dataset's root to its records.

The first ones read it from folders; the others from the lists that come with the dataset, whose paths are checked row
by row. `label` is the anomaly in some lists and the class in others: here it is never more than `is_anomalous`.
"""

import csv
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ValidationError

from vlmdiff.core.errors import InputError
from vlmdiff.core.params import Prepare
from vlmdiff.data.images import SUFFIXES, resolve

GOOD = "good"
SPLITS = ("train", "validation", "test")


class Record(NamedTuple):
    """An image and what the dataset says of it; paths relative to the root, with forward slashes.

    `split` is None where the dataset has no splits: the manifest then makes them. `defect` is None of a normal image.
    """

    path: str
    class_name: str
    split: str | None
    is_anomalous: bool
    defect: str | None = None
    mask_path: str | None = None


def mvtec_ad(root: Path, params: Prepare, good: str = GOOD) -> Iterator[Record]:
    """CLASS/train/good, CLASS/test/DEFECT or good, CLASS/ground_truth/DEFECT/STEM_mask.png (MVTec-AD, and MPDD)."""
    for folder in _folders(root):
        if not (folder / "train" / good).is_dir():
            raise InputError(
                f"{folder} has no train/{good}: layout {params.layout} expects CLASS/train/{good} and CLASS/test/*"
            )
        masks = _masks(folder / "ground_truth")
        # MVTec-AD numbers each folder from zero: a mask belongs to the test image of its name first.
        for split in ("test", "train"):
            for kind in _folders(folder / split):
                for image in _images(kind):
                    yield _found(root, folder.name, split, kind.name, good, image, masks)
        _none_left(masks)


def btad(root: Path, params: Prepare) -> Iterator[Record]:
    """MVTec-AD's with `ok` for `good` and `ko` for any defect; a mask has its image's stem, in PNG or BMP (BTAD)."""
    return mvtec_ad(root, params, good="ok")


def mvtec_3d(root: Path, params: Prepare) -> Iterator[Record]:
    """CLASS/{train,validation,test}/KIND/{rgb,gt}/STEM.png (MVTec 3D-AD): the photographs, not the depths in xyz."""
    for folder in _folders(root):
        if not (folder / "train" / GOOD / "rgb").is_dir():
            raise InputError(
                f"{folder} has no train/{GOOD}/rgb: layout mvtec_3d expects CLASS/train/{GOOD}/rgb and CLASS/test/*/rgb"
            )
        for split in SPLITS:
            for kind in _folders(folder / split):
                masks = {(kind.name, mask.stem): mask for mask in _images(kind / "gt")}
                for image in _images(kind / "rgb"):
                    yield _found(root, folder.name, split, kind.name, GOOD, image, masks)
                _none_left(masks)


def folder(root: Path, params: Prepare) -> Iterator[Record]:
    """CLASS/good and CLASS/DEFECT; masks, where there are any, in CLASS/masks/DEFECT/STEM.png or STEM_mask.png."""
    for place in _folders(root):
        if not (place / GOOD).is_dir():
            raise InputError(f"{place} has no {GOOD}: layout folder expects CLASS/{GOOD} and CLASS/DEFECT")
        masks = _masks(place / "masks")
        for kind in _folders(place):
            if kind.name != "masks":
                for image in _images(kind):
                    yield _found(root, place.name, None, kind.name, GOOD, image, masks)
        _none_left(masks)


def table(root: Path, params: Prepare) -> Iterator[Record]:
    """What `prepare.table.file` under the root lists, a row an image: CSV with a header, or Parquet by its suffix.

    Columns: path and class_name; is_anomalous or label, which say false, normal or 0, and true, anomaly or 1 (never the
    class); and, optional, defect, mask_path, split. Paths are relative to the root. With a column split (train,
    validation, test) every row has one, without it the manifest splits, as for `folder`. Other columns are not read.
    """
    yield from _table(root, params.table.file, {name: name for name in TABLE_COLUMNS})


def visa(root: Path, params: Prepare) -> Iterator[Record]:
    """CLASS/Data/Images/{Normal,Anomaly}, CLASS/Data/Masks/Anomaly, as split_csv/{prepare.visa.split}.csv says (VisA).

    Its columns: object (the class), split, label (normal or anomaly), image, mask. The splits for two classes train on
    labelled anomalies too; nothing here learns from those, and they are left out.
    """
    columns = {"path": "image", "class_name": "object", "split": "split", "label": "label", "mask_path": "mask"}
    for record in _table(root, Path("split_csv", f"{params.visa.split}.csv"), columns):
        if not (record.split == "train" and record.is_anomalous):
            yield record


def real_iad(root: Path, params: Prepare) -> Iterator[Record]:
    """IMAGES/CLASS/{OK,NG}/... as JSONS/CLASS.json says (Real-IAD); all views that it lists.

    JSONS: all views of an object (realiad_jsons), a single one (realiad_jsons_sv), or the fully unsupervised setting
    (realiad_jsons_fuiad_0.1, ...), which trains on anomalous images on purpose: they are listed as what they are, and
    the data contract stops at them.
    """
    jsons, images = params.real_iad.jsons, params.real_iad.images
    files = sorted(resolve(root, jsons.as_posix()).glob("*.json"))
    if not files:
        raise InputError(f"{root / jsons} holds no CLASS.json: set prepare.real_iad.jsons to the folder that does")
    for file in files:
        content = _parse(_RealIad, file)
        for split in ("train", "test"):
            for i, row in enumerate(getattr(content, split)):
                where = f"{file}, {split}.{i}"
                if row.category != file.stem:
                    raise InputError(
                        f"{where}: category {row.category!r} in the file of {file.stem!r}: mend one of them"
                    )
                path, mask = (
                    name and PurePosixPath(images, content.meta.prefix, name).as_posix()
                    for name in (row.image_path, row.mask_path)
                )
                defect = None if row.anomaly_class == content.meta.normal_class else row.anomaly_class
                yield _listed(root, where, path, file.stem, split, defect is not None, defect, mask)


def coco_ad(root: Path, params: Prepare) -> Iterator[Record]:
    """COCO 2017's images as meta_20_{prepare.coco_ad.split}.json says (COCO-AD): 20 of 80 classes are anomalous, in
    each of four splits others.

    The file has, under train and test, by class, rows of img_path and mask_path (relative to the root), cls_name,
    specie_name (the kind of defect) and anomaly (0 or 1). This follows a description of the format and was not tried on
    the published files.
    """
    file = resolve(root, f"meta_20_{params.coco_ad.split}.json")
    content = _parse(_CocoAd, file)
    for split in ("train", "test"):
        for class_name, rows in getattr(content, split).items():
            for i, row in enumerate(rows):
                where = f"{file}, {split}.{class_name}.{i}"
                if row.cls_name != class_name:
                    raise InputError(
                        f"{where}: cls_name {row.cls_name!r} in the list of {class_name!r}: mend one of them"
                    )
                defect = (row.specie_name or "anomaly") if row.anomaly else None
                yield _listed(root, where, row.img_path, class_name, split, row.anomaly, defect, row.mask_path)


Layout = Callable[[Path, Prepare], Iterator[Record]]
LAYOUTS: dict[str, Layout] = {
    # The stage makes these two in MVTec-AD's layout.
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

# Datasets whose masks number regions or kinds (one of VisA's may hold 0, 1 and 6): whatever is not zero is marked.
LABEL_MAPS = {"visa", "real_iad", "coco_ad"}


def _found(root: Path, class_name: str, split: str | None, kind: str, good: str, image: Path, masks: dict) -> Record:
    """The record of an image in a folder named by its `kind`; takes its mask out of `masks`."""
    mask = masks.pop((kind, image.stem), None)
    path, mask_path = (file and file.relative_to(root).as_posix() for file in (image, mask))
    return Record(path, class_name, split, kind != good, None if kind == good else kind, mask_path)


def _folders(place: Path) -> list[Path]:
    return sorted(path for path in _entries(place) if path.is_dir() and not path.name.startswith("."))


def _images(place: Path) -> list[Path]:
    return sorted(
        path
        for path in _entries(place)
        if path.suffix.lower() in SUFFIXES and path.is_file() and not path.name.startswith(".")
    )


def _entries(place: Path) -> Iterator[Path]:
    return place.iterdir() if place.is_dir() else iter(())


def _masks(place: Path) -> dict[tuple[str, str], Path]:
    """Masks by kind of defect and stem of their image."""
    return {(kind.name, mask.stem.removesuffix("_mask")): mask for kind in _folders(place) for mask in _images(kind)}


def _none_left(masks: dict[tuple[str, str], Path]) -> None:
    if masks:
        names = ", ".join(str(mask) for mask in list(masks.values())[:10])
        raise InputError(f"{len(masks)} mask(s) belong to no image: {names}; restore the images or remove the masks")


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
    """The record of a list's row, which stands at `where`. Raises InputError where a file or the class is none."""
    # Reports name files by the class.
    if not class_name.isprintable() or "/" in class_name or class_name in ("", ".", ".."):
        raise InputError(f"{where}: the class {class_name!r} cannot be a file's name: call it otherwise")
    paths = []
    for name in (path, mask_path or None):
        try:
            # An empty path is the root itself. os.path: to pathlib some names are errors.
            if name is not None and not os.path.isfile(resolve(root, name)):
                raise InputError(f"{name!r} is no file under {root}: restore it or take the row out")
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        paths.append(name and PurePosixPath(name).as_posix())
    return Record(paths[0], class_name, split, is_anomalous, defect, paths[1])


TABLE_COLUMNS = ("path", "class_name", "split", "is_anomalous", "label", "defect", "mask_path")
ANOMALOUS = {"normal": False, "false": False, "0": False, "anomaly": True, "true": True, "1": True}


def _table(root: Path, relative: Path, columns: dict[str, str]) -> Iterator[Record]:
    """The records of a table; `columns` are those it may have, by our names for them."""
    file = resolve(root, relative.as_posix())
    if not file.is_file():
        raise InputError(f"{file} does not exist: it lists the images for this layout")
    header, rows = read_table(file)
    for name in ("path", "class_name"):
        if columns[name] not in header:
            raise InputError(f"{file} has no column {columns[name]!r}: its columns are {', '.join(header)}")
    truths = [columns[name] for name in ("is_anomalous", "label") if columns.get(name) in header]
    if len(truths) != 1:
        raise InputError(f"{file} needs one of the columns is_anomalous and label: it has {', '.join(header)}")
    for where, row in rows:
        values = {name: row.get(column, "") for name, column in columns.items()}
        is_anomalous = ANOMALOUS.get(row[truths[0]].lower())
        if is_anomalous is None:
            raise InputError(
                f"{where}: {truths[0]} is {row[truths[0]]!r}, not one of {', '.join(ANOMALOUS)}: it says whether "
                f"the image is anomalous, {columns['class_name']} what it shows"
            )
        split = values["split"] if columns.get("split") in header else None
        if split is not None and split not in SPLITS:
            raise InputError(f"{where}: split is {split!r}, not one of {', '.join(SPLITS)}")
        defect = values.get("defect", "")
        if defect and is_anomalous != (defect != GOOD):
            raise InputError(f"{where}: {truths[0]} is {row[truths[0]]!r} and defect {defect!r}: one of them is wrong")
        yield _listed(
            root,
            where,
            values["path"],
            values["class_name"],
            split,
            is_anomalous,
            (defect or "anomaly") if is_anomalous else None,
            values["mask_path"],
        )


def read_table(file: Path) -> tuple[list[str], Iterator[tuple[str, dict[str, str]]]]:
    """The columns of a table, and its rows, each with where it stands; what is absent is empty.

    CSV, or Parquet by its suffix. Raises InputError where the file is something else, a column is there twice, or, on
    the way, a row has not a cell for each column.
    """
    rows = _parquet_rows(file) if file.suffix.lower() == ".parquet" else _csv_rows(file)
    _, header = next(rows, (None, []))
    if twice := {name for name in header if header.count(name) > 1}:
        raise InputError(f"{file} has more than one column {', '.join(sorted(twice))}: keep one")
    return header, _named(header, rows)


def _named(header: list[str], rows: Iterator[tuple[str, list[str]]]) -> Iterator[tuple[str, dict[str, str]]]:
    for where, cells in rows:
        if not cells:
            continue  # an empty line
        if len(cells) != len(header):
            raise InputError(f"{where}: {len(cells)} cells under {len(header)} columns: the row may be truncated")
        yield where, dict(zip(header, cells, strict=True))


def _csv_rows(file: Path) -> Iterator[tuple[str, list[str]]]:
    data = file.read_bytes()
    try:
        # Spreadsheets write a byte-order mark.
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{file}, line {line}: {error}; save it as UTF-8") from error
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        for cells in reader:
            yield f"{file}, line {reader.line_num}", cells
    except csv.Error as error:
        raise InputError(f"{file}, line {reader.line_num}: {error}: it is not CSV from here") from error


def _parquet_rows(file: Path) -> Iterator[tuple[str, list[str]]]:
    try:
        content = pq.ParquetFile(file).read()
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file} is not a whole Parquet file: {error}") from error
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


Content = TypeVar("Content", bound=BaseModel)


def _parse(model: type[Content], file: Path) -> Content:
    """The content of a JSON file. Raises InputError naming the file and the first place in it that is not right."""
    try:
        return model.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{file} does not exist: it lists the images for this layout") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ", ".join([str(file), ".".join(str(part) for part in first["loc"])]) if first["loc"] else file
        raise InputError(f"{where}: {first['msg']}; restore the file") from error
