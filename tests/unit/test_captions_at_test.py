"""Captions at test: what evaluate supplies, what score and the served model ask for."""

import base64
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from PIL import Image

from tests.tiny import CAPTIONS, SIZE, tiny_pipeline
from vlmdiff import stages
from vlmdiff.captions.files import write_captions
from vlmdiff.core import params as p
from vlmdiff.core.errors import InputError
from vlmdiff.data import listing, manifest
from vlmdiff.detection.detector import Detector
from vlmdiff.production.score import score

COLOURS = {"ball": (200, 30, 30), "fabric": (30, 160, 60)}


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    """All that evaluate reads: photographs of two classes, their manifest and captions, a pipeline."""
    root = tmp_path_factory.mktemp("line")
    generator = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        for kind, count in (("good", 12), ("hole", 2)):
            (root / "raw" / name / kind).mkdir(parents=True)
            for i in range(count):
                pixels = np.array(colour) + generator.integers(-20, 20, (SIZE, SIZE, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(root / "raw" / name / kind / f"{i}.png")
    data = p.Prepare(layout="folder", root=root / "raw")
    frame = listing.build(data, data.image_root)
    manifest.write(frame, root / "manifest.parquet")
    # Of each class the training images agree but for one; the others' captions would change the majority.
    frame["caption"] = np.where(frame["class_name"] == "ball", CAPTIONS[0], CAPTIONS[2])
    frame.loc[frame["split"] != "train", "caption"] = CAPTIONS[1]
    first = frame[frame["split"] == "train"].groupby("class_name").head(1).index
    frame.loc[first, "caption"] = "something else"
    write_captions(frame, root / "captions.jsonl")
    tiny_pipeline().save_pretrained(root / "pipeline")
    return SimpleNamespace(root=root, data=data, frame=frame)


def evaluate(line, out, **detection):
    judging = p.Evaluate(detection=p.Detection(noise_level=700, samples=1, guidance=3.0, **detection), examples=1)
    params = p.Params(prepare=line.data, train=p.Train(noise_levels=(0, 999)), evaluate=judging)
    root = line.root
    stages.evaluate(params, root / "manifest.parquet", root / "captions.jsonl", root / "pipeline", out / "d", out / "e")
    return Detector.from_pretrained(out / "d")


def photographs(line, split):
    rows = line.frame[line.frame["split"] == split]
    return rows, [np.array(Image.open(line.data.root / path)) for path in rows["path"]]


@pytest.mark.parametrize("kind", ["image", "class"])
def test_evaluate_calibrates_and_judges_with_the_captions(line, tmp_path, kind):
    detector = evaluate(line, tmp_path, captions=kind)
    rows, normal = photographs(line, "validation")
    captions = rows["caption"].tolist()
    if kind == "class":
        assert detector.class_captions == {"ball": CAPTIONS[0], "fabric": CAPTIONS[2]}
        captions = detector.captions_of(rows["class_name"])
    again = Detector(detector.pipeline, detector.params, class_captions=detector.class_captions)
    again.calibrate(normal, captions=captions)
    assert again.calibration.scales == pytest.approx(detector.calibration.scales, rel=1e-4)
    again.calibrate(normal, captions=["something else"] * len(normal))
    assert again.calibration.scales != pytest.approx(detector.calibration.scales, rel=1e-4)


def test_evaluate_names_the_image_that_has_no_caption(line, tmp_path):
    file = line.root / "captions.jsonl"
    rows = [json.loads(row) for row in file.read_text().splitlines()]
    gone = next(row for row in rows if row["split"] == "validation")
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows if row is not gone))
    params = p.Params(prepare=line.data, evaluate=p.Evaluate(detection=p.Detection(captions="image")))
    with pytest.raises(InputError, match=f"{gone['path']} has no caption"):
        stages.evaluate(
            params,
            line.root / "manifest.parquet",
            tmp_path / "captions.jsonl",
            line.root / "pipeline",
            tmp_path / "d",
            tmp_path / "e",
        )


def judge(model, images, **columns):
    """As MLflow loads and asks the registered model."""
    from vlmdiff.registry.served import Inspector

    inspector = Inspector()
    inspector.load_context(SimpleNamespace(artifacts={"detector": str(model)}, model_config={"max_pixels": 10**6}))
    encoded = [base64.b64encode(file.read_bytes()).decode() for file in images]
    return inspector.predict(None, pd.DataFrame({"image": encoded, **columns}))


def test_a_detector_by_class_asks_for_the_class(line, tmp_path):
    detector = evaluate(line, tmp_path, captions="class")
    files = sorted((line.data.root / "ball" / "hole").glob("*.png"))
    expected = [
        found.score
        for found in detector.detect([np.array(Image.open(f)) for f in files], captions=[CAPTIONS[0]] * len(files))
    ]
    sources, model = [str(file) for file in files], tmp_path / "d"
    scored = score(sources, tmp_path / "out", p.Params(), model, "ball")
    assert [row["score"] for row in scored.rows] == pytest.approx(expected, abs=1e-5)
    table = tmp_path / "table.csv"
    shutil.copytree(line.data.root / "ball" / "hole", tmp_path / "hole")
    table.write_text("path,class_name\n" + "".join(f"hole/{file.name},ball\n" for file in files))
    scored = score([str(table)], tmp_path / "by_table", p.Params(), model)
    assert [row["score"] for row in scored.rows] == pytest.approx(expected, abs=1e-5)
    assert judge(tmp_path / "d", files, class_name="ball")["score"].tolist() == pytest.approx(expected, abs=1e-5)
    for class_name, words in ((None, "--class-name"), ("cable", "only ball, fabric")):
        with pytest.raises(InputError, match=words):
            score(sources, tmp_path / "other", p.Params(), model, class_name)
        assert not (tmp_path / "other").exists()
    with pytest.raises(MlflowException, match="only ball, fabric"):
        judge(tmp_path / "d", files, class_name="cable")


def test_a_detector_by_image_asks_for_a_table_of_captions(line, tmp_path):
    detector = evaluate(line, tmp_path, captions="image")
    files = sorted((line.data.root / "ball" / "hole").glob("*.png"))
    with pytest.raises(InputError, match=r"0\.png: .* table with columns path and caption"):
        score([str(file) for file in files], tmp_path / "out", p.Params(), tmp_path / "d")
    assert not (tmp_path / "out").exists()
    judged = judge(tmp_path / "d", files, caption=[CAPTIONS[0], CAPTIONS[1]])["score"].tolist()
    images = [np.array(Image.open(file)) for file in files]
    expected = [found.score for found in detector.detect(images, captions=[CAPTIONS[0], CAPTIONS[1]])]
    assert judged == pytest.approx(expected, abs=1e-6)
    shutil.copytree(line.data.root / "ball" / "hole", tmp_path / "hole")
    captioned = pd.DataFrame({"path": [f"hole/{file.name}" for file in files], "caption": CAPTIONS[:2]})
    captioned.to_parquet(tmp_path / "table.parquet")
    scored = score([str(tmp_path / "table.parquet")], tmp_path / "out", p.Params(), tmp_path / "d")
    assert [row["score"] for row in scored.rows] == pytest.approx(expected, abs=1e-5)
    with pytest.raises(MlflowException, match="row 1: `caption` must be text"):
        judge(tmp_path / "d", files, caption=[CAPTIONS[0], None])


def test_a_detector_without_captions_takes_a_class_that_it_knows(line, tmp_path):
    files = sorted((line.data.root / "ball" / "hole").glob("*.png"))
    evaluate(line, tmp_path)
    score([str(files[0])], tmp_path / "out", p.Params(), tmp_path / "d", "fabric")
    assert pd.read_parquet(tmp_path / "out")["product"].tolist() == ["fabric"]
    with pytest.raises(InputError, match="does not know the class 'cable', only ball, fabric"):
        score([str(files[0])], tmp_path / "other", p.Params(), tmp_path / "d", "cable")
    assert not (tmp_path / "other").exists()
