"""What a person has said of photographs: confirmed ones join the training data, rejected ones the test data."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from shutil import copyfile

import numpy as np

from vlmdiff.core.errors import InputError
from vlmdiff.core.files import atomic_path
from vlmdiff.core.params import Params
from vlmdiff.data.images import SUFFIXES, decode
from vlmdiff.data.layouts import GOOD

# Under a class's folder, by layout: where its normal training images lie, defective ones, and these ones' masks.
PLACES = {
    "folder": (GOOD, "{defect}", "masks/{defect}/{stem}{suffix}"),
    "mvtec_ad": (f"train/{GOOD}", "test/{defect}", "ground_truth/{defect}/{stem}_mask{suffix}"),
}
NAME_LENGTH = 16


@dataclass(frozen=True)
class Statement:
    """What a person says of photographs. `defect` is its kind, None where they are normal; `by` is the person."""

    class_name: str
    defect: str | None
    by: str


def give_feedback(
    files: Sequence[Path], said: Statement, params: Params, log: Path, mask: Path | None = None
) -> list[Path]:
    """Copy photographs into `prepare.root` and append a line for each to `log`; the files that are new there.

    They are called by their contents' hash: twice is as good as once. mask: of one defective photograph. All is checked
    before anything is copied. Raises InputError where the layout is none of PLACES, the class is not in the dataset, a
    photograph cannot be read or is in the dataset elsewhere, or a mask that is required is missing or of another size.
    """
    root, layout = params.prepare.root, params.prepare.layout
    if layout not in PLACES:
        raise InputError(
            f"prepare.layout is {layout}: feedback can be added to {' and '.join(PLACES)}, which are folders of images"
        )
    normal, defective, masks = PLACES[layout]
    place = _class_folder(root, said.class_name, normal)
    if said.defect is None:
        if mask is not None:
            raise InputError("a normal photograph has no mask: leave --mask out")
        folder = place / normal
    else:
        _check_name(said.defect, "kind of defect")
        if said.defect in (GOOD, "masks"):
            raise InputError(f"a defect cannot be called {said.defect!r}: that folder means something else")
        folder = place / defective.format(defect=said.defect)
        if mask is None and params.validate_.masks == "required":
            raise InputError(
                "validate.masks is required: give the photograph's with --mask, or set validate.masks to optional"
            )
        if mask is not None and len(files) != 1:
            raise InputError(f"--mask is the mask of one photograph, and there are {len(files)}: give them one by one")
    hashes = {file: _check(file, params.prepare.max_pixels, mask) for file in files}
    known = _find(root, {file.stat().st_size for file in files}, set(hashes.values()))
    for file, image_id in hashes.items():
        if elsewhere := [path for path in known.get(image_id, ()) if path.parent != folder]:
            raise InputError(
                f"{file} is in the dataset already, as {elsewhere[0]}, and not in {folder}: one photograph cannot be "
                "in both; remove it there if that is wrong"
            )
    added, logged = [], _logged(log)
    for file, image_id in hashes.items():
        target = folder / f"{image_id[:NAME_LENGTH]}{file.suffix.lower()}"
        present = known.get(image_id, [])
        if mask is not None:
            # Before its photograph: who is killed in between runs the same again.
            stem = (present[0] if present else target).stem
            _copy(mask, place / masks.format(defect=said.defect, stem=stem, suffix=mask.suffix.lower()))
        if not present:
            _copy(file, target)
            known[image_id] = [target]
            added.append(target)
        row = {
            "image_id": image_id,
            "truth": "normal" if said.defect is None else "anomalous",
            "class_name": said.class_name,
            "defect": said.defect,
        }
        if tuple(row.values()) not in logged:
            logged.add(tuple(row.values()))
            line = json.dumps(row | {"by": said.by, "when": datetime.now(UTC).isoformat(timespec="seconds")})
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("a", encoding="utf-8") as stream:
                stream.write(line + "\n")
    return added


def _class_folder(root: Path, name: str, normal: str) -> Path:
    _check_name(name, "class")
    if not (root / name / normal).is_dir():
        known = sorted(path.relative_to(root).parts[0] for path in root.glob(f"*/{normal}") if path.is_dir())
        raise InputError(
            f"{root} has no class {name!r}, only {', '.join(known) or 'none'}; a new class begins with its folder: "
            f"mkdir -p {root / name / normal}"
        )
    return root / name


def _check_name(name: str, what: str) -> None:
    if not name.isprintable() or "/" in name or name.startswith(".") or not name.strip():
        raise InputError(f"the {what} {name!r} cannot be a folder's name: call it otherwise")


def _check(file: Path, max_pixels: int, mask: Path | None) -> str:
    """The hash of a photograph that can be decoded, and whose mask fits."""
    suffixes = ", ".join(sorted(SUFFIXES))
    for image in (file, mask):
        if image is not None and image.suffix.lower() not in SUFFIXES:
            raise InputError(f"{image} is not named as an image: its name must end in {suffixes}")
    size = decode(file, max_pixels).size
    if mask is not None:
        drawn = decode(mask, max_pixels)
        if drawn.size != size:
            raise InputError(
                f"{mask} has {drawn.width} x {drawn.height} pixels and its photograph {size[0]} x {size[1]}: "
                "a mask is of the photograph's size"
            )
        values = np.unique(np.asarray(drawn.convert("L")))
        if len(values) > 2 or not values.any():
            raise InputError(f"{mask} is no mask: it has two values, zero and, where the defect is, another one")
    return _hash(file)


def _find(root: Path, sizes: set[int], wanted: set[str]) -> dict[str, list[Path]]:
    """The images under `root` with these hashes; only those of such a size in bytes are read."""
    found: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() in SUFFIXES and path.is_file() and path.stat().st_size in sizes:
            image_id = _hash(path)
            if image_id in wanted:
                found.setdefault(image_id, []).append(path)
    return found


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _logged(log: Path) -> set[tuple]:
    """What the log says already, without by whom and when."""
    if not log.exists():
        return set()
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
    return {tuple(row[key] for key in ("image_id", "truth", "class_name", "defect")) for row in rows}


def _copy(file: Path, target: Path) -> None:
    with atomic_path(target) as temporary:
        copyfile(file, temporary)
