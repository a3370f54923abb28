"""Stages: run before their time they say which is to run first; what is large is in memory a part at a time."""

import tracemalloc
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from tests.tiny import SIZE, tiny_pipeline
from vlmdiff import stages
from vlmdiff.captions.files import write_captions
from vlmdiff.cli import app
from vlmdiff.core import params as p
from vlmdiff.data import listing, manifest
from vlmdiff.detection.detector import Detector
from vlmdiff.evaluation.judging import judge_images
from vlmdiff.model.normalization import Normalization
from vlmdiff.training.encoded import Encoded

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
        ("encode", "models/first_stage has no first stage. Run vlmdiff first_stage first."),
        ("train", "data/encoded does not exist. Run the earlier stages first"),
        ("evaluate", "models/vlmdiff has no pipeline. Run `vlmdiff train` first"),
    ],
)
def test_a_stage_before_its_time_says_what_to_run_first(captioned, run, stage, said) -> None:
    done = run(stage, captioned)
    assert done.exit_code != 0
    assert said in str(done.exception)


def test_nothing_is_captioned_before_there_is_a_manifest(tmp_path, captioned, run) -> None:
    (tmp_path / "params.yaml").write_text((captioned / "params.yaml").read_text())
    assert "Run vlmdiff prepare first" in str(run("caption", tmp_path).exception)


@pytest.fixture
def photographs(tmp_path):
    """All that encode and evaluate read: eight photographs, their manifest and captions, an untrained pipeline."""
    for kind in ("good", "hole"):
        (tmp_path / "raw/nut" / kind).mkdir(parents=True)
        for i in range(4):
            pixels = np.random.default_rng([kind == "good", i]).integers(0, 255, (SIZE, SIZE, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "raw/nut" / kind / f"{i}.png")
    data = p.Prepare(layout="folder", root=tmp_path / "raw")
    frame = listing.build(data, data.root)
    manifest.write(frame, tmp_path / "manifest.parquet")
    write_captions(frame.assign(caption="a nut"), tmp_path / "captions.jsonl")
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path / "pipeline")
    pipeline.vae.save_pretrained(tmp_path / "first_stage")
    Normalization().save(tmp_path / "first_stage")
    return SimpleNamespace(root=tmp_path, data=data)


@pytest.mark.parametrize(
    ("directions", "axes"),
    [([], [()]), (["horizontal"], [(), (1,)]), (["horizontal", "vertical"], [(), (0,), (1,), (0, 1)])],
)
def test_training_images_and_no_others_are_mirrored(photographs, directions, axes) -> None:
    data, root = photographs.data, photographs.root
    stages.encode(
        p.Encode(mirror=directions, text_encoder={"kind": "trained", "steps": 1}),
        data,
        *(root / name for name in ("manifest.parquet", "captions.jsonl", "first_stage", "encoded")),
    )
    found = Encoded.open(root / "encoded")
    frame = manifest.read(root / "manifest.parquet").set_index("image_id")
    rows = {split: found.index[found.index["split"] == split] for split in ("train", "validation")}
    for image_id, copies in rows["train"].groupby("image_id"):
        image = np.array(Image.open(data.root / frame["path"][image_id]))
        expected = {np.flip(image, one).tobytes() for one in axes}
        assert {found.hints[i].tobytes() for i in copies.index} == expected and len(copies) == len(axes)
        # A latent is its own image's, not that of the photograph it mirrors.
        assert len({found.mean[i].tobytes() for i in copies.index}) == len(axes)
    assert len(rows["validation"]) == (frame["split"] == "validation").sum()


def test_evaluation_holds_the_maps_of_one_class_at_a_time(photographs) -> None:
    root, data, count = photographs.root, photographs.data, 80
    frame, params = manifest.read(root / "manifest.parquet"), p.Evaluate(detection=p.Detection(samples=1), examples=1)
    files = ("manifest.parquet", "captions.jsonl", "pipeline", "detector", "evaluation")
    stages.evaluate(p.Params(prepare=data, evaluate=params), *(root / name for name in files))
    detector, test = Detector.from_pretrained(root / "detector"), frame[frame["split"] == "test"]

    def peak(classes: int) -> int:
        """Bytes, where each of so many classes has `count` test images."""
        some = pd.concat([test] * -(-count // len(test)))[:count]
        many = pd.concat([some.assign(class_name=f"nut {i}") for i in range(classes)])
        tracemalloc.start()
        try:
            judge_images(detector, many, data, {}, params)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    # What the report shows of all classes together is complete after some of them.
    few, many = peak(4), peak(6)
    assert many - few < 2 * (4 * count * SIZE**2)
