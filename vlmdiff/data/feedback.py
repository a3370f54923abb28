"""What a person says of photographs: normal ones join the training data, anomalous ones the test data."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from shutil import copyfile

import numpy as np

from vlmdiff.core.errors import InputError
from vlmdiff.core.files import atomic_path, sha256
from vlmdiff.core.params import Params
from vlmdiff.data.images import SUFFIXES, decode, read_image
from vlmdiff.data.layouts import GOOD

# By layout, under a class's folder: where normal training images lie, defective ones, and their masks.
PLACES = {
    "folder": (GOOD, "{defect}", "masks/{defect}/{stem}{suffix}"),
    "mvtec_ad": (f"train/{GOOD}", "test/{defect}", "ground_truth/{defect}/{stem}_mask{suffix}"),
}
NAME_LENGTH = 16


@dataclass(frozen=True)
class Statement:
    """What a person says of photographs. defect: its kind, None where they are normal; by: the person."""

    class_name: str
    defect: str | None
    by: str


def give_feedback(
    files: Sequence[Path], said: Statement, params: Params, log: Path, mask: Path | None = None
) -> list[Path]:
    """Copy photographs into `prepare.root`, append a line for each to `log`, and return the new files.

    Their names are hashes of their contents, so that the same feedback twice adds nothing. mask: of one defective
    photograph. Everything is checked before anything is copied. Raises InputError if the layout is not in PLACES,
    the dataset does not have the class, a photograph cannot be read or is in the dataset elsewhere, or a mask is
    required and missing or does not fit.
    """
    root, layout, limit = params.prepare.root, params.prepare.layout, params.prepare.max_pixels
    if layout not in PLACES:
        raise InputError(f"prepare.layout is {layout}: only {' and '.join(PLACES)}, folders of images, take feedback")
    normal, defective, masks = PLACES[layout]
    _check_statement(said, len(files), mask, params.validate_.masks == "required")
    place = _class_folder(root, said.class_name, normal)
    folder = place / (normal if said.defect is None else defective.format(defect=said.defect))
    for file in files:
        _check_files(file, mask, limit)
    hashes = {file: sha256(file) for file in files}
    known, added = _find_copies(root, hashes, folder), []
    for file, image_id in hashes.items():
        target = known.get(image_id, folder / f"{image_id[:NAME_LENGTH]}{file.suffix.lower()}")
        if mask is not None:
            # Before its photograph, so that the same command completes what a kill interrupts.
            _copy(mask, place / masks.format(defect=said.defect, stem=target.stem, suffix=mask.suffix.lower()))
        if image_id not in known:
            _copy(file, target)
            known[image_id] = target
            added.append(target)
    _append(log, said, hashes.values())
    return added


def _check_statement(said: Statement, count: int, mask: Path | None, mask_required: bool) -> None:
    _check_name(said.class_name, "class")
    if said.defect is None:
        if mask is not None:
            raise InputError("a normal photograph has no mask: leave --mask out")
        return
    _check_name(said.defect, "kind of defect")
    if said.defect in (GOOD, "masks"):
        raise InputError(f"a defect cannot be called {said.defect!r}, a folder with another meaning: use another name")
    if mask is None and mask_required:
        raise InputError("validate.masks is required: give the mask with --mask, or set validate.masks to optional")
    if mask is not None and count != 1:
        raise InputError(f"--mask is the mask of one photograph, and there are {count}: give them one by one")


def _check_name(name: str, what: str) -> None:
    if not name.isprintable() or "/" in name or name.startswith(".") or not name.strip():
        raise InputError(f"the {what} {name!r} cannot be a folder's name: use another name")


def _class_folder(root: Path, name: str, normal: str) -> Path:
    if not (root / name / normal).is_dir():
        known = sorted(path.relative_to(root).parts[0] for path in root.glob(f"*/{normal}") if path.is_dir())
        raise InputError(
            f"{root} has no class {name!r}, only {', '.join(known) or 'none'}; to begin a new class, make its folder: "
            f"mkdir -p {root / name / normal}"
        )
    return root / name


def _check_files(file: Path, mask: Path | None, max_pixels: int) -> None:
    """Raise InputError if a photograph cannot be read or its mask does not fit."""
    for image in (file, mask):
        if image is not None and image.suffix.lower() not in SUFFIXES:
            raise InputError(f"{image}: the name of an image must end in {', '.join(sorted(SUFFIXES))}")
    size = read_image(file, max_pixels).size
    if mask is not None:
        drawn = decode(mask, max_pixels)
        if drawn.size != size:
            raise InputError(
                f"{mask} has {drawn.width} x {drawn.height} pixels and its photograph {size[0]} x {size[1]}: "
                "give a mask of the same size"
            )
        values = np.unique(np.asarray(drawn.convert("L")))
        if len(values) > 2 or not values.any():
            raise InputError(f"{mask} is not a mask: it must hold zero and, where the defect is, one other value")


def _find_copies(root: Path, hashes: dict[Path, str], folder: Path) -> dict[str, Path]:
    """Return, by hash, the images in `folder` that are the same as these files.

    Raises InputError if the dataset has one of them elsewhere.
    """
    wanted = {image_id: file for file, image_id in hashes.items()}
    sizes = {file.stat().st_size for file in hashes}
    found: dict[str, Path] = {}
    for path in sorted(root.rglob("*")):
        # Only files of the same size can have the same hash.
        if path.suffix.lower() in SUFFIXES and path.is_file() and path.stat().st_size in sizes:
            image_id = sha256(path)
            if image_id in wanted and path.parent != folder:
                raise InputError(
                    f"{wanted[image_id]} is in the dataset already, as {path}, and cannot be in {folder} too: remove "
                    "that file if it is wrong there"
                )
            if image_id in wanted:
                found.setdefault(image_id, path)
    return found


def _copy(file: Path, target: Path) -> None:
    with atomic_path(target) as temporary:
        copyfile(file, temporary)


def _append(log: Path, said: Statement, image_ids: Iterable[str]) -> None:
    """Append a line for each photograph, except where the log says the same already."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    keys = ("image_id", "truth", "class_name", "defect")
    logged = {tuple(row[key] for key in keys) for row in map(json.loads, filter(str.strip, lines))}
    truth = "normal" if said.defect is None else "anomalous"
    record = {"by": said.by, "when": datetime.now(UTC).isoformat(timespec="seconds")}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as stream:
        for image_id in dict.fromkeys(image_ids):
            row = (image_id, truth, said.class_name, said.defect)
            if row not in logged:
                stream.write(json.dumps(dict(zip(keys, row, strict=True)) | record) + "\n")
