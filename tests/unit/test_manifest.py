"""From a folder to a manifest: layouts, splits, what is refused."""

import hashlib

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlmdiff.core.errors import InputError
from vlmdiff.core.params import Prepare
from vlmdiff.data import listing, manifest


def photograph(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def mask(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.eye(12, 16, dtype=np.uint8) * 255).save(path)


def mvtec(root, train=10):
    for seed in range(train):
        photograph(root / "nut" / "train" / "good" / f"{seed:03}.png", seed)
    photograph(root / "nut" / "test" / "good" / "000.png", 100)
    photograph(root / "nut" / "test" / "bent" / "000.png", 101)
    mask(root / "nut" / "ground_truth" / "bent" / "000_mask.png")
    return root


def build(root, **settings):
    return listing.build(Prepare(**{"layout": "mvtec_ad", "root": root, **settings}), root)


def test_mvtec_ads_layout_becomes_rows(tmp_path):
    frame = build(mvtec(tmp_path))
    assert list(frame.columns) == manifest.SCHEMA.names
    assert frame["path"].is_monotonic_increasing
    row = frame.set_index("path").loc["nut/test/bent/000.png"]
    assert (row["class_name"], row["split"], row["is_anomalous"], row["defect"]) == ("nut", "test", True, "bent")
    assert row["mask_path"] == "nut/ground_truth/bent/000_mask.png"
    assert (row["width"], row["height"], row["mode"], row["problem"]) == (16, 12, "RGB", None)
    data = (tmp_path / "nut/test/bent/000.png").read_bytes()
    assert row["image_id"] == hashlib.sha256(data).hexdigest()


def test_folder_layout_takes_good_and_defects_with_masks_or_without(tmp_path):
    for seed in range(10):
        photograph(tmp_path / "my nut" / "good" / f"ü {seed}.JPG", seed)
    photograph(tmp_path / "my nut" / "bent" / "a.png", 100)
    photograph(tmp_path / "my nut" / "bent" / "b.png", 101)
    mask(tmp_path / "my nut" / "masks" / "bent" / "a.png")
    (tmp_path / "my nut" / "good" / "notes.txt").write_text("not an image")
    (tmp_path / "README.md").write_text("nor this")
    frame = build(tmp_path, layout="folder", test_fraction=0.2)
    assert frame["split"].value_counts().to_dict() == {"train": 6, "test": 4, "validation": 2}
    masks = frame[frame["is_anomalous"]].set_index("path")["mask_path"]
    assert masks.to_dict() == {"my nut/bent/a.png": "my nut/masks/bent/a.png", "my nut/bent/b.png": None}


@settings(max_examples=10, deadline=None)
@given(before=st.integers(8, 20), more=st.integers(1, 5))
def test_more_images_move_hardly_any_between_splits(tmp_path_factory, before, more):
    root = mvtec(tmp_path_factory.mktemp("nuts"), before)
    first = build(root).set_index("path")["split"]
    for seed in range(more):
        photograph(root / "nut" / "train" / "good" / f"new{seed}.png", 1000 + seed)
    second = build(root).set_index("path")["split"]
    moved = (second[first.index] != first).sum()
    assert moved <= more
    assert (second == "validation").sum() == max(1, round(0.3 * (before + more)))


def test_reading_gives_what_was_written_and_writing_the_same_bytes(tmp_path):
    frame = build(mvtec(tmp_path / "data"))
    for name in ("a", "b"):
        manifest.write(frame, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    pd.testing.assert_frame_equal(manifest.read(tmp_path / "a"), frame, check_dtype=False)
    assert manifest.read(tmp_path / "a")["problem"].isna().all()


def test_an_unreadable_image_is_listed_with_its_problem(tmp_path):
    root = mvtec(tmp_path)
    (root / "nut" / "train" / "good" / "000.png").write_text("text")
    rows = build(root).set_index("path")
    assert "is not an image" in rows.loc["nut/train/good/000.png", "problem"]
    assert rows.loc["nut/train/good/000.png", "width"] == 0
    assert rows["problem"].notna().sum() == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "is not a folder"),
        (lambda root: root.mkdir(), "has no images"),
        (lambda root: (root / "nut" / "test").mkdir(parents=True), "has no train/good"),
    ],
)
def test_a_folder_that_is_not_a_dataset_is_refused(tmp_path, make, message):
    make(tmp_path / "data")
    with pytest.raises(InputError, match=message):
        build(tmp_path / "data")


def test_a_mask_without_its_image_is_named(tmp_path):
    root = mvtec(tmp_path)
    mask(root / "nut" / "ground_truth" / "bent" / "007_mask.png")
    with pytest.raises(InputError, match=r"007_mask\.png"):
        build(root)


def test_a_link_out_of_the_dataset_is_refused(tmp_path):
    root = mvtec(tmp_path / "data")
    photograph(tmp_path / "outside.png", 5)
    (root / "nut" / "train" / "good" / "link.png").symlink_to(tmp_path / "outside.png")
    with pytest.raises(InputError, match=r"link\.png leaves the dataset's root"):
        build(root)


@pytest.mark.parametrize("content", [b"not parquet", None])
def test_a_file_that_is_not_a_manifest_is_refused(tmp_path, content):
    path = tmp_path / "manifest.parquet"
    if content is None:
        pd.DataFrame({"a": [1]}).to_parquet(path)
    else:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"manifest\.parquet is (not|damaged)"):
        manifest.read(path)
