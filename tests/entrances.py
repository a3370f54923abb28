"""Every way in for a photograph, with one hostile file beside a whole photograph.

`python -m tests.entrances ENTRANCE MODEL FOLDER` prints a line for each file of FOLDER: its name, the sentences that
name it, the seconds of the processor, and by how many megabytes the process grew beyond its idle size.
"""

import base64
import contextlib
import json
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
from PIL import Image

from vlmdiff.core.errors import InputError
from vlmdiff.core.params import Evaluate, Params, Prepare, Validate
from vlmdiff.data import listing, manifest

LIMIT = Prepare().max_pixels
WHOLE = "whole.png"
# What an entrance says of a file; empty where it takes the file. Raises AssertionError unless it takes WHOLE.
Entrance = Callable[[Path, Path], str]


def put(file: Path, place: Path) -> Path:
    """Put a hostile file into a folder, and the whole photograph beside it."""
    place.mkdir(parents=True, exist_ok=True)
    shutil.copy(Path(WHOLE), place)
    if file.name == WHOLE:
        return place / WHOLE
    if file.is_fifo():
        os.mkfifo(place / file.name)
    elif file.is_socket():
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(os.path.relpath(place / file.name))
    else:
        # Not a copy: a hole of a terabyte would fill the disk.
        os.link(file, place / file.name, follow_symlinks=False)
    return place / file.name


def can_be_sent(file: Path) -> bool:
    """Whether a browser or a client can send the file's bytes: there are some, and not too many."""
    return file.is_file() and file.stat().st_size < 1e8


def said(what: Callable[[], object]) -> str:
    """The sentence of an InputError, empty if there is none."""
    try:
        what()
    except InputError as error:
        return str(error)
    return ""


def scoring(file: Path, model: Path) -> str:
    from vlmdiff.production.score import score

    put(file, Path("new"))
    score(["new"], Path("out"), Params(), model)
    rows = {Path(row["path"]).name: row for row in pd.read_parquet("out").to_dict("records")}
    assert pd.isna(rows[WHOLE]["error"]) and 0 <= rows[WHOLE]["score"] < 1
    words = rows[file.name]["error"]
    return "" if pd.isna(words) else words


def monitoring(file: Path, model: Path) -> str:
    """After the photograph has been scored; and with the file in place of the scores."""
    from vlmdiff.production.monitor import monitor

    words = scoring(file, model)
    found = monitor(Path("out"), Path("page"), Params(), model)
    assert (found.unreadable, found.images) == (bool(words), 2 - bool(words) - (file.name == WHOLE))
    other = said(lambda: monitor(Path("new", file.name), Path("page"), Params(), model))
    assert file.name in other
    return words


def serving(file: Path, model: Path) -> str:
    """By content, where there is one to send, and by path."""
    from mlflow.exceptions import MlflowException

    inspector = _served(str(model))
    inspector.root = put(file, Path("new").absolute()).parent
    words = ""
    sent = [{"path": file.name}]
    if can_be_sent(file):
        sent.append({"image": base64.b64encode(file.read_bytes()).decode()})
    for row in sent:
        try:
            inspector.predict(None, pd.DataFrame([row]))
        except MlflowException as error:
            assert error.error_code == "INVALID_PARAMETER_VALUE" and "row 0: " in error.message
            # A client learns the row, not the name of a file that it has sent.
            words = f"{file.name}, {error.message}"
        (answer,) = inspector.predict(None, pd.DataFrame([{"path": WHOLE}])).to_dict("records")
        assert 0 <= answer["score"] < 1
    return words


_inspectors = {}


def _served(model: str):
    from vlmdiff.registry.served import Inspector

    if model not in _inspectors:
        _inspectors[model] = Inspector()
        context = SimpleNamespace(artifacts={"detector": model}, model_config={"max_pixels": LIMIT})
        _inspectors[model].load_context(context)
    return _inspectors[model]


def inspecting(file: Path, model: Path) -> str:
    from vlmdiff.production.inspector import Model

    def look(name: str) -> None:
        Model(model, "tiny").judge(Path("new", name).read_bytes(), name, _params().prepare.max_pixels)

    put(file, Path("new"))
    words = said(lambda: look(file.name)) if can_be_sent(file) else f"{file.name} cannot be sent"
    look(WHOLE)
    return words


def feedback(file: Path, model: Path) -> str:
    from vlmdiff.data.feedback import Statement, give_feedback

    new, params = put(file, Path("new")), _params()
    Path("raw/thing/good").mkdir(parents=True)
    said_of = Statement("thing", None, "Ada")
    words = said(lambda: give_feedback([new], said_of, params, Path("log")))
    give_feedback([Path("new", WHOLE)], said_of, params, Path("log"))
    assert len(list(Path("raw/thing/good").iterdir())) == 1 + (not words and file.name != WHOLE)
    return words


def preparing(file: Path, model: Path) -> str:
    put(file, Path("raw/thing/good"))
    frames: list[pd.DataFrame] = []
    words = said(lambda: frames.append(listing.build(_params().prepare, Path("raw"))))
    if words:
        # A pipe or a device stops the stage, because the next stage would hash it.
        Path("raw/thing/good", file.name).unlink()
        listing.build(_params().prepare, Path("raw"))
        return words
    problems = frames[0].set_index("path")["problem"]
    assert problems[f"thing/good/{WHOLE}"] is None
    return problems[f"thing/good/{file.name}"] or ""


def validating(file: Path, model: Path) -> str:
    """As the mask of a whole photograph; whole ones have one, too."""
    from vlmdiff.data.contract import check_dataset

    put(file, Path("raw"))
    facts = {"class_name": "thing", "split": "test", "is_anomalous": True, "defect": "hole", "path": WHOLE}
    size = {"width": 64, "height": 64, "mode": "RGB", "problem": None}
    rows = [{"image_id": name, "mask_path": name, **facts, **size} for name in {WHOLE, file.name}]
    frame = pd.DataFrame(rows)[manifest.SCHEMA.names]
    check_dataset(frame, _params().prepare, Validate(), 64, Path("report"))
    findings = {row["rule"]: row for row in json.loads(Path("report/validation.json").read_text())["findings"]}
    assert findings["mask_file"]["count"] == (0 if findings["mask_file"]["passed"] else 1)
    pages = " ".join(page.read_text() for page in Path("report/docs").rglob("*.html"))
    return "" if findings["mask_file"]["passed"] else f"{file.name} {file.name in pages}"


def reporting(file: Path, model: Path) -> str:
    """As a test photograph, and as a mask, that became what it is after the contract had been checked."""
    from vlmdiff.evaluation.judging import judge_images

    frame = pd.DataFrame(
        {
            "image_id": "0" * 64,
            "path": [WHOLE, file.name, WHOLE],
            "mask_path": [None, None, file.name],
            "class_name": "thing",
            "split": "test",
            "is_anomalous": [False, False, True],
            "defect": [None, None, "hole"],
            "problem": None,
        }
    )
    frame = manifest.with_none(frame)
    put(file, Path("raw"))

    def judge(rows: list[int]) -> str:
        return said(
            lambda: judge_images(_detector(str(model)), frame.iloc[rows], _params().prepare, {}, Evaluate(examples=1))
        )

    words = [judge([0, 1]), judge([0, 2])]
    assert judge([0]) == ""
    # What Pillow reads is a mask, whichever value is white.
    assert file.name in (words[1] or words[0] or file.name)
    return words[0]


_detectors = {}


def _detector(model: str):
    from vlmdiff.detection.detector import Detector

    if model not in _detectors:
        _detectors[model] = Detector.from_pretrained(model)
    return _detectors[model]


def _params() -> Params:
    return Params(prepare=Prepare(layout="folder", root=Path("raw")), validate=Validate(masks="optional"))


ENTRANCES: list[Entrance] = [scoring, monitoring, serving, inspecting, feedback, preparing, validating, reporting]


def memory(name: str) -> float:
    """Megabytes of this process: VmRSS now, VmHWM at most since `clear_refs` was last written."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def attempt(entrance: Entrance, file: Path, model: Path) -> tuple[str, float]:
    """Use an entrance in a workspace of its own."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("params.yaml").write_text("{}")
        noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
        Image.fromarray(noise).save(WHOLE)
        began = time.process_time()
        return entrance(file, model), time.process_time() - began


if __name__ == "__main__":
    use = {each.__name__: each for each in ENTRANCES}[sys.argv[1]]
    place, hostile = Path(sys.argv[2]).absolute(), Path(sys.argv[3]).absolute()
    with contextlib.redirect_stdout(sys.stderr):
        # Twice: what is loaded once is there before the measuring.
        for _ in range(2):
            attempt(use, Path(WHOLE), place)
        idle = memory("VmRSS")
        for file in sorted(hostile.rglob("*")):
            if not file.is_dir():
                Path("/proc/self/clear_refs").write_text("5")
                words, seconds = attempt(use, file, place)
                print(json.dumps([file.name, words, seconds, memory("VmHWM") - idle]), file=sys.__stdout__, flush=True)
