"""The child processes of the flows: started in a group of their own, heard line by line, ended as a group."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import psutil

from vlmdiff.core import lifeline
from vlmdiff.core.lifeline import is_alive

GRACE = 10.0
# What a failure quotes of what was printed.
LAST_LINES = 20


def run_child(command: list[str], hear: Callable[[str], None]) -> tuple[int, str]:
    """Run a command, `hear` every line that it prints, and return its exit status and the last LAST_LINES of them.

    Whatever ends this function early (Ctrl-C, a cancelled run, SIGTERM) ends the command, with all that it started.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    process = subprocess.Popen(
        command,
        env=os.environ | {"PATH": path, "PYTHONUNBUFFERED": "1", lifeline.OWNER: str(os.getpid())},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    last: deque[str] = deque(maxlen=LAST_LINES)
    try:
        for raw in process.stdout:
            # A progress bar draws its states over each other in one line: the last one counts.
            if line := raw.decode("utf-8", "replace").rstrip().rpartition("\r")[2]:
                hear(line)
                last.append(line)
        return process.wait(), "\n".join(last)
    finally:
        end_group(process.pid)
        process.wait()


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
