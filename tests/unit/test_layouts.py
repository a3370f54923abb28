"""Layouts: miniatures of the published trees by their own names, and broken ones."""

import json
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from vlmdiff import stages
from vlmdiff.core.errors import InputError
from vlmdiff.core.params import Prepare, Validate
from vlmdiff.data import listing, manifest
from vlmdiff.data.images import load_mask
from vlmdiff.data.layouts import LAYOUTS, Record


def images(root: Path, *names: str) -> None:
    """Photographs of 16 x 12 pixels, each of its own noise."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(zlib.crc32(name.encode())).integers(0, 256, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / name)


def mask(file: Path, *values: int) -> None:
    """A mask with a column of each value, from the left."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((12, 16), np.uint8)
    pixels[:, : len(values)] = values
    Image.fromarray(pixels).save(file)


def write_csv(file: Path, *rows: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(row + "\n" for row in rows))


def write_json(file: Path, value) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))


def listed(layout: str, root: Path, **params) -> set[Record]:
    found = list(LAYOUTS[layout](root, Prepare(layout=layout, root=root, **params)))
    assert len(found) == len(set(found))
    return set(found)


def refused(layout: str, root: Path, *words: str, **params) -> None:
    """The stage stops with all of the words in its message and leaves no manifest, nor images it made."""
    made, out = root.parent / "out/made", root.parent / "out/manifest.parquet"
    with pytest.raises(InputError) as error:
        stages.prepare(Prepare(layout=layout, root=root, **params), made, out)
    for word in words:
        assert word in str(error.value)
    assert not out.exists() and not any(path.is_file() or path.suffix == ".tmp" for path in out.parent.rglob("*"))


def test_parameters_and_code_name_the_same_layouts():
    assert set(get_args(Prepare.model_fields["layout"].annotation)) == set(LAYOUTS)


# Folders


def test_mpdd_is_mvtec_ads_layout(tmp_path):
    images(tmp_path, "bracket_black/train/good/000.png", "bracket_black/test/good/000.png")
    images(tmp_path, "bracket_black/test/hole/000.png", "bracket_black/test/scratches/000.png")
    mask(tmp_path / "bracket_black/ground_truth/hole/000_mask.png", 255)
    mask(tmp_path / "bracket_black/ground_truth/scratches/000_mask.png", 255)
    name = "bracket_black"
    assert listed("mvtec_ad", tmp_path) == {
        Record(f"{name}/train/good/000.png", name, "train", False),
        Record(f"{name}/test/good/000.png", name, "test", False),
        Record(f"{name}/test/hole/000.png", name, "test", True, "hole", f"{name}/ground_truth/hole/000_mask.png"),
        Record(
            f"{name}/test/scratches/000.png",
            name,
            "test",
            True,
            "scratches",
            f"{name}/ground_truth/scratches/000_mask.png",
        ),
    }


def btad(root: Path) -> Path:
    images(root, "01/train/ok/0000.bmp", "01/test/ok/0000.bmp", "01/test/ko/0000.bmp")
    mask(root / "01/ground_truth/ko/0000.png", 255)
    images(root, "03/train/ok/0000.bmp", "03/test/ko/0001.bmp")
    mask(root / "03/ground_truth/ko/0001.bmp", 255)
    return root


def test_btad_calls_good_ok_and_a_defect_ko(tmp_path):
    assert listed("btad", btad(tmp_path)) == {
        Record("01/train/ok/0000.bmp", "01", "train", False),
        Record("01/test/ok/0000.bmp", "01", "test", False),
        Record("01/test/ko/0000.bmp", "01", "test", True, "ko", "01/ground_truth/ko/0000.png"),
        Record("03/train/ok/0000.bmp", "03", "train", False),
        Record("03/test/ko/0001.bmp", "03", "test", True, "ko", "03/ground_truth/ko/0001.bmp"),
    }


def test_a_broken_btad_is_refused(tmp_path):
    refused("mvtec_ad", btad(tmp_path / "data"), "01 has no train/good", "mvtec_ad")
    mask(tmp_path / "data/03/ground_truth/ko/0007.bmp", 255)
    refused("btad", tmp_path / "data", "03/ground_truth/ko/0007.bmp", "no image")
    (tmp_path / "data/01/train/ok").rename(tmp_path / "data/01/train/good")
    refused("btad", tmp_path / "data", "01 has no train/ok", "btad")


def mvtec_3d(root: Path) -> Path:
    for i in range(6):
        images(root, f"bagel/train/good/rgb/{i:03}.png")
    images(root, "bagel/validation/good/rgb/000.png", "bagel/test/good/rgb/000.png", "bagel/test/hole/rgb/000.png")
    images(root, "bagel/train/good/xyz/000.tiff", "bagel/test/hole/xyz/000.tiff")
    mask(root / "bagel/test/good/gt/000.png")
    mask(root / "bagel/test/hole/gt/000.png", 255)
    return root


def test_mvtec_3ds_photographs_keep_their_validation_split(tmp_path):
    frame = listing.build(Prepare(layout="mvtec_3d", validation_fraction=0.5), mvtec_3d(tmp_path)).set_index("path")
    assert frame["split"].value_counts().to_dict() == {"train": 6, "test": 2, "validation": 1}
    assert frame.loc["bagel/validation/good/rgb/000.png", "split"] == "validation"
    hole, good = frame.loc["bagel/test/hole/rgb/000.png"], frame.loc["bagel/test/good/rgb/000.png"]
    assert (hole["is_anomalous"], hole["defect"], hole["mask_path"]) == (True, "hole", "bagel/test/hole/gt/000.png")
    assert (good["is_anomalous"], good["defect"], good["mask_path"]) == (False, None, "bagel/test/good/gt/000.png")


def test_a_broken_mvtec_3d_is_refused(tmp_path):
    root = mvtec_3d(tmp_path / "data")
    mask(root / "bagel/test/hole/gt/004.png", 255)
    refused("mvtec_3d", root, "bagel/test/hole/gt/004.png", "no image")
    (root / "bagel/train/good/rgb").rename(root / "bagel/train/good/colour")
    refused("mvtec_3d", root, "bagel has no train/good/rgb")


# VisA

NORMAL, ANOMALY, MASK = "Data/Images/Normal", "Data/Images/Anomaly", "Data/Masks/Anomaly"
VISA = (
    "object,split,label,image,mask",
    f"candle,train,normal,candle/{NORMAL}/0000.JPG,",
    f"candle,train,normal,candle/{NORMAL}/0001.JPG,",
    f"candle,test,normal,candle/{NORMAL}/0002.JPG,",
    f"candle,test,anomaly,candle/{ANOMALY}/000.JPG,candle/{MASK}/000.png",
    f"candle,test,anomaly,candle/{ANOMALY}/001.JPG,candle/{MASK}/001.png",
)


def visa(root: Path, rows=VISA, split="1cls") -> Path:
    images(
        root, *(f"candle/{NORMAL}/{i:04}.JPG" for i in range(3)), *(f"candle/{ANOMALY}/{i:03}.JPG" for i in range(2))
    )
    mask(root / f"candle/{MASK}/000.png", 1, 6)
    mask(root / f"candle/{MASK}/001.png", 2)
    write_csv(root / f"split_csv/{split}.csv", *rows)
    return root


def test_visas_label_is_the_anomaly_and_its_object_the_class(tmp_path):
    assert listed("visa", visa(tmp_path)) == {
        Record(f"candle/{NORMAL}/0000.JPG", "candle", "train", False),
        Record(f"candle/{NORMAL}/0001.JPG", "candle", "train", False),
        Record(f"candle/{NORMAL}/0002.JPG", "candle", "test", False),
        Record(f"candle/{ANOMALY}/000.JPG", "candle", "test", True, "anomaly", f"candle/{MASK}/000.png"),
        Record(f"candle/{ANOMALY}/001.JPG", "candle", "test", True, "anomaly", f"candle/{MASK}/001.png"),
    }


def test_visas_splits_for_two_classes_give_their_normal_training_images_and_their_test(tmp_path):
    rows = [row.replace("test", "train") if f"{ANOMALY}/000" in row else row for row in VISA]
    visa(tmp_path, rows, "2cls_fewshot")
    found = listed("visa", tmp_path, visa={"split": "2cls_fewshot"})
    assert {(record.path[-8:], record.split) for record in found} == {
        ("0000.JPG", "train"),
        ("0001.JPG", "train"),
        ("0002.JPG", "test"),
        ("/001.JPG", "test"),
    }


def test_visas_label_maps_pass_the_contract_and_mark_whatever_is_not_zero(tmp_path):
    from vlmdiff.data import contract

    params = Prepare(layout="visa", root=visa(tmp_path / "data"))
    frame = listing.build(params, params.root)
    demands = Validate(min_side=1, min_images={"train": 1, "validation": 1, "test": 2})
    contract.check_dataset(frame, params, demands, 16, tmp_path / "report").raise_if_failed()
    marked = load_mask(params.root / f"candle/{MASK}/000.png", 16, 1000)
    assert marked[:, :2].all() and not marked[:, 2:].any()


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (f"candle,train,normal,candle/{NORMAL}/0009.JPG,", ["line 7", "0009.JPG", "not a file"]),
        (f"unicorn,train,normal,unicorn/{NORMAL}/0000.JPG,", ["line 7", "unicorn", "not a file"]),
        (f"candle,test,anomaly,candle/{ANOMALY}/001.JPG,candle/{MASK}/009.png", ["line 7", "009.png"]),
        ("candle,train,normal,../outside.png,", ["line 7", "../outside.png leaves"]),
        ("candle,train,normal,link.png,", ["line 7", "link.png leaves"]),
        (f"candle,train,candle,candle/{NORMAL}/0000.JPG,", ["line 7", "label is 'candle'", "use the column object"]),
        (f"candle,val,normal,candle/{NORMAL}/0000.JPG,", ["line 7", "split is 'val'"]),
        (f"candle,train,normal,candle/{NORMAL}/00", ["line 7", "4 cells for 5 columns"]),
        ('candle,train,normal,"candle/', ["line 7", "unexpected end"]),
    ],
)
def test_a_broken_row_of_visas_list_is_named(tmp_path, row, words):
    root = visa(tmp_path / "data", [*VISA, row])
    images(tmp_path, "outside.png")
    (root / "link.png").symlink_to(tmp_path / "outside.png")
    refused("visa", root, "split_csv/1cls.csv", *words)


def test_visa_without_its_list_is_refused(tmp_path):
    root = visa(tmp_path / "data")
    refused("visa", root, "split_csv/2cls_highshot.csv does not exist", visa={"split": "2cls_highshot"})
    write_csv(root / "split_csv/1cls.csv", "object,split,label,mask", "candle,train,normal,")
    refused("visa", root, "1cls.csv has no column 'image'", "object, split, label, mask")


# Real-IAD

OK = "OK/S0001/audiojack_0001_OK_C{}_20231021120000.jpg"
NG = "NG/QS/S0017/audiojack_0017_NG_QS_C1_20231021120000"


def real_iad(root: Path, jsons="realiad_jsons", name="audiojack", prefix="audiojack/", **changes) -> Path:
    for camera in (1, 2, 3):
        images(root, f"realiad_256/audiojack/{OK.format(camera)}")
    images(root, f"realiad_256/audiojack/{NG}.jpg")
    mask(root / f"realiad_256/audiojack/{NG}.png", 255)

    def row(kind, image, truth=None):
        return {"category": "audiojack", "anomaly_class": kind, "image_path": image, "mask_path": truth}

    content = {
        "meta": {"filename": "audiojack.json", "prefix": prefix, "normal_class": "OK", "pre_transform": []},
        "train": [row("OK", OK.format(1)), row("OK", OK.format(2))],
        "test": [row("OK", OK.format(3)), row("QS", f"{NG}.jpg", f"{NG}.png") | changes],
    }
    write_json(root / jsons / f"{name}.json", content)
    return root


def test_real_iads_lists_name_all_views_and_kinds_of_defect(tmp_path):
    place = "realiad_256/audiojack"
    expected = {
        Record(f"{place}/{OK.format(1)}", "audiojack", "train", False),
        Record(f"{place}/{OK.format(2)}", "audiojack", "train", False),
        Record(f"{place}/{OK.format(3)}", "audiojack", "test", False),
        Record(f"{place}/{NG}.jpg", "audiojack", "test", True, "QS", f"{place}/{NG}.png"),
    }
    real_iad(tmp_path)
    assert listed("real_iad", tmp_path, real_iad={"images": "realiad_256"}) == expected
    real_iad(tmp_path, jsons="realiad_jsons/realiad_jsons_sv")
    folders = {"jsons": "realiad_jsons/realiad_jsons_sv", "images": "realiad_256"}
    assert listed("real_iad", tmp_path, real_iad=folders) == expected


def test_real_iads_unsupervised_lists_call_their_anomalous_training_images_so(tmp_path):
    real_iad(tmp_path, jsons="realiad_jsons_fuiad_0.1")
    file = tmp_path / "realiad_jsons_fuiad_0.1/audiojack.json"
    content = json.loads(file.read_text())
    content["train"].append(content["test"].pop())
    write_json(file, content)
    found = listed("real_iad", tmp_path, real_iad={"jsons": "realiad_jsons_fuiad_0.1", "images": "realiad_256"})
    assert [record.split for record in found if record.is_anomalous] == ["train"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_path": "NG/QS/gone.jpg"}, ["test.1", "NG/QS/gone.jpg", "not a file"]),
        ({"mask_path": "NG/QS/gone.png"}, ["test.1", "NG/QS/gone.png", "not a file"]),
        ({"image_path": "../../../outside.png"}, ["test.1", "leaves"]),
        ({"image_path": "/etc/passwd"}, ["test.1", "leaves"]),
        ({"image_path": "\ud800.png"}, ["audiojack.json"]),
        ({"prefix": "../../"}, ["train.0", "leaves"]),
        ({"category": "toy"}, ["test.1", "'toy'", "'audiojack'"]),
        ({"image_path": None}, ["test.1.image_path", "string"]),
    ],
)
def test_a_broken_row_of_real_iads_lists_is_named(tmp_path, changes, words):
    images(tmp_path, "outside.png")
    root = real_iad(tmp_path / "data", **changes)
    refused("real_iad", root, "realiad_jsons/audiojack.json", *words, real_iad={"images": "realiad_256"})


def test_a_truncated_or_missing_list_of_real_iad_is_refused(tmp_path):
    root = real_iad(tmp_path / "data")
    file = root / "realiad_jsons/audiojack.json"
    file.write_bytes(file.read_bytes()[:-20])
    refused("real_iad", root, str(file), "Invalid JSON: EOF", real_iad={"images": "realiad_256"})
    file.unlink()
    refused("real_iad", root, "realiad_jsons has no CLASS.json", "prepare.real_iad.jsons")


# COCO-AD


def coco_ad(root: Path, split=0, **changes) -> Path:
    images(root, "train2017/000000000009.jpg", "val2017/000000000139.jpg", "val2017/000000000285.jpg")
    mask(root / "masks/000000000285.png", 1, 21)

    def row(image, truth="", kind="", anomaly=0):
        return {"img_path": image, "mask_path": truth, "cls_name": "coco", "specie_name": kind, "anomaly": anomaly}

    content = {
        "train": {"coco": [row("train2017/000000000009.jpg")]},
        "test": {
            "coco": [
                row("val2017/000000000139.jpg"),
                row("val2017/000000000285.jpg", "masks/000000000285.png", "bear", 1) | changes,
            ]
        },
    }
    write_json(root / f"meta_20_{split}.json", content)
    return root


def test_coco_ads_split_is_a_parameter(tmp_path):
    coco_ad(tmp_path, split=0, anomaly=0, mask_path="", specie_name="")
    coco_ad(tmp_path, split=2)
    test = Record("val2017/000000000285.jpg", "coco", "test", True, "bear", "masks/000000000285.png")
    assert listed("coco_ad", tmp_path, coco_ad={"split": 2}) == {
        Record("train2017/000000000009.jpg", "coco", "train", False),
        Record("val2017/000000000139.jpg", "coco", "test", False),
        test,
    }
    assert test._replace(is_anomalous=False, defect=None, mask_path=None) in listed("coco_ad", tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"img_path": "val2017/1.jpg"}, ["test.coco.1", "val2017/1.jpg", "not a file"]),
        ({"mask_path": "../outside.png"}, ["test.coco.1", "leaves"]),
        ({"cls_name": "bear"}, ["test.coco.1", "'bear'"]),
        ({"anomaly": "bear"}, ["test.coco.1.anomaly"]),
    ],
)
def test_a_broken_row_of_coco_ads_list_is_named(tmp_path, changes, words):
    images(tmp_path, "outside.png")
    refused("coco_ad", coco_ad(tmp_path / "data", **changes), "meta_20_0.json", *words)
    refused("coco_ad", tmp_path / "data", "meta_20_3.json does not exist", coco_ad={"split": 3})


# CIFAR


def photograph(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8))


def batch(file: Path, *labels: tuple[int, ...], seed: int) -> None:
    """The binary version by its description: label bytes, then the planes of red, green and blue, row by row."""
    file.parent.mkdir(parents=True, exist_ok=True)
    planes = [b"".join(channel.tobytes() for channel in photograph(seed + i).split()) for i in range(len(labels))]
    file.write_bytes(b"".join(bytes(label) + plane for label, plane in zip(labels, planes, strict=True)))


def cifar10(root: Path) -> Path:
    for i in range(5):
        batch(root / f"data_batch_{i + 1}.bin", (0,), (1,), (2,), seed=10 * i)
    batch(root / "test_batch.bin", (2,), (0,), (1,), seed=100)
    (root / "batches.meta.txt").write_text("airplane\nautomobile\nbird\n\n")
    return root


def cifar100(root: Path) -> Path:
    batch(root / "train.bin", (0, 1), (0, 0), (1, 2), seed=0)
    batch(root / "test.bin", (0, 1), (1, 2), (0, 0), seed=100)
    (root / "coarse_label_names.txt").write_text("fish\nflowers\n")
    (root / "fine_label_names.txt").write_text("aquarium_fish\nflatfish\norchid\n")
    return root


def prepared(root: Path, *normal: str) -> tuple[Path, pd.DataFrame]:
    """The images that the stage makes and its manifest, by path."""
    made, out = root.parent / "made", root.parent / "manifest.parquet"
    params = Prepare(layout="cifar", root=root, cifar={"normal": normal})
    made.parent.mkdir(exist_ok=True)
    # The stage reads what it made where the workspace has it.
    assert params.image_root == Path("data/made")
    here = Path.cwd()
    os.chdir(root.parent)
    try:
        stages.prepare(params, params.image_root, out)
    finally:
        os.chdir(here)
    return root.parent / params.image_root, manifest.read(out).set_index("path")


def test_one_class_of_cifar_is_normal_and_the_others_test_images_are_anomalous(tmp_path):
    made, frame = prepared(cifar10(tmp_path / "data"), "airplane")
    assert set(frame["class_name"]) == {"airplane"} and frame["mask_path"].isna().all()
    assert frame["is_anomalous"].to_dict() == {
        **{f"airplane/train/good/{3 * i:05}.png": False for i in range(5)},
        "airplane/test/bird/00000.png": True,
        "airplane/test/good/00001.png": False,
        "airplane/test/automobile/00002.png": True,
    }
    assert frame.loc["airplane/test/bird/00000.png", "defect"] == "bird"
    for name, seed in (("train/good/00006.png", 20), ("test/automobile/00002.png", 102)):
        assert Image.open(made / "airplane" / name).tobytes() == photograph(seed).tobytes()


def test_several_classes_of_cifar_are_one_normal_class(tmp_path):
    _, frame = prepared(cifar10(tmp_path / "data"), "airplane", "bird")
    assert set(frame["class_name"]) == {"unified"}
    assert set(frame.index[frame["is_anomalous"]]) == {"unified/test/automobile/00002.png"}
    assert (frame["split"] != "test").sum() == 10


def test_cifar_100s_normal_classes_are_fine_or_coarse(tmp_path):
    root = cifar100(tmp_path / "data")
    _, frame = prepared(root, "fish")
    assert set(frame.index[frame["split"] == "test"]) == {
        f"fish/test/{n}.png" for n in ("good/00000", "orchid/00001", "good/00002")
    }
    _, frame = prepared(root, "flatfish")
    assert set(frame["defect"].dropna()) == {"orchid", "aquarium_fish"}
    assert (frame["split"] != "test").sum() == 1


def test_a_broken_cifar_is_refused(tmp_path):
    root = cifar10(tmp_path / "data")
    refused(
        "cifar",
        root,
        "prepare.cifar.normal: unknown class zeppelin",
        "airplane, automobile, bird",
        cifar={"normal": ["zeppelin"]},
    )
    whole = (root / "data_batch_3.bin").read_bytes()
    (root / "data_batch_3.bin").write_bytes(whole[:-1])
    refused("cifar", root, "data_batch_3.bin", "truncated")
    (root / "data_batch_3.bin").write_bytes(b"\x09" + whole[1:])
    refused("cifar", root, "data_batch_3.bin, image 0", "label [9]")
    (root / "data_batch_3.bin").unlink()
    refused("cifar", root, "data_batch_3.bin does not exist")
    (root / "batches.meta.txt").write_text("airplane\n../../../automobile\nbird\n")
    refused("cifar", root, "batches.meta.txt", "../../../automobile")


def test_cifars_pickles_are_not_read(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    # Would make a file where it is unpickled.
    (root / "batches.meta").write_bytes(f"cos\nmkdir\n(V{tmp_path / 'unpickled'}\ntR.".encode())
    refused("cifar", root, "binary version")
    assert not (tmp_path / "unpickled").exists()


# A table

ROWS = ("path,class_name,is_anomalous,defect,mask_path", "a.png,nut,false,,", "b.png,nut,True,bent,m.png")


def nuts(root: Path, *rows: str) -> Path:
    images(root, "a.png", "b.png")
    mask(root / "m.png", 255)
    write_csv(root / "images.csv", *(rows or ROWS))
    return root


NUTS = {Record("a.png", "nut", None, False), Record("b.png", "nut", None, True, "bent", "m.png")}


def test_a_table_is_read_from_csv_and_from_parquet(tmp_path):
    assert listed("table", nuts(tmp_path)) == NUTS
    (tmp_path / "excel.csv").write_bytes("\r\n".join(ROWS).encode("utf-8-sig"))
    assert listed("table", tmp_path, table={"file": "excel.csv"}) == NUTS
    pd.read_csv(tmp_path / "images.csv").to_parquet(tmp_path / "images.parquet")
    assert listed("table", tmp_path, table={"file": "images.parquet"}) == NUTS


@pytest.mark.parametrize("truth", ["label,normal,anomaly", "label,0,1", "is_anomalous,0,1", "is_anomalous,False,TRUE"])
def test_a_tables_label_is_the_anomaly(tmp_path, truth):
    column, normal, anomalous = truth.split(",")
    nuts(
        tmp_path, f"split,{column},path,note,class_name", f"train,{normal},a.png,x,nut", f"test,{anomalous},b.png,,nut"
    )
    assert listed("table", tmp_path) == {
        Record("a.png", "nut", "train", False),
        Record("b.png", "nut", "test", True, "anomaly"),
    }


def test_a_table_without_splits_is_split_as_folders_are(tmp_path):
    images(tmp_path, *(f"nut/good/{i}.png" for i in range(20)), "nut/bent/0.png")
    rows = [f"nut/good/{i}.png,nut,normal" for i in range(20)] + ["nut/bent/0.png,nut,anomaly"]
    write_csv(tmp_path / "images.csv", "path,class_name,label", *rows)
    of_table, of_folder = (
        listing.build(Prepare(layout=layout, test_fraction=0.3), tmp_path).set_index("path")["split"]
        for layout in ("table", "folder")
    )
    assert of_table.value_counts().to_dict() == {"train": 10, "test": 7, "validation": 4}
    assert of_table.to_dict() == of_folder.to_dict()


def test_a_table_has_validation_images_of_some_classes_and_the_others_are_split(tmp_path):
    images(tmp_path, *(f"{name}{i}.png" for name in "ab" for i in range(10)))
    splits = {"a0.png": "validation"}
    rows = [f"{name}{i}.png,{name},normal,{splits.get(f'{name}{i}.png', 'train')}" for name in "ab" for i in range(10)]
    write_csv(tmp_path / "images.csv", "path,class_name,label,split", *rows)
    frame = listing.build(Prepare(layout="table", validation_fraction=0.3), tmp_path)
    held_out = frame[frame["split"] == "validation"]
    assert held_out["class_name"].value_counts().to_dict() == {"a": 1, "b": 3}
    assert "a0.png" in set(held_out["path"])


def test_a_row_that_is_there_twice_is_kept_for_the_contract(tmp_path):
    nuts(tmp_path, *ROWS, "./b.png,nut,true,bent,")
    assert listing.build(Prepare(layout="table"), tmp_path)["path"].tolist() == ["a.png", "b.png", "b.png"]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (["path,class_name", "a.png,nut"], ["is_anomalous and label", "path, class_name"]),
        (["path,class_name,label,is_anomalous", "a.png,nut,0,0"], ["one of the columns is_anomalous and label"]),
        (["class_name,label", "nut,0"], ["no column 'path'"]),
        (["path,path,class_name,label", "a.png,a.png,nut,0"], ["repeated column path"]),
        (["path;class_name;label", "a.png;nut;0"], ["no column 'path'", "path;class_name;label"]),
        (["path,class_name,label", "a.png,nut,0", "b.png,nut,nut"], ["line 3", "label is 'nut'", "column class_name"]),
        (["path,class_name,label", "", "a.png,nut,"], ["line 3", "label is ''"]),
        (["path,class_name,label", "c.png,nut,0"], ["line 2", "'c.png' is not a file"]),
        (["path,class_name,label", ",nut,0"], ["line 2", "'' is not a file"]),
        (["path,class_name,label", "a.png,,0"], ["line 2", "the class ''"]),
        (["path,class_name,label", "a.png,../nut,0"], ["line 2", "the class '../nut'"]),
        (["path,class_name,label,split", "a.png,nut,0,"], ["line 2", "split is ''"]),
        (["path,class_name,label,defect", "a.png,nut,0,bent"], ["line 2", "defect is 'bent'"]),
        (["path,class_name,label,defect", "a.png,nut,1,good"], ["line 2", "defect is 'good'"]),
        (["path,class_name,label,mask_path", "a.png,nut,1,../m.png"], ["line 2", "../m.png leaves"]),
        (["path,class_name,label", "a\0.png,nut,0"], ["line 2"]),
        (["path,class_name,label", "a.png,nut"], ["line 2", "2 cells"]),
        (["path,class_name,label"], ["has no images"]),
        ([""], ["no column 'path'"]),
    ],
)
def test_a_broken_table_is_refused_with_its_row(tmp_path, rows, words):
    root = nuts(tmp_path / "data", *rows)
    mask(tmp_path / "m.png", 255)
    refused("table", root, "images.csv" if "images" not in words[0] else "", *words)


def test_a_broken_parquet_table_is_refused_with_its_row(tmp_path):
    root = nuts(tmp_path / "data")
    table = {"file": "images.parquet"}
    refused("table", root, "images.parquet does not exist", table=table)
    frame = pd.DataFrame({"path": ["a.png", None], "class_name": ["nut", "nut"], "label": [0, 1]})
    frame.to_parquet(root / "images.parquet")
    refused("table", root, "images.parquet, row 1", "''", table=table)
    whole = (root / "images.parquet").read_bytes()
    for size in (0, 3, len(whole) // 2, len(whole) - 1):
        (root / "images.parquet").write_bytes(whole[:size])
        refused("table", root, "images.parquet", table=table)
    refused("table", root, "leaves", table={"file": "../images.csv"})
    (root / "images.csv").write_bytes(b"path,class_name,label\na.png,n\xffut,0\n")
    refused("table", root, "images.csv", "utf-8")


NAMES = ["a.png", 'quo"ted, name.png', "sub/ü b.png", "new\nline.png"]
TEXT = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "Zs"]), min_size=1, max_size=8)


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pool")
    (root / "sub").mkdir()
    for name in NAMES:
        (root / name).touch()
    return root


@st.composite
def rows(draw) -> Record:
    is_anomalous = draw(st.booleans())
    defect = draw(TEXT.filter(lambda text: text != "good")) if is_anomalous else None
    return Record(
        draw(st.sampled_from(NAMES)),
        draw(
            TEXT.filter(
                lambda text: "/" not in text and text not in (".", "..") and text.isprintable() and text == text.strip()
            )
        ),
        draw(st.sampled_from(["train", "validation", "test"])),
        is_anomalous,
        defect,
        draw(st.sampled_from([None, *NAMES])),
    )


@settings(max_examples=30)
@given(records=st.lists(rows(), min_size=1, max_size=6), order=st.permutations(Record._fields))
def test_whatever_a_csv_writer_writes_is_read_as_it_was(pool, records, order):
    frame = pd.DataFrame(records, columns=Record._fields)[order]
    frame.to_csv(pool / "images.csv", index=False)
    frame.to_parquet(pool / "images.parquet")
    for file in ("images.csv", "images.parquet"):
        found = LAYOUTS["table"](pool, Prepare(layout="table", table={"file": file}))
        assert list(found) == records


HEADER = "path,class_name,label,split,defect,mask_path"


@settings(max_examples=150)
@given(
    text=st.one_of(
        st.binary(max_size=60),
        st.lists(
            st.lists(
                st.sampled_from([*NAMES, "", '"', "nut", "0", "1", "train", "test", "..", "\0", "\r", "é"]), max_size=7
            )
        ).map(lambda cells: "\n".join(",".join(row) for row in cells).encode()),
    )
)
@example(text=b'a.png,nut,0,train,,"')
@example(text=b"a.png,nut,0,train,,\xff")
@example(text=b"a.png,nut,0,train,,a.png\0")
def test_no_table_does_worse_than_a_named_error(pool, text):
    (pool / "images.csv").write_bytes(HEADER.encode() + b"\n" + text)
    try:
        for record in LAYOUTS["table"](pool, Prepare(layout="table")):
            assert record.path in NAMES and record.mask_path in [None, *NAMES]
            assert record.split in ("train", "validation", "test") and bool(record.defect) == record.is_anomalous
    except InputError as error:
        assert "images.csv, line" in str(error)


# What prepare reads


def test_prepare_opens_each_image_once(tmp_path):
    images(tmp_path / "photos", *(f"nut/good/{i}.png" for i in range(6)), "nut/bent/0.png")
    mask(tmp_path / "photos/nut/masks/bent/0.png", 255)
    (tmp_path / "params.yaml").write_text("prepare: {layout: folder, root: photos}")
    code = """if True:
        import collections, os, sys
        opened = collections.Counter()
        def count(event, arguments):
            if event == "open" and str(arguments[0]).endswith(".png"):
                opened[os.path.relpath(arguments[0], "photos")] += 1
        sys.addaudithook(count)
        sys.argv = ["vlmdiff", "prepare"]
        from vlmdiff.cli import app
        app(standalone_mode=False)
        print(opened)
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    counts = dict(re.findall(r"'(nut/[^']+)': (\d+)", done.stdout))
    assert counts == dict.fromkeys([*(f"nut/good/{i}.png" for i in range(6)), "nut/bent/0.png"], "1")
