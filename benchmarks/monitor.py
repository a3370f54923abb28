"""Measure how often the monitor finds drift, and how often it raises a false alarm. Run it where `make demo` has run:

    python benchmarks/monitor.py

The demo's model judges a pool of new images, generated with another seed, and a part of them again under each kind of
drift. Simulated days of 200 images are drawn from the pool.

With the demo's own calibration, the days have

- no drift, with the same mix of products every day, or with a mix that changes from day to day;
- other light, or blur;
- a new product: its images are removed from the reference.

Then each day without drift gets a calibration of its own, as large as the demo's and drawn from the pool. This is what
the stated false-alarm rate refers to.
"""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table
from scipy import ndimage

from vlmdiff.core import workspace as w
from vlmdiff.core.console import track
from vlmdiff.core.params import Params, load
from vlmdiff.data import listing, manifest
from vlmdiff.data.demo import make_demo
from vlmdiff.data.images import load_rgb, resolve
from vlmdiff.data.statistics import image_statistics
from vlmdiff.detection.calibration import Calibration, conformal_threshold
from vlmdiff.detection.detector import Detector
from vlmdiff.evaluation.judging import write_reference
from vlmdiff.production.monitor import DriftCheck, Known, check, read_reference

SEED, GOOD, DEFECTIVE, DRIFTED = 100, 250, 3, 50
IMAGES, DAYS, DRIFT_DAYS = 200, 100, 20
LIMIT = 10**8
DRIFTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "light x 0.85": lambda image: brighter(image, 0.85),
    "light x 1.15": lambda image: brighter(image, 1.15),
    "blur, sigma 1": lambda image: ndimage.gaussian_filter(image, (1, 1, 0)),
}


def brighter(image: np.ndarray, factor: float) -> np.ndarray:
    return np.rint(np.clip(image * factor, 0, 255)).astype(np.uint8)


def judged(rows: pd.DataFrame, detector: Detector, folder: Path, change=lambda image: image) -> pd.DataFrame:
    """Return the rows that `vlmdiff score` would write for these images, with their truth."""
    images = (change(load_rgb(resolve(folder, path), None, LIMIT)) for path in rows["path"])
    seen = []

    def look(image: np.ndarray) -> np.ndarray:
        seen.append(image_statistics(image))
        return image

    found = [(one.score, one.is_anomalous) for one in detector.stream(map(look, images))]
    scores, verdicts = zip(*found, strict=True)
    frame = rows[["image_id", "class_name", "defect"]].reset_index(drop=True)
    return frame.assign(score=scores, is_anomalous=verdicts, error=None).join(pd.DataFrame(seen))


def pool(params: Params, detector: Detector) -> tuple[pd.DataFrame, dict[str, pd.DataFrame]]:
    """Return the judged pool, and a part of its good images under each kind of drift."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_demo(folder, seed=SEED, train=1, test_good=GOOD, test_per_defect=DEFECTIVE, size=params.prepare.demo.size)
        rows = listing.build(params.prepare.model_copy(update={"layout": "mvtec_ad", "root": folder}), folder)
        rows = rows[rows["split"] == "test"]
        good = rows[~rows["is_anomalous"]]
        part = good.groupby("class_name").head(DRIFTED)
        drifted = {
            title: judged(part, detector, folder, change)
            for title, change in track(DRIFTS.items(), "judge in each drift", len(DRIFTS))
        }
        return judged(rows, detector, folder), drifted


def calibrated(params: Params, detector: Detector) -> tuple[pd.DataFrame, Calibration]:
    """Return the reference that `vlmdiff evaluate` writes next to this workspace's detector."""
    held_out = manifest.read(w.MANIFEST)
    held_out = held_out[held_out["split"] == "validation"]
    size, root = detector.pipeline.config.image_size, params.prepare.image_root
    scores = detector.calibrate([load_rgb(resolve(root, path), size, LIMIT) for path in held_out["path"]])
    with tempfile.TemporaryDirectory() as name:
        write_reference(Path(name), held_out, scores, params.prepare)
        (Path(name) / "detector.json").write_text((w.DETECTOR / "detector.json").read_text())
        return read_reference(Path(name))


def draw(rng: np.random.Generator, good: pd.DataFrame, bad: pd.DataFrame | None, share: float, mix: float | None):
    """Draw the images of a day: the share `share` is defective; class shares are equal or from Dirichlet(`mix`)."""
    names = sorted(good["class_name"].unique())
    shares = np.full(len(names), 1 / len(names)) if mix is None else rng.dirichlet(np.full(len(names), mix))
    defective = 0 if bad is None else rng.binomial(IMAGES, share)
    counts = rng.multinomial(IMAGES - defective, shares)
    parts = [
        # A day with a single product may need more images than the pool has: some are then drawn twice.
        part.sample(count, replace=count > len(part), random_state=rng)
        for count, part in zip(counts, (good[good["class_name"] == name] for name in names), strict=True)
    ]
    if defective:
        parts.append(bad.sample(defective, random_state=rng))
    return pd.concat(parts, ignore_index=True)


def anew(rng: np.random.Generator, good: pd.DataFrame, size: int, calibration: Calibration):
    """Calibrate on `size` images of the pool; return them and the others, both rescored, and the calibration."""
    order = good.groupby("class_name").sample(size // good["class_name"].nunique(), random_state=rng).index
    raw = good["score"] / (1 - good["score"])
    threshold = conformal_threshold(raw[order].to_numpy(), calibration.false_alarm_rate)
    said = good.assign(score=raw / (raw + threshold), is_anomalous=raw > threshold)
    return said.loc[order], said.drop(order), replace(calibration, images=len(order))


def main() -> None:
    days = int(sys.argv[1]) if len(sys.argv) > 1 else DAYS
    params, rng = load(w.PARAMS), np.random.default_rng(0)
    settings = params.monitor
    detector = Detector.from_pretrained(w.DETECTOR)
    reference, calibration = calibrated(params, detector)
    everything, drifted = pool(params, detector)
    good = everything[everything["defect"].isna()].reset_index(drop=True)
    bad = everything[everything["defect"].notna()]
    known = Known.of(reference)
    table = Table("days of 200 images", "days", "days with drift", "tests that found it", title="Monitor")

    def add(title: str, checks: list[DriftCheck]) -> None:
        found = [one for one in checks if one.drift]
        names = pd.Series([test.what for one in found for test in one.found]).value_counts()
        told = ", ".join(f"{what} {count}" for what, count in names.items())
        table.add_row(title, str(len(checks)), str(len(found)), told)
        print(f"{title}: {len(found)} of {len(checks)} days; {told}", flush=True)

    def clean(mix: float | None, known: Known = known, good: pd.DataFrame = good, said: Calibration = calibration):
        return check(draw(rng, good, bad, settings.defect_rate, mix), known, said, settings)

    add("no drift, equal shares", [clean(None) for _ in range(days)])
    add("no drift, shares from Dirichlet(1)", [clean(1.0) for _ in range(days)])
    for mix in (None, 1.0):
        checks = []
        for _ in track(range(days), "calibrate", days):
            own, others, said = anew(rng, good, len(reference), calibration)
            checks.append(clean(mix, Known.of(own), others, said))
        add(f"no drift, new calibration per day, {'equal shares' if mix is None else 'Dirichlet(1)'}", checks)
    for title, rows in drifted.items():
        add(title, [check(draw(rng, rows, None, 0, None), known, calibration, settings) for _ in range(DRIFT_DAYS)])
    for name in sorted(reference["class_name"].unique()):
        without = Known.of(reference[reference["class_name"] != name].reset_index(drop=True))
        add(f"{name} is new", [clean(None, without) for _ in range(DRIFT_DAYS)])
    Console().print(table)
    print(
        f"{len(reference)} calibration images. Stated rate: drift on at most {settings.false_alarm_rate:.0%} of days "
        f"without drift, if {settings.defect_rate:.0%} of the images are defective"
    )


if __name__ == "__main__":
    main()
