"""List the images of a dataset: the rows of its manifest, with the splits that the dataset lacks."""

import contextlib
import os
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd

from vlmdiff.core.console import say, track
from vlmdiff.core.errors import InputError
from vlmdiff.core.files import open_regular, sha256
from vlmdiff.core.params import Copies, Prepare
from vlmdiff.core.text import counted
from vlmdiff.data import cifar, demo, manifest, sources
from vlmdiff.data.excluded import FILE, excluded
from vlmdiff.data.images import BYTES, SUFFIXES, check_bytes, decode, resolve
from vlmdiff.data.layouts import GOOD, LAYOUTS, Record, given

NAMED = 10
# The hash of a file that cannot be opened.
UNREADABLE = "0" * 64


def build(params: Prepare, root: Path) -> pd.DataFrame:
    """List, hash and decode every image under `root`. The columns are those of SCHEMA, the rows are sorted by path.

    Images that people excluded are left out. An unreadable image is listed with its `problem`; the data contract judges
    it. Of images with the same bytes and the
    same label, those after the first are left out with a warning; in two splits, if `copies` says so. If the dataset
    has no splits, all anomalous images and the share `test_fraction` of each class's normal images form the test split.
    If a class has no validation split, the share `validation_fraction` of its normal training images, at least one,
    forms it. Both shares take the images with the lowest hashes, so that adding images moves few others.

    Raises InputError if the root is missing, empty or not in the layout, or if a path leaves it.
    """
    records = _records(params, root)
    if passed := passed_over(params, _paths(records)):
        say(f"warning: {passed}")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        facts = pool.map(lambda record: _look(root / record.path, params.max_pixels), records)
        looked = list(track(facts, "read images", total=len(records)))
    frame = pd.DataFrame(
        [{**record._asdict(), **facts} for record, facts in zip(records, looked, strict=True)],
        columns=manifest.SCHEMA.names,
    )
    left_out = frame["image_id"].isin(excluded(params.root))
    _warn(frame, left_out, f"as {params.root / FILE} says", "note")
    frame = _without_copies(frame[~left_out], params.copies)
    _split(frame, params)
    return manifest.with_none(frame)


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


def _paths(records: Iterable[Record]) -> Iterator[str]:
    for record in records:
        yield from (path for path in (record.path, record.mask_path) if path is not None)


def _records(params: Prepare, root: Path) -> list[Record]:
    if not root.is_dir():
        raise InputError(f"{root} is not a folder. Set prepare.root to the dataset's folder.")
    records = sorted([*LAYOUTS[params.layout](root, params), *given(root, params)], key=lambda record: record.path)
    if not records:
        raise InputError(f"{root} has no images in layout {params.layout}. See vlmdiff/data/layouts.py.")
    classes: dict[str, str] = {}
    for record in records:
        if (other := classes.setdefault(record.class_name.casefold(), record.class_name)) != record.class_name:
            raise InputError(
                f"{root}: the classes {other!r} and {record.class_name!r} ({record.path}) differ only in capital "
                "letters: give them one name, or two that differ"
            )
    for path in _paths(records):
        resolve(root, path)
    return records


def passed_over(params: Prepare, paths: Iterable[str]) -> str | None:
    """Return a sentence about the images under the root that are not in the dataset, None if all are.

    paths: those of the dataset's images and masks. An image is a file with a suffix of an image, whatever its format.
    """
    if params.layout in ("demo", "cifar"):
        return None
    taken = {os.path.join(params.root, path) for path in paths}
    left = [file for file in sources.images_below(params.root) if file not in taken]
    known = [file for file in left if sources.suffix(file) in SUFFIXES]
    said = [
        f"{len(files)} {why} ({', '.join(os.path.relpath(file, params.root) for file in files[:3])}"
        f"{' …' if len(files) > 3 else ''})"
        for files, why in (
            (known, f"where layout {params.layout} does not look"),
            (sorted(set(left) - set(known)), f"with another suffix than {', '.join(sorted(SUFFIXES))}"),
        )
        if files
    ]
    return f"{counted(len(left), 'image')} under {params.root} passed over: {'; '.join(said)}" if said else None


def in_two_splits(params: Prepare) -> list[tuple[str, str]]:
    """Return the pairs of images with the same bytes in two splits of the dataset, the earlier split first.

    Only files of the same size are read.
    """
    if params.layout in ("demo", "cifar"):
        return []
    frame = pd.DataFrame(_records(params, params.root), columns=Record._fields)
    frame["image_id"] = [resolve(params.root, path).stat().st_size for path in frame["path"]]
    same_size = frame.groupby("image_id")["split"].transform("nunique") > 1
    # The contract names a file that is too large to be an image.
    frame = frame[same_size & (frame["image_id"] <= BYTES * params.max_pixels)]
    frame = frame.assign(image_id=[sha256(resolve(params.root, path)) for path in frame["path"]])
    others = manifest.across_splits(frame)
    return list(zip(frame["path"][others.notna()], others.dropna(), strict=True))


def _without_copies(frame: pd.DataFrame, copies: Copies) -> pd.DataFrame:
    """Leave out images that repeat another of the same label. What contradicts itself stays, for the contract."""
    label = ["image_id", "class_name", "is_anomalous"]
    # The contract shows files that cannot be read and rows that are listed twice, each of them.
    fit = frame["problem"].isna() & ~frame.duplicated("path", keep=False)
    again = fit & frame[fit].duplicated([*label, "split"]).reindex(frame.index, fill_value=False)
    _warn(frame, again, "with the same bytes as another image of the same split")
    frame = frame[~again]
    if copies != "error":
        order = (
            frame["split"].map(manifest.SPLITS.index, na_action="ignore").sort_values(ascending=copies == "keep_train")
        )
        later = frame.loc[order.index].duplicated(label).reindex(frame.index) & fit.reindex(frame.index)
        _warn(frame, later, f"with the same bytes as an image of another split (prepare.copies: {copies})")
        frame = frame[~later]
    return frame.reset_index(drop=True)


def _warn(frame: pd.DataFrame, left_out: pd.Series, why: str, kind: str = "warning") -> None:
    if left_out.any():
        paths = frame.loc[left_out, "path"]
        more = " …" if len(paths) > NAMED else ""
        say(f"{kind}: {counted(len(paths), 'image', 'are')} left out, {why}: {', '.join(paths[:NAMED])}{more}")


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


def _look(file: Path, max_pixels: int) -> dict[str, str | int | None]:
    """Return an image's hash, size and mode, or the problem with it. Open the file once."""
    facts = {"image_id": UNREADABLE}
    try:
        with open_regular(file) as stream:
            check_bytes(os.fstat(stream.fileno()).st_size, max_pixels, str(file))
            facts = {"image_id": sha256(stream)}
            stream.seek(0)
            image = decode(stream, max_pixels, name=str(file))
    except (InputError, OSError) as error:
        return {**facts, "width": 0, "height": 0, "mode": "", "problem": str(error)}
    return {**facts, "width": image.width, "height": image.height, "mode": image.mode, "problem": None}


@contextlib.contextmanager
def unchanged(root: Path) -> Generator[None]:
    """Raise InputError if a file below `root` appears, changes or goes within the block.

    A stage whose data changes while it reads them would lack some, and DVC would call it up to date.
    """
    before = _stamps(root)
    yield
    after = _stamps(root)
    changed = [path for path in sorted(before.keys() | after.keys()) if before.get(path) != after.get(path)]
    if changed:
        raise InputError(
            f"{counted(len(changed), 'file')} changed while {root} was read, such as {changed[0]}: run prepare "
            "again once nobody writes there"
        )


def _stamps(root: Path) -> dict[str, tuple[int, int]]:
    """Return the size and the time of each file below `root`."""
    found = {}
    for folder, _, names in os.walk(root):
        for name in names:
            path = os.path.join(folder, name)
            with contextlib.suppress(FileNotFoundError):  # gone again, or a link to nothing
                status = os.stat(path)
                found[path] = status.st_size, status.st_mtime_ns
    return found
