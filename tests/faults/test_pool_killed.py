"""A pool's processes end with whoever started them, and hand on what went wrong."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.processes import is_gone, kill_all, wait_for
from vlmdiff.core.errors import InputError
from vlmdiff.core.processes import map_in_processes

# Eight items of a minute each: whoever works on them would go on for minutes.
POOL = """\
import time
from vlmdiff.core.processes import map_in_processes

if __name__ == "__main__":
    list(map_in_processes(time.sleep, [60] * 8, chunk=1))
"""


def refuse_odd(number: int) -> int:
    if number % 2:
        raise InputError(f"{number} is odd")
    return number // 2


def die(number: int) -> None:
    """End as the system ends a process when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_the_system_kills_is_a_sentence():
    with pytest.raises(InputError, match=r"a process that reads images was killed, most likely .* not enough memory"):
        list(map_in_processes(die, [1, 2], chunk=1))


def test_results_come_in_the_order_of_the_items():
    assert list(map_in_processes(abs, range(-50, 50), chunk=7)) == [abs(number) for number in range(-50, 50)]


def test_an_error_is_raised_as_it_was():
    with pytest.raises(InputError, match="7 is odd"):
        list(map_in_processes(refuse_odd, [2, 4, 7, 8], chunk=1))


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name
)
def test_killed_it_leaves_no_process_behind(tmp_path: Path, number: signal.Signals):
    (tmp_path / "pool.py").write_text(POOL)
    pool = psutil.Popen(
        [sys.executable, "pool.py"],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    workers: list[psutil.Process] = []
    try:
        wait_for(lambda: len(workers) > 0 or workers.extend(at_work(pool)), 30)
        # To it alone, not to its group.
        pool.send_signal(number)
        pool.wait(10)
        wait_for(lambda: all(map(is_gone, workers)), 10, lambda: workers)
    finally:
        kill_all([pool, *workers])


def at_work(pool: psutil.Process) -> list[psutil.Process]:
    """The children that sleep, with all that they import behind them; multiprocessing's tracker is none of them."""
    children = [child for child in pool.children() if "spawn_main" in " ".join(child.cmdline())]
    return children if children and all(len(child.threads()) > 1 for child in children) else []
