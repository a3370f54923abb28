"""`make up` with real servers: what is deployed, what a run of the worker shows, what starts and stops with it."""

import base64
import io
import os
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import yaml
from mlflow.tracking import MlflowClient
from PIL import Image

from tests.conftest import ROOT
from tests.processes import wait_for
from tests.services import Services, services

pytestmark = pytest.mark.services

FLOW = (sys.executable, "-m", "flows.retrain")
SERVERS = {"prefect", "mlflow", "reports", "worker-vlmdiff"}
HOLD = """
import sys, time
from prefect.concurrency.sync import concurrency
with concurrency("gpu", lease_duration=60, strict=True):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def up(tiny_line, tmp_path_factory) -> Services:
    """A tiny line whose stages have run, and all of `make up`; the tests go from one to the next."""
    with services(tmp_path_factory.mktemp("services") / "workspace", tiny_line) as here:
        said = here.up()
        assert set(re.findall(r"^started ([\w-]+): http", said, re.MULTILINE)) == SERVERS
        assert "deployed retrain, score, monitor" in said
        yield here


def read(link: str) -> str:
    """The page behind a Markdown link."""
    with urllib.request.urlopen(re.search(r"\((http[^)]*)\)", link)[1]) as response:
        return response.read().decode()


def started(here: Services) -> dict[str, str]:
    return {file.name: file.read_text() for file in (here.workspace.path / ".cache/servers").glob("*.json")}


def planned(client) -> list:
    return [run for run in client.read_flow_runs() if run.state.is_scheduled() and run.auto_scheduled]


def flow_runs(here: Services) -> set:
    with here.client() as client:
        return {run.id for run in client.read_flow_runs()}


def test_every_deployment_has_its_schedule_and_a_form_that_explains_itself(up):
    declared = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    with up.client() as client:
        for each in declared:
            file, flow = each["entrypoint"].split(":")
            if not (ROOT / file).exists():
                continue
            found = client.read_deployment_by_name(f"{flow}/{each['name']}")
            asked = {(schedule["cron"], schedule["timezone"]) for schedule in each.get("schedules", [])}
            assert {(s.schedule.cron, s.schedule.timezone) for s in found.schedules if s.active} == asked
            properties = found.parameter_openapi_schema["properties"]
            assert all(properties[name].get("description") for name in properties)
            assert found.work_pool_name == "vlmdiff"
        asked = client.read_deployment_by_name("retrain/retrain").parameter_openapi_schema["properties"]
    assert asked["preset"]["enum"] == ["as it is", *sorted(file.stem for file in (ROOT / "presets").glob("*.yaml"))]


def test_a_run_asked_for_through_the_api_ends_with_a_champion_and_explains_itself(up):
    run = up.trigger()
    ended = up.end(run)
    assert ended.state.is_completed(), up.logs(run)
    assert re.fullmatch(r"retrain \d{4}-\d\d-\d\d \d\d:\d\d:\d\d", ended.name)

    shown = up.artifacts(run)
    assert {"progress", "metrics", "heatmaps", "gate", "verdict", "report", "data-docs", "registry"} == set(shown)
    assert shown["progress"] == 100
    pictures = re.findall(r"data:image/jpeg;base64,([^)]*)", shown["heatmaps"])
    assert len(pictures) == 6
    for picture in pictures:
        Image.open(io.BytesIO(base64.b64decode(picture))).verify()
    assert "<html" in read(shown["report"]) and "<html" in read(shown["data-docs"])
    assert "version 1 passes the gate and is champion" in shown["verdict"] and "<html" in read(shown["verdict"])
    assert f":{up.ports['mlflow']}/#/models/vlmdiff/versions/1" in shown["registry"]

    client = MlflowClient(f"http://127.0.0.1:{up.ports['mlflow']}")
    assert client.get_model_version_by_alias("vlmdiff", "champion").version == "1"


def test_the_next_runs_of_a_schedule_are_listed(up):
    with up.client() as client:
        wait_for(lambda: planned(client), 120)
        # At the hours that prefect.yaml says.
        assert {run.expected_start_time.hour for run in planned(client)} <= {3, 5}


def test_up_again_starts_nothing_and_keeps_what_a_person_paused(up):
    with up.client() as client:
        deployment = client.read_deployment_by_name("retrain/retrain")
        client.update_deployment_schedule(deployment.id, deployment.schedules[0].id, active=False)
        automation = client.read_automations_by_name("vlmdiff: drift starts retrain")[0]
        client.pause_automation(automation.id)
        before = started(up)

        said = up.up()

        assert set(re.findall(r"^([\w-]+) already runs: http", said, re.MULTILINE)) == SERVERS and started(up) == before
        deployment = client.read_deployment_by_name("retrain/retrain")
        assert [schedule.active for schedule in deployment.schedules] == [False]
        (automation,) = client.read_automations_by_name("vlmdiff: drift starts retrain")
        assert not automation.enabled
        client.resume_automation(automation.id)


def test_without_promotion_a_version_is_registered_and_no_champion(up):
    run = up.trigger(promote_model=False)
    assert up.end(run).state.is_completed(), up.logs(run)
    assert "gate" not in up.artifacts(run) and "metrics" in up.artifacts(run)


def test_a_broken_contract_shows_the_rule_and_the_files(up):
    up.workspace.set_params(validate={"min_side": 1000})
    run = up.trigger()
    ended = up.end(run)
    up.workspace.set_params(validate={"min_side": 32})
    assert ended.state.is_failed() and "stage 'validate' failed" in ended.state.message
    contract = up.artifacts(run)["contract"]
    (size,) = [row for row in yaml.safe_load(contract) if row["rule"] == "size"]
    assert size["broken by"] > 10 and ".png" in size["files"] and size["to do"]
    assert "<html" in read(up.artifacts(run)["data-docs"])


def test_drift_starts_a_run(up):
    before = flow_runs(up)
    emit = ("prefect", "event", "emit", "vlmdiff.drift.found", "--resource-id", "vlmdiff.model.vlmdiff")
    up.workspace.run(sys.executable, "-m", *emit, **up.connection)
    wait_for(lambda: flow_runs(up) - before, 60)
    (run,) = flow_runs(up) - before
    assert up.run(run).deployment_id
    assert up.end(run).state.is_completed(), up.logs(run)


def test_a_forced_run_waits_for_the_gpu_until_a_dead_holders_lease_ends_and_runs_every_stage(up):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD],
        env=os.environ | up.connection,
        cwd=up.workspace.path,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout.readline() == "held\n"
        run = up.trigger(force=True)
        wait_for(lambda: "waiting for the limit 'gpu'" in up.logs(run), 60, lambda: up.logs(run))
        holder.kill()
        killed = time.monotonic()
        wait_for(lambda: "Running stage 'first_stage'" in up.logs(run), 120, lambda: up.logs(run))
        assert time.monotonic() - killed < 120
        assert up.end(run, 200).state.is_completed(), up.logs(run)
        ran = re.findall(r"Running stage '(\w+)'", up.logs(run))
        assert ran == list(yaml.safe_load((up.workspace.path / "dvc.yaml").read_text())["stages"])
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


def test_a_second_run_says_who_has_the_workspace_and_down_ends_all_with_the_run_under_way(up):
    run = up.trigger(force=True)
    wait_for(lambda: "Running stage" in up.logs(run), 60, lambda: up.logs(run))
    second = up.end(up.trigger())
    assert second.state.is_failed()
    assert f"the run {up.run(run).name!r} (process " in second.state.message and "since" in second.state.message
    assert not up.run(run).state.is_final()
    assert len(up.processes()) > 6
    said = up.down()
    assert said.splitlines() == [f"stopped {name}" for name in ("worker-vlmdiff", "mlflow", "prefect", "reports")]
    assert up.processes() == []
    assert list(Path(up.workspace.path / ".cache/servers").glob("*.json")) == []
