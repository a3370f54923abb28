"""The flow `score` in a workspace, against a real Prefect API."""

import json
import os
import signal
import subprocess
import sys

import pandas as pd
import psutil
import pytest
from PIL import Image

from tests.processes import kill_all, wait_for

pytestmark = pytest.mark.services

FLOW = "import sys; from flows.score import score; score(['photographs'], heatmaps=True)"


@pytest.fixture
def scored(workspace, empty_store, prefect_api):
    """A workspace with a champion and photographs, one of them damaged; and how to run the flow there."""
    version = workspace.vlmdiff("register").stdout.strip().splitlines()[-1].removeprefix("version ")
    workspace.vlmdiff("promote", version)
    folder = workspace.path / "photographs"
    folder.mkdir()
    for i, file in enumerate(sorted((workspace.path / "data/made").glob("*/test/*/*.png"))[:6]):
        (folder / f"{i}.png").write_bytes(file.read_bytes())
    (folder / "text.png").write_text("no image")
    return workspace, lambda: workspace.run(sys.executable, "-c", FLOW, check=False, PREFECT_API_URL=prefect_api)


def test_the_flow_scores_with_the_champion_and_shows_the_worst(scored, recorded):
    workspace, run = scored
    done = run()
    assert done.returncode == 0, done.stdout
    frame = pd.read_parquet(workspace.path / "reports/scores/vlmdiff-1")
    assert len(frame) == 7 and frame["error"].notna().sum() == 1 and set(frame["model"]) == {"vlmdiff/1"}
    artifacts = {artifact["key"]: artifact for artifact in recorded("artifacts")}
    shown = json.loads(artifacts["scores"]["data"])
    assert [row["score"] for row in shown] == [f"{s:.3f}" for s in sorted(frame["score"].dropna(), reverse=True)]
    summary = artifacts["score-summary"]["data"]
    assert "| judged | 6 |" in summary and "| unreadable | 1 |" in summary and "text.png" in summary

    # What could not be read is tried again.
    assert "6 of them scored before; 1 new" in run().stdout
    again = pd.read_parquet(workspace.path / "reports/scores/vlmdiff-1")
    read = frame["error"].isna()
    pd.testing.assert_frame_equal(again[again["error"].isna()], frame[read])
    assert set(again["path"][again["error"].notna()]) == set(frame["path"][~read])
    states = {run["state_type"] for run in recorded("flow_runs")}
    assert states == {"COMPLETED"}

    # Where nothing can be judged the run has failed, and says so.
    for file in (workspace.path / "photographs").glob("*.png"):
        file.write_text("no image")
    failed = run()
    assert failed.returncode != 0 and "7 could not be read" in failed.stdout


def test_a_flow_that_is_cancelled_ends_its_child(scored, prefect_api):
    workspace, _ = scored
    # Large ones take their time.
    large = workspace.path / "large.png"
    Image.effect_noise((4000, 4000), 50).save(large, compress_level=0)
    for i in range(40):
        os.link(large, workspace.path / "photographs" / f"{i}-large.png")
    with (workspace.path / "output").open("w") as output:
        flow = psutil.Popen(
            [sys.executable, "-c", FLOW],
            cwd=workspace.path,
            env=os.environ | {"PREFECT_API_URL": prefect_api},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    family = [flow]
    try:
        lock = workspace.path / "reports/scores/vlmdiff-1/.lock"
        wait_for(lambda: lock.exists() or flow.poll() is not None, 120)
        assert flow.poll() is None, (workspace.path / "output").read_text()
        family += flow.children(recursive=True)
        assert any("vlmdiff.cli" in process.cmdline() for process in family)
        flow.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(family, timeout=20)
        assert not alive
    finally:
        kill_all(family)
    assert "another" not in (workspace.path / "output").read_text()
