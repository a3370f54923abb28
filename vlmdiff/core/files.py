"""Write files and folders whole: into a temporary sibling first, which is renamed at the end. Read and hash files."""

import contextlib
import hashlib
import json
import os
import shutil
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


def read_json(file: Path, kind: type[T]) -> T:
    """Return the content of a JSON file as `kind`, a type that pydantic validates.

    Raises InputError with the file and the first invalid place in it.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_json(file.read_bytes())
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}). Restore the file.") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ", ".join([str(file), ".".join(str(part) for part in first["loc"])]) if first["loc"] else file
        raise InputError(f"{where}: {first['msg']}. Restore the file.") from error


def check_data(folder: Path) -> None:
    """Raise InputError if something below `folder` is not a regular file, links followed, or a JSON file no object.

    Libraries that load the folder would wait for the writer of a pipe. They take text in place of an object for a name
    on the hub.
    """
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            continue
        if not path.is_file():
            raise InputError(f"{path} is not a regular file. Remove it.")
        if path.suffix == ".json":
            read_json(path, dict[str, Any])


def sha256(file: Path | BufferedReader) -> str:
    """Return the SHA-256 of a file's bytes, as 64 hexadecimal digits. An open file is read from where it stands."""
    with file.open("rb") if isinstance(file, Path) else contextlib.nullcontext(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def folder_mb(path: Path) -> float:
    """Return the size of a folder's files in 10^6 bytes."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 1e6
