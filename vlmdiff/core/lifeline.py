"""End a process with the one that started it, even if that one was killed with -9.

`python -m vlmdiff.core.lifeline MODULE ARGUMENTS...` runs another module so.
"""

import contextlib
import os
import runpy
import sys
import threading
import time

import psutil

OWNER = "VLMDIFF_OWNER"
SHELLS = {"sh", "bash", "dash", "zsh", "ksh", "fish"}
INTERVAL = 0.5
# As after SIGHUP, which a closed terminal sends.
EXIT_CODE = 128 + 1


def watch() -> None:
    """End this process, within a second, after one of its owners has ended.

    The owners are the process whose id is in the environment variable VLMDIFF_OWNER and, under DVC, the `dvc` process.
    A command that a person started has neither, and goes on.
    """
    if owners := _owners():
        _end_with(owners)


def end_with(pid: int) -> None:
    """End this process, within a second, after the process of that id has ended."""
    _end_with([_process(pid)])


def _end_with(owners: list[psutil.Process | None]) -> None:
    _end_without(owners)
    threading.Thread(target=_watch, args=(owners,), name="lifeline", daemon=True).start()


def _owners() -> list[psutil.Process | None]:
    """Return the owners, None for one that has ended already.

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
    # Nobody may read standard error any more.
    with contextlib.suppress(OSError):
        print("the process that started this one has ended: this one ends too", file=sys.stderr, flush=True)
    os._exit(EXIT_CODE)


def is_alive(process: psutil.Process) -> bool:
    """Return whether the process runs. A zombie does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


if __name__ == "__main__":
    watch()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
