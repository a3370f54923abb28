"""Wrong input stops the line with the rule and the files, through the commands that a user types."""

import contextlib
import io
import json
import os
import re
import shutil
import sys
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from vlmdiff.cli import main

CONTRACT = {"min_images": {"train": 3, "validation": 1, "test": 2}, "near_duplicate_bits": 0}


def photograph(path, seed, size=(40, 36)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def mask(path, values=255, size=(40, 36)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((size[1], size[0]), np.uint8)
    pixels[10:20, 10:20] = values
    Image.fromarray(pixels).save(path)


@pytest.fixture
def place(tmp_path):
    """A folder with a sound dataset in MVTec-AD's layout, and params.yaml."""
    for c, name in enumerate(("nut", "bolt")):
        root = tmp_path / "photos" / name
        for i in range(6):
            photograph(root / "train/good" / f"{i}.png", 100 * c + i)
        photograph(root / "test/good/0.png", 100 * c + 50)
        photograph(root / "test/bent/0.png", 100 * c + 51)
        mask(root / "ground_truth/bent/0_mask.png")
    write(tmp_path)
    return tmp_path


def write(folder, validate=CONTRACT, **prepare):
    sections = {"prepare": {"layout": "mvtec_ad", "root": "photos", **prepare}, "validate": validate}
    (folder / "params.yaml").write_text(yaml.safe_dump(sections))


def check(folder) -> tuple[int, str]:
    """Exit status and standard error of `vlmdiff prepare` and, where that went well, `vlmdiff validate`."""
    status, errors = 0, io.StringIO()
    with contextlib.chdir(folder), patch.dict(os.environ), contextlib.redirect_stderr(errors):
        for stage in ("prepare", "validate"):
            with patch.object(sys, "argv", ["vlmdiff", stage]):
                try:
                    main()
                except SystemExit as end:
                    status = end.code or 0
            if status:
                break
    return status, errors.getvalue()


def broken_rules(folder) -> set[str]:
    verdict = json.loads((folder / "reports/data/validation.json").read_text())
    assert not verdict["passed"]
    return {row["rule"] for row in verdict["findings"] if not row["passed"] and row["severity"] == "error"}


def test_a_sound_dataset_passes_and_leaves_pages_to_open(place):
    status, errors = check(place)
    assert status == 0, errors
    assert json.loads((place / "reports/data/validation.json").read_text())["passed"]
    pages = list((place / "reports/data/docs").rglob("*.html"))
    assert len(pages) == 5
    for page in pages:
        # All that a page has is in it: it looks the same where there is no internet, and tells nobody that it was read.
        assert not re.search(r"<script|<link[^>]*stylesheet|src=|url\(", page.read_text())


def spoil(photos, how):
    good, bent, truth = (
        photos / "nut/train/good/0.png",
        photos / "nut/test/bent/0.png",
        photos / "nut/ground_truth/bent/0_mask.png",
    )
    match how:
        case "truncated":
            good.write_bytes(good.read_bytes()[:1000])
        case "text":
            good.write_text("this is no image")
        case "bomb":
            Image.new("1", (20_000, 20_000)).save(good)
        case "mode":
            Image.new("CMYK", (40, 36)).save(good.with_suffix(".jpg"))
        case "small":
            photograph(good, 7, (20, 36))
        case "mask size":
            mask(truth, size=(41, 36))
        case "mask values":
            Image.fromarray(np.arange(1440, dtype=np.uint8).reshape(36, 40)).save(truth)
        case "mask empty":
            mask(truth, 0)
        case "no mask":
            truth.unlink()
        case "mask of normal":
            mask(photos / "nut/ground_truth/good/0_mask.png")
        case "anomalous train":
            (photos / "nut/train/bent").mkdir()
            bent.rename(photos / "nut/train/bent/0.png")
        case "both":
            shutil.copy(good, photos / "nut/test/good/9.png")
        case "both labels":
            shutil.copy(photos / "nut/test/good/0.png", photos / "nut/test/bent/9.png")
            mask(photos / "nut/ground_truth/bent/9_mask.png")
        case "two images":
            photograph(photos / "screw/train/good/0.png", 900)
            photograph(photos / "screw/train/good/1.png", 901)


@pytest.mark.parametrize(
    ("how", "rule", "file"),
    [
        ("truncated", "readable", "nut/train/good/0.png"),
        ("text", "readable", "nut/train/good/0.png"),
        ("bomb", "readable", "nut/train/good/0.png"),
        ("mode", "mode", "nut/train/good/0.jpg"),
        ("small", "size", "nut/train/good/0.png"),
        ("mask size", "mask_size", "nut/test/bent/0.png"),
        ("mask values", "mask_binary", "nut/test/bent/0.png"),
        ("mask empty", "mask_empty", "nut/test/bent/0.png"),
        ("no mask", "mask_exists", "nut/test/bent/0.png"),
        ("mask of normal", "mask_normal", "nut/test/good/0.png"),
        ("anomalous train", "normal_training", "nut/train/bent/0.png"),
        ("both", "test_apart", "nut/train/good/0.png = nut/test/good/9.png"),
        ("both labels", "unique_image", "nut/test/good/0.png = nut/test/bent/9.png"),
        ("two images", "enough_images", "screw/train"),
    ],
)
def test_wrong_input_is_stopped_by_its_rule_with_the_file(place, how, rule, file):
    spoil(place / "photos", how)
    status, errors = check(place)
    assert status == 2
    assert rule in broken_rules(place)
    (line,) = [line for line in errors.splitlines() if line.strip().startswith(f"{rule} (")]
    assert file in line


def test_a_rule_that_many_files_break_names_ten_and_says_how_many(place):
    for i in range(12):
        (place / f"photos/nut/train/good/bad{i:02}.png").write_text("no image")
    status, errors = check(place)
    (line,) = [line for line in errors.splitlines() if line.strip().startswith("readable (")]
    assert status == 2 and "broken by 12" in line and line.count(".png") == 10


@pytest.mark.parametrize("what", ["link", "empty", "missing", "unknown key", "bad value"])
def test_what_is_no_dataset_or_no_parameter_is_refused_and_nothing_is_written(place, what):
    match what:
        case "link":
            photograph(place / "elsewhere.png", 5)
            (place / "photos/nut/train/good/link.png").symlink_to(place / "elsewhere.png")
        case "empty":
            shutil.rmtree(place / "photos")
            (place / "photos").mkdir()
        case "missing":
            shutil.rmtree(place / "photos")
        case "unknown key":
            write(place, validate={"modez": ["RGB"]})
        case "bad value":
            write(place, validation_fraction=2)
    status, errors = check(place)
    expected = {
        "link": "link.png",
        "empty": "no images",
        "missing": "photos",
        "unknown key": "modez",
        "bad value": "fraction",
    }
    assert status == 2 and errors.startswith("error: ") and expected[what] in errors
    assert not (place / "data/manifest.parquet").exists() and not (place / "reports").exists()


def test_masks_are_optional_where_the_parameters_say_so(place):
    spoil(place / "photos", "no mask")
    write(place, validate={**CONTRACT, "masks": "optional"})
    status, errors = check(place)
    assert status == 0, errors


def test_look_alikes_across_splits_and_imbalance_are_warnings(place):
    image = Image.open(place / "photos/nut/train/good/0.png")
    image.save(place / "photos/nut/test/good/8.bmp")
    for i in range(20):
        photograph(place / f"photos/nut/train/good/more{i}.png", 500 + i)
    write(place, validate={**CONTRACT, "max_imbalance": 2.0})
    status, errors = check(place)
    assert status == 0, errors
    rows = json.loads((place / "reports/data/validation.json").read_text())["findings"]
    warned = {row["rule"]: row["files"] for row in rows if not row["passed"]}
    assert warned == {"near_duplicate": ["nut/test/good/8.bmp"], "balance": ["bolt"]}


def listed(folder) -> set[str]:
    return set(pd.read_parquet(folder / "data/manifest.parquet")["path"])


def test_copies_within_a_split_are_left_out_with_a_warning_and_their_number(place, capfd):
    photos = place / "photos/nut"
    for i in range(3):
        shutil.copy(photos / "train/good/0.png", photos / f"train/good/again{i}.png")
    shutil.copy(photos / "test/bent/0.png", photos / "test/bent/again.png")
    mask(photos / "ground_truth/bent/again_mask.png")
    status, errors = check(place)
    assert status == 0, errors
    assert "warning: 4 images are left out, with the same bytes as another image of the same split: " in (
        said := capfd.readouterr().out
    )
    assert "nut/train/good/again1.png" in said and "nut/test/bent/again.png" in said
    assert not any("again" in path for path in listed(place)) and len(listed(place)) == 16


@pytest.mark.parametrize(
    ("copies", "left_out"), [("keep_test", "nut/train/good/0.png"), ("keep_train", "nut/test/good/9.png")]
)
def test_of_an_image_in_two_splits_the_parameters_leave_out_one_side(place, capfd, copies, left_out):
    spoil(place / "photos", "both")
    write(place, copies=copies)
    status, errors = check(place)
    assert status == 0, errors
    assert f"(prepare.copies: {copies}): {left_out}" in capfd.readouterr().out
    assert left_out not in listed(place) and len(listed(place)) == 16


def test_files_that_cannot_be_read_and_have_the_same_bytes_are_all_named(place):
    for i in range(4):
        (place / f"photos/nut/train/good/broken{i}.png").write_text("no image")
    status, errors = check(place)
    assert status == 2 and all(f"broken{i}.png" in errors for i in range(4)) and "broken by 4" in errors


@pytest.mark.parametrize("kind", ["good", "bent"])
def test_a_test_split_of_one_kind_is_a_warning(place, kind):
    shutil.rmtree(place / "photos/nut/test" / kind)
    if kind == "bent":
        shutil.rmtree(place / "photos/nut/ground_truth")
    write(place, validate={**CONTRACT, "min_images": {"train": 3, "validation": 1, "test": 1}})
    status, errors = check(place)
    assert status == 0, errors
    rows = json.loads((place / "reports/data/validation.json").read_text())["findings"]
    assert {row["rule"]: row["files"] for row in rows if not row["passed"]} == {"both_kinds": ["nut/test"]}
