"""The seam to DVC: stages, data and the remote, each by `dvc` in a child process that is heard line by line."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import yaml

from flows.processes import run_child
from vlmdiff.core import workspace as w
from vlmdiff.core.errors import InputError

DVC = [sys.executable, "-m", "dvc", "--wait-for-lock"]
Outcome = Literal["ran", "restored from the run cache", "up to date"]


class StageFailed(Exception):
    """A stage failed; the message ends with the last lines that it printed."""


class StageDisturbed(StageFailed):
    """The stage is not to blame: another DVC holds its files, or a signal ended it. Trying again can help."""


class DvcFailed(Exception):
    """A command that moves data failed; the message ends with what DVC printed."""


def default_remote() -> str | None:
    """The name of DVC's default remote, None where the workspace has none."""
    return _ask("config", "core.remote").strip() or None


def take_in(log: Callable[[str], None], remote: str | None) -> None:
    """Have the data that the experiment names and DVC tracks in step with its .dvc files.

    What is absent is pulled from the remote, where there is one; what has grown or changed is added. Raises InputError
    where files are gone that a .dvc file lists: whether they should is a person's to say. Raises DvcFailed.
    """
    files = _data_files()
    absent = [file for file in files if not file.with_suffix("").exists()]
    if absent and remote:
        _move("pull", *map(str, absent), log=log)
    # Of an import its source says what it holds.
    own = [str(file) for file in files if file not in absent and "deps" not in yaml.safe_load(file.read_text())]
    changed = json.loads(_ask("status", "--json", *own) or "{}") if own else {}
    if not changed:
        return
    status = json.loads(_ask("data", "status", "--granular", "--json") or "{}")
    for file in changed:
        folder = file.removesuffix(".dvc")
        gone = [path for path in status.get("uncommitted", {}).get("deleted", []) if path.startswith(f"{folder}/")]
        if gone:
            raise InputError(
                f"{len(gone)} files that {file} lists are not in {folder}, such as {gone[0]}: `dvc checkout {file}` "
                f"brings them back, `dvc add {folder}` says that they should be gone"
            )
        log(f"{folder} has changed: added to DVC")
        _move("add", "--quiet", folder, log=log)


def push(log: Callable[[str], None]) -> None:
    """Bring what the stages made and read to the default remote, with DVC's record of runs. Raises DvcFailed.

    By that record another workspace has its stages' results without running them.
    """
    _move("push", "--run-cache", *stage_names(), *map(str, _data_files()), log=log)


def _data_files() -> list[Path]:
    """The .dvc files of what params.yaml names, a dataset or a model's folder, in parts or as a part."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", "*.dvc"]
    files = [Path(name) for name in subprocess.run(listed, capture_output=True, text=True).stdout.split("\0") if name]
    named = [Path(text) for text in _texts(yaml.safe_load(w.PARAMS.read_text())) if text]

    def is_named(path: Path) -> bool:
        return any(path.is_relative_to(each) or each.is_relative_to(path) for each in named)

    return [file for file in files if file.is_file() and is_named(file.with_suffix(""))]


def _texts(value: object) -> Iterator[str]:
    match value:
        case str():
            yield value
        case dict() | list():
            for each in value.values() if isinstance(value, dict) else value:
                yield from _texts(each)


def _ask(*arguments: str) -> str:
    """What a `dvc` command that changes nothing prints."""
    return subprocess.run([*DVC, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True).stdout


def _move(*arguments: str, log: Callable[[str], None]) -> None:
    status, printed = run_child([*DVC, *arguments], log)
    if status:
        raise DvcFailed(f"`dvc {arguments[0]}` failed:\n{printed}")


def stage_names(file: Path = Path("dvc.yaml")) -> list[str]:
    """The stages of the graph, in the order of the file."""
    return list(yaml.safe_load(file.read_text())["stages"])


def run_stage(name: str, log: Callable[[str], None], force: bool = False, pull: bool = False) -> Outcome:
    """Bring a stage of the workspace up to date, as DVC decides; `log` hears every line it prints.

    `force` runs it even where it is up to date. With `pull` what is missing, and what other workspaces have computed
    already, comes from the default remote.
    Whatever ends this function early (Ctrl-C, a cancelled run, SIGTERM) ends the stage too.
    Raises StageFailed.
    """
    options = [option for option, wanted in (("--force", force), ("--pull", pull)) if wanted]
    command = [*DVC, "repro", "--single-item", name, *options]
    running = f"Running stage '{name}':"
    outcome: Outcome = "up to date"

    def hear(line: str) -> None:
        nonlocal outcome
        log(line)
        if line == running:
            outcome = "ran"
        elif line.startswith(f"Stage '{name}' is cached"):
            outcome = "restored from the run cache"

    status, printed = run_child(command, hear)
    if status:
        printed = printed.rpartition(f"{running}\n")[2]
        failure = StageDisturbed if _disturbed(status, printed) else StageFailed
        raise failure(f"stage {name!r} failed:\n{printed}")
    return outcome


def _disturbed(status: int, printed: str) -> bool:
    """Whether DVC or the stage's command was ended by a signal, or DVC found the stage's files in use."""
    stage_status = re.search(r"failed to run: .*, exited with (-?\d+)", printed)
    by_signal = stage_status is not None and not 0 <= int(stage_status[1]) <= 128
    return status < 0 or by_signal or "is busy, it is being blocked by" in printed
