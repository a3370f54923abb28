"""What a user reported of tools like this one: nothing is passed over, and nothing is judged wrong, without a word."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tests.conftest import ROOT, Workspace
from tests.monitoring import CLASSES, photographs, write_model, write_scores
from tests.tiny import SIZE, tiny_detector
from vlmdiff import cli
from vlmdiff.core.errors import InputError
from vlmdiff.core.params import Prepare
from vlmdiff.data import listing
from vlmdiff.data.images import decode, load_mask, mask_values, read_image, resolve, size_of

LIMIT = 10**8
TRUTH = np.zeros((64, 64), bool)
TRUTH[5:20, 5:20] = True


def noise(file: Path, seed: int = 0, size: int = 40) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)).save(file)
    return file


@pytest.fixture
def dataset(tmp_path) -> Path:
    """A dataset in layout `folder`."""
    for i in range(8):
        noise(tmp_path / f"data/nut/good/{i}.png", i)
    noise(tmp_path / "data/nut/crack/0.png", 20)
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("value", "kind", "words"),
    [
        (255.0, np.float32, "to 255, and white is 1 in mode F"),
        (1.01, np.float32, "and white is 1"),
        (np.nan, np.float32, "to nan"),
        (-0.1, np.float32, "from -0.1"),
        (255, np.uint16, "to 255, and white is 65535 in mode I;16"),
        (4095, np.uint16, "to 4095"),
        (200, np.int32, "to 200"),
        (70_000, np.int32, "to 70000"),
    ],
)
def test_a_photograph_of_an_unknown_range_is_refused_and_not_judged_by_a_guess(tmp_path, value, kind, words) -> None:
    Image.fromarray(np.full((8, 8), value, kind)).save(tmp_path / "deep.tif")
    with pytest.raises(InputError, match=r"deep\.tif: its values reach") as caught:
        read_image(tmp_path / "deep.tif", LIMIT)
    assert words in str(caught.value) and "scale them" in str(caught.value)


@pytest.mark.parametrize("kind", ["png", "tif", "jpg", "bmp"])
def test_max_pixels_alone_limits_a_photograph_and_not_a_limit_of_the_library(tmp_path, monkeypatch, kind) -> None:
    # As 13,400 x 13,400 pixels are beyond Pillow's own.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    file = noise(tmp_path / f"scan.{kind}", size=60)
    assert read_image(file, 3600).size == size_of(file, 3600) == (60, 60)
    with pytest.raises(InputError, match=r"60 x 60 pixels, more than prepare\.max_pixels = 3599"):
        read_image(file, 3599)


@pytest.mark.parametrize("kind", ["tif", "png", "webp"])
def test_a_file_with_several_pictures_is_refused_by_name(tmp_path, kind) -> None:
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    first.save(tmp_path / f"two.{kind}", save_all=True, append_images=[second])
    with pytest.raises(InputError, match=rf"two\.{kind} has several pages or frames"):
        decode(tmp_path / f"two.{kind}", LIMIT)


def drawn(ground: tuple[int, ...], mark: tuple[int, ...]) -> Image.Image:
    pixels = np.empty((64, 64, 4), np.uint8)
    pixels[:], pixels[TRUTH] = ground, mark
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    "mask",
    [
        drawn((255, 255, 255, 0), (255, 255, 255, 255)),
        drawn((255, 255, 255, 0), (255, 255, 255, 255)).convert("LA"),
        drawn((0, 0, 0, 0), (0, 0, 0, 255)),
        drawn((255, 255, 255, 0), (255, 0, 0, 255)),
        drawn((0, 0, 0, 255), (255, 255, 255, 255)),
        Image.fromarray(TRUTH.astype(np.uint16) * np.uint16(256)),
        Image.fromarray(TRUTH.astype(np.uint16)),
    ],
    ids=["white on clear white", "LA", "black on clear black", "red on clear white", "opaque", "16 bits", "16 bits, 1"],
)
def test_a_mask_marks_what_was_drawn_whatever_its_form(tmp_path, mask) -> None:
    mask.save(tmp_path / "mask.png")
    assert (load_mask(tmp_path / "mask.png", 64, LIMIT) == TRUTH).all()
    assert ((mask_values(mask) > 0) == TRUTH).all()


def test_a_link_to_a_file_in_dvcs_cache_is_inside_the_dataset_and_no_other_is(tmp_path) -> None:
    cached = noise(tmp_path / "cache/files/md5/ab/0123456789abcdef0123456789abcd.png").rename(
        tmp_path / "cache/files/md5/ab/0123456789abcdef0123456789abcd"
    )
    (tmp_path / "data/nut").mkdir(parents=True)
    (tmp_path / "data/nut/0.png").symlink_to(cached)
    assert read_image(resolve(tmp_path / "data", "nut/0.png"), LIMIT).size == (40, 40)
    (tmp_path / "data/nut/1.png").symlink_to(noise(tmp_path / "cache/files/other.png"))
    (tmp_path / "data/bolt").symlink_to(cached.parent)
    for path in ("nut/1.png", f"bolt/{cached.name}"):
        with pytest.raises(InputError, match="leaves the dataset's root"):
            resolve(tmp_path / "data", path)


def test_images_that_a_layout_passes_over_are_counted_and_named(dataset, capsys) -> None:
    params = Prepare(layout="folder", root=dataset)
    listing.build(params, dataset)
    assert "passed over" not in capsys.readouterr().out
    noise(dataset / "nut/good/day1/0.png", 30)
    noise(dataset / "nut/good/9.jfif", 31)
    for suffix in ("gif", "pgm", "jp2"):
        with Image.open(dataset / "nut/good/0.png") as image:
            (image.convert("L") if suffix == "pgm" else image).save(dataset / f"nut/good/x.{suffix}")
    frame = listing.build(params, dataset)
    said = capsys.readouterr().out
    assert "nut/good/9.jfif" in set(frame["path"])
    assert "warning: 4 images under" in said and "1 where layout folder does not look (nut/good/day1/0.png)" in said
    assert "3 with another suffix than" in said and "nut/good/x.gif" in said


def test_two_masks_of_one_image_are_refused_by_name(dataset) -> None:
    for name in ("0.png", "0_mask.png"):
        noise(dataset / "nut/masks/crack" / name)
    with pytest.raises(InputError, match=r"0\.png and .*0_mask\.png are masks of one image"):
        listing.build(Prepare(layout="folder", root=dataset), dataset)


@pytest.mark.parametrize(("name", "words"), [("Nut", "differ only in capital letters"), ("nut ", "ends with a space")])
def test_names_that_look_like_one_class_are_refused(dataset, name, words) -> None:
    rows = ["path,class_name,label", *(f"nut/good/{i}.png,nut,0" for i in range(7)), f"nut/good/7.png,{name},0"]
    (dataset / "images.csv").write_text("\n".join(rows) + "\n")
    with pytest.raises(InputError, match=words):
        listing.build(Prepare(layout="table", root=dataset), dataset)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    detector = tiny_detector(samples=1, steps=1)
    generator = np.random.default_rng(0)
    detector.calibrate([generator.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8) for _ in range(20)])
    detector.save_pretrained(folder)
    return folder


def test_score_says_what_it_passes_over_follows_links_and_tries_again_what_it_could_not_read(tmp_path, model) -> None:
    place = Workspace(tmp_path)
    (tmp_path / "params.yaml").write_text("prepare: {max_pixels: 1000}\n")
    noise(tmp_path / "new/a.png")
    noise(tmp_path / "elsewhere/b.png", 1, 20)
    (tmp_path / "new/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/round").symlink_to(tmp_path / "new")
    (tmp_path / "new/c.gif").write_bytes(b"")
    command = ("score", "new", "--out", "out", "--model", str(model))
    said = place.vlmdiff(*command).stdout
    assert "warning: 1 image is passed over" in said and "c.gif" in said
    assert "2 new: " in said and "1 could not be read" in said
    (tmp_path / "params.yaml").write_text("prepare: {max_pixels: 100000}\n")
    said = place.vlmdiff(*command).stdout
    assert "1 of them scored before; 1 new" in said and "0 could not be read" in said
    assert pd.read_parquet(tmp_path / "out")["error"].isna().all() and len(pd.read_parquet(tmp_path / "out")) == 2


@pytest.mark.parametrize("fault", ["unreadable", "repeated"])
def test_a_broken_feed_is_drift_and_counted_file_by_file(tmp_path, monkeypatch, fault) -> None:
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text("{}\n")
    known = write_model(tmp_path / "model")
    rows = photographs(1, dict.fromkeys(CLASSES, 40))
    paths = rows["image_id"] + ".png"
    rows.loc[:, "image_id"] = rows["image_id"].iloc[0]
    if fault == "unreadable":
        rows["score"] = np.nan
    scores = write_scores(Path("scores.parquet"), rows, known)
    pd.read_parquet(scores).assign(path=paths).to_parquet(scores)
    said = Workspace(tmp_path).vlmdiff("monitor", "scores.parquet", "--model", "model", "--out", "out").stdout
    said, found = " ".join(said.split()), json.loads(Path("out/monitor.json").read_text())
    assert found["verdict"] == "drift" and found["drift"]
    if fault == "unreadable":
        assert found["unreadable"] == 120 and "120 of the last 120 images could not be read" in said
    else:
        assert found["repeated"] == 119 and "is the camera frozen?" in said


@pytest.mark.parametrize("how", ["moved", "copied", "linked", "shared"])
def test_a_registry_that_was_moved_or_copied_is_refused_and_one_that_is_shared_is_not(
    tmp_path, made_store, monkeypatch, how
) -> None:
    from mlflow.tracking import MlflowClient

    from vlmdiff.core.params import Registry
    from vlmdiff.registry.store import open_store

    first, here = tmp_path / "first", tmp_path / "here"
    (first / "mlruns/1").mkdir(parents=True)
    shutil.copy(made_store, first / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{here / 'mlflow.db'}")
    MlflowClient(f"sqlite:///{first / 'mlflow.db'}").create_experiment("vlmdiff", str(first / "mlruns/1"))
    if how == "moved":
        first.rename(here)
    elif how == "copied":
        shutil.copytree(first, here)
    elif how == "linked":
        here.symlink_to(first)
    else:
        here.mkdir()
        (first / "mlflow.db").rename(here / "mlflow.db")
    monkeypatch.chdir(here)
    if how in ("linked", "shared"):
        with open_store(Registry()) as client:
            assert client.get_experiment_by_name("vlmdiff")
        return
    words = rf"was made in {first}, and MLflow keeps absolute paths.*begin a new registry"
    with pytest.raises(InputError, match=words), open_store(Registry()):
        pass


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_what_the_system_refuses_is_one_sentence(tmp_path, monkeypatch, capsys, number) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number), "reports/x")

    monkeypatch.setattr(cli, "app", refuse)
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith(f"error: reports/x: {os.strerror(number)}") and said.count("\n") == 1


def test_a_folder_of_weights_is_as_readable_as_its_other_files(tmp_path) -> None:
    from vlmdiff.core.files import atomic_folder

    with atomic_folder(tmp_path / "out") as temporary:
        for name, mode in (("weights", 0o600), ("settings", 0o644)):
            (temporary / name).touch()
            (temporary / name).chmod(mode)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()} == {0o644}


def test_servers_of_this_machine_are_asked_without_the_proxy(monkeypatch) -> None:
    code = "import flows, urllib.request as u; print(u.proxy_bypass_environment('127.0.0.1'), u.getproxies()['http'])"
    environment = os.environ | {"HTTP_PROXY": "http://127.0.0.1:9", "PYTHONPATH": str(ROOT), "NO_PROXY": "intern"}
    environment.pop("no_proxy", None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.split() in (["True", "http://127.0.0.1:9"], ["1", "http://127.0.0.1:9"]), done.stderr


def test_make_works_in_a_folder_whose_name_has_a_space(tmp_path) -> None:
    place = tmp_path / "my project"
    (place / ".venv/bin").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, place)
    pip = place / ".venv/bin/pip"
    pip.write_text("#!/bin/sh\necho installed $*\n")
    pip.chmod(0o755)
    done = subprocess.run(["make", "PYTHON=true", ".venv/.installed"], cwd=place, capture_output=True, text=True)
    assert done.returncode == 0 and "installed install" in done.stdout, done.stderr
