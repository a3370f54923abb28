"""Captions by content, in one SQLite file: what was captioned once is never asked for again."""

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vlmdiff.core.errors import InputError
from vlmdiff.core.locks import hold

BUSY_SECONDS = 60


def key(image_id: str, identity: Mapping[str, Any]) -> str:
    """Hex sha256 over the image's hash and everything that decides its caption's text."""
    content = json.dumps([image_id, identity], sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(content.encode()).hexdigest()


class CaptionStore:
    """Captions by `key`. Any number of processes may read and write the file at once, on a local disk.

    `put` is one transaction, durable when it returns: a process killed at any moment loses only what it had
    not put. Raises InputError where the disk is full or the file is no store of captions.
    """

    def __init__(self, path: Path):
        self.path = path
        lock = hold(path.with_name(f"{path.name}.lock"), f"the caption store {path}", BUSY_SECONDS)
        # Processes that turn a fresh file to WAL at once may fail as busy without waiting.
        with self._explained(), lock:
            self._db = sqlite3.connect(path, timeout=BUSY_SECONDS)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS captions"
                " (key TEXT PRIMARY KEY, caption TEXT NOT NULL, created TEXT NOT NULL) WITHOUT ROWID"
            )

    def __enter__(self) -> "CaptionStore":
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    def get(self, keys: Sequence[str]) -> dict[str, str]:
        """Captions of those `keys` that are stored."""
        with self._explained():
            query = "SELECT key, caption FROM captions WHERE key = ?"
            rows = (self._db.execute(query, [k]).fetchone() for k in keys)
            return dict(row for row in rows if row)

    def put(self, captions: Mapping[str, str]) -> None:
        """Store captions by key, all or none; one that is stored already stays."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        with self._explained(), self._db:
            self._db.executemany(
                "INSERT OR IGNORE INTO captions VALUES (?, ?, ?)",
                [(key, caption, now) for key, caption in captions.items()],
            )

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise InputError(f"the caption store {self.path}: {error}; {_remedy(error)}") from error
        except OSError as error:
            raise InputError(f"the caption store {self.path} cannot be written: {error}") from error


def _remedy(error: sqlite3.Error) -> str:
    match getattr(error, "sqlite_errorcode", 0) & 0xFF:  # the low byte of an extended code is its kind
        case sqlite3.SQLITE_FULL | sqlite3.SQLITE_IOERR:
            return "is the disk full? What was stored is kept: make room, and a new run captions only the rest"
        case sqlite3.SQLITE_NOTADB | sqlite3.SQLITE_CORRUPT:
            return "the file is not a store, or damaged: move it away, and every image is captioned again"
        case sqlite3.SQLITE_BUSY:
            return f"another process has been holding it for {BUSY_SECONDS} s: end that one, then run again"
    return "check that the file and its folder can be written"
