"""What a person says of photographs: normal ones join the training data, anomalous ones the test data."""

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfile
from typing import Any

from vlmdiff.core import workspace as w
from vlmdiff.core.console import say
from vlmdiff.core.errors import InputError
from vlmdiff.core.files import atomic_path, sha256
from vlmdiff.core.locks import hold
from vlmdiff.core.params import Params, Prepare
from vlmdiff.data import log as logs
from vlmdiff.data import manifest
from vlmdiff.data.images import SUFFIXES, decode
from vlmdiff.data.layouts import GIVEN, GOOD
from vlmdiff.data.rules import check_name, image_faults, mask_faults

# By layout, under a class's folder: where normal training images lie, defective ones, and their masks. The other
# layouts have such classes in the root's folder GIVEN, in layout `folder`.
PLACES = {
    "folder": (GOOD, "{defect}", "masks/{defect}/{stem}{suffix}"),
    "mvtec_ad": (f"train/{GOOD}", "test/{defect}", "ground_truth/{defect}/{stem}_mask{suffix}"),
}
NAME_LENGTH = 16
KEYS = ("image_id", "truth", "class_name", "defect")
WITHDRAWN = "withdrawn"
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
    photograph. Everything is checked before anything is copied. Raises InputError if the dataset does not have the
    class, a photograph or a mask breaks the data contract, a photograph is in the dataset elsewhere or with another
    mask, or a mask is required and missing.
    """
    _check_statement(said, len(files), mask, params.validate_.masks == "required")
    # Two people at once would each miss what the other adds.
    with hold(w.FEEDBACK_LOCK, f"the feedback of {params.prepare.root}", LIMIT):
        return _take(files, said, params, log, mask)


def withdraw(image_id: str, by: str, params: Params, log: Path) -> dict[str, Any]:
    """Take back what was last said of a photograph: remove the files that feedback added, and log who did.

    Returns the row of the log that no longer holds. Raises InputError if there is none.
    """
    with hold(w.FEEDBACK_LOCK, f"the feedback of {params.prepare.root}", LIMIT):
        rows = logs.read(log, KEYS)
        last = logs.latest(rows).get(image_id)
        if last is None or last["truth"] == WITHDRAWN:
            raise InputError("nobody has said what this photograph shows, so there is nothing to take back")
        place, folder, masks = _places(params.prepare, last["class_name"], last["defect"])
        drawn = place / masks.format(defect=last["defect"], stem=image_id[:NAME_LENGTH], suffix=".*")
        # Only what feedback named.
        for file in [*folder.glob(f"{image_id[:NAME_LENGTH]}.*"), *drawn.parent.glob(drawn.name)]:
            file.unlink()
        logs.append(log, rows, [{**{key: last[key] for key in KEYS}, "truth": WITHDRAWN}], by)
        return last


def answers(log: Path) -> dict[str, dict[str, Any]]:
    """Return, by image, what was last said of it: the keys KEYS, `by` and `when`. What was taken back is not there."""
    return {key: row for key, row in logs.latest(logs.read(log, KEYS)).items() if row["truth"] != WITHDRAWN}


def _places(data: Prepare, class_name: str, defect: str | None) -> tuple[Path, Path, str]:
    """Return a class's folder, that of its photographs of this kind, and the pattern of their masks in the first."""
    root = data.root if data.layout in PLACES else data.root / GIVEN
    normal, defective, masks = PLACES.get(data.layout, PLACES["folder"])
    place = root / class_name
    return place, place / (normal if defect is None else defective.format(defect=defect)), masks


def _take(files: Sequence[Path], said: Statement, params: Params, log: Path, mask: Path | None) -> list[Path]:
    _check_class(params.prepare, said.class_name)
    place, folder, masks = _places(params.prepare, said.class_name, said.defect)
    for file in files:
        _check_files(file, said, params, mask)
    logged = logs.read(log, KEYS)
    hashes = {file: sha256(file) for file in files}
    known, added = _find_copies(params.prepare, hashes, folder, logs.latest(logged)), []
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
    if params.prepare.layout not in PLACES:
        # Layout `folder` needs it in each class.
        (place / GOOD).mkdir(parents=True, exist_ok=True)
    truth = "normal" if said.defect is None else "anomalous"
    rows = [(image_id, truth, said.class_name, said.defect) for image_id in dict.fromkeys(hashes.values())]
    logs.append(log, logged, [dict(zip(KEYS, row, strict=True)) for row in rows], said.by)
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


def _check_class(data: Prepare, name: str) -> None:
    """Raise InputError if the dataset does not have the class."""
    root = data.root
    if data.layout not in PLACES:
        known = sorted(set(manifest.read(w.MANIFEST)["class_name"]))
        if name not in known:
            raise InputError(f"the dataset has no class {name!r}, only {', '.join(known)}")
        return
    normal, _, _ = PLACES[data.layout]
    if not (root / name / normal).is_dir():
        known = sorted(path.relative_to(root).parts[0] for path in root.glob(f"*/{normal}") if path.is_dir())
        raise InputError(
            f"{root} has no class {name!r}, only {', '.join(known) or 'none'}; to begin a new class, make its folder: "
            f"mkdir -p {root / name / normal}"
        )


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


def _find_copies(
    data: Prepare, hashes: dict[Path, str], folder: Path, said: dict[str, dict[str, Any]]
) -> dict[str, Path]:
    """Return, by hash, the images in `folder` that are the same as these files.

    said: what was said last, by hash. Raises InputError if the dataset has one of the files elsewhere.
    """
    wanted = {image_id: file for file, image_id in hashes.items()}
    sizes = {file.stat().st_size for file in hashes}
    found: dict[str, Path] = {}
    for path in _images_of(data):
        # Only files of the same size can have the same hash.
        if path.suffix.lower() in SUFFIXES and path.is_file() and path.stat().st_size in sizes:
            image_id = sha256(path)
            if image_id in wanted and path.parent != folder:
                row = said.get(image_id, {"truth": WITHDRAWN})
                by = (
                    ""
                    if row["truth"] == WITHDRAWN
                    else f" ({row['by']} said at {row['when']} that it is {row['truth']})"
                )
                raise InputError(
                    f"{wanted[image_id]} is in the dataset already, as {path}{by}, and cannot be in {folder} too: "
                    "remove that file if it is wrong there"
                )
            if image_id in wanted:
                found.setdefault(image_id, path)
    return found


def _images_of(data: Prepare) -> Iterator[Path]:
    yield from sorted(data.root.rglob("*"))
    if data.image_root != data.root:
        # What `prepare` made, without its copies of what lies in the root.
        copies = data.image_root / GIVEN
        yield from (path for path in sorted(data.image_root.rglob("*")) if not path.is_relative_to(copies))


def _copy(file: Path, target: Path) -> None:
    with atomic_path(target) as temporary:
        copyfile(file, temporary)
