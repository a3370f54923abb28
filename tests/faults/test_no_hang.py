"""Whoever waits says for whom, and not for ever: locks, stopped processes, servers that are silent."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest

from tests.conftest import Workspace
from tests.faults.test_flow_killed import GRAPH, started
from tests.processes import is_gone, kill_all, wait_for
from tests.services import NAMES, free_ports
from vlmdiff.core import dvc, git
from vlmdiff.core.errors import InputError
from vlmdiff.core.files import write_json
from vlmdiff.core.locks import hold

# Holds the MLflow store as a command that registers does.
HOLD_STORE = """\
from vlmdiff.core.params import load
from vlmdiff.registry.store import open_store

with open_store(load().registry):
    print("held", flush=True)
    input()
"""
# As DVC holds its lock.
HOLD_DVC = """\
from dvc.lock import make_lock

with make_lock(".dvc/tmp/lock"):
    print("held", flush=True)
    input()
"""
LOCK_DATABASE = """

import sqlite3

database = sqlite3.connect("mlflow.db", isolation_level=None)
database.execute("BEGIN EXCLUSIVE")
print("held", flush=True)
input()
"""
MODEL = ("--model", "models/detector")


@contextmanager
def stopped(code: str, folder: Path) -> Iterator[subprocess.Popen]:
    """A process that runs the code until it says that it holds something, and is stopped then."""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            holder.send_signal(signal.SIGSTOP)
            yield holder
        finally:
            holder.kill()


@contextmanager
def silent() -> Iterator[int]:
    """The port of a server that takes connections and never answers, as one that is stopped."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as server:
        yield server.getsockname()[1]


@pytest.fixture(scope="module")
def place(tiny_line, tmp_path_factory) -> Workspace:
    """The tiny line with the beginnings of a dataset; a test takes away what it adds."""
    path = tmp_path_factory.mktemp("place") / "workspace"
    shutil.copytree(tiny_line.path, path, symlinks=True)
    return Workspace(path)


FOREIGN = {
    "the MLflow store": ("mlflow.db.lock", ("gate", "1")),
    "the folder scored": ("scored/.lock", ("score", "data/made/cable/test/good", *MODEL, "--out", "scored")),
    "the caption store": (".cache/captions/captions.sqlite.lock", ("caption",)),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_folder_where_a_lock_file_should_be_is_named(place, what) -> None:
    file, command = FOREIGN[what]
    (place.path / file).unlink(missing_ok=True)
    (place.path / file).mkdir(parents=True)
    try:
        done = place.vlmdiff(*command, check=False)
    finally:
        (place.path / file).rmdir()
    assert done.returncode == 2 and what in done.stdout and f"{Path(file).name}: Is a directory" in done.stdout


@pytest.mark.parametrize("lock", [Path("file/lock"), Path("folder"), Path("folder/lock")])
def test_what_is_in_the_place_of_a_lock_or_of_its_holders_name_is_no_traceback(tmp_path, lock) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder/.lock.json").mkdir(parents=True)
    if lock == Path("folder/lock"):
        # Only the name of the holder has no place.
        with hold(tmp_path / lock, "the folder"):
            pass
        assert (tmp_path / "folder/.lock.json").is_dir()
        return
    with (
        pytest.raises(InputError, match=f"the folder cannot be locked: {tmp_path}/"),
        hold(tmp_path / lock, "the folder"),
    ):
        pass


def test_who_waits_for_a_stopped_holder_of_the_mlflow_store_learns_who_it_is(place, monkeypatch) -> None:
    from vlmdiff.registry import store

    monkeypatch.setattr(store, "LIMIT", 4.0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place.path / 'mlflow.db'}")
    with stopped(HOLD_STORE, place.path) as holder:
        done = place.vlmdiff("register", check=False)
    assert done.returncode == 2
    assert done.stdout.startswith("waiting: `-c` ") and "holds the MLflow store" in done.stdout
    assert (
        f"process {holder.pid}" in done.stdout and "stopped: `kill -CONT" in done.stdout and "waited 4 s" in done.stdout
    )


def test_a_database_that_a_stopped_process_has_locked_is_a_sentence(place, made_store) -> None:
    shutil.copy(made_store, place.path)
    with stopped(LOCK_DATABASE, place.path):
        done = place.vlmdiff("register", check=False)
    assert done.returncode == 2 and "error: MLflow at" in done.stdout and "database is locked" in done.stdout


COMMANDS = {
    "register": ("register",),
    "gate": ("gate",),
    "promote": ("promote", "1"),
    "rollback": ("rollback", "--reason", "why", "--by", "Ada"),
    "score": ("score", "data/made/cable/test/good", "--out", "nothing"),
    "monitor": ("monitor", "nothing", "--out", "nothing"),
    "inspect": ("inspect",),
}


@pytest.mark.parametrize("kind", ["http", "postgresql"])
def test_every_command_says_soon_that_a_silent_registry_does_not_answer(place, monkeypatch, kind) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("PGCONNECT_TIMEOUT", "2")
    with silent() as port:
        uri = {
            "http": f"http://127.0.0.1:{port}",
            "postgresql": f"postgresql+psycopg://vlmdiff:secret@127.0.0.1:{port}/mlflow",
        }[kind]
        for name, command in COMMANDS.items():
            began = time.monotonic()
            done = place.vlmdiff(*command, check=False, tracking_uri=uri)
            assert done.returncode == 2 and f"error: MLflow at {uri.replace('secret', '***')} failed" in done.stdout, (
                name
            )
            assert "secret" not in done.stdout and time.monotonic() - began < 30, name


def test_a_stopped_dvc_that_holds_the_workspace_is_named(new_workspace, monkeypatch) -> None:
    workspace = new_workspace(GRAPH)
    monkeypatch.chdir(workspace.path)
    monkeypatch.setattr(dvc, "LIMIT", 1.0)
    workspace.run("dvc", "status")
    with stopped(HOLD_DVC, workspace.path) as holder:
        for ask in (lambda: dvc.run_stage("train", print), lambda: dvc.push(print), dvc.default_remote):
            who = rf"`python.*process {holder.pid}, stopped.*holds DVC's lock on this workspace \(waited 1 s\)"
            with pytest.raises(InputError, match=who):
                ask()


def test_a_git_that_does_not_end_is_named_and_ended(new_workspace, monkeypatch) -> None:
    workspace = new_workspace(GRAPH)
    monkeypatch.chdir(workspace.path)
    monkeypatch.setattr(git, "LIMIT", 2.0)
    hook = workspace.path / "slow"
    hook.write_text("#!/bin/sh\necho $$ > hook.pid\nexec sleep 600\n")
    hook.chmod(0o755)
    workspace.run("git", "config", "core.fsmonitor", str(hook))
    with pytest.raises(InputError, match=r"`git status .*` did not end in 2 s"):
        git.code_revision()
    kill_all([psutil.Process(int((workspace.path / "hook.pid").read_text()))])


# The flow, less patient than for a person.
IMPATIENT = "from flows import retrain, servers; servers.PATIENCE, servers.SILENCE = 2.0, 18.0; retrain.main()"
FLOW = [sys.executable, "-c", IMPATIENT]


@pytest.mark.services
def test_a_prefect_server_that_is_stopped_is_waited_for_and_not_for_ever(new_workspace) -> None:
    folder = new_workspace(GRAPH).path

    def said() -> str:
        return (folder / "output").read_text()

    with started(folder, FLOW) as flow:
        (api,) = [child for child in flow.children() if "flows.servers" in child.cmdline()]
        stage = psutil.Process(int((folder / "pid").read_text()))
        api.suspend()
        wait_for(lambda: "waiting: the Prefect server at http://127.0.0.1:" in said(), 20, said)
        api.resume()
        time.sleep(9)
        assert not is_gone(flow) and not is_gone(stage), said()

        api.suspend()

        assert flow.wait(40) == 2 and "has not answered for 18 s" in said()
        wait_for(lambda: is_gone(stage), 10)


def test_a_flow_says_at_once_that_prefects_server_does_not_answer(new_workspace) -> None:
    workspace = new_workspace(GRAPH)
    with silent() as port:
        url = f"http://127.0.0.1:{port}/api"
        done = workspace.run(*FLOW, check=False, PREFECT_API_URL=url)
    assert done.returncode != 0 and f"the Prefect server at {url} does not answer: start it" in done.stdout


def test_up_and_a_flow_name_a_server_of_make_up_that_is_stopped(tmp_path, monkeypatch) -> None:
    from flows import servers

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setattr(servers, "PATIENCE", 1.0)
    Path("params.yaml").write_text("{}")
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    with subprocess.Popen(command) as server, silent() as port:
        wait_for(lambda: psutil.Process(server.pid).cmdline() == command, 10)
        servers.STATE.mkdir(parents=True)
        servers._make_password()
        record = servers.Server("prefect", f"http://127.0.0.1:{port}", server.pid, command)
        write_json(servers.STATE / "prefect.json", asdict(record))
        try:
            for ask in (servers.prefect_settings, servers.up):
                with pytest.raises(InputError, match=rf"prefect \(process {server.pid}\) runs, and does not answer"):
                    ask()
        finally:
            server.kill()


UP = [sys.executable, "-m", "flows.servers", "up"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_an_up_that_is_interrupted_leaves_no_server_that_is_starting(tmp_path, number) -> None:
    (tmp_path / "params.yaml").write_text("{}")
    ports = [text for name, port in zip(NAMES, free_ports(3), strict=True) for text in (f"--{name}-port", str(port))]
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path / ".prefect")}
    with (tmp_path / "output").open("w") as output:
        up = psutil.Popen(
            [*UP, *ports],
            cwd=tmp_path,
            env=environment,
            stdout=output,
            stderr=output,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    family = []
    try:
        # The record says who it is before it is ready.
        wait_for((tmp_path / ".cache/servers/prefect.json").exists, 60, (tmp_path / "output").read_text)
        family = up.children(recursive=True)
        assert family

        up.send_signal(number)

        up.wait(10)
        wait_for(lambda: all(map(is_gone, family)), 10, lambda: family)
    finally:
        kill_all([up, *family])


# Its DVC takes long, as with a large dataset.
PUSH = """\
import sys
from vlmdiff.core import dvc, processes

dvc.DVC[dvc.DVC.index("dvc") :] = ["timeit", "-n1", "-s", "import time, os; open('pid', 'w').write(str(os.getpid()))"]
dvc.add("time.sleep(60)", print)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_dvc_that_moves_data_ends_with_whoever_started_it(tmp_path, number) -> None:
    with started(tmp_path, [sys.executable, "-c", PUSH]) as parent:
        family = parent.children(recursive=True)

        parent.send_signal(number)

        wait_for(lambda: all(map(is_gone, [parent, *family])), 10, lambda: family)


STUBBORN = """\
import os, pathlib, signal, sys, time

for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
pathlib.Path("pid").write_text(str(os.getpid()))
time.sleep(60)
"""


def test_a_child_that_ignores_signals_ends_within_ten_seconds(tmp_path) -> None:
    run = f"from vlmdiff.core.processes import run_child; run_child({[sys.executable, '-c', STUBBORN]}, print)"
    with started(tmp_path, [sys.executable, "-c", run]) as parent:
        family = parent.children(recursive=True)
        assert family

        parent.send_signal(signal.SIGINT)

        wait_for(lambda: all(map(is_gone, [parent, *family])), 10, lambda: family)
