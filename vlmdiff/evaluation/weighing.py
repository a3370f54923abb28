"""What is chosen on synthesised defects, without test images: the share of retrieval, and the false-alarm rate."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from vlmdiff.core.params import Costs
from vlmdiff.data.synthesised import HeldOut, synthesise
from vlmdiff.detection.anomaly_map import fuse
from vlmdiff.detection.calibration import least_cost_rate
from vlmdiff.detection.detector import Detector
from vlmdiff.evaluation.metrics import evaluate_classes

WEIGHTS = np.linspace(0, 1, 11).round(1).tolist()
# Reconstruction finds drawn defects better than real ones (docs/benchmarks.md), so it counts where it gains more.
MARGIN = 0.02
# Defects drawn: enough to tell weights apart, few enough to take a minute on a CPU.
DEFECTS = 150
# Normal images that stand beside the defects.
NORMAL = 200


@dataclass(frozen=True)
class Tried:
    """What a share of retrieval reaches on synthesised defects, as means over classes."""

    weight: float
    au_pro: float
    image_auroc: float

    @property
    def quality(self) -> float:
        return (self.au_pro + self.image_auroc) / 2


class Weighing:
    """Chooses the share of retrieval on defects drawn on held-out normal images.

    `tried` has a row for each share, after `__call__`.
    """

    def __init__(self, detector: Detector, held_out: HeldOut, batch_size: int, max_fpr: float):
        self.detector, self.held_out = detector, held_out
        self.batch_size, self.max_fpr = batch_size, max_fpr
        self.tried: list[Tried] = []

    def __call__(self, evidence: np.ndarray) -> float:
        """Return the highest share whose mean of AU-PRO and image AUROC is at most MARGIN below the best.

        evidence: that of the normal images (N, 2, S, S), as `Detector.calibrate` gives it.
        """
        classes = self.held_out.classes
        spoiled = list(synthesise(self.held_out.images, classes, DEFECTS))
        rows = [one.row for one in spoiled]
        captions = self.held_out.captions_of(rows)
        theirs = self.detector.evidence([one.image for one in spoiled], self.batch_size, captions, rows)
        # The images that carry defects come first, so that every class keeps normal ones.
        kept = np.unique([*rows, *range(len(evidence))][: len(rows) + NORMAL])
        names = [classes[row] for row in (*kept, *rows)]
        nothing = np.zeros(evidence.shape[2:], bool)
        masks = [*(nothing for _ in kept), *(one.mask for one in spoiled)]
        truths = [False] * len(kept) + [True] * len(rows)
        for weight in WEIGHTS:
            maps = np.concatenate([fuse(evidence[kept], weight), fuse(theirs, weight)])
            scores = self.detector.image_scores(maps).tolist()
            mean = evaluate_classes(names, list(maps), masks, scores, self.max_fpr, is_anomalous=truths).mean
            self.tried.append(Tried(weight, mean["au_pro"], mean["image_auroc"]))
        best = max(one.quality for one in self.tried)
        return max(one.weight for one in self.tried if one.quality >= best - MARGIN)

    def rows(self) -> list[dict[str, float]]:
        """Return what was tried, as JSON."""
        return [asdict(one) for one in self.tried]


class Costing:
    """Chooses the false-alarm rate of least expected cost on defects drawn on held-out normal images.

    share: that of images that are expected to have a defect.
    """

    def __init__(self, detector: Detector, held_out: HeldOut, batch_size: int, costs: Costs, share: float):
        self.detector, self.held_out, self.batch_size = detector, held_out, batch_size
        self.costs, self.share = costs, share

    def __call__(self, normal: np.ndarray, products: Sequence[str]) -> float:
        """Return the rate, given the standardised scores (N,) of normal images of these products.

        The detector is calibrated on them.
        """
        drawn = synthesise(self.held_out.images, self.held_out.classes, DEFECTS)
        spoiled = [one for one in drawn if self.held_out.classes[one.row] in products]
        rows = [one.row for one in spoiled]
        theirs = [self.held_out.classes[row] for row in rows]
        images, captions = [one.image for one in spoiled], self.held_out.captions_of(rows)
        defective = self.detector.standardised(images, theirs, self.batch_size, captions, rows)
        return least_cost_rate(normal, products, defective, theirs, self.costs, self.share)
