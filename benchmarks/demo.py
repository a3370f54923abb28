"""Measure what diffusion adds: compare this workspace's detector with its autoencoder alone and with class means.

All three use the same features, scales and smoothing; only the reconstruction differs. Run it in a workspace where
`make demo` or `dvc repro` has run:

    python benchmarks/demo.py
"""

from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from vlmdiff.core import workspace as w
from vlmdiff.core.params import load
from vlmdiff.data import manifest
from vlmdiff.data.images import load_mask, load_rgb, resolve
from vlmdiff.detection.detector import Detector
from vlmdiff.evaluation.metrics import evaluate_classes


class AutoencoderAlone(Detector):
    """Reconstruct with the first stage only, without noise and denoiser."""

    def reconstruct(self, latents, images, sample, captions=None) -> tuple[torch.Tensor, None]:
        return latents, None


class MeanImage(Detector):
    """Reconstruct every image as the mean of its class's training images."""

    mean: torch.Tensor

    def reconstruct(self, latents, images, sample, captions=None) -> tuple[torch.Tensor, None]:
        return self.pipeline.encode_images(self.mean).expand_as(latents), None


def main() -> None:
    params = load(w.PARAMS)
    frame, root, max_pixels = manifest.read(w.MANIFEST), params.prepare.image_root, params.prepare.max_pixels
    ours = Detector.from_pretrained(w.DETECTOR)
    size = ours.pipeline.config.image_size

    def read(rows) -> list[np.ndarray]:
        return [load_rgb(resolve(root, path), size, max_pixels) for path in rows["path"]]

    def mask(path: str | None) -> np.ndarray:
        return np.zeros((size, size), bool) if path is None else load_mask(resolve(root, path), size, max_pixels)

    by_split = {split: frame[frame["split"] == split] for split in ("train", "validation", "test")}
    names, maps, masks, scores, truths = [], {}, [], {}, []
    settings = ours.params.model_copy(update={"samples": 1})
    alone, mean = AutoencoderAlone(ours.pipeline, settings), MeanImage(ours.pipeline, settings)
    alone.calibrate(read(by_split["validation"]))
    for name, rows in by_split["test"].groupby("class_name"):
        training, held_out = (
            by_split[split][by_split[split]["class_name"] == name] for split in ("train", "validation")
        )
        mean.mean = torch.from_numpy(np.mean(read(training), axis=0)).permute(2, 0, 1)[None].float() / 255
        mean.calibrate(read(held_out))
        images = read(rows)
        names += [name] * len(rows)
        masks += [mask(path) for path in rows["mask_path"]]
        truths += rows["is_anomalous"].tolist()
        for title, detector in (("VLMDiff", ours), ("autoencoder alone", alone), ("class mean", mean)):
            found = detector.detect(images)
            maps.setdefault(title, []).extend(detection.anomaly_map for detection in found)
            scores.setdefault(title, []).extend(detection.score for detection in found)

    table = Table("class", title=f"AU-PRO, {Path.cwd().name}, {len(names)} test images")
    results = {
        t: evaluate_classes(names, maps[t], masks, scores[t], params.evaluate.max_fpr, None, truths) for t in maps
    }
    for title in results:
        table.add_column(title, justify="right")
    for name in sorted(set(names)):
        table.add_row(name, *(f"{result.classes[name]['au_pro']:.3f}" for result in results.values()))
    table.add_section()
    for metric in ("au_pro", "image_auroc"):
        table.add_row(f"mean {metric}", *(f"{result.mean[metric]:.3f}" for result in results.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
