"""Images from files that may hold anything: the one place that decodes, converts to RGB and resizes for the model."""

import contextlib
import io
import math
import mmap
import re
import threading
import warnings
from collections.abc import Callable, Generator, Iterator
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from scipy import ndimage

from vlmdiff.core.errors import InputError
from vlmdiff.core.files import open_regular

SUFFIXES = {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".tif", ".tiff", ".webp"}
# By content, whatever the name says. Pillow's other decoders do more than decode: EPS runs Ghostscript.
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
# Of values of 16 or 32 bits, those of a photograph reach beyond twelve bits.
TWELVE_BITS = 4095
# The name of a file in DVC's cache: a workspace with `cache.type symlink` has links to them.
CACHED = re.compile(r".*/files/md5/[0-9a-f]{2}/[0-9a-f]{30}")
# Limits on what decoding costs, by what a header and a file's marks say before anything is decoded.
MAX_SIDE = 100_000
# Bytes of memory that reading takes for each pixel, copies included. `max_pixels` times as many bounds an image, and
# all images together that threads read at the same time.
BYTES = 8
# How often a JPEG's scans may list the pixels: together PASSES * max_pixels, and each image's MAX_PASSES.
PASSES, MAX_PASSES = 20, 1000
# Pixels that are converted at a time.
STRIP = 1 << 20
TILE_WIDTH, TILE_LENGTH = 322, 323
JPEG = {"JPEG", "MPO"}
# A JPEG's mark that something begins or ends; among the pixels, FF 00 and FF D0 to FF D7 are none.
MARKER, SCAN, END = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]"), b"\xff\xda", b"\xff\xd9"


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


def check_bytes(size: int, max_pixels: int, name: str) -> None:
    """Raise InputError for a file of more bytes than an image may take: nobody should read or hash all of it."""
    if size > BYTES * max_pixels:
        raise InputError(f"{name} has {size} bytes, more than an image may take: replace or remove it")


def decode(source: Path | BinaryIO, max_pixels: int, name: str | None = None) -> Image.Image:
    """Return an image in the mode that its file has, fully decoded and upright.

    name: what an error calls the image, by default its path. Raises InputError with the name and the reason, if the
    file is missing, damaged, not a regular file, not of one of FORMATS, or costs too much to decode: more than
    `max_pixels` pixels or BYTES bytes for each of `max_pixels`, a side over MAX_SIDE, or more passes than PASSES.
    """
    with _opened(source, max_pixels, name, _upright) as image:
        return image


def read_image(source: Path | BinaryIO, max_pixels: int, name: str | None = None) -> Image.Image:
    """Return a photograph in RGB as `to_rgb` converts it. Parameters and errors are those of `decode`."""
    with opened(source, max_pixels, name) as image:
        return image


def opened(
    source: Path | BinaryIO, max_pixels: int, name: str | None = None
) -> contextlib.AbstractContextManager[Image.Image]:
    """Yield what `read_image` returns. Until the block ends, other threads wait if all images would take too much."""
    return _opened(source, max_pixels, name, _convert)


def size_of(file: Path, max_pixels: int) -> tuple[int, int]:
    """Return the width and height that an image's header says. Raises InputError as `decode`."""
    with _sentences(str(file)), open_regular(file) as stream, _header(stream, max_pixels) as image:
        return image.size


@contextlib.contextmanager
def _opened(
    source: Path | BinaryIO, max_pixels: int, name: str | None, convert: Callable[[Image.Image], Image.Image]
) -> Generator[Image.Image]:
    name = name or str(source)
    with contextlib.ExitStack() as stack:
        with _sentences(name):
            # Pillow maps an uncompressed TIFF into memory where it knows its path, and scrambles one that is to be
            # turned.
            stream = stack.enter_context(open_regular(source)) if isinstance(source, Path) else source
            image = _header(stream, max_pixels)
            cost = _check_cost(image, stream, max_pixels, name)
            if _has_more(image):
                raise InputError(f"{name} has several pages or frames: save the one to judge as a file of its own")
            stack.enter_context(_memory.take(cost, BYTES * max_pixels))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                try:
                    image = convert(image)
                except InputError as error:
                    raise InputError(f"{name}: {error}") from None
        yield image


@contextlib.contextmanager
def _sentences(name: str) -> Generator[None]:
    """Turn whatever reading an image raises into an InputError that names it."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{name} does not exist") from None
    except UnidentifiedImageError:
        raise InputError(f"{name} is not an image of {', '.join(FORMATS)}: replace or remove it") from None
    except MemoryError as error:
        raise InputError(
            f"{name} cannot be decoded: not enough memory. End other programs and run again, or remove it"
        ) from error
    # Pillow's decoders raise anything for a damaged file.
    except Exception as error:
        raise InputError(f"{name} cannot be decoded ({str(error) or repr(error)}): replace or remove it") from error


def _header(stream: BinaryIO, max_pixels: int) -> Image.Image:
    """Open an image and read only its header."""
    if Image.MAX_IMAGE_PIXELS is not None:
        # Pillow refuses twice its own limit, here and while it decodes.
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)
    with warnings.catch_warnings():
        # _check_cost limits the size.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(stream, formats=FORMATS)


def _has_more(image: Image.Image) -> bool:
    """Return whether a file has more than one picture, by its header. Those of a JPEG belong to its first."""
    return image.format in ("TIFF", "PNG", "WEBP") and getattr(image, "is_animated", False)


def _check_cost(image: Image.Image, stream: BinaryIO, max_pixels: int, name: str) -> int:
    """Return how many bytes of memory an image takes at most while it is read. Raises InputError if it costs too much.

    image: not decoded yet.
    """
    advice = "replace it, or raise the limit"
    if max(image.size) > MAX_SIDE:
        raise InputError(f"{name} has {image.width} x {image.height} pixels, more than {MAX_SIDE} a side: replace it")
    pixels = _decoded_pixels(image)
    if pixels > max_pixels:
        inside = "" if pixels == image.width * image.height else f" in tiles of {pixels} pixels together"
        raise InputError(
            f"{name} has {image.width} x {image.height} pixels{inside}, more than prepare.max_pixels = {max_pixels}: "
            f"{advice}"
        )
    passes = _passes(image, stream)
    if passes > MAX_PASSES or passes * pixels > PASSES * max_pixels:
        raise InputError(f"{name} lists its {pixels} pixels {passes} times, in parts: save it again, not progressive")
    needed = BYTES
    if passes > 1:
        # libjpeg keeps the coefficients of all scans, for each channel at its own resolution.
        shares = [across * down for _, across, down, _ in getattr(image, "layer", [])]
        needed = max(needed, 4 + math.ceil(2 * sum(shares) / max(shares)))
    elif image.format == "WEBP":
        # libwebp keeps two canvases and a copy beside the pixels.
        needed = 16
    if needed * pixels > BYTES * max_pixels:
        raise InputError(
            f"{name} is a {image.format} file whose {pixels} pixels take {needed} bytes each, more than {BYTES} for "
            f"each of prepare.max_pixels = {max_pixels}: {advice}"
        )
    return needed * pixels


def _decoded_pixels(image: Image.Image) -> int:
    """Return how many pixels are decoded: a TIFF's tiles may be larger than the image."""
    width, height = image.size
    tags = getattr(image, "tag_v2", {})
    if TILE_WIDTH in tags:
        across, down = int(tags[TILE_WIDTH]), int(tags[TILE_LENGTH])
        width, height = -(-width // across) * across, -(-height // down) * down
    return width * height


def _passes(image: Image.Image, stream: BinaryIO) -> int:
    """Return how many times a file lists the pixels: the scans of a JPEG; else 1."""
    if image.format not in JPEG:
        return 1
    if isinstance(stream, io.BytesIO):
        data = stream.getbuffer()
    else:
        data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    with data:
        return sum(1 for _ in islice(_scans(data), MAX_PASSES + 1))


def _scans(data: memoryview | mmap.mmap) -> Iterator[int]:
    """Yield where each scan of a JPEG begins. `data` is the whole file."""
    place = 2
    while found := MARKER.search(data, place):
        place = found.end()
        if found[0] == END:
            return
        length = int.from_bytes(data[place : place + 2], "big")
        if found[0] == SCAN:
            yield place
        place += length


class _Memory:
    """The bytes that images take which threads of this process read at the same time."""

    def __init__(self) -> None:
        self.used, self.turn, self.changed = 0, threading.Lock(), threading.Condition()

    @contextlib.contextmanager
    def take(self, cost: int, limit: int) -> Generator[None]:
        """Wait until `cost` bytes fit into `limit`, first come, first served, and hold them."""
        with self.turn, self.changed:
            self.changed.wait_for(lambda: not self.used or self.used + cost <= limit)
            self.used += cost
        try:
            yield
        finally:
            with self.changed:
                self.used -= cost
                self.changed.notify_all()


_memory = _Memory()


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
    rgb = _convert(image)
    return rgb.copy() if rgb is image else rgb


def _convert(image: Image.Image) -> Image.Image:
    """Return a PIL image as `to_rgb` does, or itself. No step keeps more than BYTES for a pixel."""
    image = _upright(image)
    if image.mode.startswith(("I", "F")):
        image = _in_strips(_eight_bits(image), image, "L")
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        image = _in_strips(_on_white, image, "RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    """Return a decoded image, turned as its EXIF says."""
    image.load()
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    return ImageOps.exif_transpose(image) if turned else image


def _strips(image: Image.Image) -> Iterator[tuple[tuple[int, int, int, int], Image.Image]]:
    """Yield the image a few rows at a time, each time with their box in it."""
    rows = max(1, STRIP // max(image.width, 1))
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(top + rows, image.height))
        yield box, image.crop(box)


def _in_strips(change: Callable[[Image.Image], Image.Image], image: Image.Image, mode: str) -> Image.Image:
    """Return the image, changed a few rows at a time, which needs little memory besides the result's."""
    changed = Image.new(mode, image.size)
    for box, rows in _strips(image):
        changed.paste(change(rows), box)
    return changed


def _eight_bits(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """Return what scales rows of 16 bits, integers or floats to 8 bits. Raises InputError if white is not known."""
    ranges = [(values.min(), values.max()) for values in (np.asarray(rows) for _, rows in _strips(image))]
    least, most = float(np.min(ranges)), float(np.max(ranges))
    top = 1.0 if image.mode == "F" else 65535.0
    # Of other ranges nobody knows which value is white. A guess would judge a black or a white picture.
    if not (least >= 0 and most <= top) or (image.mode != "F" and 0 < most <= TWELVE_BITS):
        raise InputError(
            f"its values reach from {least:g} to {most:g}, and white is {top:g} in mode {image.mode}: "
            f"scale them to 0 to {top:g}, or to 8 bits"
        )

    def scale(rows: Image.Image) -> Image.Image:
        values = np.asarray(rows)
        if values.dtype == np.uint16:
            # As below, for whole numbers.
            return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
        return Image.fromarray(np.rint(values.astype(np.float64) / top * 255).astype(np.uint8))

    return scale


def _on_white(rows: Image.Image) -> Image.Image:
    return Image.alpha_composite(Image.new("RGBA", rows.size, "white"), rows.convert("RGBA")).convert("RGB")


def fit(image: Image.Image | np.ndarray, size: int) -> np.ndarray:
    """Return a photograph, as `to_rgb` takes it, at the model's size: uint8 (size, size, 3), bilinear, antialiased."""
    rgb = _convert(image) if isinstance(image, Image.Image) else to_rgb(image)
    return np.array(rgb.resize((size, size), Image.Resampling.BILINEAR))


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
    """Return a mask, bool (size, size): cut above zero at its own size, then shrunk by `shrink`."""
    return shrink(mask_values(decode(path, max_pixels)) > 0, size)[0]


def shrink(mask: np.ndarray, size: int) -> tuple[np.ndarray, int]:
    """Return a mask (H, W), bool, at (size, size), and how many of its regions mark half of no pixel there.

    A pixel is marked if at least half of it is, or at least half as much of it as of any pixel around it. So thin parts
    stay. Each region (8-connected) keeps a pixel at least.
    """
    if mask.shape == (size, size):
        return mask, 0
    if not mask.any():
        return np.zeros((size, size), bool), 0
    share = np.asarray(Image.fromarray(mask.astype(np.float32)).resize((size, size), Image.Resampling.BOX))
    half = share >= 0.5
    kept = half | (share > 0) & (2 * share >= ndimage.maximum_filter(share, 3))
    labels, count = ndimage.label(mask, np.ones((3, 3), bool))
    # The row or column there of each row or column here.
    row, column = ((2 * np.arange(length) + 1) * size // (2 * length) for length in mask.shape)

    def without(marked: np.ndarray) -> np.ndarray:
        return np.setdiff1d(np.arange(1, count + 1), labels[mask & marked[row][:, column]])

    small, is_lost = without(half), np.zeros(count + 1, bool)
    is_lost[without(kept)] = True
    y, x = np.nonzero(is_lost[labels])
    places = labels[y, x].astype(np.int64) * size**2 + row[y] * size + column[x]
    pairs, times = np.unique(places, return_counts=True)
    regions, pixels = np.divmod(pairs[np.argsort(times, kind="stable")], size**2)
    # For each region, the last pixel: the one that it covers most.
    kept.flat[list(dict(zip(regions.tolist(), pixels.tolist(), strict=True)).values())] = True
    return kept, len(small)
