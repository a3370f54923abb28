"""The seam to DVC: a stage is `dvc repro --single-item` in a child process, heard line by line."""

import os
import re
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import yaml

from flows.processes import end_group
from vlmdiff import lifeline

Outcome = Literal["ran", "restored from the run cache", "up to date"]

LAST_LINES = 20


class StageFailed(Exception):
    """A stage failed; the message ends with the last lines that it printed."""


class StageDisturbed(StageFailed):
    """The stage is not to blame: another DVC holds its files, or a signal ended it. Trying again can help."""


def stage_names(file: Path = Path("dvc.yaml")) -> list[str]:
    """The stages of the graph, in the order of the file."""
    return list(yaml.safe_load(file.read_text())["stages"])


def run_stage(name: str, log: Callable[[str], None], force: bool = False) -> Outcome:
    """Bring a stage of the workspace up to date, as DVC decides; `log` hears every line it prints.

    `force` runs it even where it is up to date.
    Whatever ends this function early (Ctrl-C, a cancelled run, SIGTERM) ends the stage too.
    Raises StageFailed.
    """
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item", name]
    if force:
        command.append("--force")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    environment = os.environ | {"PATH": path, "PYTHONUNBUFFERED": "1", lifeline.OWNER: str(os.getpid())}
    outcome: Outcome = "up to date"
    last_lines: deque[str] = deque(maxlen=LAST_LINES)
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        for raw in process.stdout:
            # A progress bar draws its states over each other in one line: the last one counts.
            line = raw.decode("utf-8", "replace").rstrip().rpartition("\r")[2]
            if not line:
                continue
            log(line)
            last_lines.append(line)
            if line == f"Running stage '{name}':":
                outcome = "ran"
                last_lines.clear()
            elif line.startswith(f"Stage '{name}' is cached"):
                outcome = "restored from the run cache"
        status = process.wait()
    finally:
        end_group(process.pid)
        process.wait()
    if status:
        printed = "\n".join(last_lines)
        failure = StageDisturbed if _disturbed(status, printed) else StageFailed
        raise failure(f"stage {name!r} failed:\n{printed}")
    return outcome


def _disturbed(status: int, printed: str) -> bool:
    """Whether DVC or the stage's command was ended by a signal, or DVC found the stage's files in use."""
    stage_status = re.search(r"failed to run: .*, exited with (-?\d+)", printed)
    by_signal = stage_status is not None and not 0 <= int(stage_status[1]) <= 128
    return status < 0 or by_signal or "is busy, it is being blocked by" in printed
