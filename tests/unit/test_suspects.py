"""Normal training images that are unlike the others: found, shown, and left out with a reason."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from tests.tiny import save_tiny_detector, tiny_retrieving_detector
from vlmdiff import stages
from vlmdiff.cli import app
from vlmdiff.core import workspace as w
from vlmdiff.core.errors import InputError
from vlmdiff.core.params import load
from vlmdiff.data import manifest
from vlmdiff.model.feature_space import FeatureSpace
from vlmdiff.production.inspector import Inspector
from vlmdiff.production.queue import Queue, Wanted

SLIPPED = "striped/good/4.png"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_detector(tmp_path_factory.mktemp("model") / "detector")


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """Two classes of eight normal images of 96 x 64 pixels; one image has a spot at the upper right."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name, period in (("striped", 8), ("plain", 1000)):
        folder = Path("data/raw", name, "good")
        folder.mkdir(parents=True)
        for i in range(8):
            pixels = np.tile(np.where(np.arange(96) % period < period / 2, 90, 160)[None, :, None], (64, 1, 3))
            pixels = np.clip(pixels + rng.normal(0, 6, pixels.shape), 0, 255)
            if f"{name}/good/{i}.png" == SLIPPED:
                pixels[8:20, 70:84] = [230, 40, 40]
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    Path("params.yaml").write_text(yaml.safe_dump({"prepare": {"layout": "folder", "test_fraction": 0.01}}))
    stages.prepare(load().prepare, w.MADE, w.MANIFEST)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def test_what_slipped_in_comes_first_and_is_left_out_with_a_reason(dataset, model):
    said = run("suspects", "--model", str(model))
    assert "16 normal" in said and SLIPPED in said
    rows = pd.read_parquet(w.SUSPECTS).sort_values("score", ascending=False)
    assert len(rows) == 16 and rows["path"].iloc[0].endswith(SLIPPED) and rows["is_anomalous"].iloc[0]
    assert "at the upper right" in rows["explanation"].iloc[0]
    # The page lists it first, with its map, and asks whether it stays.
    queue = Queue(w.SUSPECTS, load(), is_training=True)
    first = queue.listed(Wanted())["items"][0]
    assert first["path"].endswith(SLIPPED) and first["product"] == "striped"
    assert queue.picture(first["id"], "map") and queue.picture(first["id"], "photograph")
    page = Inspector(load(), w.SCORES, None)
    body = {"source": "suspects", "ids": [first["id"]], "by": "Ada Lovelace", "truth": "excluded", "defect": "a spot"}
    assert page.answer(body)["said"][first["id"]]["why"] == "a spot"
    assert first["id"] not in {item["id"] for item in queue.listed(Wanted())["items"]}

    stages.prepare(load().prepare, w.MADE, w.MANIFEST)
    assert SLIPPED not in set(manifest.read(w.MANIFEST)["path"]) and Path("data/raw", SLIPPED).exists()
    (row,) = [json.loads(line) for line in Path("data/raw/excluded.jsonl").read_text().splitlines()]
    assert (row["path"], row["by"], row["excluded"]) == (SLIPPED, "Ada Lovelace", True)
    page.undo({"source": "suspects", "ids": [first["id"]], "by": "Grace Hopper"})
    assert first["id"] in {item["id"] for item in queue.listed(Wanted())["items"]}
    stages.prepare(load().prepare, w.MADE, w.MANIFEST)
    assert SLIPPED in set(manifest.read(w.MANIFEST)["path"])


@pytest.mark.parametrize("patches", [8 * 64, 8 * 20])
def test_with_a_bank_what_slipped_in_comes_first_whether_or_not_the_bank_has_all_patches(
    patches, dataset, saved, tmp_path, monkeypatch
):
    detector = tiny_retrieving_detector(saved("vit"), tmp_path / "state")
    wanted = detector.params.retrieval.model_copy(update={"patches": patches})
    detector.params = detector.params.model_copy(update={"retrieval": wanted})
    detector.save_pretrained(tmp_path / "detector")
    asked, features = [], FeatureSpace.features
    monkeypatch.setattr(
        FeatureSpace, "features", lambda self, x, *size: asked.append(len(x)) or features(self, x, *size)
    )
    run("suspects", "--model", str(tmp_path / "detector"))
    rows = pd.read_parquet(w.SUSPECTS).sort_values("score", ascending=False)
    assert len(rows) == 16 and rows["path"].iloc[0].endswith(SLIPPED) and rows["is_anomalous"].iloc[0]
    # What the bank has whole is encoded once.
    assert sum(asked) == (16 if patches == 8 * 64 else 32)


def test_an_image_is_excluded_and_taken_back_by_a_command(dataset):
    assert "1 image left out" in run("exclude", SLIPPED, "--reason", "a spot", "--by", "Ada")
    stages.prepare(load().prepare, w.MADE, w.MANIFEST)
    assert SLIPPED not in set(manifest.read(w.MANIFEST)["path"])
    assert "taken in again" in run("exclude", SLIPPED, "--back", "--reason", "a reflection", "--by", "Ada")
    stages.prepare(load().prepare, w.MADE, w.MANIFEST)
    assert SLIPPED in set(manifest.read(w.MANIFEST)["path"])
    for words in (["striped/good/99.png", "--reason", "x"], ["../x.png", "--reason", "x"], [SLIPPED, "--reason", " "]):
        with pytest.raises(InputError):
            run("exclude", *words, "--by", "Ada")


def test_a_class_of_two_images_has_nothing_to_be_unlike(dataset, model):
    for i in range(2, 8):
        Path(f"data/raw/plain/good/{i}.png").unlink()
    stages.prepare(load().prepare, w.MADE, w.MANIFEST)
    with pytest.raises(InputError, match="'plain' has 2 normal images"):
        run("suspects", "--model", str(model))
