"""Statistics of a photograph that change with the camera and the light, whatever it shows."""

import numpy as np
from PIL import Image, ImageStat


def image_statistics(rgb: np.ndarray) -> dict[str, float]:
    """Return statistics of a photograph, uint8 (H, W, 3), in grey levels from 0 to 255.

    `brightness` and `contrast` are the mean and the standard deviation of its grey, `sharpness` the variance of its
    grey's Laplacian (0 where a side has fewer than three pixels), `red`, `green` and `blue` the means of its channels,
    `width` and `height` its size in pixels.
    """
    image = Image.fromarray(rgb)
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
    g = grey.astype(np.int16)
    laplacian = g[:-2, 1:-1] + g[2:, 1:-1] + g[1:-1, :-2] + g[1:-1, 2:] - 4 * g[1:-1, 1:-1]
    # The squares are at most 1020 squared: int32 holds them in half the memory of floats.
    return float(np.square(laplacian, dtype=np.int32).mean() - laplacian.mean() ** 2)
