"""How datasets lie on disk. A layout is one function from the dataset's root to its records."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from vlmdiff.data.images import SUFFIXES
from vlmdiff.errors import InputError

GOOD = "good"


class Record(NamedTuple):
    """An image and what its place on disk says of it; paths relative to the root, with forward slashes."""

    path: str
    class_name: str
    split: str
    is_anomalous: bool
    defect: str | None = None
    mask_path: str | None = None


def mvtec_ad(root: Path, test_fraction: float) -> Iterator[Record]:
    """CLASS/train/good, CLASS/test/DEFECT or good, CLASS/ground_truth/DEFECT/STEM_mask.png (MVTec-AD)."""
    for folder in _folders(root):
        if not (folder / "train" / GOOD).is_dir():
            raise InputError(
                f"{folder} has no train/{GOOD}: layout mvtec_ad expects CLASS/train/{GOOD} and CLASS/test/*"
            )
        masks = _masks(folder / "ground_truth")
        # MVTec-AD numbers each folder from zero: a mask belongs to the test image of its name first.
        for split in ("test", "train"):
            for kind in _folders(folder / split) if (folder / split).is_dir() else ():
                for image in _images(kind):
                    mask = masks.pop((kind.name, image.stem), None)
                    yield _record(root, folder.name, split, kind.name, image, mask)
        _none_left(masks)


def folder(root: Path, test_fraction: float) -> Iterator[Record]:
    """CLASS/good and CLASS/DEFECT; masks, where there are any, in CLASS/masks/DEFECT/STEM.png or STEM_mask.png.

    The share `test_fraction` of the good images is for testing: those with the lowest sha256 of their bytes, so that
    images that come later hardly move others.
    """
    for place in _folders(root):
        if not (place / GOOD).is_dir():
            raise InputError(f"{place} has no {GOOD}: layout folder expects CLASS/{GOOD} and CLASS/DEFECT")
        masks = _masks(place / "masks")
        for kind in _folders(place):
            if kind.name == "masks":
                continue
            images = _images(kind)
            if kind.name == GOOD:
                ranked = sorted(images, key=lambda image: hashlib.sha256(image.read_bytes()).digest())
                held_out = set(ranked[: round(test_fraction * len(ranked))])
            for image in images:
                split = "test" if kind.name != GOOD or image in held_out else "train"
                mask = masks.pop((kind.name, image.stem), None)
                yield _record(root, place.name, split, kind.name, image, mask)
        _none_left(masks)


# The demo is made in MVTec-AD's layout.
LAYOUTS: dict[str, Callable[[Path, float], Iterator[Record]]] = {
    "demo": mvtec_ad,
    "mvtec_ad": mvtec_ad,
    "folder": folder,
}


def _record(root: Path, class_name: str, split: str, kind: str, image: Path, mask: Path | None) -> Record:
    relative = [None if path is None else path.relative_to(root).as_posix() for path in (image, mask)]
    return Record(relative[0], class_name, split, kind != GOOD, None if kind == GOOD else kind, relative[1])


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _images(place: Path) -> list[Path]:
    return sorted(
        path
        for path in place.iterdir()
        if path.suffix.lower() in SUFFIXES and path.is_file() and not path.name.startswith(".")
    )


def _masks(place: Path) -> dict[tuple[str, str], Path]:
    """Masks by kind of defect and stem of their image."""
    if not place.is_dir():
        return {}
    return {(kind.name, mask.stem.removesuffix("_mask")): mask for kind in _folders(place) for mask in _images(kind)}


def _none_left(masks: dict[tuple[str, str], Path]) -> None:
    if masks:
        names = ", ".join(str(mask) for mask in list(masks.values())[:10])
        raise InputError(f"{len(masks)} mask(s) belong to no image: {names}; restore the images or remove the masks")
