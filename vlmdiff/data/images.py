"""Reading photographs and masks from files that nobody vouches for."""

import warnings
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vlmdiff.core.errors import InputError

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}


def resolve(root: Path, relative: str) -> Path:
    """The file `relative` under `root`. Raises InputError where it lies outside, also by way of a link."""
    path = PurePosixPath(relative)
    try:
        file = (root / path).resolve()
    except ValueError as error:
        raise InputError(f"{relative!r} cannot be a file's name: {error}") from None
    if path.is_absolute() or ".." in path.parts or not file.is_relative_to(root.resolve()):
        raise InputError(f"{relative} leaves the dataset's root {root}: list only files inside it")
    return file


def decode(
    file: Path | BinaryIO, max_pixels: int, name: str | None = None, formats: Sequence[str] | None = None
) -> Image.Image:
    """A fully decoded image in its own mode. Raises InputError naming the file, or calling it `name`.

    formats: those that are tried, as Pillow calls them; None for all that it knows.
    """
    path = name or file
    try:
        with warnings.catch_warnings():
            # Our own limit judges the size, from the header, before anything is decoded.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file, formats=formats) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise InputError(
                        f"{path} has {width} x {height} pixels, more than prepare.max_pixels = {max_pixels}: "
                        "a decompression bomb, or a limit to raise"
                    )
                image.load()
                return ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except Image.DecompressionBombError as error:
        raise InputError(f"{path} is a decompression bomb: {error}") from error
    except UnidentifiedImageError:
        kinds = f", of those that are taken: {', '.join(formats)}" if formats else ", whatever its name says"
        raise InputError(f"{path} is not an image{kinds}") from None
    # Pillow's decoders raise any of these for damaged files.
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise InputError(f"{path} cannot be decoded, it may be truncated: {error}") from error


def read_image(path: Path, max_pixels: int) -> Image.Image:
    """A photograph as RGB, upright, fully decoded; 16 bits are scaled to 8, transparency is laid on white.

    Raises InputError naming a file that is missing, no image, damaged, or of more than `max_pixels` pixels.
    """
    return to_rgb(decode(path, max_pixels))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any of Pillow's modes as RGB."""
    if image.mode.startswith(("I;16", "I", "F")):
        values = np.asarray(image, np.float64)
        top = 1.0 if image.mode == "F" and values.max(initial=0) <= 1 else 65535.0
        image = Image.fromarray(np.rint(np.clip(values / top, 0, 1) * 255).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(ground, image)
    return image.convert("RGB")


def load_rgb(path: Path, size: int | None, max_pixels: int) -> np.ndarray:
    """A photograph, uint8 (H, W, 3); resized to `size` x `size`, bilinear with antialiasing, where given."""
    image = read_image(path, max_pixels)
    if size is not None:
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.array(image)


def load_mask(path: Path, size: int, max_pixels: int) -> np.ndarray:
    """A mask, bool (size, size): cut above zero at its own size, resized by area, then cut at one half."""
    mask = np.asarray(decode(path, max_pixels).convert("L")) > 0
    if mask.shape == (size, size):
        return mask
    share = Image.fromarray(mask.astype(np.float32)).resize((size, size), Image.Resampling.BOX)
    return np.asarray(share) >= 0.5
