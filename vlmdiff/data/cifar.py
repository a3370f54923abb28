"""Read CIFAR-10 and CIFAR-100 (Krizhevsky, 2009) from their binary version, not from the pickles."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from vlmdiff.core.console import track
from vlmdiff.core.errors import InputError
from vlmdiff.data.layouts import GOOD

SIDE = 32
PIXELS = 3 * SIDE * SIDE


class Version(NamedTuple):
    """The files of a dataset: one list of names per label byte of an image, and the images by split."""

    names: tuple[str, ...]
    train: tuple[str, ...]
    test: tuple[str, ...]


VERSIONS = (
    Version(("batches.meta.txt",), tuple(f"data_batch_{i}.bin" for i in range(1, 6)), ("test_batch.bin",)),
    Version(("coarse_label_names.txt", "fine_label_names.txt"), ("train.bin",), ("test.bin",)),
)


def unpack(root: Path, out: Path, normal: Sequence[str]) -> None:
    """Write the images of `listed` into the folder `out`. Raises InputError as `listed` does."""
    images = list(listed(root, normal))
    for name, pixels in track(images, "unpack", total=len(images)):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(out / name)


def listed(root: Path, normal: Sequence[str]) -> Iterator[tuple[Path, np.ndarray]]:
    """Yield (path, image) pairs in MVTec-AD's layout, as an anomaly detection task. Images are uint8 (32, 32, 3).

    Images of the classes in `normal` (for CIFAR-100 also superclasses) are in train/good and test/good. Test images of
    any other class are in test/CLASS, without masks; its training images are not used. One name gives the one-class
    setting. Several names form one product class, the unified setting (You et al., UniAD, 2022). The file name is the
    image's index in the split.

    Raises InputError if `root` holds no binary version, a file is truncated, or a name in `normal` is not a class.
    """
    version = next((version for version in VERSIONS if (root / version.names[0]).is_file()), None)
    if version is None:
        files = " or ".join(version.names[0] for version in VERSIONS)
        raise InputError(f"{root} has no {files}. Layout cifar needs the binary version of CIFAR-10 or CIFAR-100.")
    names = [_bytes(root / file).decode(errors="replace").split() for file in version.names]
    known = {name for level in names for name in level}
    # Class names become folders.
    if bad := {name for name in known if not re.fullmatch(r"[\w-]+", name) or name == GOOD}:
        raise InputError(f"{root}, {version.names}: {bad} are not CIFAR class names. Restore the files.")
    if unknown := set(normal) - known:
        raise InputError(
            f"prepare.cifar.normal: unknown class {', '.join(sorted(unknown))}. Choose from {', '.join(names[-1])}."
        )
    product = normal[0] if len(normal) == 1 else "unified"
    for split, files in (("train", version.train), ("test", version.test)):
        images = (image for file in files for image in _images(root / file, names))
        for number, (labels, pixels) in enumerate(images):
            is_normal = not set(normal).isdisjoint(labels)
            if is_normal or split == "test":
                yield Path(product, split, GOOD if is_normal else labels[-1], f"{number:05}.png"), pixels


def _images(file: Path, names: list[list[str]]) -> Iterator[tuple[list[str], np.ndarray]]:
    """Yield each image's class names, the finest last, and its pixels, uint8 (32, 32, 3)."""
    data, size = _bytes(file), len(names) + PIXELS
    if not data or len(data) % size:
        raise InputError(f"{file}: truncated ({len(data)} bytes are not a multiple of {size}). Restore it.")
    records = np.frombuffer(data, np.uint8).reshape(-1, size)
    for i, record in enumerate(records):
        labels, pixels = record[: len(names)], record[len(names) :]
        if any(label >= len(level) for label, level in zip(labels, names, strict=True)):
            raise InputError(f"{file}, image {i}: label {labels.tolist()} has no name. Restore the file.")
        # The pixels are planes of red, green and blue, row by row.
        yield (
            [level[label] for label, level in zip(labels, names, strict=True)],
            pixels.reshape(3, SIDE, SIDE).transpose(1, 2, 0),
        )


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{file} does not exist. Restore it from the binary version.") from None
