"""Compare one-pass metrics with exact ones: time, memory for many maps, and the error bound that they report.

    python benchmarks/streaming.py --many 10000 --many 114585

Afterwards, time the bootstrap: a thousand samples of a thousand images, for two models and their difference.
"""

import time
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import psutil
import typer
from aupro import make_maps
from rich.console import Console
from rich.table import Table

from vlmdiff.evaluation.bootstrap import Resampled, Statistics
from vlmdiff.evaluation.metrics import METRICS, evaluate_classes
from vlmdiff.evaluation.streaming import StreamingMetrics

SIDE = 256


def megabytes() -> float:
    return psutil.Process().memory_info().rss / 2**20


def one_pass(maps: np.ndarray, masks: np.ndarray, scores: np.ndarray) -> StreamingMetrics:
    metrics = StreamingMetrics()
    for anomaly_map, mask, score in zip(maps, masks, scores, strict=True):
        metrics.add("nut", anomaly_map, mask, score)
    metrics.results()
    return metrics


def fastest(method: Callable[[], Any], repeats: int = 3) -> tuple[Any, float]:
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        value = method()
        seconds.append(time.perf_counter() - began)
    return value, min(seconds)


def main(
    beside: Annotated[list[int], typer.Option(help="Number of maps for both methods.")] = (60, 400),
    many: Annotated[list[int], typer.Option(help="Number of maps for the one-pass method.")] = (100, 10_000),
) -> None:
    table = Table(title=f"Seven metrics of one class, maps of {SIDE} x {SIDE}")
    for column in ("maps", "exact, s", "one pass, s", "AU-PRO error", "error bound"):
        table.add_column(column, justify="right")
    for count in beside:
        maps, masks = make_maps(count, SIDE, 0)
        maps = 1 / (1 + np.exp(-maps))
        scores, classes = maps.max(axis=(1, 2)), ["nut"] * count
        exact, exactly = fastest(lambda: evaluate_classes(classes, maps, masks, scores).classes["nut"])  # noqa: B023
        metrics, passing = fastest(lambda: one_pass(maps, masks, scores))  # noqa: B023
        found, errors = metrics.results().classes["nut"], metrics.errors()["nut"]
        off, bound = abs(found["au_pro"] - exact["au_pro"]), errors["au_pro"]
        table.add_row(str(count), f"{exactly:.3f}", f"{passing:.3f}", f"{off:.0e}", f"{bound:.0e}")
    Console().print(table)

    pool, truths = make_maps(64, SIDE, 1)
    pool = 1 / (1 + np.exp(-pool))
    table = Table(title="One pass over many maps")
    for column in ("maps", "seconds", "memory growth, MiB", "largest error bound"):
        table.add_column(column, justify="right")
    for count in many:
        before, began = megabytes(), time.perf_counter()
        metrics = StreamingMetrics()
        for i in range(count):
            # Shifted copies of the pool are different maps.
            shift, k = (i * 37 % SIDE, i * 101 % SIDE), i % len(pool)
            anomaly_map, mask = np.roll(pool[k], shift, (0, 1)), np.roll(truths[k], shift, (0, 1))
            metrics.add("nut", anomaly_map, mask, float(anomaly_map.max()))
        bound = max(metrics.errors()["nut"].values())
        table.add_row(str(count), f"{time.perf_counter() - began:.1f}", f"{megabytes() - before:.0f}", f"{bound:.1e}")
    Console().print(table)

    maps, masks = make_maps(1000, SIDE, 2)
    both, models = (maps, maps - np.float32(0.1) * masks), []
    began = time.perf_counter()
    for anomaly_maps in both:
        scores = anomaly_maps.max(axis=(1, 2))
        statistics = Statistics.of(anomaly_maps, masks, scores, masks.any(axis=(1, 2)))
        models.append(Resampled({"nut": statistics.draw("nut")}))
    low, high = (models[0] - models[1]).interval("au_pro")
    print(
        f"{METRICS['au_pro']} of two models on 1,000 maps, 1,000 paired samples: {time.perf_counter() - began:.1f} s, "
        f"difference {low:.4f} to {high:.4f} (95 %)"
    )


if __name__ == "__main__":
    typer.run(main)
