"""How good is retrieval with 5, 10, 25, 50 and 100 normal images of each class, ours beside two baselines?

Run it in a workspace where `dvc repro` has run with presets/photographs.yaml:

    python benchmarks/few_images.py

The three methods get the same images, chosen at random, and the same features, those of the detector's first stage:
our banks of patches, nearest patches, and PatchCore, as in benchmarks/photographs.py. Only our banks see each image at
several sizes. The baselines search all their patches, and all maps are smoothed and scored as our detector's are. The
denoiser, which needs a training for each number of images, is left out. Writes a table and few_images.png.
"""

import argparse
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS, help="normal images of each class")
    parser.add_argument("--out", type=Path, default=Path("reports"), help="folder for few_images.png")
    options, dataset = parser.parse_args(), Dataset()
    if min(options.counts) < 2:
        parser.error("--counts must be at least 2")
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

    normal, test = dataset.normal.sample(frac=1, random_state=0), dataset.test
    kept = {row: features(path) for row, path in track(normal["path"].items(), "normal images", len(normal))}
    tested, looks = zip(*(features(path) for path in track(test["path"], "test images", len(test))), strict=True)
    methods = ("our bank", "nearest patches", "PatchCore")
    rows = []
    for count in options.counts:
        chosen = normal.groupby("class_name").head(count).index
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
        maps: dict[str, list[np.ndarray]] = {method: [] for method in methods}
        for first in track(range(0, len(tested), BATCH), f"{count} images", -(-len(tested) // BATCH)):
            batch = [torch.stack(sizes).float() for sizes in zip(*tested[first : first + BATCH], strict=True)]
            maps["our bank"].append(ours(batch, shown[first : first + BATCH]).numpy())
            maps["nearest patches"].append(nearest(random, batch[0]))
            maps["PatchCore"].append(np.sqrt(nearest(coreset, pooled(batch[0]))))
        for method in methods:
            small = torch.from_numpy(np.concatenate(maps[method]))
            large = smooth(enlarge(small, dataset.size).numpy(), detector.params.smoothing)
            scores = detector.image_scores(large - large.min()).tolist()
            found = evaluate_classes(dataset.classes, list(large), dataset.masks, scores, is_anomalous=dataset.truths)
            mean = found.mean
            rows.append((count, method, mean["au_pro"], mean["image_auroc"]))
            print(*rows[-1], flush=True)

    table = Table("normal images per class", *methods, title="AU-PRO / image AUROC, means over classes")
    for count in options.counts:
        table.add_row(str(count), *(f"{a:.3f} / {b:.3f}" for n, _, a, b in rows if n == count))
    Console().print(table)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axis, place, title in zip(axes, (2, 3), ("AU-PRO", "image AUROC"), strict=True):
        for method, style in zip(methods, ("o-", "s--", "^:"), strict=True):
            axis.plot(options.counts, [row[place] for row in rows if row[1] == method], style, label=method)
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
