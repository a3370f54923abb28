"""Measure what the checks of a model cost while it scores: the hashes of its files, and that each value is finite.

    python benchmarks/checks.py

Each pair loads the detector and judges the same images once with the checks and once without, in random order. The
table shows the median of the paired differences with a 95 % interval (bootstrap), as a share of the time without.
It uses the detector of this workspace (`make demo` creates one) or the one of --model.
"""

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated
from unittest.mock import patch

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from vlmdiff.core import workspace as w
from vlmdiff.core.files import folder_mb
from vlmdiff.detection.detector import Detector

CHECKS = ("vlmdiff.model.pipeline.verify", lambda *_: True), ("vlmdiff.detection.detector.Detector._check", None)


def seconds(model: Path, images: list[np.ndarray], checked: bool) -> tuple[float, float]:
    """Return the CPU seconds of this process for loading the model, and for judging the images."""
    with ExitStack() as stack:
        for name, instead in () if checked else CHECKS:
            stack.enter_context(patch(name, instead or (lambda *_: None)))
        times = [time.process_time()]
        detector = Detector.from_pretrained(model)
        times.append(time.process_time())
        detector.detect(images)
        times.append(time.process_time())
    return times[1] - times[0], times[2] - times[1]


def main(
    images: Annotated[int, typer.Option(min=1, help="Images a run.")] = 216,
    pairs: Annotated[int, typer.Option(min=3, help="Pairs of runs.")] = 20,
    model: Annotated[Path, typer.Option(help="Folder of a detector.")] = w.DETECTOR,
) -> None:
    torch.set_num_threads(1)
    disable_progress_bar()
    rng = np.random.default_rng(0)
    size = Detector.from_pretrained(model).pipeline.config.image_size
    photographs = list(rng.integers(0, 256, (images, size, size, 3), dtype=np.uint8))
    seconds(model, photographs, True)
    found: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for _ in range(pairs):
        for checked in rng.permutation([True, False]).tolist():
            found[checked].append(seconds(model, photographs, checked))
    having, without = (np.array(found[checked]) for checked in (True, False))
    title = f"{model}, {folder_mb(model):.0f} MB, {images} images, {pairs} pairs, one thread"
    table = Table("of CPU time", "without checks", "more with them", "share", "95 % interval", title=title)
    parts = {"loading": [0], "scoring": [1], "both": [0, 1]}
    for name, columns in parts.items():
        base, more = without[:, columns].sum(axis=1), (having - without)[:, columns].sum(axis=1)
        drawn = rng.integers(0, pairs, (2000, pairs))
        shares = np.median(more[drawn], axis=1) / np.median(base[drawn], axis=1)
        low, high = np.quantile(shares, [0.025, 0.975])
        share = np.median(more) / np.median(base)
        words = f"{np.median(base):.2f} s", f"{1000 * np.median(more):.0f} ms", f"{share:.1%}"
        table.add_row(name, *words, f"{low:.1%} to {high:.1%}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
