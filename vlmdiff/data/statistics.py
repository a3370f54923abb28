"""What a photograph measures, whatever it shows: what a camera or a light that changes would change."""

import numpy as np
from PIL import Image


def image_statistics(rgb: np.ndarray) -> dict[str, float]:
    """Statistics of a photograph, uint8 (H, W, 3), in grey levels of 0 to 255.

    `brightness` and `contrast` are the mean and the standard deviation of its grey, `sharpness` the variance of its
    grey's Laplacian (0 where a side has less than three pixels), `red`, `green`, `blue` the means of the channels,
    `width` and `height` its pixels.
    """
    height, width = rgb.shape[:2]
    grey = np.asarray(Image.fromarray(rgb).convert("L"))
    red, green, blue = rgb.reshape(-1, 3).mean(axis=0)
    return {
        "brightness": float(grey.mean()),
        "contrast": float(grey.std()),
        "sharpness": _laplacian_variance(grey),
        "red": float(red),
        "green": float(green),
        "blue": float(blue),
        "width": float(width),
        "height": float(height),
    }


def _laplacian_variance(grey: np.ndarray) -> float:
    """Of the four neighbours' differences, without the image's border."""
    if min(grey.shape) < 3:
        return 0.0
    g = grey.astype(np.int16)
    laplacian = g[:-2, 1:-1] + g[2:, 1:-1] + g[1:-1, :-2] + g[1:-1, 2:] - 4 * g[1:-1, 1:-1]
    return float(laplacian.var(dtype=np.float64))
