"""What a detector can find: spots and scratches of growing size and contrast, drawn on held-out normal images."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import ndimage

from vlmdiff.data.synthesised import LENGTH, HeldOut, mark

# The report reads what was found, and loads no networks for it.
if TYPE_CHECKING:
    from vlmdiff.detection.detector import Detector

# The width of a defect as a share of the image's side.
WIDTHS = {
    "spot": (0.016, 0.024, 0.036, 0.054, 0.08, 0.12, 0.18),
    "scratch": (0.008, 0.011, 0.015, 0.021, 0.029, 0.04, 0.055),
}
# Of 255.
CONTRASTS = {"faint": 30, "clear": 90}
# Defects on an image lie on a grid of this side, far enough from each other.
GRID = 3
# The share of the images that `evaluate` judges anyway by which it may judge more.
COST = 0.1
WANTED = 0.9


@dataclass(frozen=True)
class Detectable:
    """What is found of the defects of a class, as JSON takes it.

    size: pixels of the model's resolution; curve: by kind and contrast, the fitted share found at each of its widths;
    smallest: by kind and contrast, the width in pixels from which 90 % are found, None if even the largest are not.
    """

    class_name: str
    drawn: int
    curve: dict[str, dict[str, list[float]]]
    smallest: dict[str, dict[str, float | None]]


def measure(detector: "Detector", held_out: HeldOut, images: int, batch_size: int, seed: int = 0) -> list[Detectable]:
    """Draw defects on about `images` of the held-out normal images, and count those that are found.

    A defect is found if the anomaly map is above the threshold somewhere on it. The share found is a logistic curve in
    the logarithm of the width, with a slope for each kind and an offset for each kind, contrast and class, fitted to
    all defects together. Retrieval judges each image without its own patches. The detector is calibrated on these
    classes.
    """
    from vlmdiff.detection.anomaly_map import fuse, normalised

    rng, size = np.random.default_rng(seed), detector.pipeline.config.image_size
    classes = held_out.classes
    rows = _spread(classes, images, rng)
    specs = [(kind, contrast, i) for kind in WIDTHS for contrast in CONTRASTS for i in range(len(WIDTHS[kind]))]
    drawn, facts, masks = [], [], []
    # Each class gets every kind, contrast and width as often.
    queues: dict[str, list] = {name: [] for name in classes}
    for row in rows:
        image, marks = held_out.images[row].copy(), []
        for cell in range(GRID * GRID):
            waiting = queues[classes[row]]
            if not waiting:
                waiting += [specs[i] for i in rng.permutation(len(specs))]
            kind, contrast, width = waiting.pop()
            place = (np.array([cell % GRID, cell // GRID]) + rng.uniform(0.4, 0.6, 2)) * size / GRID
            across = WIDTHS[kind][width] * size
            centre = (float(place[0]), float(place[1]))
            marks.append(mark(image, kind, across, CONTRASTS[contrast], centre, rng.uniform(0, np.pi)))
            facts.append((classes[row], kind, contrast, across))
        drawn.append(image)
        masks.append(marks)
    evidence = detector.evidence(drawn, batch_size, held_out.captions_of(rows), rows)
    calibration = detector.calibrated()
    thresholds = [calibration.map_threshold(classes[row]) for row in rows]
    maps = normalised(fuse(evidence, calibration.weight), np.array(thresholds)[:, None, None])
    found = [
        bool(level[ndimage.binary_dilation(one)].max() > 0.5)
        for level, marks in zip(maps, masks, strict=True)
        for one in marks
    ]
    return _fit(facts, found, sorted(set(classes)), size)


def _spread(classes: Sequence[str], images: int, rng: np.random.Generator) -> list[int]:
    """Choose images, as many of each class as of the others."""
    by_class = [rng.permutation(np.flatnonzero(np.array(classes) == name)) for name in sorted(set(classes))]
    each = max(1, images // len(by_class))
    return sorted(int(row) for rows in by_class for row in rows[:each])


def _fit(
    facts: Sequence[tuple[str, str, str, float]], found: Sequence[bool], names: list[str], size: int
) -> list[Detectable]:
    from sklearn.linear_model import LogisticRegression

    def columns(name: str, kind: str, contrast: str, across: float) -> list[float]:
        width = np.log(across / size)
        return [
            *(width * (kind == each) for each in WIDTHS),
            *(float((kind, contrast) == (a, b)) for a in WIDTHS for b in CONTRASTS),
            *(float(name == each) for each in names),
        ]

    table, truth = np.array([columns(*fact) for fact in facts]), np.array(found)
    if len(set(found)) < 2:
        # All of them, or none.
        share = float(truth.mean())
        predict = lambda rows: np.full(len(rows), share)  # noqa: E731
    else:
        model = LogisticRegression(C=10, max_iter=1000).fit(table, truth)
        predict = lambda rows: model.predict_proba(rows)[:, 1]  # noqa: E731
    result = []
    for name in names:
        curve: dict[str, dict[str, list[float]]] = {}
        smallest: dict[str, dict[str, float | None]] = {}
        for kind, widths in WIDTHS.items():
            fine = np.geomspace(widths[0], widths[-1], 200) * size
            for contrast in CONTRASTS:
                shares = predict(np.array([columns(name, kind, contrast, share * size) for share in widths]))
                curve.setdefault(kind, {})[contrast] = shares.round(3).tolist()
                enough = fine[predict(np.array([columns(name, kind, contrast, across) for across in fine])) >= WANTED]
                smallest.setdefault(kind, {})[contrast] = round(float(enough[0]), 1) if len(enough) else None
        result.append(Detectable(name, sum(fact[0] == name for fact in facts), curve, smallest))
    return result


def said(one: dict[str, Any], contrast: str, widths: dict[str, list[float]]) -> str:
    """Return what is found of the defects of a class, in words: "spots from 6 px, scratches from 2×12 px".

    one: a Detectable as JSON; widths: those drawn, in pixels.
    """
    parts = []
    for kind, name in (("spot", "spots"), ("scratch", "scratches")):
        found = one["smallest"][kind][contrast]
        width = found if found is not None else max(widths[kind])
        long = f"×{LENGTH * width:.0f}" if kind == "scratch" else ""
        parts.append(f"{name} {'from' if found is not None else 'not even at'} {max(width, 1):.0f}{long} px")
    return ", ".join(parts)


def content(found: Sequence[Detectable], size: int, seconds: float) -> dict[str, Any]:
    """Return what the report and the model card show, as JSON."""
    widths = {kind: [round(share * size, 2) for share in shares] for kind, shares in WIDTHS.items()}
    images = sum(one.drawn for one in found) // GRID**2
    facts = {"size": size, "widths": widths, "seconds": round(seconds, 1), "images": images}
    return facts | {"wanted": WANTED, "contrasts": CONTRASTS, "classes": [asdict(one) for one in found]}
