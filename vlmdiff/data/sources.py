"""The photographs that files, folders, patterns and tables name."""

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from vlmdiff.core.errors import InputError
from vlmdiff.data.images import SUFFIXES, resolve
from vlmdiff.data.layouts import read_table

TABLES = {".csv", ".parquet"}


class Photograph(NamedTuple):
    """The absolute path of a photograph's file, and what a table says of it."""

    path: str
    class_name: str | None = None
    caption: str | None = None


def find_photographs(sources: Sequence[str], leave_out: Path) -> list[Photograph]:
    """List the photographs of all sources, each once, in the order of the sources and by name in each source.

    A source is a photograph, a folder (images by their suffix, also in its subfolders), a pattern such as
    `new/**/*.png`, or a table with a column `path`, relative to the table's folder, and optional columns `class_name`
    and `caption`. Hidden files and files in the folder `leave_out` are left out. Raises InputError if a source does
    not exist or has no photographs, a name is not in UTF-8, or two rows of tables contradict each other.
    """
    out = os.path.abspath(leave_out)
    found: dict[str, Photograph] = {}
    for source in sources:
        listed = list(_photographs_of(source, out))
        if not listed:
            raise InputError(f"{source} has no photographs: name photographs, a folder, a pattern or a table of them")
        for photograph in listed:
            # Python reads bytes that are not UTF-8 as these.
            if any("\ud800" <= letter <= "\udfff" for letter in photograph.path):
                raise InputError(f"{photograph.path!r} is not a name in UTF-8, which tables need: rename the file")
            if found.setdefault(photograph.path, photograph) != photograph:
                raise InputError(f"{photograph.path} is listed twice, with another class or caption: keep one")
    return list(found.values())


def _photographs_of(source: str, out: str) -> Iterator[Photograph]:
    if os.path.isdir(source):
        yield from _below(source, out)
    elif os.path.isfile(source):
        yield from _rows(Path(source)) if _suffix(source) in TABLES else [Photograph(os.path.abspath(source))]
    elif glob.has_magic(source):
        for match in sorted(glob.glob(source, recursive=True)):
            if os.path.isdir(match):
                # `**` matches each folder and the files in it.
                yield from _below(match, out)
            else:
                yield from _images([match], out)
    elif os.path.lexists(source):
        # A pipe, or a link to nothing: reading it says what is wrong.
        yield from _images([source], out)
    else:
        raise InputError(f"{source} does not exist: name a photograph, a folder, a pattern or a table")


def _below(folder: str, out: str) -> Iterator[Photograph]:
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from _images((os.path.join(place, name) for name in sorted(files) if not name.startswith(".")), out)


def _images(files: Iterable[str], out: str) -> Iterator[Photograph]:
    for file in map(os.path.abspath, files):
        if _suffix(file) in SUFFIXES and not file.startswith(out + os.sep):
            yield Photograph(file)


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


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()
