"""Captions from a file that the user provides, inside the dataset's folder, which DVC tracks.

The file's suffix selects the format:

- `.jsonl`: one object per line with `caption` and either `path` or `image_id`. The manifest must list every image.
- `.tsv`, `.txt`: one line per image: its path, a tab, its caption.
- `.json`: an object that maps paths to captions, or captions in COCO's format (`images` with `id` and `file_name`,
  `annotations` with `image_id` and `caption`). The first of several captions of an image counts.
- `.json` (a list) or `.txt` (one per line) with captions only, and `images`, a list of paths in the same order and of
  the same length, in either format. The VLMDiff authors' code writes these lists; an entry may be a list of one text.

A caption belongs to the image of its path, in any order. A path matches the manifest's path if they are equal or one
ends in the other, such as an absolute path or a file name that only one image has. A bare number is a COCO id: 139
means `000000000139.jpg`. Captions of images that the manifest does not list are counted and skipped (`.jsonl`: error).
"""

import json
from collections import Counter, defaultdict
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd

from vlmdiff.core.console import say
from vlmdiff.core.errors import InputError
from vlmdiff.core.files import sha256
from vlmdiff.core.params import CaptionFile
from vlmdiff.data.images import resolve

# Place in the file, name of the image, caption.
Row = tuple[str, Any, Any]


class FromFile:
    """Read captions from a file in one of the formats above.

    `frame` is the manifest. Each normal train and validation image needs a caption; test images do not. Raises
    InputError, which names the file and the line or entry, or the images without a caption.
    """

    def __init__(self, params: CaptionFile, frame: pd.DataFrame, dataset_root: Path):
        file = inside(dataset_root, params.file, "file")
        images = None if params.images is None else inside(dataset_root, params.images, "images")
        self.captions = _match(file, images, frame)
        digests = [sha256(f) for f in (file, images) if f is not None]
        self.identity = {"captioner": "file", "sha256": digests}

    def caption(self, items: Sequence[tuple[str, Path]]) -> Generator[dict[str, str | None]]:
        yield {image_id: self.captions.get(image_id) for image_id, _ in items}


def inside(root: Path, path: Path, name: str) -> Path:
    """Return the file that `captioner.NAME` names. Raise InputError if there is none, or it lies outside `root`."""
    try:
        file = resolve(root, path.as_posix())
    except InputError as error:
        raise InputError(
            f"caption.captioner.{name}: {error}. DVC tracks only that folder. Move the file into it."
        ) from error
    if not file.is_file():
        raise InputError(f"caption.captioner.{name}: {file} does not exist. Paths are relative to the dataset.")
    return file


def _match(file: Path, images: Path | None, frame: pd.DataFrame) -> dict[str, str]:
    """Return the captions by image_id."""
    known = _Images(frame)
    captions: dict[str, str] = {}
    first: dict[str, str] = {}
    strangers = []
    try:
        for where, name, caption in _rows(file, images):
            with _at(where):
                image_id = known.find(_text(name, "`path` or `image_id`"))
                caption = _text(caption, "`caption`")
                if image_id is None and file.suffix == ".jsonl":
                    raise ValueError(f"the manifest has no image {name!r}. Paths are relative to the dataset's root.")
                if image_id in first:
                    raise ValueError(f"the image already has a caption, in {first[image_id]}. Remove one of them.")
            if image_id is None:
                strangers.append(name)
            else:
                captions[image_id], first[image_id] = caption, where
    except ValueError as error:
        raise InputError(f"{file}, {error}") from error
    if strangers:
        say(f"caption: {file.name} has {len(strangers)} caption(s) of images not in the manifest: {strangers[0]} …")
    needed = frame[(frame["split"] != "test") & ~frame["is_anomalous"].astype(bool)]
    missing = sorted(needed.loc[~needed["image_id"].isin(list(captions)), "path"])
    if missing:
        raise InputError(
            f"{file}: no caption for {len(missing)} of {len(needed)} normal train and validation images: "
            f"{', '.join(missing[:10])}{' …' if len(missing) > 10 else ''}. Add one for each."
        )
    return captions


@contextmanager
def _at(where: str) -> Generator[None]:
    """Prefix the message of a ValueError with `where`."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


class _Images:
    """Find images by the names that caption files use."""

    def __init__(self, frame: pd.DataFrame):
        self.known = dict(zip(frame["path"], frame["image_id"], strict=True))
        self.known |= dict(zip(frame["image_id"], frame["image_id"], strict=True))
        self.by_file_name = defaultdict(list)
        for path in frame["path"]:
            self.by_file_name[PurePosixPath(path).name].append(path)

    def find(self, name: str) -> str | None:
        """Return the image_id, or None if no image matches. Raises ValueError if several match."""
        if name.isascii() and name.isdigit():
            name = f"{int(name):012}.jpg"
        name = PurePosixPath(name).as_posix()
        if name in self.known:
            return self.known[name]
        same = self.by_file_name[PurePosixPath(name).name]
        paths = [path for path in same if f"/{path}".endswith(f"/{name}") or name.endswith(f"/{path}")]
        if len(paths) > 1:
            raise ValueError(f"{name!r} matches {len(paths)} images: {paths[0]}, {paths[1]}, …. Give a longer path.")
        return self.known[paths[0]] if paths else None


def _text(value: Any, name: str) -> str:
    """Return `value`. Raises ValueError if it is empty or not text."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} is missing, empty or not text")
    value.encode()  # JSON allows half a surrogate pair, which is not text (this raises a ValueError too)
    return value


def _rows(file: Path, images: Path | None) -> Iterator[Row]:
    if images is not None:
        return _lists(file, images)
    match file.suffix:
        case ".jsonl":
            return _json_lines(file)
        case ".tsv" | ".txt":
            return _columns(file)
        case ".json":
            return _json_objects(file)
    raise InputError(f"caption.captioner.file: {file} has an unknown suffix. Use .jsonl, .json, .tsv or .txt.")


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    """Yield each line with its place."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            with _at(f"line {number}"):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            yield f"line {number}", text


def _json_lines(file: Path) -> Iterator[Row]:
    for where, line in _lines(file):
        if line.strip():
            with _at(where):
                row = _parse(line)
                if not isinstance(row, dict):
                    raise ValueError('not an object. Write {"path": …, "caption": …}.')
                unknown = sorted(set(row) - {"image_id", "path", "caption"})
                if unknown:
                    what = "Give `caption` and either `image_id` or `path`."
                    raise ValueError(f"unknown key {', '.join(unknown)}. {what}")
                if ("image_id" in row) == ("path" in row):
                    raise ValueError("needs either `image_id` or `path`")
            yield where, row.get("path", row.get("image_id")), row.get("caption")


def _columns(file: Path) -> Iterator[Row]:
    for where, line in _lines(file):
        if line.strip():
            path, tab, caption = line.partition("\t")
            if not tab:
                raise ValueError(f"{where}: no tab after the path. For captions only, set caption.captioner.images.")
            yield where, path.strip(), caption


def _json_objects(file: Path) -> Iterator[Row]:
    content = _read_json(file)
    if isinstance(content, dict) and "annotations" in content:
        yield from _coco(file, content)
    elif isinstance(content, dict):
        for path, caption in content.items():
            yield f"key {path!r}", path, caption
    else:
        raise ValueError("whole file: captions without paths. Set caption.captioner.images to the list of images.")


def _coco(file: Path, content: dict) -> Iterator[Row]:
    names, where = None, "images"
    seen, further = set(), 0
    try:
        if "images" in content:
            names = {image["id"]: image["file_name"] for image in content["images"]}
        for number, annotation in enumerate(content["annotations"]):
            where = f"annotations[{number}]"
            image = annotation["image_id"]
            # The VLMDiff authors' converter writes only annotations: the id is then the image's name.
            name = str(image) if names is None else names[image]
            if name in seen:
                further += 1
            else:
                seen.add(name)
                yield where, name, annotation["caption"]
    except (LookupError, TypeError) as error:
        raise ValueError(f"{where}: not in COCO's format: {type(error).__name__} {error}") from error
    if further:
        say(f"caption: {file.name} has {further} more caption(s) of the same images; the first of each counts")


def _lists(file: Path, images: Path) -> Iterator[Row]:
    captions, names = _list(file), _list(images)
    if len(captions) != len(names):
        raise ValueError(f"whole file: {len(captions)} captions, but {images.name} lists {len(names)} images")
    for (where, caption), (_, name) in zip(captions, names, strict=True):
        yield where, name, caption


def _list(file: Path) -> list[tuple[str, Any]]:
    if file.suffix == ".txt":
        return list(_lines(file))
    content = _read_json(file)
    if not isinstance(content, list):
        raise ValueError(f"whole file: {file.name} must be a list because caption.captioner.images is set")
    # Models that answer in batches of one write lists of one text.
    texts = (value[0] if isinstance(value, list) and len(value) == 1 else value for value in content)
    return [(f"entry {number}", text) for number, text in enumerate(texts, start=1)]


def _read_json(file: Path) -> Any:
    with _at(f"in {file.name}"):
        return _parse(file.read_text(encoding="utf-8-sig"))


def _parse(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_once)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if twice:
        raise ValueError(f"the key {twice[0]!r} occurs twice")
    return dict(pairs)
