"""Parameters and photographs that change while a run is under way: one version throughout, or a sentence."""

import itertools
import shutil
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from PIL import Image

FLOW = (sys.executable, "-m", "flows.retrain")


@contextmanager
def a_camera(folder: Path):
    """Somebody takes one photograph after the other, and puts each into the folder."""
    end = threading.Event()

    def take() -> None:
        for number in itertools.count():
            Image.new("RGB", (64, 64), (number % 256, 0, 0)).save(folder / f"new{number}.png")
            if end.wait(0.002):
                return

    thread = threading.Thread(target=take)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


@pytest.fixture
def photographs(new_workspace, tiny_line):
    """A workspace with a dataset of its own."""
    workspace = new_workspace()
    shutil.copytree(tiny_line.path / "data/made", workspace.path / "photographs")
    workspace.set_params(prepare={"layout": "mvtec_ad", "root": "photographs"})
    return workspace


def test_photographs_that_arrive_during_prepare_stop_it_and_are_in_the_next_run(photographs) -> None:
    with a_camera(photographs.path / "photographs/cable/train/good"):
        done = photographs.vlmdiff("prepare", check=False)
    assert done.returncode == 2 and "files changed while photographs was read, such as photographs/cable" in done.stdout
    assert not (photographs.path / "data/manifest.parquet").exists()
    photographs.vlmdiff("prepare")


def test_a_model_of_two_versions_of_the_photographs_is_not_registered(workspace) -> None:
    (workspace.path / "data/raw/new.txt").write_text("new")
    workspace.run("dvc", "repro", "--single-item", "caption")
    done = workspace.vlmdiff("register", check=False)
    assert done.returncode == 2 and "error: data/raw changed while the stages ran: " in done.stdout
    assert "Run `dvc repro` again" in done.stdout and not (workspace.path / "mlflow.db").exists()


def test_a_model_is_not_registered_with_parameters_that_it_did_not_have(workspace) -> None:
    workspace.set_params(train={"learning_rate": 0.5})
    done = workspace.vlmdiff("register", check=False)
    assert done.returncode == 2
    assert "error: section 'train' of params.yaml is not what the stages ran with" in done.stdout
    assert not (workspace.path / "mlflow.db").exists()


@pytest.mark.services
def test_parameters_that_change_during_a_run_stop_it_before_the_next_stage(new_workspace, prefect_api) -> None:
    change = f"{sys.executable} -c \"open('params.yaml', 'a').write('monitor: {{last: 7}}'); open('one', 'w')\""
    second = f"{sys.executable} -c \"open('two', 'w')\""
    graph = {"stages": {"prepare": {"cmd": change, "outs": ["one"]}, "validate": {"cmd": second, "outs": ["two"]}}}
    workspace = new_workspace(graph)
    params = yaml.safe_load((workspace.path / "params.yaml").read_text())
    del params["monitor"]
    (workspace.path / "params.yaml").write_text(yaml.safe_dump(params))
    done = workspace.run(*FLOW, check=False, PREFECT_API_URL=prefect_api)
    assert done.returncode == 2 and "params.yaml changed while the run was under way" in done.stdout
    assert (workspace.path / "one").exists() and not (workspace.path / "two").exists()
