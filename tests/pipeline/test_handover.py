"""Hand-over: a champion served by MLflow's own server, its card, and the way back to the champion before it."""

import base64
import contextlib
import io
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tests.pipeline.test_line import registry, set_metrics
from vlmdiff.core.params import load
from vlmdiff.core.processes import end_group
from vlmdiff.data import manifest
from vlmdiff.detection.detector import Detector
from vlmdiff.registry.card import model_card

# Where the champion is served none of these may be asked for.
WITHOUT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"prefect", "dvc", "great_expectations", "flows"}:
            raise ModuleNotFoundError(f"{name} is not here")

sys.meta_path.insert(0, Absent())
"""


@dataclass(frozen=True)
class Champion:
    """A workspace with a champion: its test photographs' files, and what its own detector says of them."""

    path: Path
    files: list[Path]
    detector: Detector

    @property
    def store(self) -> dict[str, str]:
        return {"MLFLOW_TRACKING_URI": f"sqlite:///{self.path}/mlflow.db"}


@dataclass(frozen=True)
class Server:
    """The champion's server; `root` is the folder below which it reads files itself."""

    url: str
    root: Path

    def ask(self, rows: list[dict[str, Any]], **params: Any) -> list[dict[str, Any]]:
        answer = self.post(rows, **params)
        assert answer.status_code == 200, answer.text
        return answer.json()["predictions"]

    def post(self, rows: list[dict[str, Any]], **params: Any) -> httpx.Response:
        body = {"dataframe_records": rows, "params": params}
        return httpx.post(f"{self.url}/invocations", json=body, timeout=120)


@pytest.fixture(scope="module")
def champion(tiny_line, once) -> Champion:
    def fill(path: Path) -> None:
        shutil.copytree(tiny_line.path, path, symlinks=True)
        for command in (["register"], ["promote", "1"]):
            subprocess.run(["vlmdiff", *command], cwd=path, check=True)

    path = once("champion", fill)
    frame = manifest.read(path / "data/manifest.parquet")
    files = [path / "data/made" / relative for relative in frame.loc[frame["split"] == "test", "path"]]
    return Champion(path, files, Detector.from_pretrained(path / "models/detector"))


@pytest.fixture(scope="module")
def server(champion, tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "site").mkdir()
    (folder / "site/sitecustomize.py").write_text(WITHOUT)
    root = folder / "photographs"
    (root / "line 1").mkdir(parents=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = ["mlflow", "models", "serve", "-m", "models:/vlmdiff@champion", "--env-manager", "local"]
    environment = os.environ | champion.store
    environment |= {"PYTHONPATH": str(folder / "site"), "VLMDIFF_IMAGE_ROOT": str(root)}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, "-h", "127.0.0.1", "-p", port],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(900):
            assert process.poll() is None, (folder / "log").read_text()
            with contextlib.suppress(httpx.TransportError):
                httpx.get(f"{url}/ping")
                break
            time.sleep(0.2)
        yield Server(url, root)
    finally:
        end_group(process.pid)
        process.wait()


def encoded(data: bytes) -> dict[str, str]:
    return {"image": base64.b64encode(data).decode()}


def photograph(file: Path) -> np.ndarray:
    return np.array(Image.open(file).convert("RGB"))


def png(width: int, height: int) -> bytes:
    """A PNG that says it has so many pixels, and is a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(9999))) + chunk(b"IEND", b"")
    )


def same(served: dict[str, Any], local, size: tuple[int, int]) -> None:
    assert served["score"] == pytest.approx(local.score, abs=1e-6)
    assert served["is_anomalous"] == local.is_anomalous
    expected = local.scaled_regions(*size)
    boxes = [[r[key] for key in ("x0", "y0", "x1", "y1", "area")] for r in served["regions"]]
    assert boxes == [[r.x0, r.y0, r.x1, r.y1, r.area] for r in expected]
    assert [r["peak"] for r in served["regions"]] == pytest.approx([r.peak for r in expected], abs=1e-6)
    assert [r["share"] for r in served["regions"]] == pytest.approx([r.share for r in expected], abs=1e-4)
    assert (served["explanation"], served["nearest"]) == (local.explanation, local.nearest.path)


def test_the_served_champion_says_what_the_local_detector_says(champion, server):
    rows = [encoded(file.read_bytes()) for file in champion.files]
    local = champion.detector.detect([photograph(file) for file in champion.files])
    assert {detection.is_anomalous for detection in local} == {True, False}
    sizes = [Image.open(file).size for file in champion.files]
    # More than a batch at once; and alone, from eight clients, whose rows are judged together.
    for served, detection, size in zip(server.ask(rows), local, sizes, strict=True):
        same(served, detection, size)
        assert set(served) == {
            *("score", "is_anomalous", "verdict", "product", "p_value"),
            *("regions", "explanation", "nearest"),
        }
    with ThreadPoolExecutor(8) as clients:
        alone = clients.map(lambda row: server.ask([row])[0], rows)
        for served, detection, size in zip(alone, local, sizes, strict=True):
            same(served, detection, size)


def test_verdict_and_regions_follow_the_threshold(champion, server):
    local = champion.detector.detect([photograph(file) for file in champion.files])
    threshold = float(np.median([detection.score for detection in local])) - 0.001
    answer = server.ask([encoded(file.read_bytes()) for file in champion.files], threshold=threshold)
    assert {row["is_anomalous"] for row in answer} == {True, False}
    for served, detection, file in zip(answer, local, champion.files, strict=True):
        same(served, detection.at(threshold), Image.open(file).size)
        assert bool(served["regions"]) == served["is_anomalous"]


def test_a_heatmap_comes_on_request_at_the_size_of_the_photograph(champion, server):
    buffer = io.BytesIO()
    large = Image.open(champion.files[0]).resize((1600, 400))
    large.save(buffer, "JPEG")
    rows = [encoded(champion.files[0].read_bytes()), encoded(buffer.getvalue())]
    maps = [Image.open(io.BytesIO(base64.b64decode(row["heatmap"]))) for row in server.ask(rows, heatmap=True)]
    assert [m.format for m in maps] == ["PNG", "PNG"]
    assert [m.size for m in maps] == [Image.open(champion.files[0]).size, (1024, 256)]
    assert "heatmap" not in server.ask(rows[:1], heatmap=False)[0]


def bad_requests(good: bytes) -> dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]]:
    """Name to rows, parameters, and what the answer says."""
    gif, row = io.BytesIO(), encoded(good)
    Image.new("RGB", (64, 64)).save(gif, "GIF")
    return {
        "text": ([row, encoded(b"no image")], {}, "row 1: `image` is not an image"),
        "truncated": ([encoded(good[: len(good) // 2])], {}, "row 0: `image` cannot be decoded"),
        "a bomb": ([encoded(png(60_000, 60_000))], {}, "decompression bomb"),
        "a smaller bomb": ([encoded(png(12_000, 12_000))], {}, "12000 x 12000 pixels"),
        "0 bytes": ([{"image": ""}], {}, "row 0: `image` has 0 bytes"),
        "another kind of image": ([encoded(gif.getvalue())], {}, "PNG, JPEG, BMP, TIFF, WEBP"),
        "no base64": ([{"image": "#!"}], {}, "row 0: `image` is not base64"),
        "a number": ([{"image": 7}], {}, "row 0: `image` must be base64"),
        "nothing": ([row, {"image": None}], {}, "row 1 needs either an `image` or a `path`"),
        "both": ([row | {"path": "a.png"}], {}, "row 0 needs either"),
        "no rows": ([], {}, "no row has a photograph"),
        "other columns": ([{"picture": 1}], {}, "no row has a photograph"),
        "10,000 images": ([row] * 10_000, {}, "10000 rows in one request, at most 256"),
        "a threshold out of range": ([row], {"threshold": 1.5}, "`threshold` is 1.5"),
        "a threshold of text": ([row], {"threshold": "high"}, "threshold"),
        "a misspelt parameter": ([row], {"treshold": 0.3}, "`params` has 'treshold', which is not known"),
        "a path outside": ([{"path": "../secret.png"}], {}, "row 0: `path` '../secret.png' leaves the folder"),
        "a path from the top": ([{"path": "/etc/passwd"}], {}, "leaves the folder"),
        "a path to nothing": ([{"path": "missing.png"}], {}, "not a file that can be read"),
        "a folder": ([{"path": "line 1"}], {}, "not a file that can be read"),
        "a path with a zero byte": ([{"path": "a\0.png"}], {}, "leaves the folder"),
        "a path too long": ([{"path": "a" * 5000}], {}, "the folder that is served"),
    }


@pytest.mark.parametrize("name", bad_requests(b""))
def test_bad_input_is_answered_by_a_sentence_and_the_server_lives_on(champion, server, name):
    good = champion.files[0].read_bytes()
    rows, params, sentence = bad_requests(good)[name]
    (before,) = server.ask([encoded(good)])
    answer = server.post(rows, **params)
    assert 400 <= answer.status_code < 500
    assert sentence in answer.json()["message"] and "stack_trace" not in answer.json()
    assert str(server.root) not in answer.text
    assert server.ask([encoded(good)]) == [before]


def test_a_path_is_read_below_the_root_and_nowhere_else(champion, server, tmp_path):
    file = champion.files[0]
    shutil.copy(file, server.root / "line 1/part 1.png")
    shutil.copy(file, tmp_path / "outside.png")
    (server.root / "within.png").symlink_to("line 1/part 1.png")
    (server.root / "without.png").symlink_to(tmp_path / "outside.png")
    (server.root / "folder").symlink_to(tmp_path)
    (server.root / "round").symlink_to("round")
    os.mkfifo(server.root / "pipe.png")
    (expected,) = server.ask([encoded(file.read_bytes())])
    # One request may have both.
    rows = [{"path": "line 1/part 1.png"}, encoded(file.read_bytes()), {"path": "within.png"}]
    assert [row["score"] for row in server.ask(rows)] == pytest.approx([expected["score"]] * 3, abs=1e-6)
    for refused in ("without.png", "folder/outside.png", "round", "pipe.png", "line 1/../../outside.png"):
        answer = server.post([{"path": refused}])
        assert answer.status_code == 400 and "the folder that is served" in answer.json()["message"], refused
        assert str(tmp_path) not in answer.text and str(server.root) not in answer.text


def test_parquet_carries_the_bytes_of_files(champion, server):
    data, buffer = champion.files[0].read_bytes(), io.BytesIO()
    pd.DataFrame({"image": [data]}).to_parquet(buffer)
    headers = {"Content-Type": "application/vnd.apache.parquet"}
    answer = httpx.post(f"{server.url}/invocations", content=buffer.getvalue(), headers=headers, timeout=60)
    assert answer.json()["predictions"] == server.ask([encoded(data)])


def test_in_python_bytes_are_taken_and_without_a_root_no_path_is(champion, tmp_path):
    code = (
        "import sys, mlflow, pandas as pd\n"
        "model = mlflow.pyfunc.load_model('models:/vlmdiff@champion')\n"
        "data = open(sys.argv[1], 'rb').read()\n"
        "print(model.predict(pd.DataFrame({'image': [data]}))['score'][0])\n"
        "for rows in ({'path': ['a.png']}, {'image': [data] * 3}):\n"
        "    try: model.predict(pd.DataFrame(rows))\n"
        "    except mlflow.MlflowException as error: print(error)\n"
    )
    environment = os.environ | champion.store | {"VLMDIFF_MAX_ROWS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(champion.files[0])],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    score, path, rows = done.stdout.splitlines()[-3:]
    (local,) = champion.detector.detect([photograph(champion.files[0])])
    assert float(score) == pytest.approx(local.score, abs=1e-6)
    assert "VLMDIFF_IMAGE_ROOT is not set" in path and "at most 2 are allowed" in rows


def test_the_card_travels_with_the_model_and_stands_in_the_registry(champion):
    code = (
        "import json, mlflow\n"
        "from mlflow.tracking import MlflowClient\n"
        "version = MlflowClient().get_model_version_by_alias('vlmdiff', 'champion')\n"
        "file = mlflow.artifacts.download_artifacts('models:/vlmdiff@champion/artifacts/model_card.md', dst_path='.')\n"
        "print(json.dumps([version.description, open(file).read()]))\n"
    )
    folder = champion.path.parent / "card"
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=os.environ | champion.store, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    description, card = json.loads(done.stdout.splitlines()[-1])
    # MLflow takes 5,000 characters: a longer card stands there without its table of classes.
    assert len(description) <= 5000 and card.partition("\n\n")[2].startswith(description.partition("\n## ")[0])
    # A template that takes a dict's method for its key prints it.
    assert "<built-in" not in card + description and "<bound" not in card + description
    card = card.replace("&ensp;", "")
    content = json.loads((champion.path / "reports/evaluation/report.json").read_text())
    assert f"a contrast of {content['detectable']['contrasts']['clear']} of 255" in card
    frame = manifest.read(champion.path / "data/manifest.parquet")
    for name, values in content["results"]["per_class"].items():
        low, high = content["intervals"]["per_class"][name]["au_pro"]
        of_class = frame[frame["class_name"] == name]
        trained, calibrated = ((of_class["split"] == split).sum() for split in ("train", "validation"))
        assert f"| {name} | {trained} | {calibrated} | {values['au_pro']:.3f} ({low:.3f} to {high:.3f}) |" in card
        counts = content["decision"]["per_class_decision"][name]["counts"]
        found, alarms = ("{} of {}".format(*counts[kind]) for kind in ("defective", "normal"))
        assert re.search(rf"\| {name} \|.*\| {found} \| {alarms} \|\n", card)
    together = content["decision"]["decision"]
    low, high = together["intervals"]["recall"]
    assert f"| recall | {together['metrics']['recall']:.3f} ({low:.3f} to {high:.3f}) |" in card
    alarms = content["alarms"]
    for said in (
        f"at most {100 * alarms['guarantee']:.1f} %",
        f"between {100 * alarms['range'][0]:.1f} % and {100 * alarms['range'][1]:.1f} %",
        content["provenance"]["manifest"],
        content["provenance"]["captions"].split(", ")[1],
        "one model pixel covers 2.0 x 2.0",
        "products other than those above",
        "ms per image",
        "Apache-2.0",
        "No pretrained part",
        "mlflow models serve",
    ):
        assert said in card
    assert str(champion.path) not in card


@pytest.mark.parametrize(
    ("share", "captions", "said", "unsaid"),
    [
        (None, "none", "Defects are where the two differ. One", "retrieval"),
        (0.0, "none", "Defects are where the two differ. One", "retrieval"),
        (0.7, "image", "The anomaly map is 30 % reconstruction and 70 % retrieval", "does not count"),
        (1.0, "none", "the reconstruction is shown, and does not count", "where the two differ"),
        (1.0, "class", "it judges them as what `class_name` says", "unknown product"),
    ],
)
def test_the_card_says_what_finds_defects_and_which_verdicts_there_are(
    champion, share, captions, said, unsaid, tmp_path, monkeypatch
):
    for part in ("reports/evaluation", "data/manifest.parquet", "params.yaml"):
        source, copy = champion.path / part, tmp_path / part
        copy.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, copy)
    detector = tmp_path / "models/detector"
    detector.mkdir(parents=True)
    for name in ("detector.json", "model_index.json"):
        shutil.copy(champion.path / "models/detector" / name, detector / name)
    facts = json.loads((detector / "detector.json").read_text())
    facts["detection"]["captions"] = captions
    (detector / "detector.json").write_text(json.dumps(facts))
    file = tmp_path / "reports/evaluation/report.json"
    content = json.loads(file.read_text())
    if share is not None:
        content["evidence"] = {"weight": share, "alone": {}, "tried": []}
    content["decision"]["per_size"]["none"] = {"counts": {"defective": [0, 0]}}
    file.write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)
    card = model_card(load(tmp_path / "params.yaml"))
    assert said in card and unsaid not in card and "0 of 0" not in card
    assert "`unknown product`" in card or captions == "class"


# What takes MLflow and torch seconds to import is asked in one process.
ROLLBACK = ["rollback", "--reason", "misses cracks", "--by", "Ada"]


def commands(workspace, *lines: list[str]) -> str:
    """Run commands of ours one after another, and return what they print."""
    return "".join(workspace.vlmdiff(*line, check=False).stdout for line in lines)


@pytest.mark.slow
@pytest.mark.usefixtures("empty_store")
def test_a_rollback_puts_the_previous_champion_back_for_good(workspace):
    set_metrics(workspace, au_pro=0.80)
    output = commands(workspace, ["register"], ROLLBACK, ["promote", "1"], ROLLBACK)
    assert "vlmdiff has no champion" in output and "is the first champion" in output
    set_metrics(workspace, au_pro=0.85)
    commands(workspace, ["register"], ["promote", "2"])
    set_metrics(workspace, au_pro=0.90)
    # That an old one is judged against a newer champion does not make that one its predecessor.
    commands(workspace, ["register"], ["promote", "3"], ["promote", "1"])
    found = registry(workspace)
    assert found["champion"] == "3" and found["tags"]["1"]["gate.champion"] == "3"

    # Two at once go two back: neither acts on what it read before the other.
    running = [
        subprocess.Popen(["vlmdiff", *ROLLBACK], cwd=workspace.path, stdout=subprocess.DEVNULL) for _ in range(2)
    ]
    assert [process.wait() for process in running] == [0, 0]
    found = registry(workspace)
    assert found["champion"] == "1"
    said = {"by": "Ada", "reason": "misses cracks"}
    for gone, back in (("3", "2"), ("2", "1")):
        tags = found["tags"][gone], found["tags"][back]
        assert {key: tags[0][f"rollback.{key}"] for key in ("by", "reason", "to")} == said | {"to": back}
        assert {key: tags[1][f"restored.{key}"] for key in ("by", "reason", "from")} == said | {"from": gone}

    # The next retrain makes the same model, and the gate knows it.
    output = commands(workspace, ROLLBACK, ["register"], ["promote", "3"])
    assert "is the first champion" in output and "this model is already version 3" in output
    assert "version 3 does not pass the gate; version 1 is champion" in output
    found = registry(workspace)
    assert found["champion"] == "1" and found["tags"]["3"]["gate.verdict"] == "failed"
    assert "version 3 was rolled back by Ada: misses cracks" in found["tags"]["3"]["gate.reasons"]

    assert workspace.vlmdiff("gate", check=False).returncode == 1
    assert "the model was rolled back by Ada: misses cracks" in (workspace.path / "reports/gate.json").read_text()

    # A person may think better of it.
    commands(workspace, ["promote", "3", "--override", "Grace", "--reason", "it was the camera"])
    found = registry(workspace)
    assert found["champion"] == "3" and not [key for key in found["tags"]["3"] if key.startswith("rollback.")]
    assert "version 1 is champion again, version 3 was rolled back by Ada" in commands(workspace, ROLLBACK)
    assert registry(workspace)["champion"] == "1"


def test_a_rollback_without_a_reason_changes_nothing(workspace):
    assert workspace.run("vlmdiff", "rollback", check=False).returncode == 2
    refused = workspace.run("vlmdiff", "rollback", "--reason", " ", check=False)
    assert refused.returncode == 2 and "takes a reason" in refused.stdout
    assert not (workspace.path / "mlflow.db").exists()
