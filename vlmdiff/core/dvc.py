"""The one place that runs `dvc`, always in a child process; and what its files record, read without it."""

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from vlmdiff.core import git
from vlmdiff.core import workspace as w
from vlmdiff.core.errors import InputError, explained, first_invalid
from vlmdiff.core.files import check_regular
from vlmdiff.core.locks import hold
from vlmdiff.core.params import Params
from vlmdiff.core.processes import run_child
from vlmdiff.core.text import counted

# DVC ends with the process that started it.
DVC = [sys.executable, "-m", "vlmdiff.core.lifeline", "dvc", "--wait-for-lock"]
GRAPH = Path("dvc.yaml")
LOCK = Path(".dvc/tmp/lock")
# Seconds to wait for another DVC process.
LIMIT = 600.0
Log = Callable[[str], None]
Outcome = Literal["ran", "restored from the run cache", "up to date"]


class Entry(BaseModel):
    """A file or folder that a stage read or wrote, as dvc.lock has it."""

    path: str
    md5: str


class LockedStage(BaseModel):
    """A stage as dvc.lock has it: what it read and wrote, and the sections of each file of parameters."""

    deps: list[Entry] = []
    outs: list[Entry] = []
    params: dict[str, dict[str, Any]] = {}


class StageFailed(Exception):
    """A stage failed. The message ends with the last lines that it printed."""


class StageDisturbed(StageFailed):
    """A signal ended the stage, or another DVC process holds its files. Another attempt can succeed."""


class DvcFailed(InputError):
    """A `dvc` command failed. The message ends with what it printed."""


def stage_names() -> list[str]:
    """Return the stages of dvc.yaml, in the order of the file."""
    with explained(GRAPH, "Restore it by `git checkout dvc.yaml`"):
        return list(yaml.safe_load(GRAPH.read_text(encoding="utf-8"))["stages"])


def run_stage(name: str, log: Log, force: bool = False, pull: bool = False) -> Outcome:
    """Bring one stage up to date by `dvc repro --single-item`, and return what DVC did.

    If an exception ends this function early (Ctrl-C, a cancelled run, SIGTERM), the stage ends too.

    Args:
        name: A stage of dvc.yaml.
        log: Gets each line that DVC and the stage print.
        force: Run the stage even if it is up to date.
        pull: Fetch missing files, and results of other workspaces, from the default remote.

    Raises StageFailed, and InputError if another DVC process still holds the workspace after LIMIT seconds.
    """
    options = [option for option, wanted in (("--force", force), ("--pull", pull)) if wanted]
    running = f"Running stage '{name}':"
    outcome: Outcome = "up to date"

    def note(line: str) -> None:
        nonlocal outcome
        log(line)
        if line == running:
            outcome = "ran"
        elif line.startswith(f"Stage '{name}' is cached"):
            outcome = "restored from the run cache"

    status, printed = _run("repro", "--single-item", name, *options, log=note)
    if status:
        printed = printed.rpartition(f"{running}\n")[2]
        failure = StageDisturbed if _disturbed(status, printed) else StageFailed
        raise failure(f"stage {name!r} failed:\n{printed}")
    return outcome


def _disturbed(status: int, printed: str) -> bool:
    """Return whether a signal ended DVC or the stage's command, or DVC found the stage's files in use."""
    stage_status = re.search(r"failed to run: .*, exited with (-?\d+)", printed)
    by_signal = stage_status is not None and not 0 <= int(stage_status[1]) <= 128
    return status < 0 or by_signal or "is busy, it is being blocked by" in printed


def default_remote() -> str | None:
    """Return the name of DVC's default remote, None if the workspace has none. Raises DvcFailed."""
    return _ask("config", "core.remote").strip() or None


def take_in(log: Log, remote: str | None) -> None:
    """Bring the DVC-tracked data of params.yaml and its .dvc files in step.

    Data that is missing is pulled from the remote, if there is one. Data that has changed or grown is added.

    Raises InputError if files are gone that a .dvc file lists: only a person knows whether that is right. Raises
    DvcFailed.
    """
    files = _data_files()
    absent = [file for file in files if not file.with_suffix("").exists()]
    if absent and remote:
        _move("pull", *map(str, absent), log=log)
    # The content of an import is its source's to say.
    here = {file: yaml.safe_load(file.read_text(encoding="utf-8")) for file in files if file not in absent}
    own = [str(file) for file, content in here.items() if "deps" not in content]
    for file in own:
        # DVC would wait for the writer of a pipe.
        check_regular(Path(file).with_suffix(""))
    changed = json.loads(_ask("status", "--json", *own)) if own else {}
    if not changed:
        return
    status = json.loads(_ask("data", "status", "--granular", "--json"))
    for file in changed:
        folder = file.removesuffix(".dvc")
        gone = [path for path in status.get("uncommitted", {}).get("deleted", []) if path.startswith(f"{folder}/")]
        if gone:
            raise InputError(
                f"{file} lists {counted(len(gone), 'file')} that {folder} lacks, such as {gone[0]}: "
                f"run `dvc checkout {file}` to restore them, or `dvc add {folder}` to accept that they are gone"
            )
        log(f"{folder} has changed: dvc add")
        add(folder, log)


def add(path: str, log: Log) -> None:
    """Put a file or a folder under DVC, or record its new content. Raises DvcFailed."""
    _move("add", "--quiet", path, log=log)


def push(log: Log) -> None:
    """Push data, outputs of the stages and the run cache to the default remote. Raises DvcFailed.

    The run cache gives another workspace the results of these stages without running them.
    """
    _move("push", "--run-cache", *stage_names(), *map(str, _data_files()), log=log)


def _data_files() -> list[Path]:
    """Return the .dvc files of the datasets and models that params.yaml names, of parts and of folders around them."""
    files = [Path(name) for name in git.list_files("*.dvc", untracked=True)]
    named = [Path(text) for text in _texts(yaml.safe_load(w.PARAMS.read_text(encoding="utf-8"))) if text]
    pairs = [(file, file.with_suffix("")) for file in files if file.is_file()]
    return [file for file, path in pairs if any(path.is_relative_to(n) or n.is_relative_to(path) for n in named)]


def _texts(value: object) -> Iterator[str]:
    match value:
        case str():
            yield value
        case dict() | list():
            for each in value.values() if isinstance(value, dict) else value:
                yield from _texts(each)


def _ask(*arguments: str) -> str:
    """Return what a `dvc` command that changes nothing prints on standard output."""
    _wait_for_others()
    done = subprocess.run([*DVC, *arguments], stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8")
    if done.returncode:
        raise DvcFailed(f"`dvc {' '.join(arguments)}` failed:\n{done.stderr.strip()}")
    return done.stdout


def _move(*arguments: str, log: Log) -> None:
    """Run a `dvc` command that moves data."""
    status, printed = _run(*arguments, log=log)
    if status:
        raise DvcFailed(f"`dvc {arguments[0]}` failed:\n{printed}")


def _run(*arguments: str, log: Log) -> tuple[int, str]:
    _wait_for_others()
    return run_child([*DVC, *arguments], log)


def _wait_for_others() -> None:
    """Return when no other DVC process holds the workspace.

    With --wait-for-lock DVC would wait for ever, and say nothing. Without it, a stage whose lock another process takes
    while it runs would fail at its end.
    """
    if LOCK.parents[1].is_dir():
        with hold(LOCK, "DVC's lock on this workspace", LIMIT):
            pass


def read_lock() -> dict[str, str]:
    """Return the hash of each path that the stages read and wrote, code apart, as dvc.lock records it.

    Raises InputError if there is no dvc.lock, or two stages read different versions of a path.
    """
    recorded: dict[str, str] = {}
    for name, stage in _locked_stages().items():
        for entry in [*stage.deps, *stage.outs]:
            if entry.path.startswith("vlmdiff/"):
                continue
            if recorded.setdefault(entry.path, entry.md5) != entry.md5:
                raise InputError(
                    f"{entry.path} changed while the stages ran: {name} read another version than the stages before "
                    "it. Run `dvc repro` again"
                )
    return recorded


def _locked_stages() -> dict[str, LockedStage]:
    if not w.DVC_LOCK.is_file():
        raise InputError(f"{w.DVC_LOCK} does not exist: run `dvc repro` first")
    with explained(w.DVC_LOCK, "Restore it by `git checkout dvc.lock`, or remove it and run `dvc repro`"):
        stages = yaml.safe_load(w.DVC_LOCK.read_text(encoding="utf-8"))["stages"]
        try:
            return TypeAdapter(dict[str, LockedStage]).validate_python(stages)
        except ValidationError as error:
            place, why = first_invalid(error)
            raise ValueError(f"stages{'.' * bool(place)}{place}: {why}") from error


def check_params(params: Params) -> None:
    """Raise InputError if a stage ran with other parameters than these, as dvc.lock records it."""
    now = params.model_dump(mode="json", by_alias=True)
    ran: dict[str, Any] = {}
    changed = []
    for stage in _locked_stages().values():
        for section, values in stage.params.get(str(w.PARAMS), {}).items():
            # Two stages ran with different ones.
            changed += [section] if ran.setdefault(section, values) != values else []
    try:
        then = Params.model_validate(ran).model_dump(mode="json", by_alias=True)
    except ValueError:  # of another release
        then = {}
    changed += [section for section in ran if then.get(section) != now.get(section)]
    if changed:
        raise InputError(f"section {changed[0]!r} of {w.PARAMS} is not what the stages ran with: run `dvc repro` again")


def check_output(path: Path, recorded: dict[str, str]) -> str:
    """Return the recorded hash of a stage's output. Raises InputError if it has none, or the output has another."""
    if path.as_posix() not in recorded or not path.exists():
        raise InputError(f"{path} is not an output that {w.DVC_LOCK} lists: run `dvc repro` first")
    if dvc_hash(path) != recorded[path.as_posix()]:
        raise InputError(
            f"{path} differs from what dvc.lock records: run `dvc repro`, or `dvc checkout` to restore what it was"
        )
    return recorded[path.as_posix()]


def dvc_hash(path: Path) -> str:
    """Return the hash that DVC gives a file, or a folder: the MD5 of the JSON list of its files' hashes and paths."""
    if path.is_file():
        return _md5(path)
    files = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
    listing = [{"md5": _md5(files[relative]), "relpath": relative} for relative in sorted(files)]
    return hashlib.md5(json.dumps(listing).encode(), usedforsecurity=False).hexdigest() + ".dir"


def _md5(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
