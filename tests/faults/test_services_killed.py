"""kill -9 of each part while it works: after what a person would restart, one more retrain ends right."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from uuid import UUID

import psutil
import pytest
from mlflow.tracking import MlflowClient

from tests.processes import is_gone, kill_all, wait_for
from tests.services import Services, free_ports, services

pytestmark = pytest.mark.services

FLOW = (sys.executable, "-m", "flows.retrain")
STEPS = 150


@pytest.fixture(scope="module")
def here(tiny_line, tmp_path_factory) -> Services:
    """Everything of `make up` on a tiny line; each test trains another model, and kills something meanwhile."""
    with services(tmp_path_factory.mktemp("killed") / "workspace", tiny_line) as here:
        here.up()
        yield here


def train_until_a_checkpoint(here: Services, seed: int) -> tuple[UUID, psutil.Process]:
    """A run of the worker that trains from this seed and has a checkpoint, and the process that trains."""
    here.workspace.set_params(train={"seed": seed, "steps": STEPS, "checkpoint_every": 5, "validate_every": STEPS})
    run = here.trigger()
    checkpoint = here.workspace.path / ".cache/train"

    def is_training() -> bool:
        return any(checkpoint.glob("*/checkpoint/0*/facts.json"))

    wait_for(is_training, 120, lambda: here.logs(run))
    return run, here.process("vlmdiff", "train")


def workers(here: Services) -> list[psutil.Process]:
    """What runs for the worker: the run's process, DVC, the stage."""
    return here.process("prefect", "worker").children(recursive=True)


def assert_one_more_run_ends_right(here: Services, runs: list[UUID]) -> None:
    """The next run goes on where the training was, trains nothing but that, and its version is judged and known."""
    client = MlflowClient(f"http://127.0.0.1:{here.ports['mlflow']}")
    known = client.search_registered_models()
    before = len(client.search_model_versions("name = 'vlmdiff'")) if known else 0
    run = here.trigger()
    assert here.end(run).state.is_completed(), here.logs(run)
    logs = here.logs(run)
    assert re.findall(r"Running stage '(\w+)'", logs) == ["train", "evaluate"]
    resumed = re.search(rf"resumed at step (\d+) of {STEPS}", logs)
    assert resumed and int(resumed[1]) >= 5
    versions = client.search_model_versions("name = 'vlmdiff'")
    assert len(versions) == before + 1
    newest = max(versions, key=lambda version: int(version.version))
    champion = client.get_model_version_by_alias("vlmdiff", "champion")
    # Whether it beats the one before is the gate's to say; its word and the alias agree.
    assert (champion.version == newest.version) == (newest.tags["gate.verdict"] == "passed")
    wait_for(lambda: not workers(here), 30, lambda: workers(here))


def test_the_run_is_killed(here):
    run, _ = train_until_a_checkpoint(here, seed=1)
    family = workers(here)
    (flow,) = [process for process in here.process("prefect", "worker").children()]

    flow.send_signal(signal.SIGKILL)

    wait_for(lambda: all(map(is_gone, family)), 20, lambda: family)
    # The worker sees the process end.
    assert here.end(run, 30).state.is_crashed()
    assert_one_more_run_ends_right(here, [run])


def test_the_worker_is_killed(here):
    run, _ = train_until_a_checkpoint(here, seed=2)
    worker = here.process("prefect", "worker")
    family = worker.children(recursive=True)

    worker.send_signal(signal.SIGKILL)

    wait_for(lambda: all(map(is_gone, family)), 20, lambda: family)
    assert "started worker-vlmdiff" in here.up()
    assert_one_more_run_ends_right(here, [run])
    # Nobody was left to say so: the automation does, by the heartbeats that stay away.
    assert here.end(run, 150).state.is_crashed()
    assert "its process died" in here.run(run).state.message


def test_the_trainer_is_killed(here):
    run, trainer = train_until_a_checkpoint(here, seed=3)

    trainer.send_signal(signal.SIGKILL)

    # The run tries its stage again by itself.
    assert here.end(run).state.is_completed(), here.logs(run)
    logs = here.logs(run)
    assert re.findall(r"Running stage '(\w+)'", logs) == ["train", "train", "evaluate"] and "resumed at step" in logs
    again = here.trigger()
    assert here.end(again).state.is_completed() and "Running stage" not in here.logs(again)


def test_the_prefect_server_is_killed(here):
    run, trainer = train_until_a_checkpoint(here, seed=4)

    here.process("flows.servers", "prefect").send_signal(signal.SIGKILL)
    time.sleep(2)

    assert not is_gone(trainer)
    assert "started prefect" in here.up()
    # The training never noticed, and the run ends as if nothing had been.
    assert here.end(run).state.is_completed(), here.logs(run)
    again = here.trigger()
    assert here.end(again).state.is_completed() and "Running stage" not in here.logs(again)
    # The GPU's lease outlived the server, and is back.
    with here.client() as client:
        assert client.read_global_concurrency_limit_by_name("gpu").active_slots == 0


def test_mlflow_is_killed_between_register_and_promote(workspace, prefect_api):
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(mlflow_server(workspace, port))
        output = stack.enter_context((workspace.path / "output").open("w+"))
        flow = psutil.Popen(
            FLOW,
            cwd=workspace.path,
            env=os.environ | {"PREFECT_API_URL": prefect_api, "MLFLOW_TRACKING_URI": url},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        stack.callback(kill_all, [flow])

        def said() -> str:
            return (workspace.path / "output").read_text()

        wait_for(lambda: "register: version 1 of vlmdiff" in said(), 150, said)
        kill_all([*server.children(recursive=True), server])
        server.wait()
        wait_for(lambda: flow.poll() is not None or "MLflow at" in said(), 90, said)
        stack.enter_context(mlflow_server(workspace, port))
        flow.wait(150)

        again = workspace.run(*FLOW, PREFECT_API_URL=prefect_api, MLFLOW_TRACKING_URI=url).stdout

        assert "this model is already version 1" in again and "version 1 passes the gate and is champion" in again
        assert "Running stage" not in again
        client = MlflowClient(url)
        assert [version.version for version in client.search_model_versions("name = 'vlmdiff'")] == ["1"]
        assert client.get_model_version_by_alias("vlmdiff", "champion").version == "1"


@contextlib.contextmanager
def mlflow_server(workspace, port: int):
    """MLflow as somebody else's server: the same store each time; nothing of it is left."""
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1", "--port", str(port)]
    server = psutil.Popen(
        [*command, "--backend-store-uri", "sqlite:///served.db"],
        cwd=workspace.path,
        env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        client = f"import urllib.request as u; u.urlopen('http://127.0.0.1:{port}/health')"
        wait_for(lambda: subprocess.run([sys.executable, "-c", client], capture_output=True).returncode == 0, 90)
        yield server
    finally:
        if server.is_running():
            kill_all([*server.children(recursive=True), server])
        server.wait()
