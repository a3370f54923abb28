"""Captioners by name, and the loop that asks one for every caption that the store does not hold yet."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import pandas as pd

from vlmdiff.captions import describe
from vlmdiff.captions.store import CaptionStore, key
from vlmdiff.core import params as p
from vlmdiff.core.console import say, track
from vlmdiff.core.processes import map_in_processes
from vlmdiff.data import images

BATCH_SIZE = 32  # descriptions a transaction
FEW = 64  # images that one process describes sooner than several


class Captioner(Protocol):
    """What makes captions.

    identity: all that decides the text (name, revision, prompt, decoding), as JSON types; it keys the store.
    """

    identity: Mapping[str, Any]

    def caption(self, items: Sequence[tuple[str, Path]]) -> Iterator[Mapping[str, str | None]]:
        """Captions by image_id of these (image_id, file), some at a time and in any order, as soon as they are there.

        None where there is none to be had. Raises InputError, after what else can be captioned, for an image that
        should have one.
        """
        ...


class Describe:
    """Sentences composed from measurements of the image, without a model."""

    def __init__(self, max_pixels: int):
        self.max_pixels = max_pixels
        # The code is the algorithm's revision: whoever changes it need not remember a number.
        revision = hashlib.sha256(Path(describe.__file__).read_bytes()).hexdigest()
        self.identity = {"captioner": "describe", "revision": revision[:12]}

    def caption(self, items: Sequence[tuple[str, Path]]) -> Iterator[dict[str, str | None]]:
        describe_file = partial(_describe_file, self.max_pixels)
        files = [file for _, file in items]
        # A second process takes a second to start.
        texts = map(describe_file, files) if len(files) <= FEW else map_in_processes(describe_file, files, chunk=8)
        captions = zip((image_id for image_id, _ in items), texts, strict=True)
        while batch := dict(islice(captions, BATCH_SIZE)):
            yield batch


def _describe_file(max_pixels: int, file: Path) -> str:
    return describe.describe(images.read_image(file, max_pixels))


def caption_all(items: Sequence[tuple[str, Path]], captioner: Captioner, store: CaptionStore) -> dict[str, str]:
    """Captions by image_id of these (image_id, file), asking only for images that the store does not hold.

    What the captioner hands over is stored before it is asked on. An image without a caption is left out.
    """
    files = dict(items)
    keys = {image_id: key(image_id, captioner.identity) for image_id in files}
    stored = store.get(list(keys.values()))
    missing = [(image_id, file) for image_id, file in files.items() if keys[image_id] not in stored]

    def answers() -> Iterator[str]:
        with closing(captioner.caption(missing)) as finished:
            for captions in finished:
                store.put({keys[image_id]: text for image_id, text in captions.items() if text is not None})
                yield from captions

    answered = set(track(answers(), "caption", total=len(missing)))
    if answered != {image_id for image_id, _ in missing}:
        raise ValueError(f"{len(missing)} captions were asked for, the captioner was silent on some of them")
    say(f"caption: {len(files)} images, {len(stored)} from the store, {len(missing)} asked of the captioner")
    # From the store, so that two processes which caption at once end with the same captions.
    found = store.get(list(keys.values()))
    return {image_id: found[k] for image_id, k in keys.items() if k in found}


def make_captioner(params: p.Captioner, frame: pd.DataFrame, dataset_root: Path, max_pixels: int) -> Captioner:
    """The captioner that `params` name. InputError where its file is missing or outside the dataset."""
    match params:
        case p.Describe():
            return Describe(max_pixels)
        case p.CaptionFile():
            from vlmdiff.captions.brought import FromFile

            return FromFile(params, frame, dataset_root)
        case p.VisionLanguageModel():
            from vlmdiff.captions.model import FromModel

            return FromModel(params, max_pixels)
        case p.Endpoint():
            from vlmdiff.captions.endpoint import FromEndpoint

            return FromEndpoint(params, max_pixels)


def caption_images(
    frame: pd.DataFrame,
    image_root: Path,
    dataset_root: Path,
    params: p.Caption,
    max_pixels: int,
    store: Path,
) -> pd.DataFrame:
    """The manifest's rows with a column `caption`, null where the captioner has none for a test image.

    image_root: the folder of the manifest's paths; dataset_root: that of captions which the user brings.
    """
    captioner = make_captioner(params.captioner, frame, dataset_root, max_pixels)
    files = [images.resolve(image_root, path) for path in frame["path"]]
    with CaptionStore(store) as captions:
        by_image = caption_all(list(zip(frame["image_id"], files, strict=True)), captioner, captions)
    return frame.assign(caption=frame["image_id"].map(by_image))
