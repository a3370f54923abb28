"""What a model is judged on and what is kept of it."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tests.tiny import SIZE, tiny_pipeline
from vlmdiff.core.errors import InputError
from vlmdiff.core.params import Detection, Evaluate, Prepare
from vlmdiff.data import listing
from vlmdiff.detection.detector import Detector
from vlmdiff.evaluation.decision import clopper_pearson
from vlmdiff.evaluation.evidence import EVIDENCE, Evidence
from vlmdiff.evaluation.judging import hash_test_set, judge_images


@pytest.fixture
def photographs(tmp_path) -> Prepare:
    """Twelve photographs of a nut and their manifest: four of the six with a hole have a mask."""
    rng, root = np.random.default_rng(0), tmp_path / "raw"
    for kind in ("good", "hole"):
        (root / "nut" / kind).mkdir(parents=True)
        for i in range(6):
            pixels = rng.integers(0, 255, (SIZE, SIZE, 3), np.uint8)
            Image.fromarray(pixels).save(root / "nut" / kind / f"{i}.png")
    (root / "nut/masks/hole").mkdir(parents=True)
    for i in range(4):
        mask = np.zeros((SIZE, SIZE), np.uint8)
        mask[i : i + 8, 4:9] = 255
        Image.fromarray(mask).save(root / f"nut/masks/hole/{i}.png")
    return Prepare(layout="folder", root=root, test_fraction=0.5)


def hashed(data: Prepare, max_fpr=0.3) -> str:
    return hash_test_set(listing.build(data, data.root), data, max_fpr)


def test_the_test_set_is_its_images_their_truth_and_the_limit(photographs):
    first = hashed(photographs)
    assert hashed(photographs) == first
    assert hashed(photographs, 0.2) != first
    file = photographs.root / "nut/masks/hole/0.png"
    mask = np.array(Image.open(file))
    mask[0, 0] = 255
    Image.fromarray(mask).save(file)
    other_mask = hashed(photographs)
    assert other_mask != first
    image = photographs.root / "nut/hole/5.png"
    image.unlink()
    assert hashed(photographs) not in (first, other_mask)


def test_training_images_are_no_part_of_the_test_set(photographs):
    frame = listing.build(photographs, photographs.root)
    test = frame[frame["split"] == "test"]
    assert hash_test_set(frame, photographs, 0.3) == hash_test_set(test.iloc[::-1], photographs, 0.3)


def test_what_was_judged_is_kept_and_read_again(photographs, tmp_path):
    frame = listing.build(photographs, photographs.root)
    detector = Detector(tiny_pipeline(), Detection(samples=1))
    normal = [np.array(Image.open(photographs.root / path)) for path in frame[frame["split"] == "validation"]["path"]]
    detector.calibrate(normal)
    judged = judge_images(detector, frame, photographs, {}, Evaluate(batch_size=4, examples=1))
    judged.write(tmp_path, 1.5, {"model": "tiny"})
    again = Evidence.read(tmp_path)
    test = frame[frame["split"] == "test"]
    assert again.results.classes["nut"] == pytest.approx(judged.results.classes["nut"], abs=1e-6, nan_ok=True)
    assert again.test_set == hashed(photographs) and again.size_mb == 1.5 and again.latency_ms > 0
    assert sorted(judged.scores["image_id"]) == sorted(test["image_id"])
    assert (judged.scores["verdict"] == (judged.scores["score"] > 0.5)).all()
    kept = json.loads((tmp_path / "metrics.json").read_text())
    assert list(kept) == ["mean", "per_class", "decision", "per_class_decision", "per_defect", "per_size"]
    called, truth = judged.scores["verdict"], judged.scores["is_anomalous"]
    assert kept["decision"]["recall"] == pytest.approx(called[truth].mean(), abs=1e-6)
    assert kept["decision"]["false_alarm_rate"] == pytest.approx(called[~truth].mean(), abs=1e-6)
    assert set(kept["per_defect"]) == {"nut/hole"}
    # Four of the six holes have a mask. A mask of 40 pixels is one region.
    regions = judged.scores["regions"].tolist()
    assert sorted(map(len, regions)) == [0] * (len(regions) - 4) + [1] * 4
    assert {area for areas in regions for area in areas} == {40 / SIZE**2}
    assert again.decisions.metrics["decision"]["decision"]["recall"] == called[truth].mean()
    intervals = json.loads((tmp_path / "intervals.json").read_text())
    assert intervals["decision"]["recall"] == pytest.approx(clopper_pearson(int(called[truth].sum()), 6), abs=1e-6)
    assert json.loads((tmp_path / "plots/decision.json").read_text())[0].keys() == {
        "class_name",
        "false_alarm_rate",
        "recall",
    }
    best = judged.f1_optimal()
    assert best in judged.scores["score"].to_numpy()
    assert all((tmp_path / name).exists() for name in EVIDENCE)
    html = (tmp_path / "report.html").read_text()
    assert "tiny" in html and test["path"].iloc[0].rpartition("/")[2] in html


def test_verdicts_of_the_model_are_found_regions_where_the_map_exceeds_the_threshold(photographs):
    frame = listing.build(photographs, photographs.root)
    detector = Detector(tiny_pipeline(), Detection(samples=1))
    detector.calibrate([np.array(Image.open(photographs.root / path)) for path in frame["path"]])
    for threshold, alarms in ((-1e3, True), (1e3, False)):
        detector.calibration = replace(detector.calibrated(), threshold=threshold)
        scores = judge_images(detector, frame, photographs, {}, Evaluate(examples=0)).scores
        assert (scores["verdict"] == alarms).all()
        assert [found for row in scores["regions_found"] for found in row] == [alarms] * 4


def test_evidence_that_is_missing_or_something_else_names_the_file(tmp_path):
    with pytest.raises(InputError, match=r"judged\.json does not exist"):
        Evidence.read(tmp_path)
    (tmp_path / "judged.json").write_text(json.dumps({"test_set": "a"}))
    with pytest.raises(InputError, match=r"judged\.json is not valid"):
        Evidence.read(tmp_path)
