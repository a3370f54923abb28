"""A first look at photographs of one's own: what is there, the parameters for it, and the data under DVC."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from vlmdiff.core import workspace as w
from vlmdiff.core.errors import InputError
from vlmdiff.core.files import atomic_path
from vlmdiff.core.params import Params, Prepare, load
from vlmdiff.data import manifest
from vlmdiff.data.layouts import LAYOUTS

# Those that a dataset's own lists tell first; the demo is made, and not found.
TRIED = [name for name in ("table", "visa", "real_iad", "coco_ad", "cifar") if name in LAYOUTS]
TRIED += [name for name in LAYOUTS if name not in ("demo", *TRIED)]
LOOKED_AT = 50  # images of a class whose sizes are read
NAMED = 10
# The sections of params.yaml that make the model; the others are of the data and of what is asked of it.
MODEL = ("caption", "first_stage", "encode", "train", "evaluate")


@dataclass(frozen=True)
class Found:
    """A dataset as `prepare` would read it; `frame` as manifest.outline gives it."""

    params: Prepare
    frame: pd.DataFrame


def look(root: Path, params: Prepare, layout: str | None) -> Found:
    """Read a folder as the layout says, or as the first of all layouts that fits.

    Raises InputError that says of each layout what it misses.
    """
    if not root.is_dir():
        raise InputError(f"{root} is not a folder: --data names the one with the photographs")
    if layout is not None and layout not in TRIED:
        raise InputError(f"there is no layout {layout!r} for a folder: choose one of {', '.join(TRIED)}")
    reasons = []
    for name in [layout] if layout else TRIED:
        chosen = params.model_copy(update={"layout": name, "root": root})
        try:
            return Found(chosen, manifest.outline(chosen))
        except (InputError, OSError) as error:
            reasons.append(f"  {name}: {error}")
    raise InputError(f"{root} is of no layout that is known:\n" + "\n".join(reasons))


def table(found: Found) -> Group:
    """What was found, a row a class: images by split, masks, sizes; and how many more than the manifest has."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=f"{found.params.root}, layout {found.params.layout}")
    shown.title_justify = "left"
    for title in ("class", "train", "validation", "test", "anomalous", "masks", "width × height"):
        shown.add_column(title, justify="left" if title in ("class", "width × height") else "right")
    for name, rows in found.frame.groupby("class_name"):
        anomalous = rows[rows["is_anomalous"]]
        counts = [str(int((rows["split"] == split).sum())) for split in ("train", "validation", "test")]
        masks = f"{anomalous['mask_path'].notna().sum()} of {len(anomalous)}"
        shown.add_row(str(name), *counts, str(len(anomalous)), masks, _sizes(found.params.image_root, rows["path"]))
    lines = [f"{len(found.frame)} images of {found.frame['class_name'].nunique()} classes"]
    if w.MANIFEST.is_file():
        known = set(manifest.read(w.MANIFEST)["path"])
        more, gone = len(set(found.frame["path"]) - known), len(known - set(found.frame["path"]))
        lines.append(f"since the last run of prepare {more} came and {gone} went")
    without = found.frame["is_anomalous"] & found.frame["mask_path"].isna()
    if without.any():
        lines.append(
            f"{without.sum()} anomalous images have no mask: draw them, or set validate.masks: optional, gate.metric: "
            "image_auroc and gate.floors of it"
        )
    return Group(shown, *map(Text, lines))


def _sizes(root: Path, paths: Sequence[str]) -> str:
    """The smallest and largest size among a class's images, by the headers of some."""
    some = list(paths)[:: max(1, len(paths) // LOOKED_AT)]
    sizes, broken = [], 0
    for path in some:
        try:
            with Image.open(root / path) as image:
                sizes.append(image.size)
        except (OSError, ValueError, Image.DecompressionBombError):
            broken += 1
    if not sizes:
        return "not made yet" if not root.joinpath(some[0]).exists() else "none can be read"
    least, most = np.min(sizes, axis=0), np.max(sizes, axis=0)
    said = f"{least[0]} × {least[1]}" + (f" to {most[0]} × {most[1]}" if (least != most).any() else "")
    return f"{said}, {broken} of {len(some)} cannot be read" if broken else said


def write_params(found: Found, preset: Path | None, out: Path = w.PARAMS) -> str:
    """Write params.yaml for the dataset, from a preset or the demo's, its comments kept; what was done, in words.

    A file with anything of its own in it stays as it is: then the words are how it differs.
    """
    template = preset or out
    load(template)
    text = _set(template.read_text(), template, "layout", found.params.layout)
    text = _set(text, template, "root", found.params.root.as_posix())
    with atomic_path(out.with_name(f".{out.name}.new")) as temporary:
        temporary.write_text(text)
        wanted = load(temporary)
    out.with_name(f".{out.name}.new").unlink()
    if out.is_file():
        present = load(out)
        if present == wanted:
            return f"{out} says so already"
        if present != Params():
            return f"{out} has settings of its own and stays as it is; it differs in\n" + "\n".join(
                f"  {key}: {ours}, where this would be {theirs}" for key, ours, theirs in _differences(present, wanted)
            )
    with atomic_path(out) as temporary:
        temporary.write_text(text)
    return f"{out} is written, from {template}" if preset else f"{out} has the layout and the root"


def use_preset(preset: Path, out: Path = w.PARAMS) -> None:
    """Give params.yaml the model of a preset, comments too; its data, gate, monitor and registry stay as they are.

    Raises InputError where either is not what it should be; then the file stays as it was.
    """
    load(preset)
    theirs, text = preset.read_text(), out.read_text()
    for name in MODEL:
        found = _section(theirs, name)
        section = found[0].rstrip("\n") + "\n\n" if found else f"{name}: {{}}\n\n"
        if there := _section(text, name):
            text = text[: there.start()] + section + text[there.end() :]
        else:
            text = text.rstrip("\n") + "\n\n" + section
    with atomic_path(out) as temporary:
        temporary.write_text(text.rstrip("\n") + "\n")
        load(temporary)


def _section(text: str, name: str) -> re.Match | None:
    """A section of YAML text, up to the next one."""
    return re.search(rf"^{name}:[^\n]*\n(?:(?:[ #][^\n]*)?\n)*", text, re.MULTILINE)


def _set(text: str, file: Path, key: str, value: str) -> str:
    """Set a key of the section `prepare` in YAML text, and leave all else, comments too."""
    if not re.fullmatch(r"[\w./-]+", value):
        value = json.dumps(value, ensure_ascii=False)
    section = _section(text, "prepare")
    if section is None:
        raise InputError(f"{file} has no section prepare: add `prepare:` with a layout and a root")
    pattern = rf"^(  {key}: *)(?:\"[^\"\n]*\"|'[^'\n]*'|[^\s#]+)( *)"

    def replaced(match: re.Match) -> str:
        # A comment that follows stays in its column.
        return (match[1] + value).ljust(len(match[0]) - 1 if match[2] else 0) + (" " if match[2] else "")

    body, count = re.subn(pattern, replaced, section[0], count=1, flags=re.MULTILINE)
    if not count:
        body = section[0].replace("\n", f"\n  {key}: {value}\n", 1)
    return text[: section.start()] + body + text[section.end() :]


def _differences(ours: Params, theirs: Params) -> list[tuple[str, object, object]]:
    def flat(values: dict, prefix: str = "") -> dict[str, object]:
        found = {}
        for key, value in values.items():
            found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        return found

    left, right = (flat(params.model_dump(mode="json", by_alias=True)) for params in (ours, theirs))
    missing = "not there"
    keys = sorted(left.keys() | right.keys())
    return [(key, left.get(key, missing), right.get(key, missing)) for key in keys if left.get(key) != right.get(key)]


def track(root: Path) -> str:
    """Put the folder under DVC; what was done, in words. Grown, it is taken in again.

    Outside of the workspace it stays where it is: DVC records its hash as a dependency of the stages that read it.
    """
    if root.is_absolute():
        return f"{root} is outside of this workspace: DVC records its hash and neither copies nor pushes it"
    if not Path(".dvc").is_dir():
        raise InputError("this folder is not under DVC: run `git init` and `dvc init`, then the same again")
    in_git = subprocess.run(["git", "ls-files", "--", str(root)], capture_output=True, text=True).stdout.splitlines()
    if in_git:
        return (
            f"{root} has files that git tracks ({', '.join(in_git[:NAMED])}): DVC records its hash and does not push "
            f"it; a folder of its own, such as {root}/photographs, would be pushed too"
        )
    command = [sys.executable, "-m", "dvc", "add", "--quiet", str(root)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"`dvc add {root}` failed:\n{done.stderr.strip()}")
    return f"{root} is under DVC: commit {root}.dvc to git"
