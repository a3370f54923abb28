"""Defects drawn on normal images: what settings are chosen by where test images must not be looked at."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

KINDS = ("line", "hole", "stain", "pasted", "blurred")
# A scratch of `mark` is so many times as long as wide.
LENGTH = 6
SIZES = {"small": (0.04, 0.08), "large": (0.12, 0.3)}  # of the image's side
VARIANTS = [(kind, size) for kind in KINDS for size in SIZES]


@dataclass(frozen=True)
class Spoiled:
    """A defect of a kind and size on the normal image of index `row`: image, uint8 (S, S, 3), and mask, bool (S, S)."""

    row: int
    kind: str
    size: str
    image: np.ndarray
    mask: np.ndarray


@dataclass(frozen=True)
class HeldOut:
    """Normal images to draw defects on, uint8 (N, S, S, 3), their classes, and their captions if a detector needs them.

    They are the first in the detector's bank of patches, if it has one.
    """

    images: Sequence[np.ndarray]
    classes: list[str]
    captions: list[str] | None = None

    def captions_of(self, rows: Iterable[int]) -> list[str] | None:
        """Return the captions of images by number, None if there are none."""
        return None if self.captions is None else [self.captions[row] for row in rows]


def places(images: int, limit: int | None = None) -> range:
    """Return which of the defects are drawn: each image has one of each kind and size."""
    total = images * len(VARIANTS)
    step = 1 if limit is None else max(1, -(-total // limit))
    # Steps that share no factor with the kinds visit all of them.
    while step > 1 and np.gcd(step, len(VARIANTS)) > 1:
        step += 1
    return range(0, total, step)


def synthesise(
    images: Sequence[np.ndarray], classes: Sequence[str], limit: int | None = None, seed: int = 0
) -> Iterator[Spoiled]:
    """Draw defects of every kind and size on normal images, uint8 (S, S, 3), of these classes.

    Each image gets each kind in a small and a large size: a line, a hole, a stain, a part of another image of its
    class, and a blurred part. With a `limit`, only about as many are drawn, spread over images, kinds and sizes. The
    same arguments give the same defects.
    """
    for place in places(len(images), limit):
        row, (kind, size) = place // len(VARIANTS), VARIANTS[place % len(VARIANTS)]
        rng = np.random.default_rng([seed, place])
        others = [i for i, name in enumerate(classes) if name == classes[row] and i != row] or [row]
        across = rng.uniform(*SIZES[size]) * len(images[row])
        yield Spoiled(row, kind, size, *_spoil(rng, images[row], images[rng.choice(others)], kind, across))


def mark(
    image: np.ndarray, kind: str, across: float, contrast: float, centre: tuple[float, float], turn: float
) -> np.ndarray:
    """Draw a `spot` of diameter `across`, or a straight `scratch` `across` wide and ten times as long, on an image.

    image: uint8 (S, S, 3), drawn on in place; contrast: by how much it is darker than a bright place, or brighter than
    a dark one, of 255; centre: column and row; turn: the scratch's direction in radians. Returns its mask (S, S).
    """
    size = len(image)
    y, x = np.mgrid[:size, :size] + 0.5
    along = (x - centre[0]) * np.cos(turn) + (y - centre[1]) * np.sin(turn)
    aside = (y - centre[1]) * np.cos(turn) - (x - centre[0]) * np.sin(turn)
    inside = np.hypot(along, aside) if kind == "spot" else np.maximum(np.abs(aside), np.abs(along) / LENGTH)
    # The share of a pixel that is covered, about.
    cover = np.clip(across / 2 - inside + 0.5, 0, 1)
    mask = cover >= min(0.5, cover.max())
    there = np.median(image[mask], axis=0)
    put = np.clip(there + contrast * np.where(there.mean() > 110, -1, 1), 0, 255)
    image[:] = (image + cover[..., None] * (put - image)).round().astype(np.uint8)
    return mask


def _spoil(
    rng: np.random.Generator, image: np.ndarray, other: np.ndarray, kind: str, across: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the image with a defect of this kind, uint8 (S, S, 3), and the defect's mask, bool (S, S)."""
    size = len(image)
    while not (mask := (_line if kind == "line" else _blob)(rng, size, across)).any():
        pass
    clean = image.astype(np.float32)
    match kind:
        case "line" | "hole":
            there = np.median(clean[mask], axis=0)
            # Darker on bright places, brighter on dark ones, so that the defect is visible.
            put = np.clip(there + rng.uniform(40, 110) * np.where(there.mean() > 110, -1, 1), 0, 255)
        case "stain":
            put = 0.5 * clean + 0.5 * rng.uniform(0, 255, 3)
        case "pasted":
            put = np.roll(np.rot90(other, int(rng.integers(4))), rng.integers(0, size, 2), axis=(0, 1))
        case _:
            put = ndimage.gaussian_filter(clean, (across / 4, across / 4, 0))
    cover = ndimage.gaussian_filter(mask.astype(np.float32), 0.7)[..., None]
    return (clean + cover * (put - clean)).round().astype(np.uint8), mask


def _blob(rng: np.random.Generator, size: int, across: float) -> np.ndarray:
    """Return the mask of an irregular region, about `across` pixels wide, at a random place."""
    y, x = np.mgrid[:size, :size]
    centre = rng.uniform(across / 2, size - across / 2, 2)
    stretch, turn = rng.uniform(0.6, 1.6), rng.uniform(0, np.pi)
    u = (np.cos(turn) * (x - centre[0]) + np.sin(turn) * (y - centre[1])) * stretch
    v = (np.cos(turn) * (y - centre[1]) - np.sin(turn) * (x - centre[0])) / stretch
    angle = np.arctan2(v, u)
    edge = 1 + sum(rng.normal(0, 0.12) * np.cos(k * angle + rng.uniform(0, 2 * np.pi)) for k in (2, 3, 4, 5))
    return np.hypot(u, v) < across / 2 * edge


def _line(rng: np.random.Generator, size: int, across: float) -> np.ndarray:
    """Return the mask of a curved line of length 3 `across`, at a random place."""
    steps = 12
    turns = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, 0.35, steps))
    points = np.cumsum(np.stack([np.cos(turns), np.sin(turns)], axis=1) * 3 * across / steps, axis=0)
    points += rng.uniform(0.2, 0.8, 2) * size - points.mean(axis=0)
    picture = Image.new("L", (size, size))
    ImageDraw.Draw(picture).line([tuple(point) for point in points], fill=255, width=int(rng.integers(1, 4)))
    return np.asarray(picture) > 0
