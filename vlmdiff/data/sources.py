"""The photographs that files, folders, patterns and tables name."""

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from vlmdiff.core.console import say
from vlmdiff.core.errors import InputError
from vlmdiff.core.text import counted
from vlmdiff.data.images import SUFFIXES, resolve
from vlmdiff.data.layouts import read_table

TABLES = {".csv", ".parquet"}
# Of images in any format: cameras' raw files too.
IMAGES = set(Image.registered_extensions()) | {".heic", ".heif", ".dng", ".nef", ".cr2", ".cr3", ".arw", ".raw"}
IMAGES -= {".pdf", ".h5", ".hdf", ".mpg", ".mpeg", ".ps", ".eps"}


class Photograph(NamedTuple):
    """The absolute path of a photograph's file, and what a table says of it."""

    path: str
    class_name: str | None = None
    caption: str | None = None


def find_photographs(sources: Sequence[str], leave_out: Path) -> list[Photograph]:
    """List the photographs of all sources, each once, in the order of the sources and by name in each source.

    A source is a photograph, a folder (images by their suffix, also in its subfolders), a pattern such as
    `new/**/*.png`, or a table with a column `path`, relative to the table's folder, and optional columns `class_name`
    and `caption`. Hidden files and files in the folder `leave_out` are left out; a line says how many images of other
    formats are passed over. Raises InputError if a source does
    not exist or has no photographs, a name is not in UTF-8, or two rows of tables contradict each other.
    """
    out = os.path.abspath(leave_out)
    found: dict[str, Photograph] = {}
    others: list[str] = []
    for source in sources:
        listed = list(_photographs_of(source, out, others))
        if not listed:
            raise InputError(f"{source} has no photographs: name photographs, a folder, a pattern or a table of them")
        for photograph in listed:
            # Python reads bytes that are not UTF-8 as these.
            if any("\ud800" <= letter <= "\udfff" for letter in photograph.path):
                raise InputError(f"{photograph.path!r} is not a name in UTF-8, which tables need: rename the file")
            if found.setdefault(photograph.path, photograph) != photograph:
                raise InputError(f"{photograph.path} is listed twice, with another class or caption: keep one")
    if others:
        more = " …" if len(others) > 3 else ""
        say(
            f"warning: {counted(len(others), 'image', 'are')} passed over, with another suffix than "
            f"{', '.join(sorted(SUFFIXES))} ({', '.join(others[:3])}{more})"
        )
    return list(found.values())


def _photographs_of(source: str, out: str, others: list[str]) -> Iterator[Photograph]:
    if os.path.isdir(source):
        yield from _images(images_below(source), out, others)
    elif os.path.isfile(source):
        yield from _rows(Path(source)) if suffix(source) in TABLES else [Photograph(os.path.abspath(source))]
    elif glob.has_magic(source):
        for match in sorted(glob.glob(source, recursive=True)):
            # `**` matches each folder and the files in it.
            yield from _images(images_below(match) if os.path.isdir(match) else [match], out, others)
    elif os.path.lexists(source):
        # A pipe, or a link to nothing: reading it says what is wrong.
        yield from _images([source], out, others)
    else:
        raise InputError(f"{source} does not exist: name a photograph, a folder, a pattern or a table")


def images_below(folder: str | Path) -> Iterator[str]:
    """Yield the files of a folder and its subfolders that have the suffix of an image, of any format, by name.

    Links to folders are followed, each folder once. Hidden files and folders are left out.
    """
    seen: set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and suffix(name) in IMAGES:
                yield os.path.join(place, name)


def _images(files: Iterable[str], out: str, others: list[str]) -> Iterator[Photograph]:
    """Yield the photographs; add images of other formats to `others`."""
    for file in map(os.path.abspath, files):
        if file.startswith(out + os.sep):
            continue
        if suffix(file) in SUFFIXES:
            yield Photograph(file)
        elif suffix(file) in IMAGES and file not in others:
            others.append(file)


def _rows(table: Path) -> Iterator[Photograph]:
    header, rows = read_table(table)
    if "path" not in header:
        raise InputError(f"{table} has no column `path`, only {', '.join(header)}: add one that names the photographs")
    for where, row in rows:
        try:
            resolve(table.parent, row["path"])
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        path = os.path.abspath(table.parent / row["path"])
        yield Photograph(path, row.get("class_name") or None, row.get("caption") or None)


def suffix(path: str) -> str:
    """Return the suffix of a file's name in small letters, such as ".png"."""
    return os.path.splitext(path)[1].lower()
