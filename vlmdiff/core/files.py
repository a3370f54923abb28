"""Write files and folders whole: into a temporary sibling first, which is renamed at the end. Hash files."""

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Generator
from io import BufferedReader
from pathlib import Path
from typing import Any


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


def sha256(file: Path | BufferedReader) -> str:
    """Return the SHA-256 of a file's bytes, as 64 hexadecimal digits. An open file is read from where it stands."""
    with file.open("rb") if isinstance(file, Path) else contextlib.nullcontext(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def folder_mb(path: Path) -> float:
    """Return the size of a folder's files in 10^6 bytes."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 1e6
