"""Compare this workspace's detector with retrieval that is not trained: same features, same test images.

Run it in a workspace where `dvc repro` has run with presets/photographs.yaml:

    python benchmarks/photographs.py

Both baselines see the training and the held-out images, work in the features of the detector's first stage, and do not
know the class of a test image. Their maps are smoothed by a Gaussian of sigma 4 at 256 pixels.

- nearest patches: 1 - cosine similarity to the nearest of 30,000 random patches; each layer has length one.
- PatchCore (Roth et al., CVPR 2022): patches averaged over 3 x 3; a greedy coreset of 10,000 out of 60,000 random
  patches, found in a random projection to 128 dimensions; the Euclidean distance to the nearest patch.

The image's score is that of each method's paper (nearest patches: the mean of the map's highest 1 %; PatchCore: its
maximum) and, in a second row, that of our detector's map. Intervals come from 1,000 bootstrap samples of each class's
test images, the same for all methods.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))

from dataset import Dataset

from vlmdiff.core import workspace as w
from vlmdiff.detection.anomaly_map import enlarge, image_scores, smooth
from vlmdiff.detection.detector import Detector
from vlmdiff.detection.retrieval import unit_length
from vlmdiff.detection.settings import KINDS
from vlmdiff.evaluation.bootstrap import Resampled, Statistics
from vlmdiff.evaluation.metrics import METRICS, evaluate_classes
from vlmdiff.model.feature_space import FeatureSpace
from vlmdiff.model.normalization import from_uint8

NEAREST, POOL, CORESET, PROJECTED = 30_000, 60_000, 10_000, 128


class Baseline:
    """A bank of normal patches of images, uint8 (N, S, S, 3). averaged: as PatchCore, otherwise nearest patches."""

    def __init__(self, ours: Detector, images: np.ndarray, averaged: bool):
        self.pipeline, self.averaged = ours.pipeline, averaged
        generator = torch.Generator().manual_seed(0)
        each, kept = -(-(POOL if averaged else NEAREST) // len(images)), []
        for image in images:
            patches = self.patches(image)
            kept.append(patches[torch.randperm(len(patches), generator=generator)[:each]])
        self.bank = torch.cat(kept)
        if averaged:
            directions = torch.randn(self.bank.shape[1], PROJECTED, generator=generator) / PROJECTED**0.5
            self.bank = self.bank[farthest(self.bank @ directions, CORESET)]

    @torch.no_grad()
    def patches(self, image: np.ndarray) -> torch.Tensor:
        """Return the patches (places, features) of an image, uint8 (S, S, 3)."""
        x = from_uint8(image[None], self.pipeline.device)
        features = self.pipeline.vae.features(self.pipeline.normalize(x))
        if self.averaged:
            features = F.avg_pool2d(features, 3, 1, 1)
        return unit_length(features, self.pipeline.vae.config.feature_channels)[0].flatten(1).T.cpu()

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Return the anomaly map (S, S) of an image."""
        patches = self.patches(image)
        size, side = len(image), round(len(patches) ** 0.5)
        # Of unit vectors, the squared distance is twice 1 - cosine similarity.
        squared = (2 - 2 * (patches @ self.bank.T).amax(dim=1)).clamp_min(0)
        distance = squared.sqrt() if self.averaged else squared / 2
        return smooth(enlarge(distance.view(1, side, side), size).numpy(), 4 * size / 256)[0]


def farthest(points: torch.Tensor, count: int) -> torch.Tensor:
    """Return the indices of `count` points (N, D), each the farthest from those before it."""
    squares, chosen = points.square().sum(dim=1), [0]
    distance = torch.full_like(squares, torch.inf)
    for _ in range(min(count, len(points)) - 1):
        last = chosen[-1]
        distance = torch.minimum(distance, squares + squares[last] - 2 * (points @ points[last]))
        chosen.append(int(distance.argmax()))
    return torch.tensor(chosen)


def interval(values: tuple[float, float]) -> str:
    return "{:.3f} to {:.3f}".format(*values)


def main() -> None:
    dataset, ours = Dataset(), Detector.from_pretrained(w.DETECTOR)
    assert isinstance(ours.pipeline.vae, FeatureSpace)
    max_fpr, masks = dataset.params.evaluate.max_fpr, dataset.masks
    truths, images, normal = np.array(dataset.truths), dataset.images(dataset.test), dataset.images(dataset.normal)
    began = time.monotonic()
    found = list(ours.stream(images, 16))
    pace = {"vlmdiff": len(images) / (time.monotonic() - began)}
    maps, scores = {"vlmdiff": np.stack([one.anomaly_map for one in found])}, {"vlmdiff": [one.score for one in found]}
    for i, kind in enumerate(KINDS):
        maps[f"{kind} alone"] = np.stack([one.evidence[i] for one in found if one.evidence is not None])
        scores[f"{kind} alone"] = ours.image_scores(maps[f"{kind} alone"])
    del found
    for title, averaged in {"nearest patches": False, "PatchCore": True}.items():
        baseline = Baseline(ours, normal, averaged)
        began = time.monotonic()
        maps[title] = maps[f"{title}, our score"] = np.stack([baseline(image) for image in images])
        pace[title] = len(images) / (time.monotonic() - began)
        scores[title] = image_scores(maps[title], "max" if averaged else "top_percent")
        scores[f"{title}, our score"] = ours.image_scores(maps[title])

    classes = np.array(dataset.classes)
    results = {t: evaluate_classes(classes, maps[t], masks, scores[t], max_fpr, None, truths) for t in maps}
    names = sorted(set(classes))
    # A row for each method, so that the table fits a terminal.
    table = Table(
        "", *names, "mean", "/ s", title=f"AU-PRO, image AUROC and images per second, {len(images)} test images"
    )
    for title, result in results.items():
        rows = [*(result.classes[name] for name in names), result.mean]
        cells = (f"{values['au_pro']:.3f}\n{values['image_auroc']:.3f}" for values in rows)
        table.add_row(title, *cells, f"{pace[title]:.1f}" if title in pace else "")
    Console().print(table)

    members = {name: classes == name for name in sorted(set(classes))}
    drawn = {title: Resampled({}) for title in maps}
    for title, found in drawn.items():
        for name, i in members.items():
            statistics = Statistics.of(maps[title][i], masks[i], np.array(scores[title])[i], truths[i])
            found.classes[name] = statistics.draw(name, max_fpr)
    for metric in ("au_pro", "image_auroc"):
        for title, found in drawn.items():
            less = (
                ""
                if title == "vlmdiff"
                else f", vlmdiff minus {title} {interval((drawn['vlmdiff'] - found).interval(metric))}"
            )
            print(f"{METRICS[metric]}, {title}: {interval(found.interval(metric))}{less} (95 %)")


if __name__ == "__main__":
    main()
