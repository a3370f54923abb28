"""Compare what `vlmdiff doctor` predicts for the stages with what they take: seconds, and peak memory of trainings.

It runs the demo, and the preset photographs with photographs of your own if you name them. Each stage is a
process of its own, as in `dvc repro`. Run it in the repository:
python benchmarks/doctor.py [--photographs FOLDER --backbone FOLDER] [--steps 150]
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
import yaml
from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parents[1]
STAGES = "prepare", "caption", "first_stage", "encode", "train", "evaluate"
MIB = 2**20


def write_params(workspace: Path, file: Path, steps: int | None, **changes: dict) -> None:
    values = yaml.safe_load(file.read_text())
    for section, keys in changes.items():
        values[section] |= keys
    for section in ("first_stage", "train"):
        values[section]["steps"] = min(values[section]["steps"], steps or sys.maxsize)
    (workspace / "params.yaml").write_text(yaml.safe_dump(values))


def run(stage: str, workspace: Path) -> tuple[float, int]:
    """Run a stage. Return its seconds and its peak resident memory in bytes."""
    began = time.monotonic()
    command, environment = [sys.executable, "-m", "vlmdiff.cli", stage], {"VLMDIFF_OWNER": str(os.getpid())}
    process = subprocess.Popen(command, cwd=workspace, env=os.environ | environment)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{stage} failed in {workspace}")
    return time.monotonic() - began, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def add_rows(table: Table, name: str, workspace: Path, real: dict[str, tuple[float, int]]) -> None:
    # Imported once the real stages are over: a child's peak memory counts that of the process that starts it.
    from vlmdiff.core.params import load
    from vlmdiff.data import manifest
    from vlmdiff.setup.cost import measure
    from vlmdiff.setup.doctor import LIMIT, MEASURED, TRAININGS, predicted_seconds

    os.chdir(workspace)
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the vlmdiff command sets it
    params = load(Path("params.yaml"))
    frame = manifest.read(Path("data/manifest.parquet"))
    costs = {stage: measure(stage, params, LIMIT) for stage in MEASURED}
    seconds = predicted_seconds(params, costs, frame)
    # The real stages map these files into memory, and have read them all by their end.
    mapped = {
        "first_stage": 3 * params.first_stage.image_size**2 * int((frame["split"] != "test").sum()),
        "train": sum(file.stat().st_size for file in Path("data/encoded").glob("*.npy")),
    }
    for stage in ("first_stage", "encode", "train", "evaluate"):
        took, peak = real[stage]
        if stage not in seconds:
            table.add_row(name, stage, f"not within {LIMIT:.0f} s", f"{took:.0f}", "", "", f"{peak / MIB:.0f}", "")
            continue
        memory = []
        if stage in TRAININGS:
            predicted = costs[stage].memory + mapped[stage]
            memory = [f"{predicted / MIB:.0f}", f"{peak / MIB:.0f}", f"{predicted / peak:.2f}"]
        table.add_row(name, stage, f"{seconds[stage]:.0f}", f"{took:.0f}", f"{seconds[stage] / took:.2f}", *memory)


def main(
    photographs: Annotated[Path | None, typer.Option(help="A folder in MVTec-AD's layout.")] = None,
    backbone: Annotated[Path, typer.Option(help="The folder of the backbone.")] = Path("models/backbone"),
    steps: Annotated[int | None, typer.Option(help="Steps of each training, at most.")] = None,
) -> None:
    table = Table("", "stage", title=f"predicted and real, {os.cpu_count()} CPU cores")
    for title in ("predicted s", "real s", "ratio", "predicted MiB", "real MiB", "ratio"):
        table.add_column(title, justify="right")
    with tempfile.TemporaryDirectory() as folder:
        workspaces = {"demo": Path(folder, "demo")}
        workspaces["demo"].mkdir()
        write_params(workspaces["demo"], REPOSITORY / "params.yaml", steps)
        if photographs:
            workspaces["photographs"] = Path(folder, "photographs")
            workspaces["photographs"].mkdir()
            preset = REPOSITORY / "presets/photographs.yaml"
            data = {"layout": "mvtec_ad", "root": str(photographs.resolve())}
            write_params(workspaces["photographs"], preset, steps, prepare=data)
            (workspaces["photographs"] / "models").mkdir()
            (workspaces["photographs"] / "models/backbone").symlink_to(backbone.resolve())
        real = {name: {stage: run(stage, workspace) for stage in STAGES} for name, workspace in workspaces.items()}
        for name, workspace in workspaces.items():
            add_rows(table, name, workspace, real[name])
        os.chdir(REPOSITORY)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
