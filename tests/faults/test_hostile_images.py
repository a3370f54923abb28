"""Hostile photographs at every entrance: files that decode to far more than they weigh, and pipes and devices."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.conftest import ROOT
from tests.entrances import ENTRANCES, LIMIT
from tests.hostile import many_scans, png, tiff
from tests.tiny import save_tiny_detector
from vlmdiff.core.errors import InputError
from vlmdiff.core.params import Prepare
from vlmdiff.evaluation.judging import REFERENCE
from vlmdiff.production.monitor import STATISTICS
from vlmdiff.setup.init import look, table, track

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
    shutil.copytree(faults / "names", folder / "names")
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
    names = sorted(str(file) for file in hostile.iterdir() if not file.is_dir())
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
    """A detector with the list of images that it was calibrated on, which the monitor reads."""
    folder = save_tiny_detector(tmp_path_factory.mktemp("model"))
    rng, columns = np.random.default_rng(0), [*STATISTICS, "score"]
    rows = pd.DataFrame({name: rng.random(20) for name in columns})
    rows.assign(image_id=[f"{i:064x}" for i in range(20)], class_name="thing").to_parquet(folder / REFERENCE)
    return folder


# Nobody knows which of their values is white, and a mask needs no white.
WITHOUT_WHITE = {"validating"}
# A manifest lists what can be decoded; the next stage but one asks which value is white.
LISTED = {"preparing"}


# Those that read photographs as others do, after a minute's work of their own.
SLOW = {"validating", "monitoring", "inspecting", "reporting"}


@pytest.mark.parametrize(
    "entrance",
    [
        pytest.param(name, marks=pytest.mark.services if name in SLOW else ())
        for name in (entrance.__name__ for entrance in ENTRANCES)
    ],
)
def test_an_entrance_names_what_it_refuses_and_goes_on(entrance, hostile, model, tmp_path):
    """Within seconds and little memory, and Ghostscript leaves no trace."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/EXECUTED\n")
    (tmp_path / "gs").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, "-m", "tests.entrances", entrance, str(model), str(hostile)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    found = {name: facts for name, *facts in map(json.loads, done.stdout.splitlines())}
    files = {file.name for file in hostile.rglob("*") if not file.is_dir()}
    assert done.returncode == 0 and found.keys() == files, done.stderr[-3000:]
    taken = {name for name, (words, *_) in found.items() if not words}
    names = {file.name for file in (hostile / "names").rglob("*") if not file.is_dir()}
    # What is given as feedback must be fit to train on: neither transparent nor of 16 bits.
    large = set() if entrance == "feedback" else LARGE
    assert taken == names | large | (WHOLE if entrance in WITHOUT_WHITE | LISTED else set())
    assert not [name for name, (words, *_) in found.items() if words and name not in words]
    # The largest photographs that are allowed may take what they need to be shown.
    dear = {name: facts[1:] for name, facts in found.items() if facts[1] > SECONDS or facts[2] > MEGABYTES}
    assert not dear.keys() - LARGE and not (tmp_path / "EXECUTED").exists(), dear


def test_init_names_a_pipe_or_a_device_before_dvc_waits_for_it(hostile, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(hostile / "names", "raw/thing/good")
    data = Prepare(layout="folder", root=Path("raw"))
    table(look(data.root, data, "folder"))
    for name in ("endless.png", "nothing.png", "terminal.png"):
        shutil.copy(hostile / name, "raw/thing/good", follow_symlinks=False)
        with pytest.raises(InputError, match=name):
            look(data.root, data, "folder")
        Path("raw/thing/good", name).unlink()
    os.mkfifo("raw/thing/notes.txt")
    with pytest.raises(InputError, match=r"notes\.txt is not a regular file"):
        track(data.root)
