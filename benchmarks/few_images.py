"""How good is retrieval with 5, 10, 25, 50 and 100 normal images of each class, ours beside two baselines?

Run it in a workspace where `dvc repro` has run with presets/photographs.yaml:

    python benchmarks/few_images.py [OUT]

The three methods get the same images, chosen at random, and the same features, those of the detector's first stage:
our bank of patches, nearest patches, and PatchCore, as in benchmarks/photographs.py. All maps are smoothed and scored
as our detector's are. The denoiser, which needs a training for each number of images, is left out. Writes a table and
few_images.png into OUT (default: reports).
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))

from photographs import CORESET, POOL, PROJECTED, farthest

from vlmdiff.core import workspace as w
from vlmdiff.core.console import track
from vlmdiff.core.params import load
from vlmdiff.data import manifest
from vlmdiff.data.images import load_mask, load_rgb, resolve
from vlmdiff.detection.anomaly_map import enlarge, smooth
from vlmdiff.detection.detector import Detector
from vlmdiff.detection.products import Products, appearance
from vlmdiff.detection.retrieval import NormalPatches, PatchBank, PatchBanks, unit_length
from vlmdiff.evaluation.metrics import evaluate_classes
from vlmdiff.model.normalization import from_uint8

COUNTS, NEAREST = (5, 10, 25, 50, 100), 30_000


def sample(features: torch.Tensor, size: int) -> torch.Tensor:
    """Return about `size` random patches (M, D) of features (N, D, h, w)."""
    each, generator = -(-size // len(features)), torch.Generator().manual_seed(0)
    patches = features.flatten(2).transpose(1, 2)
    return torch.cat([one[torch.randperm(len(one), generator=generator)[:each]].float() for one in patches])


def nearest(bank: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Return 1 - cosine similarity (1, h, w) of features (D, h, w) to the nearest patch of a bank (M, D)."""
    return (1 - (features.float().flatten(1).T @ bank.T).amax(dim=1)).view(1, *features.shape[1:])


def pooled(features: torch.Tensor) -> torch.Tensor:
    """Average features (N, D, h, w) over 3 x 3 and scale them to length one."""
    return unit_length(torch.nn.functional.avg_pool2d(features.float(), 3, 1, 1), [features.shape[1]])


def main() -> None:
    if not (w.DETECTOR / "bank.safetensors").is_file():
        print("skipped: this is not a workspace where presets/photographs.yaml has run")
        return
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "reports")
    params = load(w.PARAMS)
    frame, data = manifest.read(w.MANIFEST), params.prepare
    detector = Detector.from_pretrained(w.DETECTOR)
    pipeline, retrieval = detector.pipeline, detector.params.retrieval
    assert retrieval is not None
    size = pipeline.config.image_size

    @torch.no_grad()
    def features(path: str) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Return the patches (D, h, w) of an image at each size, and what it looks like as a whole (F,)."""
        x = from_uint8(load_rgb(resolve(data.image_root, path), size, data.max_pixels)[None], pipeline.device)
        vae, images = pipeline.vae, pipeline.normalize(x)
        found = vae.features(images)
        every = [found, *(vae.features(images, size) for size in retrieval.more_sizes)]
        patches = [unit_length(one, vae.config.feature_channels)[0].half().cpu() for one in every]
        return patches, appearance(vae.project(found))[0]

    normal = frame[frame["split"] != "test"].sample(frac=1, random_state=0)
    test = frame[frame["split"] == "test"].reset_index(drop=True)
    kept = {row: features(path) for row, path in track(normal["path"].items(), "normal images", len(normal))}
    tested, looks = zip(*(features(path) for path in track(test["path"], "test images", len(test))), strict=True)
    empty = np.zeros((size, size), bool)
    masks = [
        empty if path is None else load_mask(resolve(data.image_root, path), size, data.max_pixels)
        for path in test["mask_path"]
    ]
    methods = ("our bank", "nearest patches", "PatchCore")
    rows = []
    for count in COUNTS:
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
        for one, product in track(zip(tested, shown, strict=True), f"{count} images", len(tested)):
            maps["our bank"].append(ours([patches[None].float() for patches in one], [product]).numpy())
            maps["nearest patches"].append(nearest(random, one[0]).numpy())
            maps["PatchCore"].append(nearest(coreset, pooled(one[0][None])[0]).clamp_min(0).sqrt().numpy())
        for method in methods:
            small = torch.from_numpy(np.concatenate(maps[method]))
            large = smooth(enlarge(small, size).numpy(), detector.params.smoothing)
            scores = detector.image_scores(large - large.min())
            truths = test["is_anomalous"].tolist()
            names = test["class_name"].tolist()
            mean = evaluate_classes(names, list(large), masks, scores.tolist(), is_anomalous=truths).mean
            rows.append((count, method, mean["au_pro"], mean["image_auroc"]))
            print(*rows[-1], flush=True)

    table = Table("normal images per class", *methods, title="AU-PRO / image AUROC, means over classes")
    for count in COUNTS:
        table.add_row(str(count), *(f"{a:.3f} / {b:.3f}" for n, _, a, b in rows if n == count))
    Console().print(table)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axis, place, title in zip(axes, (2, 3), ("AU-PRO", "image AUROC"), strict=True):
        for method, style in zip(methods, ("o-", "s--", "^:"), strict=True):
            axis.plot(COUNTS, [row[place] for row in rows if row[1] == method], style, label=method)
        axis.set(xscale="log", xticks=COUNTS, xticklabels=COUNTS, xlabel="normal images per class", ylabel=title)
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "few_images.png", dpi=110)


if __name__ == "__main__":
    main()
