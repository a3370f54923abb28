"""Ending the processes that the flows start."""

import contextlib
import os
import signal
import time

import psutil

from vlmdiff.lifeline import is_alive

GRACE = 10.0


def end_group(group: int) -> None:
    """End every process of a process group: ask first, kill who is left after GRACE seconds."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        # Between asking who lives and the signal, the last one may have ended.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, number)
        deadline = time.monotonic() + GRACE
        while _is_alive(group):
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        else:
            return


def end_family(leader: int) -> None:
    """End a process group, and whatever its processes started in groups of their own."""
    family = psutil.Process(leader).children(recursive=True)
    end_group(leader)
    for signal_ in (None, signal.SIGTERM, signal.SIGKILL):
        # Most end by themselves once the one who started them is gone.
        deadline = time.monotonic() + (GRACE / 2)
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                if signal_ is not None:
                    process.send_signal(signal_)
        while family := [process for process in family if is_alive(process)]:
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        else:
            return


def _is_alive(group: int) -> bool:
    """Whether a process of the group still runs; a zombie does not."""
    return any(_group(process) == group for process in psutil.process_iter())


def _group(process: psutil.Process) -> int | None:
    try:
        return None if process.status() == psutil.STATUS_ZOMBIE else os.getpgid(process.pid)
    except (psutil.NoSuchProcess, ProcessLookupError):
        return None
