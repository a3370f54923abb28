"""Compare this workspace's detector with PatchCore: same backbone, same test images, same image size.

Run it in a workspace where `dvc repro` has run with a preset for photographs and a MobileNetV2 in models/backbone:

    python benchmarks/photographs.py

PatchCore (Roth et al., CVPR 2022) has one memory bank for all classes. It uses patches of MobileNetV2's layers 4, 11
and 14, averaged over 3 x 3 and normalised to unit length; 6,000 random patches per class; and the distance to the
nearest patch, smoothed by a Gaussian of sigma 4. Neither method knows the class of a test image. Intervals come from
1,000 bootstrap samples of each class's test images, the same for both methods.
"""

import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from vlmdiff.core import workspace as w
from vlmdiff.core.params import VisionBackbone, load
from vlmdiff.data import manifest
from vlmdiff.data.images import load_mask, load_rgb, resolve
from vlmdiff.detection.anomaly_map import enlarge, image_scores, smooth
from vlmdiff.detection.detector import Detector
from vlmdiff.evaluation.bootstrap import Resampled, Statistics
from vlmdiff.evaluation.metrics import METRICS, evaluate_classes
from vlmdiff.model.backbone import Backbone, concatenate
from vlmdiff.model.normalization import from_uint8

LAYERS, PATCHES_A_CLASS, SIGMA = (4, 11, 14), 6000, 4.0
CPU, BACKBONE = torch.device("cpu"), Path("models/backbone")


class PatchCore:
    """PatchCore with one memory bank for normal images, uint8 (N, S, S, 3), of these classes."""

    def __init__(self, images: np.ndarray, classes: np.ndarray):
        self.size = images.shape[1]
        params = VisionBackbone(model=str(BACKBONE), image_size=self.size, layers=LAYERS)
        self.backbone = Backbone.load(params)
        generator = torch.Generator().manual_seed(0)
        kept = []
        for name in np.unique(classes):
            patches = self.patches(images[classes == name]).flatten(0, 1)
            kept.append(patches[torch.randperm(len(patches), generator=generator)[:PATCHES_A_CLASS]])
        self.bank = torch.cat(kept)
        self.squares = self.bank.square().sum(dim=1)

    def patches(self, images: np.ndarray) -> torch.Tensor:
        """Return patches (N, places, features)."""
        parts = []
        for start in range(0, len(images), 16):
            maps = [F.avg_pool2d(x, 3, 1, 1) for x in self.backbone(from_uint8(images[start : start + 16], CPU))]
            parts.append(concatenate([F.normalize(x, dim=1) for x in maps], self.size // 8).flatten(2).transpose(1, 2))
        return torch.cat(parts)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Return anomaly maps (N, S, S)."""
        maps = []
        for patches in self.patches(images):
            squared = patches.square().sum(dim=1, keepdim=True) + self.squares - 2 * patches @ self.bank.T
            maps.append(squared.min(dim=1).values.clamp_min(0).sqrt().view(self.size // 8, self.size // 8))
        return smooth(enlarge(torch.stack(maps), self.size).numpy(), SIGMA)


def interval(values: tuple[float, float]) -> str:
    return "{:.3f} to {:.3f}".format(*values)


def main() -> None:
    if not BACKBONE.is_dir():
        print(f"skipped: {BACKBONE} does not exist, so this is not a workspace with real photographs")
        return
    params = load(w.PARAMS)
    frame, root, max_pixels = manifest.read(w.MANIFEST), params.prepare.image_root, params.prepare.max_pixels
    ours = Detector.from_pretrained(w.DETECTOR)
    size, max_fpr = ours.pipeline.config.image_size, params.evaluate.max_fpr

    def read(rows) -> np.ndarray:
        return np.stack([load_rgb(resolve(root, path), size, max_pixels) for path in rows["path"]])

    normal, test = frame[frame["split"] != "test"], frame[frame["split"] == "test"].reset_index(drop=True)
    empty = np.zeros((size, size), bool)
    masks = np.stack(
        [empty if path is None else load_mask(resolve(root, path), size, max_pixels) for path in test["mask_path"]]
    )
    truths, images = test["is_anomalous"].to_numpy(), read(test)
    # PatchCore also gets the held-out normal images, on which our detector calibrates.
    patchcore = PatchCore(read(normal), normal["class_name"].to_numpy())
    began = time.monotonic()
    found = list(ours.stream(images, 16))
    pace = {"vlmdiff": len(images) / (time.monotonic() - began)}
    maps, scores = {"vlmdiff": np.stack([one.anomaly_map for one in found])}, {"vlmdiff": [one.score for one in found]}
    began = time.monotonic()
    maps["PatchCore"] = patchcore(images)
    pace["PatchCore"] = len(images) / (time.monotonic() - began)
    scores["PatchCore"] = maps["PatchCore"].max(axis=(1, 2))
    # PatchCore again, with our detector's score of a map.
    maps["PatchCore, same score"] = maps["PatchCore"]
    scores["PatchCore, same score"] = image_scores(maps["PatchCore"], ours.params.image_score)

    classes = test["class_name"].to_numpy()
    table = Table("class", title=f"AU-PRO / image AUROC, {Path.cwd().name}, {len(images)} test images")
    results = {t: evaluate_classes(classes, maps[t], masks, scores[t], max_fpr, None, truths) for t in maps}
    for title in maps:
        table.add_column(title, justify="right")
    for name in sorted(set(classes)):
        of_class = [result.classes[name] for result in results.values()]
        table.add_row(name, *(f"{values['au_pro']:.3f} / {values['image_auroc']:.3f}" for values in of_class))
    table.add_section()
    means = [result.mean for result in results.values()]
    table.add_row("mean", *(f"{values['au_pro']:.3f} / {values['image_auroc']:.3f}" for values in means))
    table.add_row("images / s", *(f"{pace[title]:.1f}" for title in pace))
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
