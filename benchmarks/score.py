"""Measure images per second and memory of `vlmdiff score` on demo images, with one process and with two.

    python benchmarks/score.py --images 10000

It uses the detector of this workspace (`make demo` creates one) or the one of --model. Each process has one thread.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, NamedTuple

import pandas as pd
import psutil
import typer
from rich.console import Console
from rich.table import Table

from vlmdiff.core import workspace as w
from vlmdiff.core.params import Demo
from vlmdiff.data.demo import PRODUCTS, make_demo

ALONE = [sys.executable]
LAUNCH = [
    sys.executable,
    "-m",
    "accelerate.commands.launch",
    "--multi_gpu",
    "--num_machines=1",
    "--main_process_port=0",
]
LAUNCH += ["--mixed_precision=no", "--dynamo_backend=no"]
DEFECTIVE = 0.1


class Moment(NamedTuple):
    """State after `images` judged images: memory of the largest process, and CPU seconds of all processes so far."""

    images: int
    mebibytes: float
    seconds: float


def look(process: psutil.Process, images: int) -> Moment:
    family = [process, *process.children(recursive=True)]
    seconds = sum(each.cpu_times().user + each.cpu_times().system for each in family)
    return Moment(images, max(each.memory_info().rss for each in family) / 2**20, seconds)


def score(launcher: list[str], arguments: list[str]) -> tuple[float, list[Moment]]:
    """Return images per second, and the moments at which the main process wrote a part."""
    process = psutil.Popen(
        [*launcher, "-m", "vlmdiff.cli", "score", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    moments, line = [], ""
    for line in process.stdout:
        if found := re.match(r"score: (\d+) of about", line):
            moments.append(look(process, int(found[1])))
    if process.wait():
        sys.exit(f"vlmdiff score failed: {line}")
    return float(re.search(r"([\d.]+) images a second", line)[1]), moments


def main(
    images: Annotated[int, typer.Option(min=240, help="Approximate number of images.")] = 2000,
    model: Annotated[Path, typer.Option(help="Folder of a detector.")] = w.DETECTOR,
    processes: Annotated[list[int], typer.Option(help="Number of processes; repeat it for several.")] = (1, 2),
) -> None:
    table = Table(title=f"vlmdiff score, {images} images of {Demo().size} x {Demo().size}")
    for column in ("processes", "images / s", "images / CPU s", "MiB after a tenth", "MiB at the end"):
        table.add_column(column, justify="right")
    defects = sum(len(kinds) for _, kinds in PRODUCTS.values())
    per_defect = round(DEFECTIVE * images / defects)
    good = (images - per_defect * defects) // len(PRODUCTS)
    with tempfile.TemporaryDirectory() as folder:
        photographs = Path(folder, "photographs")
        make_demo(photographs, seed=1, train=0, test_good=good, test_per_defect=per_defect, size=Demo().size)
        for count in processes:
            out = Path(folder, f"by_{count}")
            launcher = ALONE if count == 1 else [*LAUNCH, f"--num_processes={count}"]
            parameters = Path(folder, "params.yaml")
            parameters.write_text("{}\n")
            arguments = [f"{photographs}/*/test/*/*.png", "--out", str(out), "--model", str(model)]
            speed, moments = score(launcher, [*arguments, "--params", str(parameters)])
            written = pd.read_parquet(out, columns=["path", "error"])
            assert written["path"].is_unique and written["error"].isna().all()
            assert len(written) == good * len(PRODUCTS) + per_defect * defects
            early, last = next(m for m in moments if m.images >= images / 10), moments[-1]
            # On a busy machine, CPU seconds are more reliable. The start-up is left out.
            work = (last.images - moments[0].images) / (last.seconds - moments[0].seconds)
            sizes = (f"{early.mebibytes:.0f}", f"{last.mebibytes:.0f}")
            table.add_row(str(count), f"{speed:.1f}", f"{work:.1f}", *sizes)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
