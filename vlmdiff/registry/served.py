"""The registered model, as MLflow loads it: its code from this file, its weights from safetensors beside it.

It runs where the package's repository, Prefect, DVC and Great Expectations are not.
"""

import base64
import binascii
import io
import math
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import mlflow
import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from PIL import Image

from vlmdiff.core.errors import InputError
from vlmdiff.data.images import decode, resolve, to_rgb
from vlmdiff.detection.detector import Detection, Detector, batches
from vlmdiff.evaluation.report import heatmap

# Of the server's environment: the folder below which it reads photographs itself, and the most rows of a request.
IMAGE_ROOT, MAX_ROWS = "VLMDIFF_IMAGE_ROOT", "VLMDIFF_MAX_ROWS"
ROWS = 256
BATCH = 32
# What else Pillow reads has decoders that nobody should reach over a network: EPS runs Ghostscript.
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
HEATMAP_SIDE = 1024
# The signature's parameters, as they are where a request says nothing.
DEFAULTS: dict[str, Any] = {"heatmap": False, "threshold": 0.5}
# What else a row has, by the detector's `captions`.
CAPTION_COLUMNS = {"image": "caption", "class": "class_name"}


@dataclass(frozen=True)
class Photograph:
    """What is kept of a row's photograph: at the model's size, as it is judged; its own size; to draw a heatmap on."""

    judged: Image.Image
    width: int
    height: int
    shown: Image.Image | None


class Inspector(mlflow.pyfunc.PythonModel):
    """Photographs in, scores and verdicts out; the signature in packaging.py gives names and types."""

    def load_context(self, context) -> None:
        """Read the weights, and the environment. Raises InputError where that says what cannot be."""
        self.detector = Detector.from_pretrained(context.artifacts["detector"])
        self.max_pixels = context.model_config["max_pixels"]
        self.max_rows, self.root = _max_rows(), _image_root()
        self.judge, self.waiting = ThreadPoolExecutor(1), deque()

    def predict(self, context, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """A row a photograph: `score` in [0, 1); `is_anomalous`, whether it is above `threshold`; `regions`, and on
        request a `heatmap`, base64 of a PNG, at most HEATMAP_SIDE pixels a side.

        A row has either `image`, a photograph's file as base64 or, from Python or Parquet, as bytes; or `path`, below
        the server's IMAGE_ROOT and relative to it. A model that judges by captions wants `caption`, or `class_name`
        where a class has one. Params: `threshold`, 0.5 by default, where the false alarms are guaranteed; regions are
        where the map exceeds it, in the photograph's own pixels; `heatmap`, false by default. Raises MlflowException,
        which its server answers by status 400, with a sentence that names the row.
        """
        try:
            return self._judge(model_input, params or {})
        except InputError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error

    def _judge(self, frame: pd.DataFrame, params: dict[str, Any]) -> pd.DataFrame:
        asked = DEFAULTS | {name: value for name, value in params.items() if value is not None}
        threshold, draw = asked["threshold"], asked["heatmap"]
        if not 0 <= threshold <= 1:
            raise InputError(f"`threshold` is {threshold}: scores lie between 0 and 1, and so must it")
        columns = [frame[name].tolist() if name in frame else [None] * len(frame) for name in ("image", "path")]
        if not frame.columns.intersection(["image", "path"]).size:
            raise InputError("no row has a photograph: give each an `image`, base64 of a file, or a `path`")
        if len(frame) > self.max_rows:
            raise InputError(
                f"{len(frame)} rows in one request, at most {self.max_rows} are taken: send several requests, or start "
                f"the server with a larger {MAX_ROWS}"
            )
        captions = self._captions(frame)
        rows = []
        for batch in batches(zip(range(len(frame)), *columns, strict=True), BATCH):
            photographs = [self._read(number, image, path, draw) for number, image, path in batch]
            texts = captions and captions[len(rows) : len(rows) + len(batch)]
            found = self._detect([p.judged for p in photographs], texts)
            rows += [_row(p, detection.at(threshold)) for p, detection in zip(photographs, found, strict=True)]
        names = ["score", "is_anomalous", "regions"]
        return pd.DataFrame(rows, columns=[*names, "heatmap"] if draw else names)

    def _detect(self, images: list[Image.Image], captions: list[str] | None) -> list[Detection]:
        """Judge at most BATCH images. MLflow's server asks from many threads: one thread judges, and what waited
        meanwhile it judges together, which takes less time. Of many, each would bring threads of its own to the cores.
        """
        mine: Future[list[Detection]] = Future()
        self.waiting.append((images, captions, mine))
        self.judge.submit(self._detect_waiting)
        return mine.result()

    def _detect_waiting(self) -> None:
        taken, size = [], 0
        while self.waiting and size + len(self.waiting[0][0]) <= BATCH:
            taken.append(self.waiting.popleft())
            size += len(taken[-1][0])
        if not taken:  # an earlier call took it along
            return
        try:
            texts = [text for _, captions, _ in taken for text in captions or ()] or None
            found = iter(self.detector.detect([i for images, _, _ in taken for i in images], BATCH, texts))
            for images, _, future in taken:
                future.set_result(list(islice(found, len(images))))
        except Exception as error:
            for _, _, future in taken:
                future.set_exception(error)

    def _captions(self, frame: pd.DataFrame) -> list[str] | None:
        kind = self.detector.params.captions
        if kind == "none":
            return None
        column = CAPTION_COLUMNS[kind]
        texts = frame[column].tolist()
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                raise InputError(f"row {number}: `{column}` must be text, not {text!r}")
        return texts if kind == "image" else self.detector.captions_of(texts)

    def _read(self, number: int, image: Any, path: Any, draw: bool) -> Photograph:
        if _is_missing(image) == _is_missing(path):
            raise InputError(f"row {number} needs either an `image` or a `path`")
        if _is_missing(path):
            name = f"row {number}: `image`"
            stream: BinaryIO = io.BytesIO(_bytes(name, image))
        else:
            name = f"row {number}: `path`"
            stream = self._open(name, path)
        with stream:
            picture = to_rgb(decode(stream, self.max_pixels, name, FORMATS))
        width, height = picture.size
        side = self.detector.pipeline.config.image_size
        judged = picture.resize((side, side), Image.Resampling.BILINEAR)
        if draw:
            picture.thumbnail((HEATMAP_SIDE, HEATMAP_SIDE), Image.Resampling.LANCZOS)
        return Photograph(judged, width, height, picture if draw else None)

    def _open(self, name: str, path: Any) -> BinaryIO:
        """A file below the root. The client is not told where the root is, nor what lies outside."""
        if self.root is None:
            raise InputError(f"{name}: this server reads no files, its {IMAGE_ROOT} is not set: send an `image`")
        if not isinstance(path, str):
            raise InputError(f"{name} must be text, not {type(path).__name__}")
        try:
            file = resolve(self.root, path)
            # A pipe would be waited for.
            if file.is_file():
                return file.open("rb")
        except InputError:
            raise InputError(f"{name} {path!r} leaves the folder that is served: give it relative to that") from None
        except (OSError, RuntimeError):  # a name too long, no right to read it; links in a circle
            pass
        raise InputError(f"{name} {path!r} is no file that can be read in the folder that is served")


def _row(photograph: Photograph, detection: Detection) -> dict[str, Any]:
    regions = detection.scaled_regions(photograph.width, photograph.height)
    row = {
        "score": detection.score,
        "is_anomalous": detection.is_anomalous,
        "regions": [asdict(region) for region in regions],
    }
    if photograph.shown is not None:
        buffer = io.BytesIO()
        picture = heatmap(np.asarray(photograph.shown), detection.anomaly_map, vmax=1.0)
        Image.fromarray(picture).save(buffer, "PNG")
        row["heatmap"] = base64.b64encode(buffer.getvalue()).decode()
    return row


def _is_missing(value: Any) -> bool:
    return value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))


def _bytes(name: str, value: Any) -> bytes:
    if isinstance(value, bytes):
        data = value
    elif isinstance(value, str):
        try:
            # MLflow's own clients break lines.
            data = base64.b64decode("".join(value.split()), validate=True)
        except (binascii.Error, ValueError) as error:
            raise InputError(f"{name} is not base64: {error}") from error
    else:
        raise InputError(f"{name} must be base64 of a file, not {type(value).__name__}")
    if not data:
        raise InputError(f"{name} has 0 bytes")
    return data


def _max_rows() -> int:
    said = os.environ.get(MAX_ROWS, str(ROWS))
    if not said.isdecimal() or int(said) < 1:
        raise InputError(f"{MAX_ROWS} is {said!r}: give a number of rows, from 1 on")
    return int(said)


def _image_root() -> Path | None:
    root = os.environ.get(IMAGE_ROOT)
    if not root:
        return None
    if not Path(root).is_dir():
        raise InputError(f"{IMAGE_ROOT} is {root!r}, which is no folder: name the one below which photographs lie")
    return Path(root).resolve()


mlflow.models.set_model(Inspector())
