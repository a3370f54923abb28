"""What a photograph measures, whatever it shows: what another camera or light would change."""

import numpy as np
from PIL import Image, ImageStat


def image_statistics(rgb: np.ndarray) -> dict[str, float]:
    """Statistics of a photograph, uint8 (H, W, 3), in grey levels of 0 to 255.

    `brightness` and `contrast` are the mean and the standard deviation of its grey, `sharpness` the variance of its
    grey's Laplacian (0 where a side has less than three pixels), `red`, `green`, `blue` the means of the channels,
    `width` and `height` its pixels.
    """
    image = Image.fromarray(rgb)
    grey = image.convert("L")
    # Pillow has both from histograms, which takes no more memory for a large photograph than for a small one.
    brightness = ImageStat.Stat(grey)
    red, green, blue = ImageStat.Stat(image).mean
    return {
        "brightness": brightness.mean[0],
        "contrast": brightness.stddev[0],
        "sharpness": _laplacian_variance(np.asarray(grey)),
        "red": red,
        "green": green,
        "blue": blue,
        "width": float(image.width),
        "height": float(image.height),
    }


def _laplacian_variance(grey: np.ndarray) -> float:
    """Of grey (H, W): each pixel against its four neighbours; those of the border do not count."""
    if min(grey.shape) < 3:
        return 0.0
    g = grey.astype(np.int16)
    laplacian = g[:-2, 1:-1] + g[2:, 1:-1] + g[1:-1, :-2] + g[1:-1, 2:] - 4 * g[1:-1, 1:-1]
    # At most 1020 squared: it fits, and needs half of what floats would.
    return float(np.square(laplacian, dtype=np.int32).mean() - laplacian.mean() ** 2)
