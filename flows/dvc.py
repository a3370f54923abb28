"""The seam to DVC: a stage is `dvc repro --single-item` in a child process, heard line by line."""

import re
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import yaml

from flows.processes import LAST_LINES, run_child

Outcome = Literal["ran", "restored from the run cache", "up to date"]


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
    outcome: Outcome = "up to date"
    last_lines: deque[str] = deque(maxlen=LAST_LINES)

    def hear(line: str) -> None:
        nonlocal outcome
        log(line)
        last_lines.append(line)
        if line == f"Running stage '{name}':":
            outcome = "ran"
            last_lines.clear()
        elif line.startswith(f"Stage '{name}' is cached"):
            outcome = "restored from the run cache"

    status = run_child(command, hear)
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
