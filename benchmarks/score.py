"""`vlmdiff score` on photographs of the demo factory: images a second and memory, by one process and by two.

    python benchmarks/score.py --images 10000

By the detector of this workspace (`make demo` makes one), or by --model's. Each process has one thread.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import pandas as pd
import psutil
import typer
from rich.console import Console
from rich.table import Table

from vlmdiff import workspace as w
from vlmdiff.data.demo import PRODUCTS, make_demo
from vlmdiff.params import Demo

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


def megabytes(process: psutil.Process) -> float:
    """Of the largest of the processes that judge."""
    family = [process, *process.children(recursive=True)]
    return max(each.memory_info().rss for each in family) / 2**20


def score(launcher: list[str], arguments: list[str]) -> tuple[float, list[tuple[int, float]]]:
    """Images a second, and memory whenever the main process has written a part, with how many images there were."""
    process = psutil.Popen(
        [*launcher, "-m", "vlmdiff.cli", "score", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    memory, line = [], ""
    for line in process.stdout:
        if found := re.match(r"score: (\d+) of about", line):
            memory.append((int(found[1]), megabytes(process)))
    if process.wait():
        sys.exit(f"it did not score: {line}")
    return float(re.search(r"([\d.]+) images a second", line)[1]), memory


def main(
    images: Annotated[int, typer.Option(min=240, help="About so many photographs.")] = 2000,
    model: Annotated[Path, typer.Option(help="A detector's folder.")] = w.DETECTOR,
) -> None:
    table = Table(title=f"vlmdiff score, {images} photographs of {Demo().size} x {Demo().size}")
    for column in ("processes", "images a second", "MiB at a tenth", "MiB at the end"):
        table.add_column(column, justify="right")
    defects = sum(len(kinds) for _, kinds in PRODUCTS.values())
    per_defect = round(DEFECTIVE * images / defects)
    good = (images - per_defect * defects) // len(PRODUCTS)
    with tempfile.TemporaryDirectory() as folder:
        photographs = Path(folder, "photographs")
        make_demo(photographs, seed=1, train=0, test_good=good, test_per_defect=per_defect, size=Demo().size)
        for count in (1, 2):
            out = Path(folder, f"by_{count}")
            launcher = ALONE if count == 1 else [*LAUNCH, f"--num_processes={count}"]
            parameters = Path(folder, "params.yaml")
            parameters.write_text("{}\n")
            arguments = [f"{photographs}/*/test/*/*.png", "--out", str(out), "--model", str(model)]
            speed, memory = score(launcher, [*arguments, "--params", str(parameters)])
            written = pd.read_parquet(out, columns=["path", "error"])
            assert written["path"].is_unique and written["error"].isna().all()
            assert len(written) == good * len(PRODUCTS) + per_defect * defects
            early = next(size for done, size in memory if done >= images / 10)
            table.add_row(str(count), f"{speed:.1f}", f"{early:.0f}", f"{memory[-1][1]:.0f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
