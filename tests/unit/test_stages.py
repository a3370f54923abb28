"""Stages: run before their time they say which is to run first; what is large is in memory a part at a time."""

import tracemalloc

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from tests.tiny import SIZE, tiny_pipeline
from vlmdiff import params as p
from vlmdiff import stages
from vlmdiff.cli import app
from vlmdiff.data import manifest

SECTIONS = ("validate", "caption", "first_stage", "encode", "train", "evaluate", "gate")


@pytest.fixture(scope="module")
def captioned(tmp_path_factory, run):
    """A workspace in which the first stages ran."""
    folder = tmp_path_factory.mktemp("workspace")
    demo = {"train": 2, "test_good": 1, "test_per_defect": 1, "size": 64}
    params = {"prepare": {"layout": "demo", "demo": demo}, **{section: {} for section in SECTIONS}}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    for stage in ("prepare", "caption"):
        assert run(stage, folder).exit_code == 0
    return folder


@pytest.fixture(scope="module")
def run():
    def run(stage, folder):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            return CliRunner().invoke(app, [stage])

    return run


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ("encode", "models/first_stage holds no first stage: run the first_stage stage first"),
        ("train", "data/encoded does not exist: run the stages before this one first"),
        ("evaluate", "models/vlmdiff holds no pipeline: run the train stage first"),
    ],
)
def test_a_stage_before_its_time_says_what_to_run_first(captioned, run, stage, said) -> None:
    done = run(stage, captioned)
    assert done.exit_code != 0
    assert said in str(done.exception)


def test_nothing_is_captioned_before_there_is_a_manifest(tmp_path, captioned, run) -> None:
    (tmp_path / "params.yaml").write_text((captioned / "params.yaml").read_text())
    assert "run the prepare stage first" in str(run("caption", tmp_path).exception)


def test_evaluate_holds_the_maps_of_one_class_at_a_time(tmp_path) -> None:
    root, count = tmp_path / "raw", 120
    for kind in ("good", "hole"):
        (root / "nut" / kind).mkdir(parents=True)
        for i in range(4):
            pixels = np.random.default_rng([kind == "good", i]).integers(0, 255, (SIZE, SIZE, 3), np.uint8)
            Image.fromarray(pixels).save(root / "nut" / kind / f"{i}.png")
    data = p.Prepare(layout="folder", root=root)
    frame = manifest.build(data, root)
    (tmp_path / "captions.jsonl").touch()
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")

    def peak(classes: int) -> int:
        """Bytes, where each of so many classes has `count` test images."""
        some = frame[frame["split"] == "test"]
        some = pd.concat([some] * -(-count // len(some)))[:count]
        parts = [frame[frame["split"] != "test"], *(some.assign(class_name=f"nut {i}") for i in range(classes))]
        manifest.write(pd.concat(parts), tmp_path / "manifest.parquet")
        params = p.Evaluate(detection=p.Detection(noise_level=500, samples=1, steps=1), examples=1)
        files = ("manifest.parquet", "captions.jsonl", "pipeline", "detector", "evaluation")
        tracemalloc.start()
        try:
            stages.evaluate(params, data, *(tmp_path / name for name in files))
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(1)
    one_class_of_maps = 4 * count * SIZE**2
    assert peak(6) - peak(1) < 2 * one_class_of_maps
