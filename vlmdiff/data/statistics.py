"""Statistics of a photograph that change with the camera and the light, whatever it shows."""

import numpy as np
from PIL import Image, ImageStat

from vlmdiff.data.images import STRIP


def image_statistics(rgb: np.ndarray | Image.Image) -> dict[str, float]:
    """Return statistics of a photograph, uint8 (H, W, 3) or in RGB, in grey levels from 0 to 255.

    `brightness` and `contrast` are the mean and the standard deviation of its grey, `sharpness` the variance of its
    grey's Laplacian (0 where a side has fewer than three pixels), `red`, `green` and `blue` the means of its channels,
    `width` and `height` its size in pixels.
    """
    image = rgb if isinstance(rgb, Image.Image) else Image.fromarray(rgb)
    grey = image.convert("L")
    # Pillow computes both from histograms, so that a large photograph takes no more memory than a small one.
    brightness = ImageStat.Stat(grey)
    return {
        "brightness": brightness.mean[0],
        "contrast": brightness.stddev[0],
        "sharpness": _laplacian_variance(np.asarray(grey)),
        **dict(zip(("red", "green", "blue"), ImageStat.Stat(image).mean, strict=True)),
        "width": float(image.width),
        "height": float(image.height),
    }


def _laplacian_variance(grey: np.ndarray) -> float:
    """Return the variance of the Laplacian of grey (H, W): four neighbours, without the pixels of the border."""
    if min(grey.shape) < 3:
        return 0.0
    total = squares = 0
    rows = max(1, STRIP // grey.shape[1])
    # A few rows at a time: the whole would take several times the photograph's memory.
    for top in range(0, grey.shape[0] - 2, rows):
        g = grey[top : top + rows + 2].astype(np.int16)
        laplacian = g[:-2, 1:-1] + g[2:, 1:-1] + g[1:-1, :-2] + g[1:-1, 2:] - 4 * g[1:-1, 1:-1]
        total += int(laplacian.sum(dtype=np.int64))
        squares += int(np.square(laplacian, dtype=np.int32).sum(dtype=np.int64))
    count = (grey.shape[0] - 2) * (grey.shape[1] - 2)
    return squares / count - (total / count) ** 2
