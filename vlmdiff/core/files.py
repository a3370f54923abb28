"""Write files and folders whole: into a temporary sibling first, which is renamed at the end. Read and hash files."""

import contextlib
import hashlib
import json
import os
import shutil
import stat
import uuid
from collections.abc import Generator
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar

from vlmdiff.core.errors import InputError

T = TypeVar("T")


@contextlib.contextmanager
def atomic_path(path: Path) -> Generator[Path]:
    """Yield a temporary path beside `path`. It replaces `path` when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Generator[Path]:
    """Yield a new temporary folder beside `path`. It replaces `path` and all its files at the end of the block."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            # A folder cannot be renamed over another that is not empty.
            old = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.old")
            os.replace(path, old)
            os.replace(temporary, path)
            shutil.rmtree(old)
        else:
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. Raises ValueError for NaN, which JSON does not have."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n")


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
        first = error.errors(include_url=False)[0]
        where = ", ".join([str(file), ".".join(str(part) for part in first["loc"])]) if first["loc"] else file
        raise InputError(f"{where}: {first['msg']}. Restore the file.") from error


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


def folder_mb(path: Path) -> float:
    """Return the size of a folder's files in 10^6 bytes."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 1e6
