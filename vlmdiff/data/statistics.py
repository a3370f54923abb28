"""What a photograph is like, in numbers: by which a change of light, focus or product is seen."""

import numpy as np
from scipy import ndimage

# The weights of ITU-R BT.601, as Pillow's mode L has them.
GREY = np.array([0.299, 0.587, 0.114], np.float32)


def image_statistics(rgb: np.ndarray) -> dict[str, float]:
    """Statistics of a photograph as it came, uint8 (H, W, 3); grey values run from 0 to 255.

    brightness and contrast: mean and standard deviation of grey; sharpness: the variance of its Laplacian; red, green,
    blue: means of the channels; width, height: in pixels.
    """
    grey = rgb.astype(np.float32) @ GREY
    red, green, blue = rgb.reshape(-1, 3).mean(axis=0)
    return {
        "brightness": float(grey.mean()),
        "contrast": float(grey.std()),
        "sharpness": float(ndimage.laplace(grey).var()),
        "red": float(red),
        "green": float(green),
        "blue": float(blue),
        "width": float(rgb.shape[1]),
        "height": float(rgb.shape[0]),
    }
