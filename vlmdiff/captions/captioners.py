"""Make captioners by name, and ask them for the captions that the store does not have yet."""

from collections.abc import Generator, Iterator, Mapping, Sequence
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
from vlmdiff.core.files import sha256
from vlmdiff.core.processes import map_in_processes
from vlmdiff.core.text import counted
from vlmdiff.data import images

BATCH_SIZE = 32  # descriptions per transaction
FEW = 64  # up to this many images, one process is faster than several


class Captioner(Protocol):
    """Interface of all captioners.

    `identity` holds, as JSON types, everything that affects a caption's text (name, revision, prompt, decoding). It is
    part of the store's key.
    """

    @property
    def identity(self) -> Mapping[str, Any]: ...

    def caption(self, items: Sequence[tuple[str, Path]]) -> Generator[Mapping[str, str | None]]:
        """Yield captions of (image_id, file) pairs as dictionaries by image_id, in any order, as soon as they exist.

        A caption is None if the captioner has none for the image. Raises InputError, after all other images are
        captioned, if captioning an image fails.
        """
        ...


class Describe:
    """Compose sentences from measurements of the image, without a model."""

    def __init__(self, max_pixels: int):
        self.max_pixels = max_pixels
        # The hash of the code is the revision, so that no change of the algorithm goes unnoticed.
        revision = sha256(Path(describe.__file__))
        self.identity = {"captioner": "describe", "revision": revision[:12]}

    def caption(self, items: Sequence[tuple[str, Path]]) -> Generator[dict[str, str]]:
        describe_file = partial(_describe_file, self.max_pixels)
        files = [file for _, file in items]
        # Starting a process takes about a second.
        texts = map(describe_file, files) if len(files) <= FEW else map_in_processes(describe_file, files, chunk=8)
        captions = zip((image_id for image_id, _ in items), texts, strict=True)
        while batch := dict(islice(captions, BATCH_SIZE)):
            yield batch


def _describe_file(max_pixels: int, file: Path) -> str:
    return describe.describe(images.read_image(file, max_pixels))


def caption_all(items: Sequence[tuple[str, Path]], captioner: Captioner, store: CaptionStore) -> dict[str, str]:
    """Return captions by image_id for (image_id, file) pairs. Ask only for captions that the store does not have.

    Each batch of captions is stored before the next is requested. The result omits images without a caption.
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
        raise ValueError(f"the captioner did not return every image of the {len(missing)} requested")
    say(f"caption: {counted(len(files), 'image')}, {len(stored)} from the store, {len(missing)} requested")
    # Read from the store, so that two processes captioning at once return the same captions.
    found = store.get(list(keys.values()))
    return {image_id: found[k] for image_id, k in keys.items() if k in found}


def make_captioner(params: p.Captioner, frame: pd.DataFrame, dataset_root: Path, max_pixels: int) -> Captioner:
    """Return the captioner that `params` name. Raises InputError if its file is missing or outside the dataset."""
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
    frame: pd.DataFrame, image_root: Path, dataset_root: Path, params: p.Caption, max_pixels: int, store: Path
) -> pd.DataFrame:
    """Return the manifest with a column `caption`, null for test images without a caption.

    The manifest's paths are relative to `image_root`, the path of a caption file is relative to `dataset_root`.
    """
    captioner = make_captioner(params.captioner, frame, dataset_root, max_pixels)
    files = [images.resolve(image_root, path) for path in frame["path"]]
    with CaptionStore(store) as captions:
        by_image = caption_all(list(zip(frame["image_id"], files, strict=True)), captioner, captions)
    return frame.assign(caption=frame["image_id"].map(by_image))
