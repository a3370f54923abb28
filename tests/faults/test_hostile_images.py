"""Hostile photographs at every entrance: files that decode to far more than they weigh, and pipes and devices."""

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from PIL import Image

from tests.conftest import ROOT
from tests.hostile import many_scans, png, tiff
from tests.tiny import save_tiny_detector
from vlmdiff.core.errors import InputError
from vlmdiff.core.params import Params, Prepare, Validate
from vlmdiff.data import listing, manifest
from vlmdiff.data.contract import check_dataset
from vlmdiff.data.feedback import Statement, give_feedback
from vlmdiff.production.inspector import Model
from vlmdiff.production.monitor import read_scores
from vlmdiff.production.score import score
from vlmdiff.registry.served import IMAGE_ROOT, Inspector
from vlmdiff.setup.init import look, table, track

LIMIT = Prepare().max_pixels
SECONDS, MEGABYTES = 3, 500
# What Pillow reads without harm. Nobody knows which of its values is white: a mask or the manifest needs no white.
WHOLE = {"grey_12_in_16.png", "grey_8_in_16.png", "float_one_pixel_above_one.tif", "int32.tif"}
# As large as a photograph may be; and a hole of a terabyte, which nothing may copy.
LARGE = {"deep.png", "alpha.png"}
SPARSE = "sparse.bmp"
# Prints a line for each file: its error, the processor's seconds, and how many megabytes the process has ever grown.
READ = """
import json, sys, time, resource
from pathlib import Path
from vlmdiff.core.errors import InputError
from vlmdiff.data.images import read_image
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
idle = peak()
for name in sys.argv[2:]:
    began, said = time.process_time(), None
    try:
        read_image(Path(name), int(sys.argv[1]))
    except InputError as error:
        said = str(error)
    print(json.dumps([name, said, time.process_time() - began, peak() - idle]), flush=True)
"""


@pytest.fixture(scope="module")
def hostile(faults, tmp_path_factory) -> Path:
    """The fault maker's photographs, with more of their kinds."""
    folder = tmp_path_factory.mktemp("hostile")
    for file in faults.iterdir():
        if file.is_file():
            shutil.copy(file, folder)
    os.mkfifo(folder / "pipe.png")
    (folder / "endless.png").symlink_to("/dev/zero")
    (folder / "terminal.png").symlink_to("/dev/tty")
    (folder / "nothing.png").symlink_to("/nothing/there.png")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(folder / "socket.png"))
    (folder / "column.png").write_bytes(png(1, 200_000))
    (folder / "deep.png").write_bytes(png(7_900, 7_900, 16))
    (folder / "alpha.png").write_bytes(png(7_900, 7_900, 8, 6))
    (folder / "scans.jpg").write_bytes(many_scans(200, 100_000))
    (folder / "scans_large.jpg").write_bytes(many_scans(6_000, 900))
    pixels = {256: 100, 257: 100, 258: 8, 262: 1, 277: 1}
    for name, sides in (("tile_wide.tif", (2_000_000_000, 16)), ("tile_many.tif", (60_000, 1_008))):
        (folder / name).write_bytes(tiff({**pixels, 259: 8, 322: sides[0], 323: sides[1], 324: 8, 325: 10}, bytes(10)))
    (folder / "no_tile.tif").write_bytes(tiff({**pixels, 259: 8, 322: 0, 323: 0, 324: 8, 325: 10}, bytes(10)))
    with (folder / "sparse.bmp").open("wb") as stream:
        stream.truncate(10**12)
    return folder


@pytest.fixture(scope="module")
def said(hostile) -> dict[str, list]:
    """Of each file, what the one loader says in a process of its own, in how long and with how much memory."""
    names = sorted(str(file) for file in hostile.iterdir())
    command = [sys.executable, "-c", READ, str(LIMIT), *names]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, timeout=120)
    lines = map(json.loads, done.stdout.decode().splitlines())
    found = {Path(name).name: facts for name, *facts in lines}
    assert len(found) == len(names), done.stderr.decode()[-2000:]
    return found


def test_a_hostile_photograph_is_a_sentence_that_names_it(said):
    assert {name for name, (words, *_) in said.items() if words is None} == LARGE
    assert not [name for name, (words, *_) in said.items() if words and name not in words]


def test_a_hostile_photograph_costs_little_time_and_memory(said):
    dear = {name: facts[1:] for name, facts in said.items() if facts[1] > SECONDS or facts[2] > MEGABYTES}
    assert not dear


# Threads that read photographs of nine million pixels; prints by how much the process has grown.
AT_ONCE = """
import sys, resource
from concurrent.futures import ThreadPoolExecutor
from vlmdiff.data.images import fit, opened
from pathlib import Path
def read(_):
    with opened(Path(sys.argv[1]), 10**7) as image:
        return fit(image, 64)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
idle = peak()
with ThreadPoolExecutor(8) as pool:
    assert len(list(pool.map(read, range(8)))) == 8
print(peak() - idle)
"""


def test_photographs_that_threads_read_at_once_take_together_no_more_than_one_may(tmp_path):
    (tmp_path / "deep.png").write_bytes(png(3_000, 3_000, 16))
    command = [sys.executable, "-c", AT_ONCE, str(tmp_path / "deep.png")]
    grown = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, check=True)
    # 80 MB, and what the decoder and the threads take; each of the eight takes more than 50.
    assert float(grown.stdout) < 150


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_detector(tmp_path_factory.mktemp("model"))


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A workspace, where Ghostscript would leave a trace."""
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text("{}")
    Path("bin").mkdir()
    Path("bin/gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/EXECUTED\n")
    Path("bin/gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def scoring(files: list[Path], model: Path) -> dict[str, str]:
    scored = score([str(files[0].parent)], Path("out"), Params(), model)
    rows = pd.read_parquet("out")
    assert scored.images == len(rows) == len(files)
    errors = rows[rows["error"].notna()]
    assert len(read_scores(Path("out"))) == len(files)
    return {Path(path).name: error for path, error in zip(errors["path"], errors["error"], strict=True)}


def errors_of(read: Callable[[Path], object], files: list[Path]) -> dict[str, str]:
    found = {}
    for file in files:
        try:
            read(file)
        except Exception as error:
            found[file.name] = str(error)
    return found


def serving(files: list[Path], model: Path) -> dict[str, str]:
    """By content, where there is any to send, and by path."""
    inspector = Inspector()
    inspector.load_context(SimpleNamespace(artifacts={"detector": str(model)}, model_config={"max_pixels": LIMIT}))

    def send(file: Path) -> None:
        if file.is_file():
            image = base64.b64encode(file.read_bytes()).decode()
            inspector.predict(None, pd.DataFrame({"image": [image]}))
        else:
            inspector.predict(None, pd.DataFrame({"path": [file.name]}))

    # A client learns the row, not the name of a file that it has sent.
    return {name: f"{name}, {words}" for name, words in errors_of(send, files).items() if "row 0: " in words}


def inspecting(files: list[Path], model: Path) -> dict[str, str]:
    sent = [file for file in files if file.is_file()]
    found = errors_of(lambda file: Model(model, "tiny").judge(file.read_bytes(), file.name, LIMIT), sent)
    return found | {file.name: f"{file.name} cannot be sent" for file in files if file not in sent}


def feedback(files: list[Path], model: Path) -> dict[str, str]:
    Path("data/thing/good").mkdir(parents=True)
    params = Params(prepare=Prepare(layout="folder", root=Path("data")), validate=Validate(masks="optional"))
    found = errors_of(lambda file: give_feedback([file], Statement("thing", None, "Ada"), params, Path("log")), files)
    assert len(list(Path("data/thing/good").iterdir())) == len(files) - len(found)
    return found


def validating_masks(files: list[Path], model: Path) -> dict[str, str]:
    """Each is the mask of a whole photograph."""
    Path("raw").mkdir()
    rows = []
    for file in files:
        Image.new("RGB", (64, 64)).save(f"raw/{file.stem}{file.suffix}.bmp")
        facts = {"image_id": file.name, "class_name": "thing", "split": "test", "is_anomalous": True, "defect": "hole"}
        size = {"width": 64, "height": 64, "mode": "RGB", "problem": None}
        shutil.move(file, "raw")
        rows.append({**facts, "path": f"{file.stem}{file.suffix}.bmp", "mask_path": file.name, **size})
    frame = pd.DataFrame(rows)[manifest.SCHEMA.names]
    data = Prepare(layout="folder", root=Path("raw"))
    check_dataset(frame, data, Validate(), Path("report"))
    findings = json.loads(Path("report/validation.json").read_text())["findings"]
    (broken,) = [finding for finding in findings if finding["rule"] == "mask_file"]
    docs = " ".join(page.read_text() for page in Path("report/docs").rglob("*.html"))
    assert broken["count"] == len(files) - len(WHOLE)
    return {file.name: file.name for file in files if f"{file.name} " in docs and file.name not in WHOLE}


def preparing(files: list[Path], model: Path) -> dict[str, str]:
    Path("raw/thing").mkdir(parents=True)
    shutil.move(files[0].parent, "raw/thing/good")
    data, found = Prepare(layout="folder", root=Path("raw")), {}
    # A pipe or a device stops the stage, because the next stage would hash it.
    for name in ("endless.png", "nothing.png", "pipe.png", "socket.png", "terminal.png"):
        with pytest.raises(InputError, match=name):
            listing.build(data, data.root)
        with pytest.raises(InputError, match=name):
            look(data.root, data, "folder")
        Path("raw/thing/good", name).unlink()
        found[name] = name
    table(look(data.root, data, "folder"))
    os.mkfifo("raw/thing/notes.txt")
    with pytest.raises(InputError, match=r"notes\.txt is not a regular file"):
        track(data.root)
    frame = listing.build(data, data.root).set_index("path")
    bad = frame[frame["problem"].notna()]
    return found | {Path(path).name: problem for path, problem in bad["problem"].items()}


WITHOUT_WHITE = [validating_masks, preparing]
ENTRANCES = [scoring, serving, inspecting, feedback, *WITHOUT_WHITE]


@pytest.mark.parametrize("entrance", ENTRANCES, ids=lambda entrance: entrance.__name__)
def test_an_entrance_names_what_it_refuses_and_goes_on(
    entrance: Callable[[list[Path], Path], dict[str, str]], hostile, model, place, monkeypatch
):
    new = Path("new")
    new.mkdir()
    for file in hostile.iterdir():
        if (file.is_symlink() or file.is_file()) and file.name not in {*LARGE, SPARSE}:
            shutil.copy(file, new, follow_symlinks=False)
    os.mkfifo("new/pipe.png")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("new/socket.png")
    monkeypatch.setenv(IMAGE_ROOT, str(new.absolute()))
    files = sorted(new.absolute().iterdir())
    errors = entrance(files, model)
    assert errors.keys() == {file.name for file in files} - (WHOLE if entrance in WITHOUT_WHITE else set())
    assert not [name for name, words in errors.items() if name not in words]
    assert not Path("EXECUTED").exists()
