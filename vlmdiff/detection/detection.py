"""`Detection`: what a detector says of one photograph."""

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from PIL import Image

from vlmdiff.core.errors import InputError
from vlmdiff.data.images import to_rgb
from vlmdiff.detection.explain import Region, explain, find_regions, scaled
from vlmdiff.detection.normals import Normal, Normals

# The part of the map's maximum from which an alarm marks places, if none is above the threshold.
PEAK = 0.95
Photograph = np.ndarray | Image.Image


@dataclass(frozen=True)
class Detection:
    """What a detector says of one photograph. Score, map and peaks are in [0, 1]; the threshold is 0.5.

    product: the recognised or given one; None if the photograph shows none that is known, which counts as anomalous,
    since nothing says that it is normal. p_value: the share of `normal_images` normal images, each judged as a new one
    is, and of this one, that are as unusual; None for a detector that does not know. review: half the width of the band
    of scores around the threshold whose verdict is `review`.

    anomaly_map: float32 (S, S); reconstruction: uint8 (S, S, 3), the photograph as if it were normal. S is the model's
    resolution, to which the photograph is resized. evidence: (E, S, S), what the map is made of, see
    `Detector.evidence`; None for a detector that has one kind only. photograph: as it was given; size: its own width
    and height. nearest: the most similar normal training image, None for a detector that remembers none.
    """

    score: float
    is_anomalous: bool
    anomaly_map: np.ndarray
    regions: list[Region]
    reconstruction: np.ndarray
    evidence: np.ndarray | None = None
    product: str | None = None
    p_value: float | None = None
    normal_images: int | None = None
    review: float = 0.0
    threshold: float = 0.5
    photograph: Photograph | None = field(default=None, repr=False)
    size: tuple[int, int] | None = None
    nearest: Normal | None = None
    normals: Normals | None = field(default=None, repr=False)

    @cached_property
    def explanation(self) -> str:
        """The verdict, the regions in the photograph's own pixels, and what is different from normal images, in words.

        An alarm takes some milliseconds more where the dataset's captions are descriptions: the photograph is described
        too.
        """
        size = self.size or self.anomaly_map.shape[::-1]
        words = None
        if self.is_anomalous and self.normals and self.nearest and self.photograph is not None:
            words = self.normals.words(to_rgb(self.photograph), self.nearest.class_name)
        path, count = self.nearest.path if self.nearest else None, self.normal_images
        regions, product = self.scaled_regions(*size), self.product or None
        return explain(self.verdict, self.score, regions, size, words, path, product, self.p_value, count)

    @property
    def verdict(self) -> str:
        """`normal`, `anomalous`, `review` or `unknown product`."""
        if self.product is None:
            return "unknown product"
        if self.review and abs(self.score - self.threshold) <= self.review:
            return "review"
        return "anomalous" if self.is_anomalous else "normal"

    @property
    def marked(self) -> np.ndarray:
        """The places that the verdict marks, bool (S, S): none of a normal image, and at least one of an alarm."""
        if not self.is_anomalous:
            return np.zeros(self.anomaly_map.shape, bool)
        return self.anomaly_map > self._level

    @property
    def _level(self) -> float:
        # An image may be unusual by one kind of evidence where the map, which has all of them, is below its threshold.
        return min(self.threshold, PEAK * float(self.anomaly_map.max()))

    def at(self, threshold: float) -> "Detection":
        """Return the same photograph judged at another threshold: is_anomalous and the regions follow it.

        Raises InputError if the threshold is not from 0 to 1.
        """
        if not 0 <= threshold <= 1:
            raise InputError(f"the threshold is {threshold}: give a number from 0 to 1")
        is_anomalous = self.product is None or self.score > threshold
        found = replace(self, is_anomalous=is_anomalous, threshold=threshold)
        # Where the score is not the map's maximum, a normal image's map may exceed the threshold.
        return replace(found, regions=find_regions(self.anomaly_map, found._level) if is_anomalous else [])

    def scaled_regions(self, width: int, height: int) -> list[Region]:
        """Return the regions in the photograph's own pixels, `width` x `height`."""
        return scaled(self.regions, self.anomaly_map.shape, (width, height))
