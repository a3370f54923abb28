"""A stage's process ends with whoever started it, even where that one was killed with -9."""

import contextlib
import os
import sys
import threading
import time

import psutil

OWNER = "VLMDIFF_OWNER"
SHELLS = {"sh", "bash", "dash", "zsh", "ksh", "fish"}
INTERVAL = 0.5
EXIT_CODE = 128 + 1  # as a process that its terminal's hang-up ended


def watch() -> None:
    """End this process, within a second, when one of its owners is gone.

    Owners are the process whose id is in the environment's VLMDIFF_OWNER and, under DVC, the `dvc` process.
    A command that a person typed has neither, and goes on.
    """
    if owners := _owners():
        _end_with(owners)


def end_with(pid: int) -> None:
    """End this process, within a second, when the process of that id is gone."""
    _end_with([_process(pid)])


def _end_with(owners: list[psutil.Process | None]) -> None:
    _end_without(owners)
    threading.Thread(target=_watch, args=(owners,), name="lifeline", daemon=True).start()


def _owners() -> list[psutil.Process | None]:
    """The owners as psutil knows them, None for one that is gone already.

    From here on psutil tells a process from a later one with the same id.
    """
    owners = []
    if pid := os.environ.get(OWNER):
        owners.append(_process(int(pid)))
    if "DVC_STAGE" in os.environ:
        above = (process for process in psutil.Process().parents() if process.name() not in SHELLS)
        owners.append(next(above, None))
    return owners


def _process(pid: int) -> psutil.Process | None:
    return psutil.Process(pid) if psutil.pid_exists(pid) else None


def _watch(owners: list[psutil.Process | None]) -> None:
    while True:
        time.sleep(INTERVAL)
        _end_without(owners)


def _end_without(owners: list[psutil.Process | None]) -> None:
    if all(owner is not None and is_alive(owner) for owner in owners):
        return
    # Standard error may have gone with its reader.
    with contextlib.suppress(OSError):
        print("the process that ran this stage is gone: ending", file=sys.stderr, flush=True)
    os._exit(EXIT_CODE)


def is_alive(process: psutil.Process) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
