"""Child processes: commands that are logged line by line and ended as a group, and pools of workers."""

import contextlib
import getpass
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import TypeVar

import psutil

from vlmdiff.core import lifeline
from vlmdiff.core.errors import InputError
from vlmdiff.core.lifeline import is_alive

# Seconds between SIGTERM and SIGKILL.
GRACE = 5.0
# How many of a command's last lines an error message quotes.
LAST_LINES = 20

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_processes(function: Callable[[Item], Result], items: Iterable[Item], chunk: int) -> Iterator[Result]:
    """Yield `function` of each item, in order, computed by as many processes as there are cores.

    A process takes `chunk` items at a time. Function, items and results are pickled. The first exception is raised
    here; InputError if a process was killed. The processes end with this one, however it ends.
    """
    # Fork would copy whatever threads the caller runs.
    context = get_context("spawn")
    with ProcessPoolExecutor(mp_context=context, initializer=lifeline.end_with, initargs=(os.getpid(),)) as pool:
        try:
            yield from pool.map(function, items, chunksize=chunk)
        except KeyboardInterrupt:
            # Nobody waits for what they are at.
            for process in active_children():
                process.terminate()
            raise
        except BrokenProcessPool as error:
            raise InputError(
                "a process that reads images was killed, most likely because there is not enough memory: end other "
                "programs, then run again"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def run_child(command: list[str], log: Callable[[str], None]) -> tuple[int, str]:
    """Run a command, pass each line that it prints to `log`; return its exit status and its last LAST_LINES lines.

    If an exception ends this function early (Ctrl-C, a cancelled run, SIGTERM), the command ends too, with every
    process of its group.
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
        for raw in process.stdout or ():
            # A progress bar overwrites its line: only its last state counts.
            if line := raw.decode("utf-8", "replace").rstrip().rpartition("\r")[2]:
                log(line)
                last.append(line)
        return process.wait(), "\n".join(last)
    finally:
        end_group(process.pid)
        process.wait()


def login_name() -> str:
    """Return the name of the user that runs this process, empty where the system has none for the user's number."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return ""


def end_group(group: int) -> None:
    """End every process of a process group: SIGTERM first, SIGKILL after GRACE seconds."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        # The last process may end before the signal is sent.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, number)
        deadline = time.monotonic() + GRACE
        while any(_group(process) == group for process in psutil.process_iter()):
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        else:
            return


def end_family(leader: int) -> None:
    """End a process group, and the processes that it started in other groups."""
    family = psutil.Process(leader).children(recursive=True)
    end_group(leader)
    for number in (None, signal.SIGTERM, signal.SIGKILL):
        # Most end by themselves when their parent is gone.
        deadline = time.monotonic() + GRACE / 2
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                if number is not None:
                    process.send_signal(number)
        while family := [process for process in family if is_alive(process)]:
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        else:
            return


def _group(process: psutil.Process) -> int | None:
    """Return the process group. None if the process has ended; a zombie has."""
    try:
        return None if process.status() == psutil.STATUS_ZOMBIE else os.getpgid(process.pid)
    except (psutil.NoSuchProcess, ProcessLookupError):
        return None
