"""A photograph between its file and its verdict."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image

from vlmdiff.data.images import fit
from vlmdiff.detection.detector import Detection
from vlmdiff.detection.heatmap import heatmap

HEATMAP_SIDE = 1024


@dataclass(frozen=True)
class Decoded:
    """What is kept of a photograph until it is judged.

    judged: uint8 (S, S, 3), at the model's size; width and height: its own, in pixels; shown: uint8 (H, W, 3), what a
    heatmap is drawn on, at most HEATMAP_SIDE pixels a side; None where no heatmap is wanted.
    """

    judged: np.ndarray
    width: int
    height: int
    shown: np.ndarray | None

    @classmethod
    def of(cls, image: Image.Image, size: int, draw: bool) -> "Decoded":
        """Return what is kept of a photograph in RGB for a model of `size` pixels. `image` may be made smaller."""
        (width, height), judged = image.size, fit(image, size)
        if draw:
            image.thumbnail((HEATMAP_SIDE, HEATMAP_SIDE))
        return cls(judged, width, height, np.array(image) if draw else None)

    def verdict(self, detection: Detection) -> dict[str, Any]:
        """Return the score, the verdict, and the regions in the photograph's own pixels."""
        regions = detection.scaled_regions(self.width, self.height)
        return {
            "score": detection.score,
            "is_anomalous": detection.is_anomalous,
            "regions": [asdict(region) for region in regions],
        }

    def heatmap(self, detection: Detection) -> Image.Image:
        """Return the anomaly map over the photograph, which must be kept to be shown."""
        assert self.shown is not None
        return Image.fromarray(heatmap(self.shown, detection.anomaly_map, vmax=1.0))
