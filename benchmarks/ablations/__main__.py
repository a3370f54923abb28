"""Compare sets of parameters in a table and a plot. The file PLAN defines the sets; each set becomes a row.

Run it in a workspace where `make demo` or `dvc repro` has run:

    python benchmarks/ablations PLAN [OUT]

Each set changes some keys of params.yaml and runs `dvc repro`, once for each combination of values in `repeat`. Stages
that sets share run once, and an interrupted command continues where it stopped. At the end, the workspace is in its
original state. table.md and plot.png are written to OUT (default: reports/ablations/PLAN). The whiskers of the plot
show the minimum and maximum over the repeats.
"""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

from vlmdiff.core import params
from vlmdiff.core import workspace as w

METRICS = {"au_pro": "AU-PRO", "image_auroc": "image AUROC"}
Measured = dict[str, list[dict[str, float]]]


def changed(base: dict, changes: dict) -> dict:
    """Return a copy of `base` with the dotted keys of `changes` set."""
    values = json.loads(json.dumps(base))
    for key, value in changes.items():
        *path, last = key.split(".")
        section = values
        for name in path:
            section = section.setdefault(name, {})
        section[last] = value
    return values


def shuffle_captions(file: Path) -> None:
    """Write the workspace's captions to `file` in a fixed random order, so that images get other images' captions."""
    rows = [json.loads(line) for line in w.CAPTIONS.read_text().splitlines()]
    order = np.random.default_rng(0).permutation(len(rows))
    dealt = [{"image_id": row["image_id"], "caption": rows[i]["caption"]} for row, i in zip(rows, order, strict=True)]
    file.write_text("".join(json.dumps(row) + "\n" for row in dealt))


def repro(*stages: str) -> None:
    subprocess.run([sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--quiet", *stages], check=True)


def measure(plan: dict) -> Measured:
    """Return the mean metrics of each set, one dict per repeat. params.yaml is always restored."""
    original = w.PARAMS.read_text()
    base, repeat = yaml.safe_load(original), plan.get("repeat", {})
    repeats = [dict(zip(repeat, values, strict=True)) for values in itertools.product(*repeat.values())]
    variants = {
        name: [changed(base, {**again, **changes}) for again in repeats] for name, changes in plan["sets"].items()
    }
    for values in itertools.chain(*variants.values()):
        params.Params.model_validate(values)
    if "shuffled" in plan:
        repro("caption")
        shuffle_captions(Path(base["prepare"].get("root", "data/raw"), plan["shuffled"]))
    measured: Measured = {}
    try:
        for name, runs in variants.items():
            for values in runs:
                w.PARAMS.write_text(yaml.safe_dump(values, sort_keys=False))
                repro()
                mean = json.loads(w.METRICS.read_text())["mean"]
                measured.setdefault(name, []).append({metric: mean[metric] for metric in METRICS})
                print(name, *(f"{title} {mean[metric]:.3f}" for metric, title in METRICS.items()), flush=True)
    finally:
        w.PARAMS.write_text(original)
    repro()
    return measured


def spread(rows: list[dict[str, float]], metric: str) -> tuple[float, float, float]:
    """Return mean, minimum and maximum of a metric."""
    values = [row[metric] for row in rows]
    return float(np.mean(values)), min(values), max(values)


def cell(rows: list[dict[str, float]], metric: str) -> str:
    mean, least, most = spread(rows, metric)
    return f"{mean:.3f}" if len(rows) == 1 else f"{mean:.3f} ({least:.3f} to {most:.3f})"


def write(measured: Measured, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    lines = [f"| | {' | '.join(METRICS.values())} |", "| --- |" + " --- |" * len(METRICS)]
    lines += [f"| {name} | {' | '.join(cell(rows, m) for m in METRICS)} |" for name, rows in measured.items()]
    (out / "table.md").write_text("\n".join(lines) + "\n")

    figure, axes = plt.subplots(1, len(METRICS), sharey=True, figsize=(10, 1 + 0.35 * len(measured)), layout="tight")
    places = np.arange(len(measured))[::-1]
    for axis, (metric, title) in zip(axes, METRICS.items(), strict=True):
        mean, least, most = np.array([spread(rows, metric) for rows in measured.values()]).T
        axis.errorbar(mean, places, xerr=[mean - least, most - mean], fmt="o", capsize=3)
        axis.set_xlabel(title)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(places, list(measured))
    axes[0].set_ylim(-0.5, len(measured) - 0.5)
    figure.savefig(out / "plot.png", dpi=120)


def main() -> None:
    plan = Path(sys.argv[1])
    out = Path(sys.argv[2]) if len(sys.argv) > 2 else Path("reports/ablations", plan.stem)
    measured = measure(yaml.safe_load(plan.read_text()))
    write(measured, out)
    table = Table("set", *METRICS.values(), title=f"{plan.stem}, {Path.cwd().name}")
    for title, rows in measured.items():
        table.add_row(title, *(cell(rows, metric) for metric in METRICS))
    Console().print(table)


if __name__ == "__main__":
    main()
