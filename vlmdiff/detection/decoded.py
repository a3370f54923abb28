"""A photograph between its file and its verdict."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from vlmdiff.captions.describe import working_size
from vlmdiff.data.images import fit
from vlmdiff.detection.detection import Detection
from vlmdiff.detection.detector import Detector
from vlmdiff.detection.heatmap import heatmap

HEATMAP_SIDE = 1024


@dataclass(frozen=True)
class Decoded:
    """What is kept of a photograph until it is judged.

    judged: uint8 (S, S, 3), at the model's size; width and height: its own, in pixels; shown: uint8 (H, W, 3), what a
    heatmap is drawn on, at most HEATMAP_SIDE pixels a side; None where no heatmap is wanted; described: by what an
    alarm is described in words, None where it is not.
    """

    judged: np.ndarray
    width: int
    height: int
    shown: np.ndarray | None
    described: Image.Image | None = None

    @classmethod
    def of(cls, image: Image.Image, detector: Detector, draw: bool) -> "Decoded":
        """Return what is kept of a photograph in RGB for a detector. `image` may be made smaller."""
        (width, height), judged = image.size, fit(image, detector.pipeline.config.image_size)
        described = working_size(image) if detector.normals and detector.normals.described else None
        if draw:
            image.thumbnail((HEATMAP_SIDE, HEATMAP_SIDE))
        return cls(judged, width, height, np.array(image) if draw else None, described)

    def verdict(self, detection: Detection) -> dict[str, Any]:
        """Return the score, the verdict, the regions in the photograph's own pixels, and what explains them."""
        detection = replace(detection, photograph=self.described, size=(self.width, self.height))
        regions = detection.scaled_regions(self.width, self.height)
        return {
            "score": detection.score,
            "is_anomalous": detection.is_anomalous,
            "verdict": detection.verdict,
            "product": detection.product,
            "p_value": detection.p_value,
            "regions": [asdict(region) for region in regions],
            "explanation": detection.explanation,
            "nearest": detection.nearest and detection.nearest.path,
        }

    def heatmap(self, detection: Detection) -> Image.Image:
        """Return the anomaly map over the photograph, which must be kept to be shown."""
        assert self.shown is not None
        return Image.fromarray(heatmap(self.shown, detection.anomaly_map, vmax=1.0))
