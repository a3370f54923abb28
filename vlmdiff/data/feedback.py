"""What a person says of photographs: normal ones join the training data, anomalous ones the test data."""

import glob
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from shutil import copyfile
from typing import Any

from vlmdiff.core import workspace as w
from vlmdiff.core.console import say
from vlmdiff.core.errors import InputError
from vlmdiff.core.files import atomic_path, sha256
from vlmdiff.core.locks import hold
from vlmdiff.core.params import Params
from vlmdiff.data.images import SUFFIXES, decode
from vlmdiff.data.layouts import GOOD
from vlmdiff.data.rules import check_name, image_faults, mask_faults

# By layout, under a class's folder: where normal training images lie, defective ones, and their masks.
PLACES = {
    "folder": (GOOD, "{defect}", "masks/{defect}/{stem}{suffix}"),
    "mvtec_ad": (f"train/{GOOD}", "test/{defect}", "ground_truth/{defect}/{stem}_mask{suffix}"),
}
NAME_LENGTH = 16
KEYS = ("image_id", "truth", "class_name", "defect")
# Seconds to wait for another person's feedback.
LIMIT = 60.0


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
    the dataset does not have the class, a photograph or a mask breaks the data contract, a photograph is in the dataset
    elsewhere or with another mask, or a mask is required and missing.
    """
    root, layout = params.prepare.root, params.prepare.layout
    if layout not in PLACES:
        raise InputError(f"prepare.layout is {layout}: only {' and '.join(PLACES)}, folders of images, take feedback")
    _check_statement(said, len(files), mask, params.validate_.masks == "required")
    # Two people at once would each miss what the other adds.
    with hold(w.FEEDBACK_LOCK, f"the feedback of {root}", LIMIT):
        return _take(files, said, params, log, mask)


def _take(files: Sequence[Path], said: Statement, params: Params, log: Path, mask: Path | None) -> list[Path]:
    root = params.prepare.root
    normal, defective, masks = PLACES[params.prepare.layout]
    place = _class_folder(root, said.class_name, normal)
    folder = place / (normal if said.defect is None else defective.format(defect=said.defect))
    for file in files:
        _check_files(file, said, params, mask)
    logged = _read_log(log)
    hashes = {file: sha256(file) for file in files}
    known, added = _find_copies(root, hashes, folder), []
    for file, image_id in hashes.items():
        target = known.get(image_id, folder / f"{image_id[:NAME_LENGTH]}{file.suffix.lower()}")
        if mask is not None:
            # Before its photograph, so that the same command completes what a kill interrupts.
            drawn = place / masks.format(defect=said.defect, stem=target.stem, suffix=mask.suffix.lower())
            _refuse_another_mask(drawn, mask, target)
            _copy(mask, drawn)
        if image_id not in known:
            _copy(file, target)
            known[image_id] = target
            added.append(target)
    _append(log, logged, said, hashes.values())
    return added


def _check_statement(said: Statement, count: int, mask: Path | None, mask_required: bool) -> None:
    if not said.by.strip():
        raise InputError("feedback is recorded with a person's name: say who you are")
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
    check_name(name, what)
    if name.startswith("."):
        raise InputError(f"the {what} {name!r} would be a hidden folder: use another name")


def _class_folder(root: Path, name: str, normal: str) -> Path:
    if not (root / name / normal).is_dir():
        known = sorted(path.relative_to(root).parts[0] for path in root.glob(f"*/{normal}") if path.is_dir())
        raise InputError(
            f"{root} has no class {name!r}, only {', '.join(known) or 'none'}; to begin a new class, make its folder: "
            f"mkdir -p {root / name / normal}"
        )
    return root / name


def _check_files(file: Path, said: Statement, params: Params, mask: Path | None) -> None:
    """Raise InputError if a photograph or its mask cannot be read or breaks the data contract."""
    for image in (file, mask):
        if image is not None and image.suffix.lower() not in SUFFIXES:
            raise InputError(f"{image}: the name of an image must end in {', '.join(sorted(SUFFIXES))}")
    photograph = decode(file, params.prepare.max_pixels)
    found = image_faults(photograph.mode, *photograph.size, params.validate_)
    if mask is not None:
        drawn, size = decode(mask, params.prepare.max_pixels), params.first_stage.image_size
        found |= mask_faults(drawn, photograph.size, said.defect is not None, str(mask), size)
    if not found:
        return
    from vlmdiff.data.contract import image_rules  # Great Expectations takes seconds to import

    where = f"{file} with the mask {mask}" if mask else str(file)
    errors = []
    for rule in image_rules(params.validate_, label_maps=False):
        if rule.name in found:
            broken = f"{rule.what}, and this one: {found[rule.name]}. {rule.remedy}"
            if rule.severity == "error":
                errors.append(broken)
            else:
                say(f"warning: {where}: {broken}")
    if errors:
        raise InputError(f"{where} breaks the data contract: {'; '.join(errors)}")


def _refuse_another_mask(drawn: Path, mask: Path, photograph: Path) -> None:
    """Raise InputError if the dataset has another mask of this photograph."""
    stem = glob.escape(drawn.stem.removesuffix("_mask"))
    for present in [*drawn.parent.glob(f"{stem}.*"), *drawn.parent.glob(f"{stem}_mask.*")]:
        if present != drawn or sha256(present) != sha256(mask):
            raise InputError(f"{photograph} has another mask already, {present}: remove that file if it is wrong")


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


def _read_log(log: Path) -> list[dict[str, Any]]:
    """Return the rows of the log, without a last line that a kill cut off. Raises InputError for any other damage."""
    lines = log.read_bytes().splitlines(keepends=True) if log.exists() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows.append({key: row[key] for key in (*KEYS, "by", "when")})
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines) and not line.endswith(b"\n"):
                say(f"warning: {log}: the last line was cut off and is removed: {line.decode(errors='replace')}")
            elif line.strip():
                raise InputError(
                    f"{log}, line {number}: not a line of feedback ({error!r}): fix or remove it"
                ) from None
    return rows


def _append(log: Path, rows: list[dict[str, Any]], said: Statement, image_ids: Iterable[str]) -> None:
    """Add a row for each photograph, except where the log says the same already, and write the log whole."""
    logged = {tuple(row[key] for key in KEYS) for row in rows}
    truth = "normal" if said.defect is None else "anomalous"
    record = {"by": said.by, "when": datetime.now(UTC).isoformat(timespec="seconds")}
    new = [(image_id, truth, said.class_name, said.defect) for image_id in dict.fromkeys(image_ids)]
    rows = rows + [dict(zip(KEYS, row, strict=True)) | record for row in new if row not in logged]
    with atomic_path(log) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
