"""From the features of a photograph and of its reconstruction to an anomaly map, and from the map to a score.

What the reference (arXiv 2511.08173) does is one choice of the arguments; its sum over layers is `compare` times their
number, a factor that calibration divides out.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

# Eight means over 8 x 8 pixels: about a Gaussian of sigma 6.5.
POOL, POOLINGS = 8, 8
SMALLEST_POOLED = POOLINGS * (POOL - 1) + 1


def compare(
    before: Sequence[torch.Tensor],
    after: Sequence[torch.Tensor],
    distance: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    size: int,
    align_corners: bool = False,
) -> torch.Tensor:
    """Maps (B, size, size): the distances of two images' features, made as large as the image, averaged over layers.

    before, after: (B, C, h, w) a layer, C, h and w its own; distance: two of those to (B, h, w). The maps are resized
    as `enlarge` does.
    """
    maps = [enlarge(distance(a, b), size, align_corners) for a, b in zip(before, after, strict=True)]
    return torch.stack(maps).mean(dim=0)


def enlarge(maps: torch.Tensor, size: int, align_corners: bool = False) -> torch.Tensor:
    """Maps (B, h, w) as (B, size, size), bilinear.

    With align_corners the centres of the corner pixels meet, as in the reference, else their outer edges.
    """
    return F.interpolate(maps[:, None], size=(size, size), mode="bilinear", align_corners=align_corners)[:, 0]


def smooth(maps: np.ndarray, sigma: float) -> np.ndarray:
    """(..., S, S) after a Gaussian of `sigma` pixels, mirrored at the border and cut at four sigma; as it is for 0."""
    return ndimage.gaussian_filter(maps, sigma, axes=(-2, -1)) if sigma > 0 else maps


def image_scores(maps: np.ndarray, kind: Literal["max", "top_percent", "pooled_max"] = "max") -> np.ndarray:
    """A score an image (B,) of its map (B, S, S): the maximum, or what is less at the mercy of one place.

    "top_percent" is the mean of the highest hundredth of the pixels; "pooled_max", the reference's, the maximum of a
    much smoother map: means over 8 x 8 pixels at stride 1, eight times. It needs SMALLEST_POOLED = 57 pixels at least.
    """
    if kind == "top_percent":
        pixels = maps.reshape(len(maps), -1)
        count = math.ceil(pixels.shape[1] / 100)
        return np.partition(pixels, -count, axis=1)[:, -count:].mean(axis=1)
    if kind == "pooled_max":
        pooled = torch.from_numpy(maps)[:, None]
        for _ in range(POOLINGS):
            pooled = F.avg_pool2d(pooled, POOL, stride=1)
        maps = pooled[:, 0].numpy()
    return maps.max(axis=(1, 2))
