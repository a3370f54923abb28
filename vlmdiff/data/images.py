"""Images from files that may hold anything: the one place that decodes, converts to RGB and resizes for the model."""

import contextlib
import re
import warnings
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vlmdiff.core.errors import InputError

SUFFIXES = {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".tif", ".tiff", ".webp"}
# By content, whatever the name says. Pillow's other decoders do more than decode: EPS runs Ghostscript.
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
# Of values of 16 or 32 bits, those of a photograph reach beyond twelve bits.
TWELVE_BITS = 4095
# The name of a file in DVC's cache: a workspace with `cache.type symlink` has links to them.
CACHED = re.compile(r".*/files/md5/[0-9a-f]{2}/[0-9a-f]{30}")


def resolve(root: Path, relative: str) -> Path:
    """Return the file `relative` under `root`. Raises InputError if it lies outside, also by way of a link.

    A link to a file in DVC's cache is the file that DVC put in this place.
    """
    path = PurePosixPath(relative)
    try:
        file = (root / path).resolve()
    except ValueError as error:
        raise InputError(f"{relative!r} cannot be a file's name: {error}") from None
    inside = file.is_relative_to(root.resolve())
    if not inside and (root / path).is_symlink() and CACHED.fullmatch(str(file)):
        inside = (root / path).parent.resolve().is_relative_to(root.resolve())
    if path.is_absolute() or ".." in path.parts or not inside:
        raise InputError(f"{relative} leaves the dataset's root {root}: list only files inside it")
    return file


def decode(source: Path | BinaryIO, max_pixels: int, name: str | None = None) -> Image.Image:
    """Return an image in the mode that its file has, fully decoded and upright.

    name: what an error calls the image, by default its path. Raises InputError with the name and the reason, if the
    file is missing, damaged, not of one of FORMATS, or has more than `max_pixels` pixels.
    """
    return _read(source, max_pixels, name, ImageOps.exif_transpose)


def read_image(source: Path | BinaryIO, max_pixels: int, name: str | None = None) -> Image.Image:
    """Return a photograph in RGB as `to_rgb` converts it. Parameters and errors are those of `decode`."""
    return _read(source, max_pixels, name, to_rgb)


def _read(
    source: Path | BinaryIO, max_pixels: int, name: str | None, convert: Callable[[Image.Image], Image.Image]
) -> Image.Image:
    name = name or str(source)
    try:
        # Pillow maps an uncompressed TIFF into memory where it knows its path, and scrambles one that is to be turned.
        opened = source.open("rb") if isinstance(source, Path) else contextlib.nullcontext(source)
        with opened as stream, warnings.catch_warnings():
            # max_pixels limits the size, by the header, before anything is decoded.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(stream, formats=FORMATS)
            if image.width * image.height > max_pixels:
                raise InputError(
                    f"{name} has {image.width} x {image.height} pixels, more than prepare.max_pixels = {max_pixels}: "
                    "replace it, or raise the limit"
                )
            if _has_more(image):
                raise InputError(f"{name} has several pages or frames: save the one to judge as a file of its own")
            try:
                return convert(image)
            except InputError as error:
                raise InputError(f"{name}: {error}") from None
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{name} does not exist") from None
    except UnidentifiedImageError:
        raise InputError(f"{name} is not an image of {', '.join(FORMATS)}: replace or remove it") from None
    # Pillow's decoders raise anything for a damaged file.
    except Exception as error:
        raise InputError(f"{name} cannot be decoded ({str(error) or repr(error)}): replace or remove it") from error


def _has_more(image: Image.Image) -> bool:
    """Return whether a file has more than one picture. Those of a JPEG belong to its first: depth, a preview."""
    if image.format not in ("TIFF", "PNG", "WEBP"):
        return False
    with contextlib.suppress(EOFError):
        image.seek(1)
        return True
    return False


def to_rgb(image: Image.Image | np.ndarray) -> Image.Image:
    """Return a photograph as a PIL image in RGB.

    image: a PIL image in any mode, turned upright as its EXIF says; or an array, uint8 (H, W, 3). 16 bits, and floats
    from 0 to 1, are scaled to 8 bits; transparency is laid on white. Raises InputError for anything else: floats
    outside that range, and values of 16 or 32 bits that reach no further than 12 bits do or beyond 16.
    """
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape[2:] == (3,) and image.size:
        return Image.fromarray(image)
    if not isinstance(image, Image.Image):
        found = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise InputError(f"a photograph must be a PIL image or an array of uint8 (H, W, 3), not {found}")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, np.float64)
        least, most = values.min(initial=0), values.max(initial=0)
        top = 1.0 if image.mode == "F" else 65535.0
        # Of other ranges nobody knows which value is white. A guess would judge a black or a white picture.
        if not (least >= 0 and most <= top) or (image.mode != "F" and 0 < most <= TWELVE_BITS):
            raise InputError(
                f"its values reach from {least:g} to {most:g}, and white is {top:g} in mode {image.mode}: "
                f"scale them to 0 to {top:g}, or to 8 bits"
            )
        image = Image.fromarray(np.rint(values / top * 255).astype(np.uint8))
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def fit(image: Image.Image | np.ndarray, size: int) -> np.ndarray:
    """Return a photograph, as `to_rgb` takes it, at the model's size: uint8 (size, size, 3), bilinear, antialiased."""
    return np.array(to_rgb(image).resize((size, size), Image.Resampling.BILINEAR))


def load_rgb(path: Path, size: int | None, max_pixels: int) -> np.ndarray:
    """Return a photograph, uint8 (H, W, 3), of its own size or, where `size` is given, of the model's."""
    image = read_image(path, max_pixels)
    return np.array(image) if size is None else fit(image, size)


def mask_values(mask: Image.Image) -> np.ndarray:
    """Return the values of a mask (H, W): zero where nothing is marked.

    In a mask with transparency, what is drawn is marked, whatever its colour and that of the ground.
    """
    if mask.has_transparency_data:
        alpha = np.asarray(mask.convert("RGBA"))[..., 3]
        if alpha.min() < alpha.max():
            return alpha
    return np.asarray(mask if mask.mode.startswith(("I", "F")) else mask.convert("L"))


def load_mask(path: Path, size: int, max_pixels: int) -> np.ndarray:
    """Return a mask, bool (size, size): cut above zero at its own size, resized by area, then cut at one half."""
    mask = mask_values(decode(path, max_pixels)) > 0
    if mask.shape == (size, size):
        return mask
    share = Image.fromarray(mask.astype(np.float32)).resize((size, size), Image.Resampling.BOX)
    return np.asarray(share) >= 0.5
