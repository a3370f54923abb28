"""Simulate how often the gate is right, with the demo's model. Run it in a workspace where `make demo` has run:

    python benchmarks/gate.py

The demo's model and a weaker one judge a pool of new test images, generated with another seed and five times as large
as the demo's test set. Test sets of the demo's size are then drawn from the pool many times, to count

- how often the better model passes the comparison with the weaker one;
- how often one of two equal models passes: for each image, a coin decides which model gets which judgement;
- how often the conformal threshold raises a false alarm on new normal images.
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from vlmdiff.core import workspace as w
from vlmdiff.core.console import track
from vlmdiff.core.params import Gate, Latents, Pixels, load
from vlmdiff.data import listing, manifest
from vlmdiff.data.demo import make_demo
from vlmdiff.data.images import load_mask, load_rgb, resolve
from vlmdiff.detection.calibration import Calibration, conformal_threshold
from vlmdiff.detection.detector import Detector
from vlmdiff.evaluation.bootstrap import Resampled, Statistics
from vlmdiff.evaluation.evidence import Evidence
from vlmdiff.evaluation.gate import judge
from vlmdiff.evaluation.metrics import Results

SEED, POOL, TRIALS = 100, 5, 600
CALIBRATIONS = 10000
# The comparison with a champion: the gain alone, and with each further criterion; the gain never decides in the last.
GATES = (
    {"max_class_drop": None, "no_worse_verdicts": False},
    {"max_class_drop": 0.05, "no_worse_verdicts": False},
    {"max_class_drop": None, "no_worse_verdicts": True},
    {"max_class_drop": None, "no_worse_verdicts": True, "margin": -1.0},
)


@dataclass(frozen=True)
class Pool:
    """Hold both models' statistics of each image of a class, the better model's first."""

    models: tuple[Statistics, Statistics]

    def test(self, rng: np.random.Generator, images: dict[bool, int], share: float) -> tuple[Statistics, Statistics]:
        """Draw a test set of `images[False]` good and `images[True]` defective images.

        Returns two models' statistics. The first model gets the share `share` of the better model's judgements, the
        second model gets all others.
        """
        truth = self.models[0].is_anomalous
        rows = np.concatenate(
            [rng.choice(np.flatnonzero(truth == kind), count, replace=False) for kind, count in images.items()]
        )
        first = rng.random(len(rows)) < share
        return tuple(
            Statistics(
                *(
                    np.where(given.reshape(-1, *[1] * (a.ndim - 1)), a[rows], b[rows])
                    for a, b in zip(vars(self.models[0]).values(), vars(self.models[1]).values(), strict=True)
                )
            )
            for given in (first, ~first)
        )


def pool(folder: Path) -> tuple[dict[str, Pool], np.ndarray]:
    """Return the judged pool of each class, and the better model's scores of the good images."""
    params = load(w.PARAMS)
    demo = params.prepare.demo
    prepare = params.prepare.model_copy(update={"layout": "mvtec_ad", "root": folder})
    make_demo(
        folder,
        seed=SEED,
        train=1,
        test_good=POOL * demo.test_good,
        test_per_defect=POOL * demo.test_per_defect,
        size=demo.size,
    )
    frame = listing.build(prepare, folder)
    frame = frame[frame["split"] == "test"].reset_index(drop=True)
    better = Detector.from_pretrained(w.DETECTOR)
    features = (Pixels(kind="pixels", weight=0.15), Latents(kind="latents"))
    worse = Detector(better.pipeline, better.params.model_copy(update={"features": features}))
    held_out = manifest.read(w.MANIFEST)
    held_out = held_out[held_out["split"] == "validation"]
    size = better.pipeline.config.image_size
    worse.calibrate([load_rgb(resolve(params.prepare.image_root, path), size, 10**8) for path in held_out["path"]])
    pools, normal = {}, []
    for name, part in track(frame.groupby("class_name"), "judge", frame["class_name"].nunique()):
        images = [load_rgb(resolve(folder, path), size, 10**8) for path in part["path"]]
        masks = [
            np.zeros((size, size), bool) if path is None else load_mask(resolve(folder, path), size, 10**8)
            for path in part["mask_path"]
        ]
        truth = part["is_anomalous"].tolist()
        found = [detector.detect(images) for detector in (better, worse)]
        scores = [[one.score for one in detections] for detections in found]
        # Both models' maps are counted in the same groups, because an image may get either model's judgement.
        maps = [[one.anomaly_map for one in detections] for detections in found]
        both = Statistics.of(maps[0] + maps[1], masks * 2, scores[0] + scores[1], truth * 2)
        halves = (slice(None, len(truth)), slice(len(truth), None))
        pools[name] = Pool(tuple(Statistics(*(value[half] for value in vars(both).values())) for half in halves))
        normal += [score for score, is_anomalous in zip(scores[0], truth, strict=True) if not is_anomalous]
    return pools, np.array(normal)


def evidence(statistics: dict[str, Statistics], max_fpr: float) -> Evidence:
    ones = {name: np.ones((1, len(found.scores))) for name, found in statistics.items()}
    results = {
        name: {metric: float(value[0]) for metric, value in found.metrics(ones[name], max_fpr).items()}
        for name, found in statistics.items()
    }
    resampled = {name: found.draw(name, max_fpr) for name, found in statistics.items()}
    tables = [
        pd.DataFrame(
            {"class_name": name, "defect": None, "is_anomalous": found.is_anomalous, "score": found.scores}
        ).assign(image_id=lambda table: [f"{i:05d}" for i in table.index])
        for name, found in statistics.items()
    ]
    scores = pd.concat(tables, ignore_index=True).assign(verdict=lambda table: table["score"] > 0.5)
    return Evidence(Results(results), Resampled(resampled), scores, "", 0.0, 0.0)


def main() -> None:
    trials = int(sys.argv[1]) if len(sys.argv) > 1 else TRIALS
    params, rng = load(w.PARAMS), np.random.default_rng(0)
    demo, max_fpr = params.prepare.demo, params.evaluate.max_fpr
    with tempfile.TemporaryDirectory() as folder:
        pools, normal = pool(Path(folder))
    whole = [evidence({name: p.models[i] for name, p in pools.items()}, max_fpr) for i in (0, 1)]
    apart = whole[0].results.mean["au_pro"] - whole[1].results.mean["au_pro"]
    print(f"pool: {sum(len(p.models[0].scores) for p in pools.values())} images, AU-PRO differs by {apart:.4f}")
    defects = len(pools[min(pools)].models[0].is_anomalous) // POOL - demo.test_good
    images = {False: demo.test_good, True: defects}

    gates = [Gate(floors={}, max_false_alarm_rate=None, **changes) for changes in GATES]
    table = Table("model", "better by", *map(str, GATES), title=f"{trials} test sets each")
    for title, share in (("alike", 0.5), ("better", 1.0)):
        passed, gained = np.zeros(len(gates)), 0.0
        for _ in track(range(trials), title, trials):
            models = {name: p.test(rng, images, share) for name, p in sorted(pools.items())}
            ours, theirs = (evidence({name: pair[i] for name, pair in models.items()}, max_fpr) for i in (0, 1))
            gained += (ours.results.mean["au_pro"] - theirs.results.mean["au_pro"]) / trials
            for i, gate in enumerate(gates):
                criteria = judge(ours, theirs, gate)
                passed[i] += all(criterion.passed for criterion in criteria)
        table.add_row(title, f"{gained:+.4f}", *(f"{share:.3f}" for share in passed / trials))
        print(f"{title}: {gained:+.4f}, {passed / trials}", flush=True)
    Console().print(table)

    rate = params.evaluate.detection.false_alarm_rate
    count = min(int((manifest.read(w.MANIFEST)["split"] == "validation").sum()), len(normal) // 2)
    said = Calibration(1.0, [1.0], 1.0, count, rate)
    low, high = said.rate_range()
    rates = np.empty(CALIBRATIONS)
    for i in range(CALIBRATIONS):
        order = rng.permutation(len(normal))
        threshold = conformal_threshold(normal[order[:count]], rate)
        rates[i] = np.mean(normal[order[count:]] > threshold)
    print(
        f"false alarms: {rates.mean():.4f} of new normal images, over {CALIBRATIONS} calibrations with {count} images; "
        f"guaranteed {said.guarantee:.4f}, requested {rate}; {np.mean((rates >= low) & (rates <= high)):.3f} of the "
        f"calibrations have a rate between {low:.3f} and {high:.3f}, 0.9 are expected with unlimited images"
    )


if __name__ == "__main__":
    main()
