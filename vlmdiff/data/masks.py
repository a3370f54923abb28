"""Masks of defects: what a file marks, and what is left of it at a model's resolution."""

from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from vlmdiff.data.images import decode

EIGHT_CONNECTED = np.ones((3, 3), bool)


def mask_values(mask: Image.Image) -> np.ndarray:
    """Return the values of a mask (H, W): zero where nothing is marked.

    In a mask with transparency, what is drawn is marked, whatever its colour and that of the ground.
    """
    if mask.has_transparency_data:
        alpha = np.asarray(mask.convert("RGBA"))[..., 3]
        if alpha.min() < alpha.max():
            return alpha
    return np.asarray(mask if mask.mode.startswith(("I", "F")) else mask.convert("L"))


def load_mask(path: Path, size: int, max_pixels: int) -> np.ndarray:
    """Return a mask, bool (size, size): cut above zero at its own size, then shrunk by `shrink`."""
    return shrink(mask_values(decode(path, max_pixels)) > 0, size)[0]


def shrink(mask: np.ndarray, size: int) -> tuple[np.ndarray, int]:
    """Return a mask (H, W), bool, at (size, size), and how many of its regions mark half of no pixel there.

    A pixel is marked if at least half of it is, or at least half as much of it as of any pixel around it. So thin parts
    stay. Each region (8-connected) keeps a pixel at least.
    """
    if mask.shape == (size, size):
        return mask, 0
    if not mask.any():
        return np.zeros((size, size), bool), 0
    share = np.asarray(Image.fromarray(mask.astype(np.float32)).resize((size, size), Image.Resampling.BOX))
    half = share >= 0.5
    kept = half | (share > 0) & (2 * share >= ndimage.maximum_filter(share, 3))
    (rows, columns), (height, width) = np.nonzero(mask), mask.shape
    pixel = (2 * rows + 1) * size // (2 * height) * size + (2 * columns + 1) * size // (2 * width)
    region, count = regions_of(mask)
    small = np.setdiff1d(np.arange(1, count + 1), region[half.flat[pixel]])
    lost = np.isin(region, np.setdiff1d(small, region[kept.flat[pixel]]))
    pairs, times = np.unique(region[lost].astype(np.int64) * size**2 + pixel[lost], return_counts=True)
    regions, pixels = np.divmod(pairs[np.argsort(times, kind="stable")], size**2)
    # Of each region the last one, of which it covers most.
    kept.flat[list(dict(zip(regions.tolist(), pixels.tolist(), strict=True)).values())] = True
    return kept, len(small)


def regions_of(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the region, from 1, of each marked pixel in raster order, and the number of regions."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    labels, count = ndimage.label(box, EIGHT_CONNECTED)
    return labels[box], count
