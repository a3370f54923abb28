"""Locks between processes: one holds a file, the others learn who it is."""

import contextlib
import json
import os
import shlex
import sys
from collections.abc import Generator
from datetime import datetime
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from vlmdiff.core.console import say
from vlmdiff.core.errors import InputError
from vlmdiff.core.files import write_json

# Seconds of silent waiting.
PATIENCE = 3.0
# Characters of a command line that a message quotes.
QUOTED = 100


@contextlib.contextmanager
def hold(file: Path, what: str, limit: float = 0.0, by: str | None = None) -> Generator[None]:
    """Hold a lock file, as the only process that does.

    The system releases the lock when the process ends, however it ends. A JSON file beside the lock file, whose name
    begins with a dot, says who holds it.

    Args:
        file: The lock file. It is created where there is none, with its folder.
        what: What the lock protects, as messages name it: "the folder out".
        limit: Seconds to wait at most. 0: do not wait.
        by: Who holds it, as messages to others name this process. None: its command line.

    Raises InputError that names the holder if another process still holds the lock after `limit` seconds, or if the
    lock file cannot be created or opened.
    """
    holder = file.with_name(f".{file.name.lstrip('.')}.json")
    lock = FileLock(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=min(limit, PATIENCE))
        except Timeout:
            if limit > PATIENCE:
                say(f"waiting: {_who(holder, file)} holds {what}")
            lock.acquire(timeout=max(0.0, limit - PATIENCE))
    except Timeout:
        waited = f" (waited {limit:g} s)" if limit else ""
        raise InputError(f"{_who(holder, file)} holds {what}{waited}: wait for it or end it, then try again") from None
    except OSError as error:
        raise InputError(
            f"{what} cannot be locked: {error.filename or file}: {error.strerror}. Remove or rename it, or "
            "make its folder writable"
        ) from error
    try:
        by = by or _quoted(sys.argv)
        name = {"by": by, "pid": os.getpid(), "what": what, "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}
        # A full disk, or what others have put there, hides the holder's name. It does not stop work that only reads.
        with contextlib.suppress(OSError, InputError):
            write_json(holder, name)
        yield
    finally:
        with contextlib.suppress(OSError):
            holder.unlink(missing_ok=True)
        lock.release()


def _who(holder: Path, lock: Path) -> str:
    """Return who holds a lock, and whether that process is stopped."""
    since = ""
    try:
        # A holder writes its name right after it has the lock. DVC writes its process's id into the lock file.
        if holder.exists():
            said = json.loads(holder.read_text(encoding="utf-8"))
            by, pid, since = said["by"], int(said["pid"]), f", since {said['since']}"
        else:
            pid = int(lock.read_text(encoding="utf-8"))
            by = _quoted(psutil.Process(pid).cmdline())
    except (OSError, ValueError, KeyError, TypeError, psutil.Error):
        return "another process"
    with contextlib.suppress(psutil.Error):
        if psutil.Process(pid).status() == psutil.STATUS_STOPPED:
            since += f", stopped: `kill -CONT {pid}` lets it go on"
    return f"{by} (process {pid}{since})"


def _quoted(command: list[str]) -> str:
    line = shlex.join([Path(command[0]).name, *command[1:]])
    return f"`{' '.join(line.split())[:QUOTED]}`"
