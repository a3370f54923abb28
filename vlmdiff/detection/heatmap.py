"""Anomaly maps as pictures."""

import numpy as np
from PIL import Image

from vlmdiff.core.errors import InputError


def heatmap(image: np.ndarray, anomaly_map: np.ndarray, vmax: float) -> np.ndarray:
    """Lay an anomaly map over its image, darkened and grey; image and result are uint8 (H, W, 3).

    The map (h, w) is scaled to the image. Scores from 0 to `vmax` run from clear to bright yellow on a
    perceptually even scale; higher ones stay there. Raises InputError for a map that is not finite.
    """
    import matplotlib

    if not np.isfinite(anomaly_map).all():
        raise InputError("the anomaly map holds NaN or infinity: every score must be finite")
    level = np.clip(anomaly_map / vmax, 0, 1) if vmax > 0 else np.zeros(anomaly_map.shape)
    level = scaled(level.astype(np.float32), image, Image.Resampling.BILINEAR)
    colour = matplotlib.colormaps["inferno"](level)[..., :3]
    opacity = level[..., None]
    blended = opacity * colour + (1 - opacity) * dimmed(image)
    return np.rint(255 * blended).astype(np.uint8)


def scaled(values: np.ndarray, image: np.ndarray, resampling: Image.Resampling) -> np.ndarray:
    """Return `values` (h, w) at the size of `image` (H, W, 3)."""
    height, width = image.shape[:2]
    return np.asarray(Image.fromarray(values).resize((width, height), resampling))


def dimmed(image: np.ndarray) -> np.ndarray:
    """Return an image, uint8 (H, W, 3), grey and half as bright: floats in [0, 0.5]."""
    grey = image @ np.array([0.299, 0.587, 0.114]) / 255
    return np.repeat(0.5 * grey[..., None], 3, axis=2)
