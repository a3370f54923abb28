"""How good is retrieval with 5, 10, 25, 50 and 100 normal images of each class, ours beside two baselines?

Run it in a workspace where `dvc repro` has run with presets/photographs.yaml:

    python benchmarks/few_images.py

The three methods get the same images and the same features, those of the detector's first stage: our banks of
patches, nearest patches, and PatchCore, as in benchmarks/photographs.py. Only our banks see each image at several
sizes. The baselines search all their patches, and all maps are smoothed and scored as our detector's map. The denoiser,
which needs a training for each number of images, is left out. The images are chosen at random, several times. Writes a
table with the mean, the lowest and the highest value of these choices, and few_images.png.
"""

import argparse
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))

from dataset import Dataset
from photographs import CORESET, POOL, PROJECTED, farthest

from vlmdiff.core import workspace as w
from vlmdiff.core.console import track
from vlmdiff.detection.anomaly_map import enlarge, smooth
from vlmdiff.detection.detector import Detector
from vlmdiff.detection.products import Products, appearance
from vlmdiff.detection.retrieval import NormalPatches, PatchBank, PatchBanks, unit_length
from vlmdiff.evaluation.metrics import evaluate_classes
from vlmdiff.model.normalization import from_uint8

COUNTS, NEAREST, BATCH = (5, 10, 25, 50, 100), 30_000, 16
METHODS = ("our bank", "nearest patches", "PatchCore")


def sample(features: torch.Tensor, size: int) -> torch.Tensor:
    """Return about `size` random patches (M, D) of features (N, D, h, w)."""
    each, generator = -(-size // len(features)), torch.Generator().manual_seed(0)
    patches = features.flatten(2).transpose(1, 2)
    return torch.cat([one[torch.randperm(len(one), generator=generator)[:each]].float() for one in patches])


def nearest(patches: torch.Tensor, features: torch.Tensor) -> np.ndarray:
    """Return 1 - cosine similarity (B, h, w) of features (B, D, h, w) to the nearest of patches (M, D)."""
    found = [1 - (one.flatten(1).T @ patches.T).amax(dim=1).view(one.shape[1:]) for one in features]
    return torch.stack(found).clamp_min(0).numpy()


def pooled(features: torch.Tensor) -> torch.Tensor:
    """Average features (N, D, h, w) over 3 x 3 and scale them to length one."""
    return unit_length(torch.nn.functional.avg_pool2d(features.float(), 3, 1, 1), [features.shape[1]])


def with_range(values: np.ndarray) -> str:
    """Return the mean of values, and their range, as text."""
    return f"{values.mean():.3f} ({values.min():.3f} to {values.max():.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS, help="normal images of each class")
    parser.add_argument("--draws", type=int, default=3, help="how often the images are chosen")
    parser.add_argument("--out", type=Path, default=Path("reports"), help="folder for few_images.png")
    options, dataset = parser.parse_args(), Dataset()
    if min(options.counts) < 2 or options.draws < 1:
        parser.error("--counts must be at least 2, and --draws at least 1")
    detector = Detector.from_pretrained(w.DETECTOR)
    pipeline, retrieval = detector.pipeline, detector.params.retrieval
    assert retrieval is not None

    @torch.no_grad()
    def features(path: str) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Return the patches (D, h, w) of an image at each size, and what it looks like as a whole (F,)."""
        x = from_uint8(dataset.read(path)[None], pipeline.device)
        vae, images = pipeline.vae, pipeline.normalize(x)
        found = vae.features(images)
        every = [found, *(vae.features(images, size) for size in retrieval.more_sizes)]
        patches = [unit_length(one, vae.config.feature_channels)[0].half().cpu() for one in every]
        return patches, appearance(vae.project(found))[0]

    normal, test = dataset.normal, dataset.test
    kept = {row: features(path) for row, path in track(normal["path"].items(), "normal images", len(normal))}
    tested, looks = zip(*(features(path) for path in track(test["path"], "test images", len(test))), strict=True)

    def judged(chosen: pd.Index) -> dict[str, tuple[float, float]]:
        """Return AU-PRO and image AUROC of each method, by these rows of the normal images."""
        every = [torch.stack(sizes) for sizes in zip(*(kept[row][0] for row in chosen), strict=True)]
        images = every[0]
        of = normal.loc[chosen, "class_name"].tolist()
        ours = PatchBanks([PatchBank.fit(NormalPatches(of, retrieval, 0).add(one.float())) for one in every])
        # Whose patches count is recognised, as by a detector.
        shown, _ = Products.fit(torch.stack([kept[row][1] for row in chosen]).numpy(), of)(torch.stack(looks).numpy())
        random = sample(images, NEAREST)
        candidates = sample(pooled(images), POOL)
        directions = torch.randn(candidates.shape[1], PROJECTED, generator=torch.Generator().manual_seed(0))
        coreset = candidates[farthest(candidates @ directions, CORESET)]
        maps: dict[str, list[np.ndarray]] = {method: [] for method in METHODS}
        for first in track(range(0, len(tested), BATCH), f"{len(chosen)} images", -(-len(tested) // BATCH)):
            batch = [torch.stack(sizes).float() for sizes in zip(*tested[first : first + BATCH], strict=True)]
            maps["our bank"].append(ours(batch, shown[first : first + BATCH]).numpy())
            maps["nearest patches"].append(nearest(random, batch[0]))
            maps["PatchCore"].append(np.sqrt(nearest(coreset, pooled(batch[0]))))
        metrics = {}
        for method in METHODS:
            small = torch.from_numpy(np.concatenate(maps[method]))
            large = smooth(enlarge(small, dataset.size).numpy(), detector.params.smoothing)
            scores = detector.image_scores(large - large.min()).tolist()
            result = evaluate_classes(dataset.classes, list(large), dataset.masks, scores, is_anomalous=dataset.truths)
            metrics[method] = result.mean["au_pro"], result.mean["image_auroc"]
        return metrics

    # By count and method: AU-PRO and image AUROC (draws, 2).
    found: dict[tuple[int, str], np.ndarray] = {}
    sizes = normal["class_name"].value_counts()
    for count in options.counts:
        draws = options.draws if count < sizes.max() else 1
        drawn = [normal.sample(frac=1, random_state=i).groupby("class_name").head(count).index for i in range(draws)]
        results = [judged(chosen) for chosen in drawn]
        for method in METHODS:
            found[count, method] = np.array([result[method] for result in results])
            print(count, method, *(np.round(values, 4).tolist() for values in found[count, method].T), flush=True)

    table = Table("normal images per class", *METHODS, title="AU-PRO and image AUROC, means over classes")
    for count in options.counts:
        table.add_row(str(count), *("\n".join(map(with_range, found[count, method].T)) for method in METHODS))
    Console().print(table)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axis, place, title in zip(axes, (0, 1), ("AU-PRO", "image AUROC"), strict=True):
        for method, style in zip(METHODS, ("o-", "s--", "^:"), strict=True):
            values = [found[count, method][:, place] for count in options.counts]
            (line,) = axis.plot(options.counts, [one.mean() for one in values], style, label=method)
            lowest, highest = [one.min() for one in values], [one.max() for one in values]
            axis.fill_between(options.counts, lowest, highest, color=line.get_color(), alpha=0.15, linewidth=0)
        axis.set(
            xscale="log",
            xticks=options.counts,
            xticklabels=options.counts,
            xlabel="normal images per class",
            ylabel=title,
        )
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    options.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out / "few_images.png", dpi=110)


if __name__ == "__main__":
    main()
