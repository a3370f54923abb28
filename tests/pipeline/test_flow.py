"""The flow `retrain` in a workspace, against a real Prefect API."""

import sys

import yaml

from tests.conftest import ROOT
from vlmdiff.core.params import load

FLOW = (sys.executable, "-m", "flows.retrain")


def test_the_flow_ends_with_a_champion_and_run_again_changes_nothing(workspace, prefect_api, recorded):
    first = workspace.run(*FLOW, PREFECT_API_URL=prefect_api).stdout
    assert "version 1 passes the gate and is champion" in first
    for shown in ("AU-PRO", "reports/gate.html", "reports/data/docs/index.html", "make up", "vlmdiff score"):
        assert shown in first
    second = workspace.run(*FLOW, PREFECT_API_URL=prefect_api).stdout
    assert "this model is already version 1" in second and "version 1 passes the gate and is champion" in second
    assert "Running stage" not in second

    tasks = sorted(recorded("task_runs"), key=lambda run: run["start_time"])
    stages = list(yaml.safe_load((workspace.path / "dvc.yaml").read_text())["stages"])
    assert [run["name"] for run in tasks][-9:] == [*stages, "register", "promote"]
    artifacts = {artifact["key"] for artifact in recorded("artifacts")}
    assert {"metrics", "report", "gate", "verdict"} <= artifacts


def test_a_stage_that_fails_ends_the_flow_with_its_words(workspace, prefect_api):
    workspace.set_params(validate={"min_side": 1000})
    done = workspace.run(*FLOW, check=False, PREFECT_API_URL=prefect_api)
    assert done.returncode == 2
    assert (
        "stage 'validate' failed" in done.stdout and "size (every image has at least 1000 pixels a side)" in done.stdout
    )
    assert not (workspace.path / "mlflow.db").exists()


def test_a_model_that_misses_a_floor_ends_well_without_a_champion(workspace, prefect_api):
    workspace.set_params(gate={"floors": {"au_pro": {"mean": 1.0}}})
    output = workspace.run(*FLOW, PREFECT_API_URL=prefect_api).stdout
    assert "does not pass the gate; there is no champion" in output and "at least 1 required" in output


def test_a_preset_is_followed_from_now_on(workspace, prefect_api):
    # The line ends at the contract: nothing is trained.
    workspace.set_params(validate={"min_side": 1000})
    before = load(workspace.path / "params.yaml")
    command = "from flows.retrain import retrain; retrain(preset='visa_fast', return_state=True)"
    output = workspace.run(sys.executable, "-c", command, PREFECT_API_URL=prefect_api).stdout
    assert "stage 'validate' failed" in output
    now, preset = load(workspace.path / "params.yaml"), load(ROOT / "presets/visa_fast.yaml")
    assert now.first_stage == preset.first_stage and now.train == preset.train
    assert now.prepare == before.prepare and now.gate == before.gate
