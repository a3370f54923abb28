"""Captioners by name, and the loop that asks one for every caption that the store does not hold yet."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import pandas as pd

from vlmdiff import params as p
from vlmdiff.captions import describe
from vlmdiff.captions.store import CaptionStore, key
from vlmdiff.console import say, track
from vlmdiff.data import images
from vlmdiff.errors import InputError

BATCH_SIZE = 32


class Captioner(Protocol):
    """What makes captions.

    identity: all that decides the text (name, revision, prompt, decoding), as JSON types; it keys the store.
    """

    identity: Mapping[str, Any]

    def caption(self, batch: Sequence[tuple[str, Path]]) -> list[str | None]:
        """A caption for each (image_id, file), None where there is none to be had."""
        ...


class Describe:
    """Sentences composed from measurements of the image, without a model."""

    def __init__(self, max_pixels: int):
        self.max_pixels = max_pixels
        # The code is the algorithm's revision: whoever changes it need not remember a number.
        revision = hashlib.sha256(Path(describe.__file__).read_bytes()).hexdigest()
        self.identity = {"captioner": "describe", "revision": revision[:12]}

    def caption(self, batch: Sequence[tuple[str, Path]]) -> list[str | None]:
        return [describe.describe(images.read_image(file, self.max_pixels)) for _, file in batch]


class FromFile:
    """Captions that the user brings: JSONL of `caption` and either `image_id` or `path`, one object a line.

    frame: the manifest; each normal train and validation image needs a caption, a test image may lack one.
    Raises InputError with the line, or with the images that lack a caption.
    """

    def __init__(self, file: Path, frame: pd.DataFrame):
        self.captions = _read_lines(file, frame)
        self.identity = {"captioner": "file", "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}

    def caption(self, batch: Sequence[tuple[str, Path]]) -> list[str | None]:
        return [self.captions.get(image_id) for image_id, _ in batch]


def _read_lines(file: Path, frame: pd.DataFrame) -> dict[str, str]:
    known = {"image_id": dict(zip(frame["image_id"], frame["image_id"], strict=True))}
    known["path"] = dict(zip(frame["path"], frame["image_id"], strict=True))
    captions: dict[str, str] = {}
    first: dict[str, int] = {}
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                if not line.strip():
                    continue
                image_id, caption = _parse(line.decode("utf-8-sig"), known)
                if image_id in first:
                    raise ValueError(f"its image has a caption already, in line {first[image_id]}")
            except ValueError as error:
                raise InputError(f"{file}, line {number}: {error}") from error
            captions[image_id], first[image_id] = caption, number
    needed = frame[(frame["split"] != "test") & ~frame["is_anomalous"].astype(bool)]
    missing = sorted(needed.loc[~needed["image_id"].isin(list(captions)), "path"])
    if missing:
        raise InputError(
            f"{file} has no caption for {len(missing)} of {len(needed)} normal train and validation images: "
            f"{', '.join(missing[:10])}{' …' if len(missing) > 10 else ''}; add a line for each"
        )
    return captions


def _parse(line: str, known: Mapping[str, Mapping[str, str]]) -> tuple[str, str]:
    """(image_id, caption) of one line; ValueError says what is wrong with it."""
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError('not an object: write {"path": …, "caption": …}')
    unknown = sorted(set(row) - {"image_id", "path", "caption"})
    if unknown:
        raise ValueError(f"unknown key {', '.join(unknown)}: a line has `caption` and either `image_id` or `path`")
    if ("image_id" in row) == ("path" in row):
        raise ValueError("give either `image_id` or `path`")
    caption = row.get("caption")
    if not isinstance(caption, str) or not caption.strip():
        raise ValueError("`caption` is missing, empty or no text")
    caption.encode()  # half a surrogate pair is JSON but no text (a ValueError as well)
    name = "path" if "path" in row else "image_id"
    value = row[name]
    if not isinstance(value, str):
        raise ValueError(f"`{name}` must be text")
    image_id = known[name].get(PurePosixPath(value).as_posix() if name == "path" else value)
    if image_id is None:
        raise ValueError(f"{name} {value!r} is no image of the manifest (paths are relative to the dataset's root)")
    return image_id, caption


def caption_all(
    batch: Sequence[tuple[str, Path]], captioner: Captioner, store: CaptionStore, batch_size: int = BATCH_SIZE
) -> dict[str, str]:
    """Captions by image_id of these (image_id, file), asking only for images that the store does not hold.

    Every batch is stored before the next is asked for. An image without a caption is left out.
    """
    files = dict(batch)
    keys = {key(image_id, captioner.identity): image_id for image_id in files}
    stored = store.get(list(keys))
    missing = [(k, image_id) for k, image_id in keys.items() if k not in stored]
    batches = [missing[i : i + batch_size] for i in range(0, len(missing), batch_size)]
    for items in track(batches, "caption", total=len(batches)):
        captions = captioner.caption([(image_id, files[image_id]) for _, image_id in items])
        store.put({k: text for (k, _), text in zip(items, captions, strict=True) if text is not None})
    say(f"caption: {len(files)} images, {len(stored)} from the store, {len(missing)} asked of the captioner")
    # From the store, so that two processes which caption at once end with the same captions.
    return {keys[k]: caption for k, caption in store.get(list(keys)).items()}


def make_captioner(params: p.Caption, frame: pd.DataFrame, dataset_root: Path, max_pixels: int) -> Captioner:
    """The captioner that `params` name. InputError where its file is missing or outside the dataset."""
    if params.captioner == "describe":
        return Describe(max_pixels)
    try:
        file = images.resolve(dataset_root, params.file.as_posix())
    except InputError as error:
        raise InputError(
            f"caption.file: {error}. DVC tracks that folder, and would not see captions elsewhere change"
        ) from error
    if not file.is_file():
        raise InputError(f"caption.file: {file} does not exist (the path is relative to the dataset's root)")
    return FromFile(file, frame)


def caption_images(
    frame: pd.DataFrame,
    image_root: Path,
    dataset_root: Path,
    params: p.Caption,
    max_pixels: int,
    store: Path,
) -> pd.DataFrame:
    """The manifest's rows with a column `caption`, null where the captioner has none for a test image.

    image_root: the folder of the manifest's paths; dataset_root: that of `caption.file`.
    """
    captioner = make_captioner(params, frame, dataset_root, max_pixels)
    files = [images.resolve(image_root, path) for path in frame["path"]]
    with CaptionStore(store) as captions:
        by_image = caption_all(list(zip(frame["image_id"], files, strict=True)), captioner, captions)
    return frame.assign(caption=frame["image_id"].map(by_image))
