"""Rank the training images by how unlike the others of their class they are: defects that slipped into "good"."""

from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from rich.table import Table
from rich.text import Text
from scipy import ndimage

from vlmdiff.core import workspace as w
from vlmdiff.core.console import track
from vlmdiff.core.errors import InputError
from vlmdiff.core.files import atomic_folder
from vlmdiff.core.params import Params
from vlmdiff.core.text import counted, plain
from vlmdiff.data import manifest
from vlmdiff.data.images import load_rgb, resolve
from vlmdiff.detection.detector import Detector
from vlmdiff.detection.explain import explain, find_regions, scaled
from vlmdiff.detection.normals import Normal
from vlmdiff.production.pictures import PICTURES, pictures_of
from vlmdiff.production.score import folder_name, write_part

# Robust deviations from the median of its class from which an image is a suspect (Iglewicz and Hoaglin, 1993).
LIMIT = 3.5
# Without a bank: patches of PATCH x PATCH pixels, STEP apart, of images of SIDE x SIDE, by COMPONENTS numbers each. Of
# these sizes of patches, 6, 8 and 12, this one ranked synthesised defects best for its time.
SIDE, PATCH, STEP, COMPONENTS = 64, 8, 4, 32
# Other images of the class that an image is compared with, at most.
OTHERS = 200
SHOWN = 20


def suspects(params: Params, model: Path, out: Path) -> pd.DataFrame:
    """Write a dataset like that of `score` into `out`, a row for each normal training image, and return its rows.

    No image is judged by itself: with a bank of patches, an image's own patches do not count; without one, each image
    is compared with the patches of others of its class. The deviation of a place from what is usual at this place in
    the class, in robust deviations, is divided by LIMIT; `score` is its maximum on the scale of scores, so that 0.5 is
    the limit. model: a detector's folder. Raises InputError if a class has fewer than three images.
    """
    frame, data = manifest.read(w.MANIFEST), params.prepare
    frame = frame[(frame["split"] != "test") & ~frame["is_anomalous"]].reset_index(drop=True)
    classes = frame["class_name"].to_numpy()
    for name, count in frame["class_name"].value_counts().items():
        if count < 3:
            raise InputError(
                f"the class {name!r} has {counted(count, 'normal image')}: what is unlike them takes at least three"
            )
    detector = Detector.from_pretrained(model)
    files = [resolve(data.image_root, path) for path in frame["path"]]
    size = SIDE if detector.bank is None else detector.pipeline.config.image_size
    images = [load_rgb(file, size, data.max_pixels) for file in track(files, "read", len(files))]
    if detector.bank is None:
        maps = _unlike_others(np.stack(images), classes)
    else:
        known = [Normal(*row) for row in frame[["image_id", "path", "class_name"]].itertuples(index=False)]
        detector.learn(images, known, params.evaluate.batch_size)
        maps = detector.distances(images, range(len(images)), params.evaluate.batch_size, same=True)
    levels = deviations(maps, classes) / LIMIT
    levels = (levels / (levels + 1)).astype(np.float32)
    name, now = folder_name(model), datetime.now(UTC)
    rows = [
        _row(record, file, level, image) | {"model": name, "scored_at": now}
        for record, file, level, image in zip(frame.to_dict("records"), files, levels, images, strict=True)
    ]
    with atomic_folder(out) as temporary:
        (temporary / PICTURES).mkdir()
        write_part(rows, temporary, 0)
    return pd.DataFrame(rows).drop(columns=["map", "reconstruction"]).sort_values("score", ascending=False)


def deviations(maps: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Return how far maps (N, h, w) lie above what is usual at each place in their class, in robust deviations.

    0 is the median of the images' highest values, 1 the median of their distances from it.
    """
    maps = ndimage.gaussian_filter(maps, (0, 0.7, 0.7)).astype(np.float64)
    for name in np.unique(classes):
        here = classes == name
        maps[here] -= np.median(maps[here], axis=0)
        highest = maps[here].max(axis=(1, 2))
        middle = np.median(highest)
        spread = 1.4826 * np.median(np.abs(highest - middle))
        maps[here] = (maps[here] - middle) / max(spread, 1e-9)
    return np.maximum(maps, 0)


@torch.no_grad()
def _unlike_others(images: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Return maps (N, h, w): the distance of each patch to the nearest patch of another image of its class."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    patches = F.unfold(pixels, PATCH, stride=STEP).transpose(1, 2)
    flat = patches.flatten(0, 1)
    flat = flat - flat.mean(dim=0)
    _, directions = torch.linalg.eigh(flat.T @ flat)
    patches = (flat @ directions[:, -COMPONENTS:]).unflatten(0, patches.shape[:2])
    found = torch.empty(patches.shape[:2])
    rng = np.random.default_rng(0)
    for i in track(range(len(images)), "compare", len(images)):
        others = np.flatnonzero((classes == classes[i]) & (np.arange(len(classes)) != i))
        others = rng.permutation(others)[:OTHERS]
        found[i] = torch.cdist(patches[i], patches[others].flatten(0, 1)).amin(dim=1)
    side = (images.shape[1] - PATCH) // STEP + 1
    return found.unflatten(1, (side, side)).numpy()


def _row(record: dict, file: Path, level: np.ndarray, image: np.ndarray) -> dict:
    size = record["width"], record["height"]
    regions = scaled(find_regions(level), level.shape, size)
    score = float(level.max())
    return {
        "path": str(file),
        "image_id": record["image_id"],
        "score": score,
        "is_anomalous": score > 0.5,
        "regions": [asdict(region) for region in regions],
        "explanation": explain("suspect" if score > 0.5 else "normal", score, regions, size),
        "width": size[0],
        "height": size[1],
        **pictures_of(np.asarray(Image.fromarray(level).resize(image.shape[1::-1], Image.Resampling.BILINEAR))),
    }


def suspects_table(rows: pd.DataFrame, root: Path) -> Table:
    """Return the images most unlike the others as a table for the terminal."""
    count = int(rows["is_anomalous"].sum())
    table = Table(title=f"{counted(count, 'suspect')} among {len(rows)} normal images", caption="0.5 is the limit")
    table.add_column("image", overflow="fold")
    table.add_column("score")
    for path, score in rows[["path", "score"]].head(SHOWN).itertuples(index=False):
        file = Path(path)
        shown = file.relative_to(root.resolve()) if file.is_relative_to(root.resolve()) else file
        table.add_row(Text(plain(str(shown))), f"[bold red]{score:.3f}" if score > 0.5 else f"{score:.3f}")
    return table
