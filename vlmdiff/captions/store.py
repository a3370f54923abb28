"""Store captions by content in one SQLite file, so that no caption is requested twice."""

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Generator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vlmdiff.core.errors import InputError
from vlmdiff.core.locks import hold

BUSY_SECONDS = 60


def key(image_id: str, identity: Mapping[str, Any]) -> str:
    """Return the hex SHA-256 of the image's hash and of everything that affects its caption."""
    content = json.dumps([image_id, identity], sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(content.encode()).hexdigest()


class CaptionStore:
    """Captions by `key`. Several processes may read and write the file at once, on a local disk.

    `put` is one durable transaction: a killed process loses only the captions that it had not put. Methods raise
    InputError if the disk is full or the file is not a caption store.
    """

    def __init__(self, path: Path):
        self.path = path
        lock = hold(path.with_name(f"{path.name}.lock"), f"the caption store {path}", BUSY_SECONDS)
        # Switching a new file to WAL in several processes at once can fail as busy without waiting.
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
        """Return the captions of those `keys` that are stored."""
        with self._explained():
            query = "SELECT key, caption FROM captions WHERE key = ?"
            rows = (self._db.execute(query, [k]).fetchone() for k in keys)
            return dict(row for row in rows if row)

    def put(self, captions: Mapping[str, str]) -> None:
        """Store captions by key, all or none. Existing captions stay as they are."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        with self._explained(), self._db:
            self._db.executemany(
                "INSERT OR IGNORE INTO captions VALUES (?, ?, ?)",
                [(key, caption, now) for key, caption in captions.items()],
            )

    @contextlib.contextmanager
    def _explained(self) -> Generator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise InputError(f"{self.path}: {error}. {_remedy(error)}") from error
        except OSError as error:
            raise InputError(f"{self.path}: cannot write the caption store ({error}).") from error


def _remedy(error: sqlite3.Error) -> str:
    match getattr(error, "sqlite_errorcode", 0) & 0xFF:  # the low byte of an extended code is its primary code
        case sqlite3.SQLITE_FULL | sqlite3.SQLITE_IOERR:
            return "The disk may be full. Free some space and run again: stored captions are kept."
        case sqlite3.SQLITE_NOTADB | sqlite3.SQLITE_CORRUPT:
            return "The file is damaged or not a caption store. Move it away and run again to caption all images."
        case sqlite3.SQLITE_BUSY:
            return f"Another process has locked it for {BUSY_SECONDS} s. Stop that process, then run again."
    return "Check that the file and its folder are writable."
