"""What `evaluate` leaves for the monitor, and the flow `monitor` against a real Prefect API."""

import json
import shutil
import time
from pathlib import Path

import httpx
import numpy as np
import pandas as pd
import pytest
from scipy import special

from tests.monitoring import CLASSES, photographs, write_model, write_scores
from vlmdiff.data import manifest
from vlmdiff.data.images import load_rgb
from vlmdiff.data.statistics import image_statistics
from vlmdiff.detection.settings import Settings


def events(api: str, **question: dict) -> list[dict]:
    """The events of this `event` and this `resource`, as Prefect filters them."""
    return httpx.post(f"{api}/events/filter", json={"filter": question}).raise_for_status().json()["events"]


def drifts(api: str, name: str, patience: float) -> list[dict]:
    """The events of drift of a model, once there is one or `patience` seconds are over."""
    question = {"event": {"name": ["vlmdiff.drift.found"]}, "resource": {"id": [f"vlmdiff.monitor.{name}"]}}
    deadline = time.monotonic() + patience
    while not (found := events(api, **question)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return found


def test_the_detector_travels_with_what_it_was_calibrated_on(workspace) -> None:
    folder = workspace.path / "models/detector"
    reference = pd.read_parquet(folder / "reference.parquet")
    frame = manifest.read(workspace.path / "data/manifest.parquet")
    held_out = frame[frame["split"] == "validation"].reset_index(drop=True)
    assert reference["image_id"].tolist() == held_out["image_id"].tolist()
    assert reference["class_name"].tolist() == held_out["class_name"].tolist()

    images = [load_rgb(workspace.path / "data/made" / path, None, 10**8) for path in held_out["path"]]
    assert reference["width"].tolist() == [image.shape[1] for image in images]
    assert reference["sharpness"][0] == pytest.approx(image_statistics(images[0])["sharpness"])
    # Each is judged by what the others say is normal, as a new image is.
    said = Settings.read(folder).calibration
    limits = np.array([said.limit(name) for name in reference["class_name"]])
    np.testing.assert_allclose(np.sort(special.logit(reference["score"]) / said.slope + limits), said.normal, atol=1e-6)


def test_the_monitor_asks_the_registry_for_the_champion_and_what_it_was_calibrated_on(workspace, empty_store) -> None:
    workspace.vlmdiff("register")
    workspace.vlmdiff("promote", "1")
    shutil.rmtree(workspace.path / "models/detector")
    rows = pd.concat([photographs(seed, dict.fromkeys(CLASSES, 20)) for seed in (1, 2)])
    write_scores(workspace.path / "reports/scores/a.parquet", rows[:60], "vlmdiff/1")
    write_scores(workspace.path / "reports/scores/b.parquet", rows[60:90], "vlmdiff/2")
    output = workspace.run("vlmdiff", "monitor", "reports/scores").stdout
    said = json.loads((workspace.path / "reports/monitor/monitor.json").read_text())
    # The tiny line's photographs are others than these.
    assert (said["images"], said["others"], said["verdict"]) == (60, 30, "drift") and "drift in the last 60" in output
    held_out = manifest.read(workspace.path / "data/manifest.parquet")["split"] == "validation"
    assert said["reference"] == held_out.sum()


@pytest.fixture
def line(tmp_path, monkeypatch) -> str:
    """A folder with parameters and a detector; the name under which its model is registered."""
    monkeypatch.chdir(tmp_path)
    name = tmp_path.name
    Path("params.yaml").write_text(json.dumps({"registry": {"model_name": name}}))
    write_model(Path("model"))
    return name


@pytest.mark.services
def test_the_flow_emits_an_event_with_what_has_drifted(line, prefect_api, recorded) -> None:
    from flows.monitor import monitor

    write_scores(
        Path("reports/scores/a.parquet"), photographs(1, dict.fromkeys(CLASSES, 67), sharpness=0.2), Path("model")
    )
    state = monitor(model="model", return_state=True)
    assert state.is_completed() and state.message.startswith("drift in the last 200 images: ")
    (event,) = drifts(prefect_api, line, patience=30)
    assert event["payload"]["outcome"] == state.message and event["payload"]["images"] == 200
    assert "sharpness" in {test["what"] for test in event["payload"]["found"]}
    (run,) = [item for item in event["related"] if item["prefect.resource.role"] == "flow-run"]
    assert run["prefect.resource.id"] == f"prefect.flow-run.{state.state_details.flow_run_id}"

    by_key = {artifact["key"]: artifact for artifact in recorded("artifacts")}
    assert by_key.keys() == {"monitor", "monitor-page"}
    assert state.message in by_key["monitor"]["description"] and "sharpness" in by_key["monitor"]["data"]
    assert Path("reports/monitor/monitor.html").absolute().as_uri() in by_key["monitor-page"]["data"]


@pytest.mark.services
def test_the_flow_says_nothing_where_nothing_has_drifted(line, prefect_api) -> None:
    from flows.monitor import monitor

    write_scores(Path("reports/scores/a.parquet"), photographs(1, dict.fromkeys(CLASSES, 67)), Path("model"))
    state = monitor(model="model", return_state=True)
    assert state.is_completed() and state.message == "no drift in the last 200 images"
    # Events come in order: one that was emitted would be there before the run's end is.
    deadline = time.monotonic() + 120
    run = f"prefect.flow-run.{state.state_details.flow_run_id}"
    while not events(prefect_api, event={"name": ["prefect.flow-run.Completed"]}, resource={"id": [run]}):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert not drifts(prefect_api, line, patience=2)


@pytest.mark.services
def test_the_flow_fails_with_a_sentence_where_there_are_no_scores(line, prefect_api) -> None:
    from flows.monitor import monitor

    state = monitor(model="model", return_state=True)
    assert state.is_failed() and "reports/scores has no Parquet files" in state.message


def test_the_flow_describes_its_parameters() -> None:
    from prefect.utilities.callables import parameter_schema

    from flows.monitor import monitor

    properties = parameter_schema(monitor.fn).properties
    assert properties.keys() == {"scores", "model", "last", "out"}
    assert all(item.get("description") for item in properties.values())
