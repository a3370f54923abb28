"""Whoever started a stage is killed: the stage must not go on training for nobody."""

import fcntl
import os
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.processes import is_gone, kill_all, wait_for

# A stage that says who it is, says nothing more, and would go on for a minute.
STAGE = """\
import os, pathlib, time
from vlmdiff.core import lifeline
lifeline.watch()
pathlib.Path("pid.tmp").write_text(str(os.getpid()))
os.rename("pid.tmp", "pid")
time.sleep(60)
"""
GRAPH = {"stages": {"train": {"cmd": "python stage.py", "outs": ["models"]}}}
SOON = 10.0

FLOW = [sys.executable, "-m", "flows.retrain"]
DVC = [sys.executable, "-m", "dvc", "repro"]


@contextmanager
def started(
    folder: Path, command: list[str], terminal: int | None = None, **environment: str
) -> Iterator[psutil.Popen]:
    """Run a command in a workspace in the background, or in a terminal; nothing of it is left afterwards."""

    def begin() -> None:
        # As in a terminal's foreground: tests that run in the background of a shell have Ctrl-C ignored.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if terminal is not None:
            os.setsid()
            fcntl.ioctl(terminal, termios.TIOCSCTTY)

    (folder / "stage.py").write_text(STAGE)
    with (folder / "output").open("w") as output:
        process = psutil.Popen(
            command,
            cwd=folder,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL if terminal is None else terminal,
            stdout=output if terminal is None else terminal,
            stderr=subprocess.STDOUT,
            preexec_fn=begin,
        )
    family = [process]
    try:
        wait_for(lambda: (folder / "pid").exists() or process.poll() is not None, 150, (folder / "output").read_text)
        assert (folder / "pid").exists(), (folder / "output").read_text()
        family += process.children(recursive=True)
        yield process
    finally:
        kill_all(family)
        process.wait()


def stage_of(folder: Path) -> psutil.Process:
    return psutil.Process(int((folder / "pid").read_text()))


def assert_all_end_soon(processes: list[psutil.Process]) -> None:
    wait_for(lambda: all(map(is_gone, processes)), SOON, lambda: processes)


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name
)
def test_a_flow_that_is_killed_leaves_nothing_behind(new_workspace, prefect_api, number) -> None:
    folder = new_workspace(GRAPH).path
    with started(folder, FLOW, PREFECT_API_URL=prefect_api) as flow:
        family = flow.children(recursive=True)
        assert stage_of(folder) in family

        flow.send_signal(number)

        assert_all_end_soon([flow, *family])


@pytest.mark.parametrize("how", ["Ctrl-C", "closed"])
@pytest.mark.parametrize("command", [FLOW, DVC], ids=["flow", "dvc"])
def test_ctrl_c_and_a_closed_terminal_end_every_child(new_workspace, prefect_api, command, how) -> None:
    folder = new_workspace(GRAPH).path
    person, terminal = os.openpty()
    with started(folder, command, terminal, PREFECT_API_URL=prefect_api) as process:
        os.close(terminal)
        family = process.children(recursive=True)
        assert stage_of(folder) in family

        # Nobody reads what it prints: less than a terminal keeps.
        if how == "Ctrl-C":
            os.write(person, b"\x03")
        else:
            os.close(person)

        assert_all_end_soon([process, *family])
    if how == "Ctrl-C":
        os.close(person)


def test_the_api_that_a_flow_started_for_itself_ends_with_it(new_workspace) -> None:
    folder = new_workspace(GRAPH).path
    with started(folder, FLOW) as flow:
        family = flow.children(recursive=True)
        assert any("flows.servers" in process.cmdline() for process in family)

        flow.kill()

        assert_all_end_soon(family)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_stage_ends_when_dvc_is_killed(new_workspace, number) -> None:
    folder = new_workspace(GRAPH).path
    with started(folder, DVC) as dvc:
        stage = stage_of(folder)

        dvc.send_signal(number)

        assert_all_end_soon([dvc, stage])


def test_the_same_command_runs_the_stage_again_after_a_kill(new_workspace) -> None:
    folder = new_workspace(GRAPH).path
    with started(folder, DVC) as dvc:
        dvc.kill()
        assert_all_end_soon([stage_of(folder)])
    (folder / "pid").unlink()
    with started(folder, DVC):
        assert not is_gone(stage_of(folder))


def test_a_command_that_a_person_started_goes_on_without_its_shell(tmp_path) -> None:
    with started(tmp_path, ["sh", "-c", f"{sys.executable} stage.py; true"]) as shell:
        stage = stage_of(tmp_path)
        assert stage.parent() == shell

        shell.kill()

        time.sleep(2)
        assert not is_gone(stage)


def test_a_stage_whose_flow_is_gone_before_it_starts_does_no_work(new_workspace) -> None:
    gone = psutil.Popen([sys.executable, "-c", ""])
    gone.wait()

    workspace = new_workspace(GRAPH)
    (workspace.path / "stage.py").write_text(STAGE)
    result = workspace.run("dvc", "repro", check=False, VLMDIFF_OWNER=str(gone.pid))

    assert result.returncode != 0
    assert not (workspace.path / "pid").exists()
