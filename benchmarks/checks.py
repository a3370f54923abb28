"""Measure what a verdict costs beside the anomaly map: hashes of the model's files, checks of values, and products.

    python benchmarks/checks.py

Each pair does the same work once with a part and once without it, in random order: it loads the detector, or judges the
same test images. The table shows the median of the paired differences with a 95 % interval (bootstrap), as a share of
the time without the part. Run it in a workspace where `make demo` or `dvc repro` has run; --model is another detector.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from vlmdiff.core import workspace as w
from vlmdiff.core.files import folder_mb
from vlmdiff.core.params import load
from vlmdiff.data import manifest
from vlmdiff.data.images import load_rgb, resolve
from vlmdiff.detection.detector import Detector

DETECTOR, NORMALS = "vlmdiff.detection.detector.Detector", "vlmdiff.detection.normals.Normals"
HASHES = {"vlmdiff.model.pipeline.verify": lambda *_: True}
FINITE = {f"{DETECTOR}._check": lambda *_: None}


def by_map_alone(detector: Detector, photographs: list[np.ndarray]) -> dict[str, Any]:
    """Return what judges by the score of the map alone, with the products known, without p-value or similar image."""
    calibration = detector.calibrated()
    levels = len(next(iter(calibration.products.values())).levels)
    names = [one.product or next(iter(calibration.products)) for one in detector.detect(photographs)]

    def statistics(self: Detector, parts: np.ndarray, raw: np.ndarray, _: Any) -> np.ndarray:
        # The other kinds of evidence are so low that they decide nothing.
        values = np.full((len(raw), levels), -1e9)
        values[:, -1] = np.log(np.maximum(self.image_scores(raw).astype(np.float64), 1e-12))
        return values

    return {
        f"{DETECTOR}._statistics": statistics,
        f"{DETECTOR}._products": lambda self, features, given: (names, [True] * len(features)),
        f"{NORMALS}.nearest": lambda self, features, products: [None] * len(features),
        "vlmdiff.detection.detector.appearance": lambda latents: torch.zeros(len(latents), 1),
        "vlmdiff.detection.calibration.Calibration.p_value": lambda *_: None,
    }


def seconds(work: Callable[[], Any], without: dict[str, Any]) -> float:
    """Return the CPU seconds of this process for the work, with other functions in place of some."""
    with ExitStack() as stack:
        for name, instead in without.items():
            stack.enter_context(patch(name, instead))
        began = time.process_time()
        work()
        return time.process_time() - began


def main(
    images: Annotated[int, typer.Option(min=1, max=32, help="Images judged at once.")] = 16,
    pairs: Annotated[int, typer.Option(min=3, help="Pairs of runs.")] = 60,
    model: Annotated[Path, typer.Option(help="Folder of a detector.")] = w.DETECTOR,
) -> None:
    torch.set_num_threads(1)
    disable_progress_bar()
    rng = np.random.default_rng(0)
    detector = Detector.from_pretrained(model)
    data, size = load(w.PARAMS).prepare, detector.pipeline.config.image_size
    frame = manifest.read(w.MANIFEST)
    rows = frame[frame["split"] == "test"].sample(images, random_state=0)
    photographs = [load_rgb(resolve(data.image_root, path), size, data.max_pixels) for path in rows["path"]]
    kinds: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
        "loading: hashes of the files": (lambda: Detector.from_pretrained(model), HASHES),
        "scoring: every value is finite": (lambda: detector.detect(photographs), FINITE),
        "scoring: verdicts by product": (lambda: detector.detect(photographs), by_map_alone(detector, photographs)),
    }
    title = f"{model}, {folder_mb(model):.0f} MB, {images} images at once, {pairs} pairs, one thread"
    table = Table("of CPU time", "without", "more with it", "share", "95 % interval", title=title)
    for name, (work, without) in kinds.items():
        seconds(work, {})
        found: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(pairs):
            for having in rng.permutation([True, False]).tolist():
                found[having].append(seconds(work, {} if having else without))
        base, more = np.array(found[False]), np.array(found[True]) - np.array(found[False])
        drawn = rng.integers(0, pairs, (2000, pairs))
        low, high = np.quantile(np.median(more[drawn], axis=1) / np.median(base[drawn], axis=1), [0.025, 0.975])
        words = f"{1000 * np.median(base):.0f} ms", f"{1000 * np.median(more):.1f} ms"
        table.add_row(name, *words, f"{np.median(more) / np.median(base):.1%}", f"{low:.1%} to {high:.1%}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
