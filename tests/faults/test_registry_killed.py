"""Killed while it registers or promotes: the next command leaves one version, and says of it what is so."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from tests.pipeline.test_line import registry

pytestmark = pytest.mark.usefixtures("empty_store")

# Ends, as by kill -9, while the model is copied into the store.
REGISTER = """\
import os, sys

def end(event, arguments):
    if event == "shutil.copyfile" and "/models/m-" in str(arguments[1]):
        os._exit(9)

sys.addaudithook(end)
sys.argv = ["vlmdiff", "register"]
from vlmdiff.cli import main
main()
"""


def copies(workspace) -> list[Path]:
    return [path for path in workspace.path.glob("mlruns/*/models/m-*") if any(path.rglob("*"))]


def test_a_killed_register_leaves_a_pending_model_that_the_next_one_removes(workspace):
    uri = f"sqlite:///{workspace.path / 'mlflow.db'}"
    killed = subprocess.run([sys.executable, "-c", REGISTER], cwd=workspace.path, capture_output=True, text=True)
    assert killed.returncode == 9, killed.stderr
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("vlmdiff").experiment_id
    assert [model.status for model in client.search_logged_models([experiment])] == ["PENDING"]

    workspace.vlmdiff("register")

    (model,) = client.search_logged_models([experiment])
    assert model.status == "READY" and len(copies(workspace)) == 1
    assert sorted(run.info.status for run in client.search_runs([experiment])) == ["FINISHED", "KILLED"]
    assert list(registry(workspace)["tags"]) == ["1"]


OVERRIDE = ("promote", "1", "--override", "Grace", "--reason", "the camera")
WRITES = ("set_model_version_tag", "delete_model_version_tag", "set_registered_model_alias", "log_artifact")


def killed_before_write(moment: int, workspace) -> bool:
    """Promote by override, in a process that is killed before that write to the registry."""
    if not (child := os.fork()):
        calls = 0

        def dying(method):
            def call(*arguments, **options):
                nonlocal calls
                calls += 1
                if calls == moment:
                    os._exit(9)
                return method(*arguments, **options)

            return call

        for name in WRITES:
            setattr(MlflowClient, name, dying(getattr(MlflowClient, name)))
        workspace.vlmdiff(*OVERRIDE, check=False)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_an_override_that_is_killed_at_any_write_leaves_no_word_of_it_after_the_next_verdict(workspace):
    workspace.set_params(gate={"floors": {"au_pro": {"mean": 1.0}}})
    workspace.vlmdiff("register")
    moment = 1
    while killed_before_write(moment, workspace):
        assert registry(workspace)["champion"] is None
        assert workspace.vlmdiff("promote", "1", check=False).returncode == 1
        found = registry(workspace)
        tags = found["tags"]["1"]
        assert found["champion"] is None and tags["gate.verdict"] == "failed"
        assert not [key for key in tags if key.startswith("gate.override")]
        moment += 4
    found = registry(workspace)
    assert moment > 6 and found["champion"] == "1" and found["tags"]["1"]["gate.override.by"] == "Grace"
