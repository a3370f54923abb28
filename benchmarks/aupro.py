"""Compare the closed-form AU-PRO with the two usual methods: a full sort, and a loop over 200 thresholds.

    python benchmarks/aupro.py --maps 60 --maps 400

Each method starts from maps and masks, labels the regions and computes the area up to a false-positive rate of 0.3. The
table shows the fastest of several runs. The loop over thresholds is an approximation; the table shows its error.
"""

import gc
import time
from collections.abc import Callable
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from scipy import ndimage
from skimage import measure

from vlmdiff.evaluation import aupro
from vlmdiff.evaluation.aupro import collect

MAX_FPR = 0.3


def full_sort(maps: np.ndarray, masks: np.ndarray) -> float:
    """Sort all pixels, accumulate both rates, keep the last point of each score, and integrate."""
    pixels = collect(maps, masks)
    scores = np.concatenate([pixels.anomalous, pixels.normal])
    overlap = np.concatenate([pixels.shares, np.zeros(len(pixels.normal))])
    alarms = np.repeat([0, 1 / len(pixels.normal)], [len(pixels.anomalous), len(pixels.normal)])
    order = np.argsort(scores)[::-1]
    scores = scores[order]
    last = np.append(scores[1:] != scores[:-1], True)
    fpr = np.append(0, np.cumsum(alarms[order])[last])
    pro = np.append(0, np.cumsum(overlap[order])[last])
    return area_below_limit(fpr, pro)


def threshold_loop(maps: np.ndarray, masks: np.ndarray, thresholds: int = 200) -> float:
    """Compute AU-PRO as the reference code and many others do: at each of `thresholds` evenly spaced thresholds,
    scikit-image finds the regions of every mask again, and the overlaps are averaged over the regions."""
    normal, fpr, pro = ~masks, [0.0], [0.0]
    for threshold in np.linspace(maps.max(), maps.min(), thresholds):
        cut = maps >= threshold
        fpr.append(np.count_nonzero(cut & normal) / np.count_nonzero(normal))
        overlaps = [
            np.count_nonzero(found[tuple(region.coords.T)]) / region.area
            for found, mask in zip(cut, masks, strict=True)
            for region in measure.regionprops(measure.label(mask))
        ]
        pro.append(np.mean(overlaps))
    return area_below_limit(np.array(fpr), np.array(pro))


def area_below_limit(fpr: np.ndarray, pro: np.ndarray) -> float:
    inside = fpr < MAX_FPR
    x = np.append(fpr[inside], MAX_FPR)
    y = np.append(pro[inside], np.interp(MAX_FPR, fpr, pro))
    return float(np.trapezoid(y, x) / MAX_FPR)


def make_maps(count: int, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return maps of blurred noise, raised inside three rectangles on every second map, and the rectangles' masks."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((count, size, size), bool)
    for mask in masks[::2]:
        for _ in range(3):
            height, width = rng.integers(size // 25, size // 6, 2)
            y, x = rng.integers(0, size - height), rng.integers(0, size - width)
            mask[y : y + height, x : x + width] = True
    noise = (ndimage.gaussian_filter(rng.standard_normal((size, size), np.float32), 4) for _ in range(count))
    maps = np.stack(list(noise)) / 0.07
    return maps + masks.astype(np.float32), masks


def fastest(method: Callable, maps: np.ndarray, masks: np.ndarray, repeats: int) -> tuple[float, float]:
    seconds = []
    for _ in range(repeats):
        gc.collect()
        start = time.perf_counter()
        value = method(maps, masks)
        seconds.append(time.perf_counter() - start)
    return value, min(seconds)


def main(
    maps: Annotated[list[int], typer.Option(help="Number of maps; repeat it for several.")] = (60, 400),
    size: Annotated[int, typer.Option(help="Side of a map in pixels.")] = 256,
    repeats: Annotated[int, typer.Option(help="Runs of each method; the fastest counts.")] = 3,
    loop: Annotated[bool, typer.Option(help="Also time the loop over 200 thresholds.")] = True,
    seed: int = 0,
) -> None:
    ways = {"closed form": aupro, "full sort": full_sort}
    if loop:
        ways["200 thresholds"] = threshold_loop
    table = Table(title=f"AU-PRO up to {MAX_FPR}, maps of {size}x{size} in float32")
    for column in ("maps", "method", "seconds", "relative time", "AU-PRO", "error"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for count in maps:
        anomaly_maps, masks = make_maps(count, size, seed)
        measured = {way: fastest(method, anomaly_maps, masks, repeats) for way, method in ways.items()}
        exact, least = measured["closed form"]
        for way, (value, seconds) in measured.items():
            error = f"{abs(value - exact):.0e}"
            table.add_row(str(count), way, f"{seconds:.3f}", f"{seconds / least:.1f}", f"{value:.6f}", error)
        table.add_section()
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
