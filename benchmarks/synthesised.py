"""Compare detection settings for this workspace's pipeline on synthesised defects, without using test images.

Each held-out normal image is judged unchanged and with five kinds of defect drawn on it, each in a small and a large
size: a line, a hole, a stain, a part of another image of its class, and a blurred part. The first row of the table is
`evaluate.detection` of params.yaml. Each argument is a YAML mapping that changes some of its keys and adds a row:

    python benchmarks/synthesised.py '{noise_level: 500}' '{smoothing: 6, samples: 8}'
"""

import sys
from collections.abc import Iterator

import numpy as np
import yaml
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table
from scipy import ndimage
from sklearn.metrics import roc_auc_score

from vlmdiff.captions.files import read_captions
from vlmdiff.core import workspace as w
from vlmdiff.core.device import pick_device
from vlmdiff.core.params import Detection, load
from vlmdiff.data import manifest
from vlmdiff.data.images import load_rgb, resolve
from vlmdiff.detection.detector import Detector
from vlmdiff.evaluation import aupro
from vlmdiff.model.pipeline import load_pipeline

KINDS = ("line", "hole", "stain", "pasted", "blurred")
SIZES = {"small": (0.04, 0.08), "large": (0.12, 0.3)}  # of the image's side


def blob(rng: np.random.Generator, size: int, across: float) -> np.ndarray:
    """Return the mask of an irregular region, about `across` pixels wide, at a random place."""
    y, x = np.mgrid[:size, :size]
    centre = rng.uniform(across / 2, size - across / 2, 2)
    stretch, turn = rng.uniform(0.6, 1.6), rng.uniform(0, np.pi)
    u = (np.cos(turn) * (x - centre[0]) + np.sin(turn) * (y - centre[1])) * stretch
    v = (np.cos(turn) * (y - centre[1]) - np.sin(turn) * (x - centre[0])) / stretch
    angle = np.arctan2(v, u)
    edge = 1 + sum(rng.normal(0, 0.12) * np.cos(k * angle + rng.uniform(0, 2 * np.pi)) for k in (2, 3, 4, 5))
    return np.hypot(u, v) < across / 2 * edge


def line(rng: np.random.Generator, size: int, across: float) -> np.ndarray:
    """Return the mask of a curved line of length 3 `across`, at a random place."""
    steps = 12
    turns = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, 0.35, steps))
    points = np.cumsum(np.stack([np.cos(turns), np.sin(turns)], axis=1) * 3 * across / steps, axis=0)
    points += rng.uniform(0.2, 0.8, 2) * size - points.mean(axis=0)
    picture = Image.new("L", (size, size))
    ImageDraw.Draw(picture).line([tuple(point) for point in points], fill=255, width=int(rng.integers(1, 4)))
    return np.asarray(picture) > 0


def spoil(rng: np.random.Generator, image: np.ndarray, other: np.ndarray, kind: str, across: float):
    """Return the image with a defect of this kind, uint8 (S, S, 3), and the defect's mask, boolean (S, S)."""
    size = len(image)
    while not (mask := (line if kind == "line" else blob)(rng, size, across)).any():
        pass
    clean = image.astype(np.float32)
    match kind:
        case "line" | "hole":
            there = np.median(clean[mask], axis=0)
            # Darker on bright places, brighter on dark ones, so that the defect is visible.
            put = np.clip(there + rng.uniform(40, 110) * np.where(there.mean() > 110, -1, 1), 0, 255)
        case "stain":
            put = 0.5 * clean + 0.5 * rng.uniform(0, 255, 3)
        case "pasted":
            put = np.roll(np.rot90(other, rng.integers(4)), rng.integers(0, size, 2), axis=(0, 1))
        case "blurred":
            put = ndimage.gaussian_filter(clean, (across / 4, across / 4, 0))
    cover = ndimage.gaussian_filter(mask.astype(np.float32), 0.7)[..., None]
    return (clean + cover * (put - clean)).round().astype(np.uint8), mask


def synthesise(images: list[np.ndarray], classes: list[str]) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield (row, image, mask) of every defective image; `row` is its normal image's. The result is deterministic."""
    rng = np.random.default_rng(0)
    for row, image in enumerate(images):
        others = [i for i, name in enumerate(classes) if name == classes[row] and i != row] or [row]
        for kind in KINDS:
            for low, high in SIZES.values():
                other = images[rng.choice(others)]
                yield row, *spoil(rng, image, other, kind, rng.uniform(low, high) * len(image))


def main() -> None:
    params = load(w.PARAMS)
    frame, data = manifest.read(w.MANIFEST), params.prepare
    frame = frame[frame["split"] == "validation"].reset_index(drop=True)
    pipeline = load_pipeline(w.PIPELINE, pick_device())
    size = pipeline.config.image_size
    normal = [load_rgb(resolve(data.image_root, path), size, data.max_pixels) for path in frame["path"]]
    classes, texts = frame["class_name"].to_numpy(), read_captions(w.CAPTIONS)
    rows, spoilt, drawn = zip(*synthesise(normal, classes.tolist()), strict=True)
    images = [*normal, *spoilt]
    rows = np.array([*range(len(normal)), *rows])
    masks = np.concatenate([np.zeros((len(normal), size, size), bool), drawn])
    truths = np.arange(len(images)) >= len(normal)

    table = Table("evaluate.detection", "AU-PRO", "image AUROC", title=f"{len(spoilt)} synthesised defects")
    for argument in ("{}", *sys.argv[1:]):
        detection = Detection.model_validate(params.evaluate.detection.model_dump() | yaml.safe_load(argument))
        if detection.captions == "class":
            sys.exit("this benchmark does not support captions: class")
        prompts = None if detection.captions == "none" else [texts[frame["image_id"][row]] for row in rows]
        detector = Detector(pipeline, detection)
        detector.calibrate(normal, captions=prompts and prompts[: len(normal)])
        found = detector.detect(images, captions=prompts)
        maps, scores = np.stack([one.anomaly_map for one in found]), np.array([one.score for one in found])
        measured = []
        for name in np.unique(classes):
            here = classes[rows] == name
            area = aupro(maps[here], masks[here], max_fpr=params.evaluate.max_fpr)
            measured.append((area, roc_auc_score(truths[here], scores[here])))
        table.add_row(argument, *(f"{value:.3f}" for value in np.mean(measured, axis=0)))
        print(argument, np.round(measured, 3).tolist(), flush=True)
    Console().print(table)


if __name__ == "__main__":
    main()
