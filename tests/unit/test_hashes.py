"""A model's folder lists the hash of each file, and one that has changed is refused by name."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.monitoring import write_model
from tests.tiny import save_tiny_detector
from vlmdiff.core.errors import InputError
from vlmdiff.core.files import HASHES, seal
from vlmdiff.detection.detector import Detector
from vlmdiff.model.pipeline import VLMDiffPipeline
from vlmdiff.production.monitor import read_reference


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place % len(data)] ^= 1
    file.write_bytes(data)


@pytest.fixture
def model(tmp_path) -> Path:
    save_tiny_detector(tmp_path / "model")
    return tmp_path / "model"


def test_one_flipped_byte_in_any_file_of_a_model_is_refused_with_the_files_name(model):
    files = [file for file in sorted(model.rglob("*")) if file.is_file()]
    assert {file.name for file in files} >= {"detector.json", "model_index.json", HASHES, "tokenizer.json"}
    for file in files:
        whole = file.read_bytes()
        for place in (0, len(whole) // 2, len(whole) - 1):
            if file.name == HASHES and whole[place : place + 1].isspace():
                continue
            flip(file, place)
            for kind in (Detector, VLMDiffPipeline):
                if kind is VLMDiffPipeline and file.name == "detector.json" and place:
                    continue  # the detector says more of its own file
                with pytest.raises(InputError) as caught:
                    kind.from_pretrained(model)
                # A hash that has changed says which file it no longer fits.
                assert file.name == HASHES or str(file) in str(caught.value)
            file.write_bytes(whole)
    assert Detector.from_pretrained(model).calibrated().images == 20


def test_a_file_that_is_gone_is_named_and_one_that_came_later_is_not(model):
    (model / "notes.txt").write_text("mine")
    Detector.from_pretrained(model)
    (model / "tokenizer/tokenizer_config.json").unlink()
    with pytest.raises(InputError, match=rf"tokenizer_config\.json is missing, and {HASHES} lists it"):
        Detector.from_pretrained(model)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "unet/../../outside"])
def test_hashes_name_no_file_outside(model, name):
    (model.parent / "outside").write_text("")
    (model / HASHES).write_text(json.dumps({name: "0" * 64}))
    with pytest.raises(InputError, match="is missing"):
        Detector.from_pretrained(model)


def test_a_model_of_an_earlier_release_loads_and_says_once_that_it_cannot_be_verified(model, capsys):
    (model / HASHES).unlink()
    for _ in range(2):
        Detector.from_pretrained(model)
    said = capsys.readouterr().out
    assert said.count(f"{model} has no {HASHES}") == 1


def test_a_saved_model_that_is_calibrated_and_saved_again_loads(model):
    detector = Detector.from_pretrained(model)
    detector.calibrate(list(np.random.default_rng(0).integers(0, 256, (5, 40, 40, 3), dtype=np.uint8)))
    detector.save_pretrained(model)
    assert Detector.from_pretrained(model).calibrated().images == 5


def test_the_monitor_refuses_calibration_images_that_have_changed(tmp_path):
    known = write_model(tmp_path / "known")
    read_reference(known)
    seal(known)
    read_reference(known)
    flip(known / "reference.parquet", 1000)
    with pytest.raises(InputError, match=r"reference\.parquet has changed since it was written"):
        read_reference(known)
