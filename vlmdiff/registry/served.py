"""The registered model as MLflow loads it: the code from this file, the weights from safetensors beside it.

It runs without the package's repository, Prefect, DVC and Great Expectations.
"""

import base64
import binascii
import io
import json
import math
import os
import sys
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import wraps
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import mlflow
import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException

from vlmdiff.core.errors import InputError, ModelError
from vlmdiff.core.files import open_regular, verify
from vlmdiff.data.images import opened, resolve
from vlmdiff.detection.decoded import Decoded
from vlmdiff.detection.detection import Detection
from vlmdiff.detection.detector import Detector, batches

# In the server's environment: the folder of photographs that it may read, and the most rows of a request.
IMAGE_ROOT, MAX_ROWS = "VLMDIFF_IMAGE_ROOT", "VLMDIFF_MAX_ROWS"
ROWS = 256
# Characters of a path that an error repeats.
SHOWN = 200
BATCH = 32
# The signature's parameters and their defaults.
DEFAULTS: dict[str, Any] = {"heatmap": False, "threshold": 0.5}
# The keys of a request; a client of TensorFlow names a signature, and there is only one.
KEYS = {"dataframe_records", "dataframe_split", "inputs", "instances", "params", "signature_name"}
# Characters of an error's message.
MESSAGE = 1000
# The column that may name what a row's photograph shows.
PRODUCT = "class_name"
# The column that a row needs besides, by the detector's `captions`.
CAPTION_COLUMNS = {"image": "caption", "class": PRODUCT}


class Inspector(mlflow.pyfunc.PythonModel):
    """Photographs in, scores and verdicts out. The signature in packaging.py gives names and types."""

    def load_context(self, context) -> None:
        """Read the weights and the environment.

        Raises InputError if a file of the version has changed since it was registered, or a variable has a value that
        is not valid.
        """
        folder = Path(context.artifacts["detector"])
        # The code, the signature and the requirements too.
        verify(folder.absolute().parent.parent, "Register the model again")
        self.detector = Detector.from_pretrained(folder)
        self.max_pixels = context.model_config["max_pixels"]
        self.max_rows, self.root = _max_rows(), _image_root()
        self.judge, self.waiting = ThreadPoolExecutor(1), deque()
        server: Any = sys.modules.get("mlflow.pyfunc.scoring_server")
        if server is not None:
            server.invocations = in_sentences(server.invocations)

    # MLflow's method has no annotations.
    # pyrefly: ignore[bad-override]
    def predict(self, context, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Return a row for each photograph: `score` in [0, 1); `is_anomalous`, whether it is above `threshold`;
        `verdict`, `product` and `p_value`, as a `Detection` has them; `regions`, the places that the map marks, in the
        photograph's own pixels; `explanation`, all that in words; `nearest`, the path in the dataset of the most
        similar normal training image; and on request a `heatmap`, base64 of a PNG of at most 1024 pixels a side.

        A row has either `image`, a photograph's file as base64 or, from Python or Parquet, as bytes; or `path`,
        relative to the server's IMAGE_ROOT. `class_name` tells the product; without it, the product is recognised. A
        model that judges by captions also needs `caption`, or `class_name` where a class has one. params: `threshold`,
        by default 0.5, for which the false alarm rate is guaranteed; `heatmap`, by default false. Raises
        MlflowException with a sentence that names the row; the server answers with status 400, or 500 where the model
        gives a value that is not finite.
        """
        try:
            return self._judge(model_input, params or {})
        except ModelError as error:
            raise MlflowException(str(error)) from error
        except InputError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error

    def _judge(self, frame: pd.DataFrame, params: dict[str, Any]) -> pd.DataFrame:
        asked = DEFAULTS | {name: value for name, value in params.items() if value is not None}
        threshold, draw = asked["threshold"], asked["heatmap"]
        if not 0 <= threshold <= 1:
            raise InputError(f"`threshold` is {threshold}: give a number from 0 to 1")
        columns = [frame[name].tolist() if name in frame else [None] * len(frame) for name in ("image", "path")]
        if not frame.columns.intersection(["image", "path"]).size:
            raise InputError("no row has a photograph: give each an `image`, base64 of a file, or a `path`")
        if len(frame) > self.max_rows:
            raise InputError(
                f"{len(frame)} rows in one request, at most {self.max_rows} are allowed: send several requests, or "
                f"start the server with a larger {MAX_ROWS}"
            )
        products, captions, rows = self._products(frame), self._captions(frame), []
        for batch in batches(zip(range(len(frame)), *columns, strict=True), BATCH):
            photographs = [self._read(number, image, path, draw) for number, image, path in batch]
            part = slice(len(rows), len(rows) + len(batch))
            names = [f"row {number}" for number, *_ in batch]
            images = [photograph.judged for photograph in photographs]
            found = self._detect(images, captions and captions[part], products[part], names)
            for photograph, detection in zip(photographs, found, strict=True):
                rows.append(photograph.verdict(detection.at(threshold)))
                if draw:
                    buffer = io.BytesIO()
                    photograph.heatmap(detection).save(buffer, "PNG")
                    rows[-1]["heatmap"] = base64.b64encode(buffer.getvalue()).decode()
        names = ["score", "is_anomalous", "verdict", "product", "p_value", "regions", "explanation", "nearest"]
        return pd.DataFrame(rows, columns=[*names, "heatmap"] if draw else names)

    def _detect(
        self, images: list[np.ndarray], captions: list[str] | None, products: list[str | None], names: list[str]
    ) -> list[Detection]:
        """Judge at most BATCH images. MLflow's server calls from many threads, but one thread judges: it takes together
        what waits, which is faster, and several threads with torch's own threads would compete for the cores.
        """
        mine = self._request(images, captions, products, names)
        self.judge.submit(self._detect_waiting)
        return mine.result()

    def _request(
        self, images: list[np.ndarray], captions: list[str] | None, products: list[str | None], names: list[str]
    ) -> Future:
        mine: Future[list[Detection]] = Future()
        self.waiting.append((images, captions, products, names, mine))
        return mine

    def _detect_waiting(self) -> None:
        taken, size = [], 0
        while self.waiting and size + len(self.waiting[0][0]) <= BATCH:
            taken.append(self.waiting.popleft())
            size += len(taken[-1][0])
        if taken:  # else an earlier call judged it too
            self._answer(taken)

    def _answer(self, taken: list[tuple]) -> None:
        images, captions, products, names, futures = zip(*taken, strict=True)
        try:
            texts = [text for each in captions for text in each or ()] or None
            found = iter(self.detector.detect([*chain(*images)], BATCH, texts, [*chain(*names)], chain(*products)))
            for each, future in zip(images, futures, strict=True):
                future.set_result(list(islice(found, len(each))))
        except Exception as error:
            if len(taken) == 1:
                futures[0].set_exception(error)
                return
            # One request's error, which names its row, is no answer to the others.
            for one in taken:
                self._answer([one])

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

    def _products(self, frame: pd.DataFrame) -> list[str | None]:
        """Return the products that the rows tell, None where there is none."""
        known = self.detector.calibrated().products
        if PRODUCT not in frame or known.keys() == {""}:
            return [None] * len(frame)
        told = [None if _is_missing(name) else name for name in frame[PRODUCT]]
        for number, name in enumerate(told):
            if name is not None and not (isinstance(name, str) and name in known):
                shown, names = repr(name)[:SHOWN], ", ".join(sorted(known))
                raise InputError(f"row {number}: this model does not know the `{PRODUCT}` {shown}, only {names}")
        return told

    def _read(self, number: int, image: Any, path: Any, draw: bool) -> Decoded:
        if _is_missing(image) == _is_missing(path):
            raise InputError(f"row {number} needs either an `image` or a `path`")
        if _is_missing(path):
            name = f"row {number}: `image`"
            stream: BinaryIO = io.BytesIO(_bytes(name, image))
        else:
            name = f"row {number}: `path`"
            stream = self._open(name, path)
        with stream, opened(stream, self.max_pixels, name) as photograph:
            return Decoded.of(photograph, self.detector, draw)

    def _open(self, name: str, path: Any) -> BinaryIO:
        """Open a file below the root. Errors tell the client neither where the root is nor what lies outside."""
        if self.root is None:
            raise InputError(f"{name}: this server does not read files, its {IMAGE_ROOT} is not set: send an `image`")
        if not isinstance(path, str):
            raise InputError(f"{name} must be text, not {type(path).__name__}")
        shown = path if len(path) <= SHOWN else f"{path[:SHOWN]}…"
        try:
            file = resolve(self.root, path)
        except (InputError, OSError, RuntimeError):  # also a name that is too long, and links in a circle
            raise InputError(f"{name} {shown!r} leaves the folder that is served: give a path inside it") from None
        try:
            return open_regular(file)
        except (InputError, OSError):
            raise InputError(f"{name} {shown!r} is not a file that can be read in the folder that is served") from None


def in_sentences(answer: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the function by which MLflow's server answers a request, so that each error is a sentence.

    MLflow itself repeats the request in the error's message, photographs included, and ignores a key or a parameter
    that it does not know.
    """

    @wraps(answer)
    def invocations(data: bytes, content_type: str | None, *others: Any) -> Any:
        try:
            _check_keys(data, content_type)
            return answer(data, content_type, *others)
        except MlflowException as error:
            said = error.message.partition("\nInput:")[0]
            if said.startswith("Failed to "):
                said = said.rpartition("Error: ")[2]
            error.message = said if len(said) <= MESSAGE else f"{said[: MESSAGE - 1]}…"
            # For the server's log, not for the client.
            print(error.json_kwargs.pop("stack_trace", ""), end="", file=sys.stderr)
            raise

    return invocations


def _check_keys(data: bytes, content_type: str | None) -> None:
    try:
        body = json.loads(data) if "json" in (content_type or "") else None
    except ValueError:  # MLflow says what is wrong with it
        return
    if not isinstance(body, dict):
        return
    params = body.get("params")
    for place, keys, known in (
        ("the request", body, KEYS),
        ("`params`", params if isinstance(params, dict) else {}, DEFAULTS),
    ):
        if unknown := sorted(keys.keys() - known):
            words = f"{place} has {unknown[0]!r}, which is not known: give only {', '.join(sorted(known))}"
            raise MlflowException.invalid_parameter_value(words)


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
        raise InputError(f"{MAX_ROWS} is {said!r}: give a whole number of rows, at least 1")
    return int(said)


def _image_root() -> Path | None:
    root = os.environ.get(IMAGE_ROOT)
    if not root:
        return None
    if not Path(root).is_dir():
        raise InputError(f"{IMAGE_ROOT} is {root!r}, which is not a folder: give the folder of the photographs")
    return Path(root).resolve()


mlflow.models.set_model(Inspector())
