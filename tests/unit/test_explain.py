"""A verdict in words: the regions and their shares, how a caption differs, and the most similar normal image."""

import base64
import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.tiny import SIZE, named, tiny_detector
from vlmdiff.captions.describe import describe
from vlmdiff.core.errors import InputError
from vlmdiff.core.files import seal
from vlmdiff.core.params import Params
from vlmdiff.detection.detector import Detector
from vlmdiff.detection.explain import Region, difference, explain, find_regions
from vlmdiff.production.inspector import Model
from vlmdiff.production.monitor import read_scores
from vlmdiff.production.queue import Queue, Wanted
from vlmdiff.production.score import score
from vlmdiff.registry.served import Inspector

NORMAL = [
    "One large rectangular light grey object on a dark grey background. On it eight round red parts in two rows.",
    "One large rectangular light grey object on a grey background. On it eight round red parts in two rows.",
]


def test_the_shares_of_regions_are_those_of_the_evidence_above_the_threshold():
    level = np.full((20, 20), 0.2, np.float32)
    level[2:4, 2:4] = 0.75  # three times the threshold: 2 above it, at 4 places
    level[10:12, 10:14] = 0.6  # 1.5 times: 0.5 above it, at 8 places
    first, second = find_regions(level)
    assert (first.area, second.area) == (4, 8)
    assert first.share == pytest.approx(2 / 3, abs=1e-5) and second.share == pytest.approx(1 / 3, abs=1e-5)


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        (NORMAL[0], None),
        (NORMAL[0].replace("eight", "seven"), "eight round red parts expected, seven seen"),
        (NORMAL[1].replace("red", "blue"), "red parts expected, blue seen"),
        (NORMAL[1].replace("red", "blue and red"), "blue seen, not expected"),
        (NORMAL[1].replace("red", "red and blue"), "blue parts seen, not expected"),
        (NORMAL[1].replace("eight round", "eight mostly round"), "mostly round red parts seen, not expected"),
        (NORMAL[1].replace("grey background", "background"), "grey background expected, not seen"),
        (NORMAL[1].replace(" On it eight round red parts in two rows.", ""), None),
    ],
)
def test_a_caption_is_compared_with_the_normal_caption_that_is_closest(caption, words):
    found = difference(caption, NORMAL)
    assert found == words or (words is None and found and "expected, not seen" in found)


def test_without_normal_captions_there_is_no_difference():
    assert difference("Eight parts.", []) is None


def test_the_sentences_name_what_is_known_and_nothing_else():
    regions = [Region(0, 0, 10, 10, 90, 0.9, 0.75), Region(45, 45, 55, 55, 30, 0.6, 0.25)]
    assert explain("normal", 0.25, [], (100, 100)) == "Normal, score 0.250."
    said = explain("anomalous", 0.9, regions, (100, 100), "red expected, blue seen", "a/b.png", "flange", 1 / 121, 120)
    assert said == (
        "Anomalous, score 0.900. Product: flange. "
        "More unusual for its product than 120 of 120 normal images are for theirs. "
        "Two regions: 90 px at the upper left (75 % of the evidence) and 30 px in the centre (25 %). "
        "In words: red expected, blue seen. Most similar normal training image: a/b.png."
    )


@pytest.fixture(scope="module")
def detector():
    rng = np.random.default_rng(1)
    normal = [np.clip(rng.normal(128, 6, (SIZE, SIZE, 3)) + shade, 0, 255).astype(np.uint8) for shade in (-60, 0, 60)]
    detector = tiny_detector(samples=1, steps=1)
    known = [
        replace(one, caption=describe(Image.fromarray(image))) for one, image in zip(named(3), normal, strict=True)
    ]
    detector.learn(normal, known, described=True)
    detector.calibrate(normal)
    return detector, normal


def test_the_nearest_normal_image_is_the_most_similar_one(detector):
    detector, normal = detector
    found = detector.detect([np.clip(image.astype(int) + 3, 0, 255).astype(np.uint8) for image in normal])
    assert [one.nearest.path for one in found] == [f"thing/good/{i}.png" for i in range(3)]


def test_an_alarm_is_explained_in_the_photographs_own_pixels_and_in_words(detector):
    detector, normal = detector
    spoiled = np.asarray(Image.fromarray(normal[1]).resize((4 * SIZE, 2 * SIZE))).copy()
    # A tint changes the description of the whole.
    spoiled[..., 2] = np.clip(spoiled[..., 2].astype(int) + 60, 0, 255)
    (found,) = detector.detect([spoiled])
    (at,) = (found.at(0.01),)
    area = sum(region.area for region in at.scaled_regions(4 * SIZE, 2 * SIZE))
    assert at.size == (4 * SIZE, 2 * SIZE) and area > 600
    assert at.explanation.startswith("Anomalous, score") and " px " in at.explanation
    assert "In words: " in at.explanation and "seen" in at.explanation
    assert at.explanation.endswith("Most similar normal training image: thing/good/1.png.")
    # What is normal has nothing to explain.
    assert "In words" not in found.at(0.999).explanation


def test_a_saved_detector_remembers_its_normal_images(detector, tmp_path):
    detector, normal = detector
    detector.save_pretrained(tmp_path)
    again = Detector.from_pretrained(tmp_path, "cpu")
    assert [one.at(0.01).explanation for one in again.detect(normal)] == [
        one.at(0.01).explanation for one in detector.detect(normal)
    ]


def test_python_score_the_served_model_and_the_page_say_the_same(detector, tmp_path, monkeypatch):
    detector, normal = detector
    monkeypatch.chdir(tmp_path)
    detector.save_pretrained("model")
    settings = json.loads(Path("model/detector.json").read_text())
    settings["calibration"]["threshold"] -= 50
    Path("model/detector.json").write_text(json.dumps(settings))
    seal(Path("model"))
    spoiled = np.asarray(Image.fromarray(normal[1]).resize((300, 200))).copy()
    spoiled[..., 2] = np.clip(spoiled[..., 2].astype(int) + 60, 0, 255)
    Image.fromarray(spoiled).save("new.png")

    (found,) = Detector.from_pretrained("model").detect([spoiled])
    assert found.explanation.startswith("Anomalous") and "In words: " in found.explanation
    assert "px in the centre" in found.explanation

    # As the flow `score` does: a folder for each version.
    score(["new.png"], Path("out/model-1"), Params(), Path("model"))
    assert len(read_scores(Path("out"))) == 1
    (row,) = pd.read_parquet("out").to_dict("records")
    assert row["explanation"] == found.explanation and row["nearest"] == found.nearest.path
    assert row["regions"][0]["share"] == pytest.approx(found.regions[0].share, abs=1e-4)

    served = Inspector()
    served.load_context(SimpleNamespace(artifacts={"detector": "model"}, model_config={"max_pixels": 10**6}))
    image = base64.b64encode(Path("new.png").read_bytes()).decode()
    (answer,) = served.predict(None, pd.DataFrame({"image": [image]})).to_dict("records")
    assert answer["explanation"] == found.explanation and answer["nearest"] == found.nearest.path

    queue = Queue(Path("out"), Params())
    (item,) = queue.listed(Wanted())["items"]
    assert item["text"] == found.explanation
    level = np.asarray(Image.open(io.BytesIO(queue.picture(item["id"], "map"))))[..., 3]
    assert level == pytest.approx(255 * found.anomaly_map, abs=1)
    assert queue.picture(item["id"], "reconstruction").startswith(b"\xff\xd8")
    # The training images are not here.
    assert queue.picture(item["id"], "nearest") is None
    photograph, brought = Model(Path("model"), "it").judge(Path("new.png").read_bytes(), "new.png", 10**6)
    assert photograph.verdict(brought)["explanation"] == found.explanation


@pytest.mark.parametrize("damage", ["empty", "cut", "garbage", "other"])
def test_a_damaged_list_of_normal_images_is_named(detector, tmp_path, damage):
    detector[0].save_pretrained(tmp_path)
    file = tmp_path / "normals.safetensors"
    whole = file.read_bytes()
    if damage == "other":
        save_file({"features": torch.full((3, 8), torch.nan)}, file, {"images": "[]", "described": "true"})
    else:
        file.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "garbage": b"x" * 500}[damage])
    seal(tmp_path)
    with pytest.raises(InputError, match=r"normals\.safetensors does not list normal images"):
        Detector.from_pretrained(tmp_path, "cpu")
