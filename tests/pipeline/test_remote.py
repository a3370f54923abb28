"""Data and models move by DVC's remote: a folder with git and the remote alone has what another one has made."""

import re
import shutil
import sys
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from tests.conftest import Workspace
from vlmdiff.core import dvc
from vlmdiff.core.errors import InputError

FLOW = (sys.executable, "-m", "flows.retrain")
ON_A_BRANCH = (sys.executable, "-c", "from flows.retrain import retrain; print(retrain(branch='retrained').outcome)")
PHOTOS = Path("data/raw/photos")
# A stage that reads data under DVC, and nothing that trains.
COUNT = {
    "stages": {
        "count": {
            "cmd": "ls data/raw/photos | wc -l > count.txt",
            "deps": [str(PHOTOS)],
            "outs": [{"count.txt": {"cache": True}}],
        }
    }
}


def clone(source: Workspace, path: Path, *options: str) -> Workspace:
    source.run("git", "clone", "--quiet", *options, ".", str(path))
    return Workspace(path)


def ran(output: str) -> list[str]:
    return re.findall(r"Running stage '(\w+)'", output)


@pytest.fixture
def here(new_workspace, tmp_path, monkeypatch) -> Workspace:
    """Photographs under DVC and an unrelated dataset beside them, pushed to a remote; the tests run in there."""
    here = new_workspace(COUNT)
    for folder in (PHOTOS, Path("data/raw/unrelated")):
        (here.path / folder).mkdir()
        for name in ("a.txt", "b.txt"):
            (here.path / folder / name).write_text(f"{folder} {name}")
        here.run("dvc", "add", "--quiet", str(folder))
    here.set_params(prepare={"root": str(PHOTOS)})
    here.run("dvc", "remote", "add", "--default", "store", str(tmp_path / "remote"))
    here.commit()
    monkeypatch.chdir(here.path)
    return here


@pytest.fixture
def elsewhere(here, tmp_path, monkeypatch) -> Workspace:
    """A clone of it after a push, with neither data nor a cache."""
    dvc.run_stage("count", print, pull=True)
    dvc.push(print)
    here.commit()
    clone(here, tmp_path / "clone")
    monkeypatch.chdir(tmp_path / "clone")
    return Workspace(tmp_path / "clone")


def test_a_clone_has_the_data_that_it_names_and_the_results_of_others(elsewhere):
    assert dvc.default_remote() == "store"
    dvc.take_in(print, "store")
    assert sorted(file.name for file in PHOTOS.iterdir()) == ["a.txt", "b.txt"]
    assert not Path("data/raw/unrelated").exists()
    Path("dvc.lock").unlink()
    assert dvc.run_stage("count", print, pull=True) == "restored from the run cache"
    assert Path("count.txt").read_text().strip() == "2"
    # What was never pushed by us, and is missing here, is not asked for.
    dvc.push(print)


def test_data_that_has_grown_is_added_and_pushed(elsewhere, tmp_path):
    dvc.take_in(print, "store")
    before = (PHOTOS.with_suffix(".dvc")).read_text()
    (PHOTOS / "c.txt").write_text("new")
    (PHOTOS / "a.txt").write_text("drawn anew")
    dvc.take_in(print, "store")
    assert (PHOTOS.with_suffix(".dvc")).read_text() != before
    dvc.push(print)
    elsewhere.commit()
    third = clone(elsewhere, tmp_path / "third")
    third.run("dvc", "pull", "--quiet", f"{PHOTOS}.dvc")
    assert (third.path / PHOTOS / "a.txt").read_text() == "drawn anew" and (third.path / PHOTOS / "c.txt").exists()


def test_data_that_is_gone_is_asked_about(elsewhere):
    dvc.take_in(print, "store")
    (PHOTOS / "b.txt").unlink()
    (PHOTOS / "c.txt").write_text("new")
    with pytest.raises(InputError, match=f"{PHOTOS}.dvc lists 1 file that {PHOTOS} lacks, such as {PHOTOS}/b.txt"):
        dvc.take_in(print, "store")
    assert not (PHOTOS / "b.txt").exists() and (PHOTOS / "c.txt").exists()


def test_without_a_remote_nothing_is_pulled_and_what_has_grown_is_added(here):
    shutil.rmtree("data/raw/unrelated")
    (PHOTOS / "c.txt").write_text("new")
    dvc.take_in(print, None)
    assert "nfiles: 3" in PHOTOS.with_suffix(".dvc").read_text() and not Path("data/raw/unrelated").exists()
    here.run("dvc", "config", "--unset", "core.remote")
    assert dvc.default_remote() is None


def test_a_remote_that_is_away_says_so(here):
    here.run("dvc", "remote", "modify", "store", "url", "/proc/nowhere")
    dvc.run_stage("count", print, pull=True)
    with pytest.raises(dvc.DvcFailed, match=r"`dvc push` failed:\n.*nowhere"):
        dvc.push(print)


def test_a_dvc_that_fails_is_an_error_and_not_an_empty_answer(here):
    (here.path / ".dvc/config").write_text("[core\n")
    for ask in (dvc.default_remote, lambda: dvc.take_in(print, None)):
        with pytest.raises(dvc.DvcFailed, match=r"`dvc .*` failed:\n.*config"):
            ask()


@pytest.mark.services
def test_a_clone_reproduces_the_champions_lock_from_the_remote_alone_and_runs_no_stage(
    workspace, prefect_api, tmp_path
):
    registry = f"sqlite:///{tmp_path}/mlflow.db"
    environment = {"PREFECT_API_URL": prefect_api, "MLFLOW_TRACKING_URI": registry}
    workspace.run("git", "rm", "--quiet", "dvc.lock")
    workspace.run("dvc", "remote", "add", "--default", "store", str(tmp_path / "remote"))
    workspace.commit()
    head = workspace.run("git", "rev-parse", "HEAD").stdout
    said = workspace.run(*ON_A_BRANCH, **environment).stdout
    assert "version 1 passes the gate and is champion" in said
    lock = (workspace.path / "dvc.lock").read_bytes()
    assert workspace.run("git", "rev-parse", "HEAD").stdout == head

    client = MlflowClient(registry)
    version = client.get_model_version_by_alias("vlmdiff", "champion")
    revision = workspace.run("git", "rev-parse", "retrained").stdout.strip()
    assert version.tags["git.revision"] == revision and version.tags["git.branch"] == "retrained"
    assert version.tags["git.changed"] == "nothing"

    # By the revision that the version names.
    first = clone(workspace, tmp_path / "first")
    first.run("git", "checkout", "--quiet", revision)
    assert (first.path / "dvc.lock").read_bytes() == lock and not (first.path / "models").exists()
    said = first.run(*FLOW, **environment).stdout
    assert ran(said) == [] and "this model is already version 1" in said
    assert (first.path / "dvc.lock").read_bytes() == lock
    assert "Data and pipelines are up to date" in first.run("dvc", "status").stdout
    assert (first.path / "models/detector/detector.json").is_file()

    # Without a lock: by the runs that the remote has a record of.
    second = clone(workspace, tmp_path / "second")
    assert not (second.path / "dvc.lock").exists()
    assert ran(second.run("dvc", "repro", "--pull").stdout) == []
    assert (second.path / "dvc.lock").read_bytes() == lock

    # Without a branch: by what the version's run keeps.
    third = clone(second, tmp_path / "third")
    download = ("mlflow", "artifacts", "download", "-r", version.run_id, "-a", "lineage", "-d", ".")
    third.run(*download, MLFLOW_TRACKING_URI=registry)
    for name in ("params.yaml", "dvc.lock"):
        shutil.copy(third.path / "lineage" / name, third.path / name)
    third.run("dvc", "pull")
    assert ran(third.run("dvc", "repro").stdout) == [] and (third.path / "dvc.lock").read_bytes() == lock
