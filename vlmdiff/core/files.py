"""Write files and folders whole: into a temporary sibling first, which is renamed at the end. Read and hash files."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import uuid
from collections.abc import Callable, Generator
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar

import psutil

from vlmdiff.core.errors import InputError, first_invalid

T = TypeVar("T")
_HOST = re.sub(r"\W", "_", socket.gethostname())
# In a folder of a model or of a training's state: the SHA-256 of each file.
HASHES = "sha256.json"


# Folders in which this process has removed what killed processes left.
_swept: set[Path] = set()


@contextlib.contextmanager
def atomic_path(path: Path) -> Generator[Path]:
    """Yield a temporary path beside `path`. It replaces `path` when the block ends without an error.

    Raises InputError if `path` is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder, and a file is written there: rename or move it")
    temporary = _beside(path, "tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Generator[Path]:
    """Yield a new temporary folder beside `path`. It replaces `path` and all its files at the end of the block.

    For folders that vlmdiff alone writes, never for one that a user names. Raises InputError if `path` is a file or a
    link.
    """
    path = Path(path)
    refuse_other_than_folder(path)
    temporary = _beside(path, "tmp")
    temporary.mkdir()
    try:
        yield temporary
        # Some libraries write for the owner alone: another user who may read the folder reads its files.
        readable = temporary.stat().st_mode & 0o666
        for file in temporary.rglob("*"):
            if file.is_file() and not file.is_symlink():
                file.chmod(file.stat().st_mode | readable)
        if path.exists():
            # A folder cannot be renamed over another that is not empty.
            old = _beside(path, "old")
            os.replace(path, old)
            os.replace(temporary, path)
            shutil.rmtree(old)
        else:
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_out(out: Path, is_ours: Callable[[str], bool]) -> None:
    """Raise InputError unless a folder that a user names for output is new, empty, or one of ours.

    is_ours: whether a file of that name is from an earlier run. Hidden files do not count. Output never replaces or
    removes other files, and stays apart from them: `out` is not a link, nor the current folder or one around it.
    """
    if Path.cwd().resolve().is_relative_to(out.resolve()):
        raise InputError(f"{out} is the current folder or contains it: give an empty or new folder as --out")
    refuse_other_than_folder(out)
    names = sorted(each.name for each in out.iterdir()) if out.is_dir() else []
    if others := [name for name in names if not (name.startswith(".") or is_ours(name))]:
        raise InputError(f"{out} holds other files ({', '.join(others[:3])}): give an empty or new folder as --out")


def refuse_other_than_folder(path: Path) -> None:
    """Raise InputError if `path` is a file or a link."""
    if path.is_symlink():
        raise InputError(f"{path} is a link, and a folder is written there: name the folder itself")
    for place in (path, *path.parents):
        if place.exists():
            if not place.is_dir():
                raise InputError(f"{place} is a file, and a folder is written there: rename or move it")
            return


def _beside(path: Path, suffix: str) -> Path:
    """Return a new hidden name beside `path`, and remove what killed processes left there under such names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path.parent.resolve())
    return path.with_name(f".{path.name}.{_HOST}-{os.getpid()}-{uuid.uuid4().hex[:8]}.{suffix}")


def _sweep(folder: Path) -> None:
    """Remove the temporary files and folders of ended processes, once a process. Restore what one was replacing."""
    if folder in _swept:
        return
    _swept.add(folder)
    for left in folder.glob(".*"):
        # Another machine may write to the same disk: only this one's processes can be known to have ended.
        found = re.fullmatch(rf"\.(.+)\.{re.escape(_HOST)}-(\d+)-[0-9a-f]{{8}}\.(tmp|old)", left.name)
        if found is None or psutil.pid_exists(int(found[2])):
            continue
        if found[3] == "old" and not left.with_name(found[1]).exists():
            os.replace(left, left.with_name(found[1]))
        elif left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. Raises ValueError for NaN, which JSON does not have."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def sync(folder: Path) -> None:
    """Return when a folder's files, and their names, are on the disk."""
    for path in (*(file for file in folder.iterdir() if file.is_file()), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def open_regular(file: Path) -> BufferedReader:
    """Open a regular file to read it, links followed.

    Raises InputError, without waiting, for anything else: a pipe without a writer never opens, and a device never ends.
    Raises OSError if the file cannot be opened.
    """
    # A device may act when it is opened, and the file may be another one a moment later.
    if stat.S_ISREG(os.stat(file).st_mode):
        descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return os.fdopen(descriptor, "rb")
        os.close(descriptor)
    raise InputError(f"{file} is not a regular file. Replace or remove it.")


def read_json(file: Path, kind: type[T]) -> T:
    """Return the content of a JSON file as `kind`, a type that pydantic validates.

    Raises InputError with the file and the first invalid place in it.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        with open_regular(file) as stream:
            return TypeAdapter(kind).validate_json(stream.read())
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}). Restore the file.") from None
    except ValidationError as error:
        place, why = first_invalid(error)
        raise InputError(f"{', '.join([str(file), place]) if place else file}: {why}. Restore the file.") from error


def check_regular(folder: Path) -> list[Path]:
    """Return the files below `folder`. Raises InputError if something there is neither a regular file nor a folder.

    Programs that read the whole folder would wait for the writer of a pipe.
    """
    files = [path for path in sorted(folder.rglob("*")) if not path.is_dir()]
    for path in files:
        if not path.is_file():
            raise InputError(f"{path} is not a regular file, and a link leads to none. Replace or remove it.")
    return files


def sha256(file: Path | BufferedReader) -> str:
    """Return the SHA-256 of a file's bytes, as 64 hexadecimal digits. An open file is read from where it stands."""
    with open_regular(file) if isinstance(file, Path) else contextlib.nullcontext(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def seal(folder: Path) -> None:
    """Write HASHES into a folder: the SHA-256 of each file below it, by which `verify` knows a change.

    Hidden files and compiled code do not count.
    """
    hashes = {name: sha256(file) for name, file in _named(folder).items() if name != HASHES}
    write_json(folder / HASHES, hashes)


def verify(folder: Path, remedy: str) -> bool:
    """Compare a folder's files with the hashes that `seal` wrote. Return False if there are none.

    Files that came later do not count. Raises InputError, with the remedy, for the first file that is missing or has
    changed.
    """
    if not (folder / HASHES).exists():
        return False
    files = _named(folder)
    for name, digest in read_json(folder / HASHES, dict[str, str]).items():
        if name not in files:
            raise InputError(f"{folder / name} is missing, and {HASHES} lists it. {remedy}.")
        if sha256(files[name]) != digest:
            raise InputError(f"{files[name]} has changed since it was written: {HASHES} has another hash. {remedy}.")
    return True


def _named(folder: Path) -> dict[str, Path]:
    """Return the files below a folder by their paths in it, without hidden ones and compiled code."""
    files = {file.relative_to(folder): file for file in check_regular(folder)}
    left_out = re.compile(r"\.|__pycache__$")
    return {name.as_posix(): file for name, file in files.items() if not any(map(left_out.match, name.parts))}


def folder_mb(path: Path) -> float:
    """Return the size of a folder's files in 10^6 bytes."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 1e6
