"""Look at a folder of photographs: what is in it, the parameters for it, and the data under DVC."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import MarkedYAMLError

from vlmdiff.core import dvc, git
from vlmdiff.core import workspace as w
from vlmdiff.core.errors import InputError
from vlmdiff.core.files import atomic_path, check_regular
from vlmdiff.core.params import Params, Prepare, load
from vlmdiff.core.text import counted, plain
from vlmdiff.data import listing, manifest
from vlmdiff.data.images import size_of
from vlmdiff.data.layouts import LAYOUTS

# Layouts with a list of their own come first: the list decides. The demo is generated, not found.
TRIED = [name for name in ("table", "visa", "real_iad", "coco_ad", "cifar") if name in LAYOUTS]
TRIED += [name for name in LAYOUTS if name not in ("demo", *TRIED)]
# Images of a class whose sizes are read.
LOOKED_AT = 50
NAMED = 10
# The sections of params.yaml that define the model. The others define the data and what is expected of the model.
MODEL = ("caption", "first_stage", "encode", "train", "evaluate")


@dataclass(frozen=True)
class Found:
    """A dataset as `prepare` reads it.

    frame: what listing.outline returns; pairs: what listing.in_two_splits returns.
    """

    params: Prepare
    frame: pd.DataFrame
    pairs: list[tuple[str, str]]


def look(root: Path, params: Prepare, layout: str | None) -> Found:
    """Read a folder in this layout or, if `layout` is None, in the first layout that fits.

    Raises InputError that says for each layout why it does not fit.
    """
    if not root.is_dir():
        raise InputError(f"{root} is not a folder: pass the folder of the photographs by --data")
    if layout is not None and layout not in TRIED:
        raise InputError(f"unknown layout {layout!r}: choose one of {', '.join(TRIED)}")
    reasons = []
    for name in [layout] if layout else TRIED:
        chosen = params.model_copy(update={"layout": name, "root": root})
        try:
            return Found(chosen, listing.outline(chosen), listing.in_two_splits(chosen))
        except (InputError, OSError) as error:
            reasons.append(f"  {name}: {error}")
    raise InputError(f"{root} fits no layout:\n" + "\n".join(reasons))


def table(found: Found) -> Group:
    """Return what was found, one row a class: images by split, masks, sizes; and what changed since `prepare`."""
    title = Text(plain(f"{found.params.root}, layout {found.params.layout}"))
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title)
    shown.title_justify = "left"
    for title in ("class", "train", "validation", "test", "anomalous", "masks", "width × height"):
        shown.add_column(title, justify="left" if title in ("class", "width × height") else "right")
    for name, rows in found.frame.groupby("class_name"):
        anomalous = rows[rows["is_anomalous"]]
        counts = [str(int((rows["split"] == split).sum())) for split in ("train", "validation", "test")]
        masks = f"{anomalous['mask_path'].notna().sum()} of {len(anomalous)}"
        sizes = _sizes(found.params, rows["path"])
        shown.add_row(Text(plain(str(name))), *counts, str(len(anomalous)), masks, sizes)
    lines = [f"{counted(len(found.frame), 'image')} of {counted(found.frame['class_name'].nunique(), 'class')}"]
    if w.MANIFEST.is_file():
        known = set(manifest.read(w.MANIFEST)["path"])
        more, gone = len(set(found.frame["path"]) - known), len(known - set(found.frame["path"]))
        lines.append(f"since the last run of prepare: {more} new, {gone} removed")
    paths = pd.concat([found.frame["path"], found.frame["mask_path"].dropna()])
    if passed := listing.passed_over(found.params, paths):
        lines.append(passed)
    if found.pairs and found.params.copies == "error":
        named = ", ".join(f"{first} = {second}" for first, second in found.pairs[:NAMED])
        more = " …" if len(found.pairs) > NAMED else ""
        lines.append(
            f"{counted(len(found.pairs), 'image', 'are')} in two splits ({named}{more}): remove one of each pair, or "
            "run this command again with --copies keep_test, which leaves out the one in the earlier split (train, "
            "validation, test), or --copies keep_train, the one in the later split"
        )
    without = found.frame["is_anomalous"] & found.frame["mask_path"].isna()
    if without.any():
        lines.append(
            f"{counted(without.sum(), 'anomalous image')} without a mask: draw the masks, or set validate.masks: "
            "optional, gate.metric: image_auroc, and gate.floors for image_auroc"
        )
    return Group(shown, *(Text(plain(line)) for line in lines))


def _sizes(params: Prepare, paths: pd.Series) -> str:
    """Return the smallest and the largest size of a class's images, by the headers of some of them."""
    root, some = params.image_root, list(paths)[:: max(1, len(paths) // LOOKED_AT)]
    sizes, broken = [], 0
    for path in some:
        try:
            sizes.append(size_of(root / path, params.max_pixels))
        except InputError:
            broken += 1
    if not sizes:
        return "none can be read" if root.joinpath(some[0]).exists() else "made by prepare"
    least, most = np.min(sizes, axis=0), np.max(sizes, axis=0)
    said = f"{least[0]} × {least[1]}" + (f" to {most[0]} × {most[1]}" if (least != most).any() else "")
    return f"{said}, {broken} of {len(some)} cannot be read" if broken else said


def write_params(found: Found, preset: Path | None, out: Path = w.PARAMS) -> str:
    """Write params.yaml for the dataset, from a preset or from the demo's, and return what was done, as a sentence.

    Comments stay. A file that has settings of its own stays as it is: then the sentence says how it differs.
    """
    template = preset or out
    wanted = load(template).model_copy(update={"prepare": found.params})
    if out.is_file():
        present = load(out)
        if present == wanted:
            return f"{out} is up to date"
        # Of settings of its own, only the choice that a person made by --copies changes.
        prepare = present.prepare.model_copy(update={"copies": found.params.copies})
        if present != Params() and present.model_copy(update={"prepare": prepare}) != wanted:
            return f"{out} has settings of its own and stays as it is; it differs in\n" + "\n".join(
                f"  {key}: {ours}, here {theirs}" for key, ours, theirs in _differences(present, wanted)
            )
    document = _read(template)
    section: Any = document.setdefault("prepare", CommentedMap())
    values = {"root": found.params.root.as_posix(), "layout": found.params.layout}
    if found.params.copies != "error" or "copies" in section:
        values = {"copies": found.params.copies, **values}
    for key, value in values.items():
        if key in section:
            section[key] = value
        else:
            section.insert(0, key, value)
    with atomic_path(out) as temporary:
        _yaml().dump(document, temporary)
        load(temporary)
    return f"wrote {out}, from {template}" if preset else f"wrote the section prepare of {out}"


def use_preset(preset: Path, out: Path = w.PARAMS) -> None:
    """Copy the model of a preset into params.yaml, with its comments. All other lines stay as they are.

    Raises InputError if one of the files is not valid; then params.yaml stays as it was.
    """
    load(preset)
    theirs, ours = _sections(preset), _sections(out)
    for name in MODEL:
        before, _ = ours.get(name, ("\n", ""))
        _, lines = theirs.get(name, ("", f"{name}: {{}}\n"))
        ours[name] = before, lines
    # The lines after the last section stay at the end.
    end = ours.pop("")
    with atomic_path(out) as temporary:
        temporary.write_text("".join(before + lines for before, lines in [*ours.values(), end]), encoding="utf-8")
        load(temporary)


def _sections(file: Path) -> dict[str, tuple[str, str]]:
    """Return the lines of each section of a YAML file: comments and blank lines before it, and its own lines.

    The last section has the name "", and no lines of its own.
    """
    document, lines = _read(file), (file.read_text(encoding="utf-8").rstrip() + "\n").splitlines(keepends=True)
    starts = [(name, document.lc.key(name)[0]) for name in document]
    sections, done = {}, 0
    for (name, start), (_, end) in pairwise([*starts, ("", len(lines))]):
        while lines[end - 1].startswith(("#", "\n")):
            end -= 1
        sections[name] = "".join(lines[done:start]), "".join(lines[start:end])
        done = end
    sections[""] = "".join(lines[done:]), ""
    return sections


def _yaml() -> YAML:
    """Return a reader and writer that keeps comments, their columns, quotes and the length of lines."""
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 10_000
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.representer.add_representer(type(None), lambda to, _: to.represent_scalar("tag:yaml.org,2002:null", "null"))
    return yaml


def _read(file: Path) -> CommentedMap:
    try:
        return _yaml().load(file) or CommentedMap()
    except MarkedYAMLError as error:
        raise InputError(f"{file}, line {error.problem_mark.line + 1}: {error.problem}") from None


def _differences(ours: Params, theirs: Params) -> list[tuple[str, object, object]]:
    def flat(values: dict, prefix: str = "") -> dict[str, object]:
        found = {}
        for key, value in values.items():
            found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        return found

    left, right = (flat(params.model_dump(mode="json", by_alias=True)) for params in (ours, theirs))
    missing = "not set"
    keys = sorted(left.keys() | right.keys())
    return [(key, left.get(key, missing), right.get(key, missing)) for key in keys if left.get(key) != right.get(key)]


def track(root: Path) -> str:
    """Put the folder under DVC, or record how it has grown; return what was done, as a sentence.

    A folder outside of the workspace stays there: DVC records its hash as a dependency of the stages that read it.
    """
    if root.is_absolute():
        return f"{root} is outside of this workspace: DVC records its hash, and does not copy or push it"
    # DVC reads every file.
    check_regular(root)
    if not Path(".dvc").is_dir():
        raise InputError("this folder is not under DVC: run `git init` and `dvc init`, then this command again")
    if in_git := git.list_files(str(root)):
        return (
            f"{root} has files that git tracks ({', '.join(in_git[:NAMED])}): DVC records its hash, and does not push "
            f"it. To push the photographs too, move them into a folder of their own, such as {root}/photographs"
        )
    dvc.add(str(root), print)
    return f"{root} is under DVC: commit {root}.dvc to git"
