"""Compute anomaly maps from the features of an image and its reconstruction, and image scores from the maps.

The method of the reference (arXiv 2511.08173) is one choice of the arguments. It sums over layers where `compare`
averages; calibration cancels this factor.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

# Eight means over 8 x 8 pixels approximate a Gaussian of sigma 6.5.
POOL, POOLINGS = 8, 8
SMALLEST_POOLED = POOLINGS * (POOL - 1) + 1


def compare(
    before: Sequence[torch.Tensor],
    after: Sequence[torch.Tensor],
    distance: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    size: int,
    align_corners: bool = False,
) -> torch.Tensor:
    """Return maps (B, size, size): the distances between two images' features, resized and averaged over layers.

    `before` and `after` hold one (B, C, h, w) per layer; C, h and w may differ between layers. `distance` maps two of
    them to (B, h, w). `enlarge` resizes the result.
    """
    maps = [enlarge(distance(a, b), size, align_corners) for a, b in zip(before, after, strict=True)]
    return torch.stack(maps).mean(dim=0)


def enlarge(maps: torch.Tensor, size: int, align_corners: bool = False) -> torch.Tensor:
    """Resize maps (B, h, w) to (B, size, size), bilinear.

    `align_corners` aligns the centres of the corner pixels, as in the reference. Otherwise their outer edges align.
    """
    return F.interpolate(maps[:, None], size=(size, size), mode="bilinear", align_corners=align_corners)[:, 0]


def smooth(maps: np.ndarray, sigma: float) -> np.ndarray:
    """Smooth maps (..., S, S) by a Gaussian of `sigma` pixels, mirrored at the border and cut at four sigma."""
    return ndimage.gaussian_filter(maps, sigma, axes=(-2, -1)) if sigma > 0 else maps


def fuse(evidence: np.ndarray, weight: float) -> np.ndarray:
    """Return anomaly maps (B, S, S) of evidence (B, E, S, S); `weight` is the share of the second kind."""
    return evidence[:, 0] if evidence.shape[1] == 1 else (1 - weight) * evidence[:, 0] + weight * evidence[:, 1]


def normalised(values: np.ndarray, threshold: np.ndarray) -> np.ndarray:
    """Return values (B, S, S) from 0 on as float32 in [0, 1): the thresholds (B, 1, 1) become 0.5."""
    return (values / (values + threshold)).astype(np.float32)


def image_scores(
    maps: np.ndarray, kind: Literal["max", "top_percent", "pooled_max"] = "max", top_share: float = 0.01
) -> np.ndarray:
    """Return image scores (B,) of maps (B, S, S): the maximum, or a score that depends less on single pixels.

    "top_percent" is the mean of the highest pixels, `top_share` of all. "pooled_max", the reference's score, is the
    maximum after eight means over 8 x 8 pixels at stride 1; it needs S of at least SMALLEST_POOLED = 57.
    """
    if kind == "top_percent":
        pixels = maps.reshape(len(maps), -1)
        count = math.ceil(round(pixels.shape[1] * top_share, 6))
        return np.partition(pixels, -count, axis=1)[:, -count:].mean(axis=1)
    if kind == "pooled_max":
        pooled = torch.from_numpy(maps)[:, None]
        for _ in range(POOLINGS):
            pooled = F.avg_pool2d(pooled, POOL, stride=1)
        maps = pooled[:, 0].numpy()
    return maps.max(axis=(1, 2))
