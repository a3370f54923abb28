"""The whole line on small parameters: what reruns, what is registered, who becomes champion, what serves."""

import base64
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import mlflow
import numpy as np
import pandas as pd
import pytest
import yaml
from mlflow.tracking import MlflowClient
from PIL import Image

from tests.processes import wait_for
from vlmdiff.core.dvc import dvc_hash
from vlmdiff.core.errors import InputError
from vlmdiff.core.files import HASHES
from vlmdiff.data import manifest
from vlmdiff.evaluation.bootstrap import Resampled
from vlmdiff.registry.served import Inspector


def registry(workspace) -> dict:
    """What the store of the workspace has of the model's versions."""
    client = MlflowClient(f"sqlite:///{workspace.path / 'mlflow.db'}")
    aliases = client.get_registered_model("vlmdiff").aliases
    versions = client.search_model_versions("name = 'vlmdiff'")
    experiment = client.get_experiment_by_name("vlmdiff")
    return {
        "champion": str(aliases["champion"]) if aliases else None,
        "tags": {str(v.version): v.tags for v in versions},
        "metrics": {str(v.version): client.get_run(v.run_id).data.metrics for v in versions},
        "runs": len(client.search_runs([experiment.experiment_id])),
        "artifacts": {
            str(v.version): sorted(f.path for f in client.list_artifacts(v.run_id, "gate")) for v in versions
        },
    }


def ran(output: str) -> list[str]:
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage '")]


def version_of(output: str) -> str:
    return output.strip().splitlines()[-1].removeprefix("version ")


def set_metrics(workspace, **means: float | None) -> None:
    """Stand in for an evaluation with other results, and certain ones: its files, recorded as what the stage made."""
    folder = workspace.path / "reports/evaluation"
    metrics = json.loads((folder / "metrics.json").read_text())
    resampled = Resampled.load(folder / "samples.npz")
    for name, values in metrics["per_class"].items():
        values |= means
        resampled.classes[name] |= {metric: np.full(1000, np.nan if v is None else v) for metric, v in means.items()}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    resampled.save(folder / "samples.npz")
    workspace.run("dvc", "commit", "--force", "--quiet")


def verdict(workspace) -> dict:
    return json.loads((workspace.path / "reports/gate.json").read_text())


def register(workspace) -> str:
    return version_of(workspace.vlmdiff("register").stdout)


def test_a_second_repro_runs_nothing(workspace):
    assert ran(workspace.run("dvc", "repro").stdout) == []


def test_new_bounds_for_captions_rerun_captions_and_not_the_first_stage(workspace):
    workspace.set_params(caption={"max_words": 100})
    assert ran(workspace.run("dvc", "repro").stdout) == ["caption"]


def test_other_captions_rerun_what_follows_and_not_the_first_stage(workspace):
    written = (workspace.path / "data/captions/captions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in written]
    lines = [json.dumps({"path": row["path"], "caption": f"a thing called {row['class_name']}"}) for row in rows]
    (workspace.path / "data/raw/captions.jsonl").write_text("\n".join(lines))
    workspace.set_params(caption={"captioner": {"kind": "file", "file": "captions.jsonl"}})
    again = ran(workspace.run("dvc", "repro").stdout)
    assert {"caption", "encode", "train", "evaluate"} <= set(again) and "first_stage" not in again


def test_touching_one_photograph_recaptions_one(workspace):
    photographs = workspace.path / "data/raw/photos"
    demo = workspace.path / "data/made"
    subprocess.run(["cp", "-r", str(demo), str(photographs)], check=True)
    workspace.set_params(prepare={"layout": "mvtec_ad", "root": "data/raw/photos"})
    workspace.run("dvc", "repro", "caption")
    file = sorted(photographs.glob("*/train/good/*.png"))[0]
    image = Image.open(file)
    image.load()
    image.putpixel((0, 0), (1, 2, 3))
    image.save(file)
    output = workspace.run("dvc", "repro", "caption").stdout
    assert "1 requested" in output


def test_our_hashes_are_dvcs(workspace):
    lock = yaml.safe_load((workspace.path / "dvc.lock").read_text())
    outputs = {o["path"]: o["md5"] for stage in lock["stages"].values() for o in stage["outs"]}
    assert {path: dvc_hash(workspace.path / path) for path in outputs} == outputs


def test_registering_twice_makes_one_version_with_its_lineage(workspace):
    assert version_of(workspace.run("vlmdiff", "register").stdout) == "1"
    assert version_of(workspace.run("vlmdiff", "register").stdout) == "1"
    found = registry(workspace)
    assert found["runs"] == 1 and list(found["tags"]) == ["1"]
    lock = yaml.safe_load((workspace.path / "dvc.lock").read_text())
    (recorded,) = [o["md5"] for o in lock["stages"]["prepare"]["outs"] if o["path"] == "data/manifest.parquet"]
    tags = found["tags"]["1"]
    assert tags["dvc.data/manifest.parquet"] == recorded
    assert tags["git.revision"] == workspace.run("git", "rev-parse", "HEAD").stdout.strip()
    metrics = json.loads((workspace.path / "reports/evaluation/metrics.json").read_text())
    # metrics.json has six digits.
    assert round(found["metrics"]["1"]["au_pro"], 6) == metrics["mean"]["au_pro"]
    assert round(found["metrics"]["1"]["decision/recall"], 6) == metrics["decision"]["recall"]
    assert round(found["metrics"]["1"]["decision/recall/cable"], 6) == metrics["per_class_decision"]["cable"]["recall"]
    assert found["metrics"]["1"]["decision/recall/per_defect/cable/cut"] == metrics["per_defect"]["cable/cut"]["recall"]


def test_a_model_that_dvc_did_not_make_is_not_registered(workspace):
    file = workspace.path / "reports/evaluation/metrics.json"
    file.write_text(file.read_text() + " ")
    done = workspace.run("vlmdiff", "register", check=False)
    assert done.returncode == 2 and "dvc.lock" in done.stdout
    assert not (workspace.path / "mlruns").exists()


@pytest.mark.usefixtures("empty_store")
def test_the_gate_promotes_the_better_and_no_other(workspace):
    set_metrics(workspace, au_pro=0.8)
    workspace.set_params(gate={"floors": {"au_pro": {"mean": 0.85, "every_class": 0.5}}, "margin": 0.01})
    dry = workspace.vlmdiff("gate", check=False)
    assert dry.returncode == 1 and "the model does not pass the gate; there is no champion" in dry.stdout
    low = register(workspace)
    refused = workspace.vlmdiff("promote", low, check=False)
    assert refused.returncode == 1 and "no champion" in refused.stdout
    found = registry(workspace)
    assert found["champion"] is None and found["tags"][low]["gate.verdict"] == "failed"
    assert "0.8000, at least 0.85 required" in found["tags"][low]["gate.reasons"]

    set_metrics(workspace, au_pro=0.9)
    good = register(workspace)
    before = registry(workspace)
    assert "passes the gate; there is no champion" in workspace.vlmdiff("gate", good).stdout
    assert registry(workspace) == before
    workspace.vlmdiff("promote", good)
    assert registry(workspace)["champion"] == good

    set_metrics(workspace, au_pro=0.905)
    hardly = register(workspace)
    assert workspace.vlmdiff("promote", hardly, check=False).returncode == 1
    found = registry(workspace)
    assert found["champion"] == good
    assert "differs from the champion's by +0.0050" in found["tags"][hardly]["gate.reasons"]

    set_metrics(workspace, au_pro=None)
    undefined = register(workspace)
    assert workspace.vlmdiff("promote", undefined, check=False).returncode == 1
    found = registry(workspace)
    assert found["champion"] == good and "not defined" in found["tags"][undefined]["gate.reasons"]

    # To ask about the champion again changes nothing.
    before = found
    workspace.vlmdiff("promote", good)
    assert registry(workspace) == before
    assert verdict(workspace)["is_champion"]

    # A person can; who and why stays with the version.
    for half in (("--override", "Ada Lovelace"), ("--override", " ", "--reason", "why"), ("--reason", "why")):
        refused = workspace.vlmdiff("promote", hardly, *half, check=False)
        assert refused.returncode == 2 and "both a person's name and a reason" in refused.stdout
    reason = "the other one misses cracks"
    workspace.vlmdiff("promote", hardly, "--override", "Ada Lovelace", "--reason", reason)
    workspace.vlmdiff("promote", hardly)
    found = registry(workspace)
    tags = found["tags"][hardly]
    assert found["champion"] == hardly and tags["gate.verdict"] == "overridden"
    assert (tags["gate.override.by"], tags["gate.override.reason"]) == ("Ada Lovelace", reason)
    assert verdict(workspace)["override"] == {"by": "Ada Lovelace", "reason": reason}
    assert reason in (workspace.path / "reports/gate.html").read_text()
    assert found["artifacts"][hardly] == ["gate/gate.html", "gate/gate.json"]


@pytest.mark.usefixtures("empty_store")
def test_a_champion_is_judged_again_where_the_test_has_changed(workspace):
    workspace.vlmdiff("promote", register(workspace))
    workspace.set_params(evaluate={"max_fpr": 0.1})
    workspace.run("dvc", "repro")
    again = register(workspace)
    assert "evaluating version 1" in workspace.vlmdiff("promote", again, check=False).stdout
    found = verdict(workspace)
    assert found["rejudged"] and found["champion"] == 1 and not found["is_champion"]
    # It is the same model: judged by the same images it is the same.
    (gain,) = [row for row in found["criteria"] if row["name"].startswith("gain")]
    assert gain["measured"] == 0 and "differs from the champion's by +0.0000" in gain["why"]
    assert "judged again on these" in (workspace.path / "reports/gate.html").read_text()

    # Without its weights it cannot be; that is no reason to let another pass, but a person may.
    for weights in (workspace.path / "mlruns").glob("*/models/*/artifacts/artifacts/detector/unet/*.safetensors"):
        weights.write_bytes(b"no weights")
    for cache in ("judged", "registry"):
        shutil.rmtree(workspace.path / ".cache" / cache)
    workspace.vlmdiff("promote", again, check=False)
    assert registry(workspace)["champion"] == "1"
    assert "could not be evaluated on these test images: version 1 cannot be loaded" in "".join(
        row["why"] for row in verdict(workspace)["criteria"]
    )
    workspace.vlmdiff("promote", again, "--override", "Ada", "--reason", "version 1 is lost")
    assert registry(workspace)["champion"] == again


@pytest.mark.services
@pytest.mark.usefixtures("empty_store")
def test_of_two_promotions_at_once_the_better_model_wins(workspace):
    versions = []
    for value in (0.90, 0.95):
        set_metrics(workspace, au_pro=value)
        versions.append(register(workspace))
    running = [
        subprocess.Popen(["vlmdiff", "promote", v], cwd=workspace.path, stdout=subprocess.DEVNULL)
        for v in versions[::-1]
    ]
    better, worse = (process.wait() for process in running)
    # The worse one is refused if it comes second.
    assert better == 0 and worse in (0, 1)
    assert registry(workspace)["champion"] == versions[1]


@pytest.mark.services
def test_three_that_open_a_fresh_store_at_once_leave_one_version(workspace):
    running = [
        subprocess.Popen(["vlmdiff", "register"], cwd=workspace.path, stdout=subprocess.DEVNULL) for _ in range(3)
    ]
    assert [process.wait() for process in running] == [0, 0, 0]
    found = registry(workspace)
    assert list(found["tags"]) == ["1"] and found["runs"] == 1


@pytest.mark.usefixtures("empty_store")
def test_who_was_killed_between_run_and_version_registers_the_same_run(workspace):
    kill = (
        "import os, signal; from mlflow.tracking import MlflowClient as C\n"
        "C.create_model_version = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)\n"
        "from vlmdiff.cli import main; import sys; sys.argv = ['vlmdiff', 'register']; main()"
    )
    done = workspace.run(sys.executable, "-c", kill, check=False)
    assert done.returncode == -9
    assert version_of(workspace.run("vlmdiff", "register").stdout) == "1"
    assert registry(workspace)["runs"] == 1


@pytest.mark.usefixtures("empty_store")
def test_a_registry_that_is_down_is_a_clear_error_soon(workspace):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens: refused
        uri = f"http://127.0.0.1:{taken.getsockname()[1]}"
        start = time.monotonic()
        done = workspace.run("vlmdiff", "register", check=False, MLFLOW_TRACKING_URI=uri)
        assert done.returncode == 2 and uri in done.stdout and "Nothing is trained again" in done.stdout
        assert time.monotonic() - start < 120  # MLflow alone would wait four minutes
        assert register(workspace) == "1"
        start = time.monotonic()
        done = workspace.run("vlmdiff", "promote", "1", check=False, MLFLOW_TRACKING_URI=uri)
        assert done.returncode == 2 and uri in done.stdout and "Nothing is trained again" in done.stdout
        assert time.monotonic() - start < 120  # MLflow alone would wait four minutes
    assert "is champion" in workspace.vlmdiff("promote", "1").stdout


@pytest.mark.usefixtures("empty_store")
def test_a_dataset_without_good_test_images_is_warned_of_evaluated_and_registered(workspace):
    file = workspace.path / "data/manifest.parquet"
    frame = manifest.read(file)
    file.unlink()
    manifest.write(frame[(frame["split"] != "test") | frame["is_anomalous"]].reset_index(drop=True), file)
    said = " ".join(workspace.vlmdiff("validate").stdout.split())
    assert "warning: both_kinds" in said and "most metrics are not defined" in said
    workspace.vlmdiff("evaluate")
    workspace.run("dvc", "commit", "--force", "--quiet")
    assert "- is not defined" in " ".join(workspace.vlmdiff("results").stdout.split())
    version = register(workspace)
    workspace.set_params(gate={"floors": {"image_auroc": {"mean": 0.5}}})
    done = workspace.vlmdiff("promote", version, check=False)
    assert done.returncode == 1 and "not defined" in done.stdout and registry(workspace)["champion"] is None


@pytest.mark.usefixtures("empty_store")
def test_score_judges_by_the_champion_and_names_it(workspace, tmp_path):
    photograph = next((workspace.path / "data/made/cable/test/missing").glob("*.png"))
    out = tmp_path / "out"
    done = workspace.run("vlmdiff", "score", str(photograph), "--out", str(out), check=False)
    assert done.returncode == 2 and "has no champion" in done.stdout and not out.exists()
    version = register(workspace)
    workspace.vlmdiff("promote", version)
    assert photograph.name in workspace.run("vlmdiff", "score", str(photograph), "--out", str(out)).stdout
    (row,) = pd.read_parquet(out).to_dict("records")
    assert 0 <= row["score"] < 1 and row["is_anomalous"] == (row["score"] > 0.5)
    assert row["model"] == f"vlmdiff/{version}"
    workspace.run("vlmdiff", "score", str(photograph), "--model", "models/detector", "--out", str(tmp_path / "b"))
    (other,) = pd.read_parquet(tmp_path / "b").to_dict("records")
    assert other["score"] == row["score"] and other["model"].startswith("sha256:")
    # The copy in the cache is verified whenever it is loaded.
    (weights,) = (workspace.path / ".cache/registry").rglob("unet/*.safetensors")
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    done = workspace.vlmdiff("score", str(photograph), "--out", str(tmp_path / "c"), check=False)
    assert done.returncode == 2 and f"{weights.name} has changed since it was written" in done.stdout
    assert not list((tmp_path / "c").glob("part-*"))


@pytest.mark.usefixtures("empty_store")
def test_one_flipped_byte_in_any_file_of_a_registered_version_is_refused_with_the_files_name(workspace, tmp_path):
    uri, store = f"models:/vlmdiff/{register(workspace)}", f"sqlite:///{workspace.path}/mlflow.db"
    folder = Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(tmp_path / "version"), tracking_uri=store))
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != "registered_model_meta"]
    names = {file.relative_to(folder).as_posix() for file in files}
    assert names >= {"MLmodel", "requirements.txt", "code/vlmdiff/core/files.py", "artifacts/detector/detector.json"}
    artifacts = {"detector": str(folder / "artifacts/detector")}
    context = SimpleNamespace(artifacts=artifacts, model_config={"max_pixels": 10**6})
    Inspector().load_context(context)
    for file in files:
        whole = file.read_bytes()
        place = len(whole) // 2
        file.write_bytes(whole[:place] + bytes([(whole[place : place + 1] or b"a")[0] ^ 1]) + whole[place + 1 :])
        # A hash that has changed names the file that it no longer fits.
        with pytest.raises(InputError, match="" if file.name == HASHES else re.escape(str(file))):
            Inspector().load_context(context)
        file.write_bytes(whole)


@pytest.mark.usefixtures("empty_store")
def test_the_champion_loads_and_serves_without_this_repository(workspace, tmp_path):
    workspace.vlmdiff("promote", register(workspace))
    photograph = next((workspace.path / "data/made/cable/test/missing").glob("*.png"))
    row = {"image": base64.b64encode(photograph.read_bytes()).decode()}
    store = {"MLFLOW_TRACKING_URI": f"sqlite:///{workspace.path}/mlflow.db"}
    # -I: neither the folder at hand nor an installed checkout's path entries come before the model's own code.
    load = (
        "import json, sys, mlflow, pandas as pd\n"
        "model = mlflow.pyfunc.load_model('models:/vlmdiff@champion')\n"
        "import vlmdiff; print(vlmdiff.__file__)\n"
        "print(model.predict(pd.DataFrame([json.loads(sys.argv[1])])).to_json(orient='records'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", load, json.dumps(row)],
        cwd=tmp_path,
        env=os.environ | store,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    module, answer = done.stdout.splitlines()[-2:]
    assert Path(module).is_relative_to(workspace.path / "mlruns")
    (loaded,) = json.loads(answer)

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = ["mlflow", "models", "serve", "-m", "models:/vlmdiff@champion", "--env-manager", "local", "-p", port]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [*command, "-h", "127.0.0.1"],
            cwd=tmp_path,
            env=os.environ | store,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"

        def answers() -> bool:
            assert server.poll() is None, (tmp_path / "log").read_text()
            try:
                urllib.request.urlopen(f"{url}/ping", timeout=5).close()
            except OSError:
                return False
            return True

        # A server that ends says so at once; one that starts beside other work takes minutes.
        wait_for(answers, 600)
        body = json.dumps({"dataframe_records": [row]}).encode()
        request = urllib.request.Request(f"{url}/invocations", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            (served,) = json.load(response)["predictions"]
    finally:
        from vlmdiff.core.processes import end_group

        end_group(server.pid)
        server.wait()
    assert served["score"] == pytest.approx(loaded["score"], abs=1e-6)
    assert served["is_anomalous"] == loaded["is_anomalous"] and isinstance(served["regions"], list)
