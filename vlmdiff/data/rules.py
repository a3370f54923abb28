"""What the data contract asks of a single image and its mask, for the whole dataset and for an image that joins it."""

import numpy as np
from PIL import Image

from vlmdiff.core.errors import InputError
from vlmdiff.core.params import Validate
from vlmdiff.core.text import counted
from vlmdiff.data.images import mask_values, shrink

# A mask that marks a larger share of the image may be inverted.
LARGE = 0.5
# Bytes of a file's name, less those that reports, masks and temporary files add to it.
NAME_LENGTH = 180


def check_name(name: str, what: str) -> None:
    """Raise InputError if a class or a kind of defect cannot be a folder's name, and a file's name in reports."""
    if not name.isprintable() or "/" in name or name in ("", ".", ".."):
        raise InputError(f"the {what} {name!r} is not a valid file name: use another name")
    if name != name.strip():
        raise InputError(f"the {what} {name!r} begins or ends with a space, which nobody sees: remove it")
    if (length := len(name.encode())) > NAME_LENGTH:
        raise InputError(f"the {what} '{name[:40]}…' has {length} bytes, more than {NAME_LENGTH}: use a shorter name")


def image_faults(mode: str, width: int, height: int, params: Validate) -> dict[str, str]:
    """Return what is wrong with an image, by rule of the contract. mode: Pillow's name; width, height: in pixels."""
    found = {}
    if mode not in params.modes:
        found["mode"] = mode
    if min(width, height) < params.min_side:
        found["size"] = f"{width} x {height}"
    return found


def mask_faults(
    mask: Image.Image, size: tuple[int, int] | None, is_anomalous: bool, name: str, model_size: int
) -> dict[str, str]:
    """Return what is wrong with a decoded mask, by rule of the contract.

    size: width and height of its image, None if that cannot be read; name: what to call the mask; model_size: the
    model's resolution in pixels.
    """
    found = {}
    if size is not None and mask.size != size:
        found["mask_size"] = f"{mask.width} x {mask.height}, its image {size[0]} x {size[1]}"
    pixels = mask_values(mask)
    values = np.unique(pixels)
    if len(values[values > 0]) > 1:
        found["mask_binary"] = f"{len(values)} values"
    marked = bool(values.max() > 0)
    if is_anomalous and (share := np.mean(pixels > 0)) > LARGE:
        found["mask_large"] = f"{share:.0%} of the image"
    if is_anomalous and (small := shrink(pixels > 0, model_size)[1]):
        found["mask_small"] = f"{counted(small, 'defect')} of less than half of a pixel at {model_size} x {model_size}"
    if is_anomalous and not marked:
        found["mask_empty"] = name
    if marked and not is_anomalous:
        found["mask_normal"] = name
    return found
