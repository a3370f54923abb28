"""The registered model, as MLflow loads it: its code from this file, its weights from safetensors beside it."""

import base64
import binascii
import io
from dataclasses import asdict
from typing import Any

import mlflow
import numpy as np
import pandas as pd

from vlmdiff.data.images import decode, to_rgb
from vlmdiff.detection.detector import Detector
from vlmdiff.errors import InputError

MAX_PIXELS = 100_000_000
# What else a row has, by the detector's `captions`.
CAPTION_COLUMNS = {"image": "caption", "class": "class_name"}


class Inspector(mlflow.pyfunc.PythonModel):
    """Photographs in, scores and verdicts out; the signature in packaging.py gives names and types."""

    def load_context(self, context) -> None:
        self.detector = Detector.from_pretrained(context.artifacts["detector"])

    def predict(self, context, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """A row a photograph: `score` in [0, 1), 0.5 the threshold; `is_anomalous`; `regions` in its own pixels.

        `image` is the base64 of a photograph's file; a model that judges by captions wants `caption`, or `class_name`
        where a class has one. Raises InputError naming the row that is no image, or the class without a caption.
        """
        captions = None
        match self.detector.params.captions:
            case "image":
                captions = model_input[CAPTION_COLUMNS["image"]].tolist()
            case "class":
                captions = self.detector.captions_of(model_input[CAPTION_COLUMNS["class"]])
        photographs = [_decode(number, value) for number, value in enumerate(model_input["image"])]
        rows = []
        for photograph, detection in zip(
            photographs, self.detector.detect(photographs, captions=captions), strict=True
        ):
            regions = detection.scaled_regions(photograph.shape[1], photograph.shape[0])
            rows.append(
                {
                    "score": detection.score,
                    "is_anomalous": detection.is_anomalous,
                    "regions": [asdict(region) for region in regions],
                }
            )
        return pd.DataFrame(rows, columns=["score", "is_anomalous", "regions"])


def _decode(number: int, value: str) -> np.ndarray:
    try:
        data = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise InputError(f"row {number}: `image` is not base64: {error}") from error
    return np.array(to_rgb(decode(io.BytesIO(data), MAX_PIXELS, f"row {number}: `image`")))


mlflow.models.set_model(Inspector())
