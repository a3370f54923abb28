"""What would captions add as evidence, beside the anomaly map?

Run it in a workspace where `dvc repro` has run, `make demo` for example:

    python benchmarks/caption_evidence.py

A caption's evidence is how unlikely its words and pairs of words are among the captions of its product's training
images: the mean negative logarithm of a bigram model, smoothed by the words' own shares. It is standardised by product,
and a share of it is added to the image's standardised score. The share is chosen on defects drawn on held-out normal
images, captioned by `describe` as the others; the table shows what it does there and on the test images. Intervals of
the differences come from 2,000 bootstrap samples of each class's normal and defective images.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from rich.console import Console
from rich.table import Table
from scipy.special import logit
from sklearn.metrics import roc_auc_score

sys.path.insert(0, str(Path(__file__).parent))

from dataset import learn_again

from vlmdiff.captions.describe import describe
from vlmdiff.captions.files import read_captions
from vlmdiff.core import workspace as w
from vlmdiff.core.params import load
from vlmdiff.data import manifest
from vlmdiff.data.images import load_rgb, resolve
from vlmdiff.data.synthesised import synthesise
from vlmdiff.detection.detector import Detector
from vlmdiff.detection.explain import words_of

SHARES = (0.0, 0.1, 0.2, 0.3, 0.5, 1.0)
# Pseudo-counts of a word, and of all pairs that a word begins.
WORD, PAIR = 0.5, 2.5


class Words:
    """A model of the captions of a product's normal images."""

    def __init__(self, captions: Sequence[str]):
        self.words, self.pairs, self.first = Counter(), Counter(), Counter()
        for caption in captions:
            self.count(caption, 1)
        self.vocabulary = len(self.words) + 1

    def count(self, caption: str, times: int) -> None:
        for pair in self.split(caption):
            self.pairs[pair] += times
            self.first[pair[0]] += times
            self.words[pair[1]] += times

    @staticmethod
    def split(caption: str) -> list[tuple[str, str]]:
        return list(pairwise(["", *words_of(caption), ""]))

    def unlikely(self, caption: str, counted: bool = False) -> float:
        """Return how unlikely a caption is; `counted`: it is one of those that the model has counted."""
        self.count(caption, -counted)
        total, found = self.words.total(), []
        for first, word in self.split(caption):
            share = (self.words[word] + WORD) / (total + WORD * self.vocabulary)
            found.append(-np.log((self.pairs[first, word] + PAIR * share) / (self.first[first] + PAIR)))
        self.count(caption, counted)
        return float(np.mean(found))


def of_captions(normal: pd.DataFrame, rows: pd.DataFrame) -> np.ndarray:
    """Return the standardised evidence (N,) of the captions of `rows`. `normal` holds other images."""
    values = np.zeros(len(rows))
    for name, part in normal.groupby("class_name"):
        model = Words(part["caption"])
        own = np.array([model.unlikely(caption, True) for caption in part["caption"]])
        here = np.flatnonzero(rows["class_name"] == name)
        found = np.array([model.unlikely(rows["caption"].iloc[i]) for i in here])
        values[here] = (found - own.mean()) / max(own.std(), 1e-6)
    return values


def auroc(rows: pd.DataFrame, values: np.ndarray) -> dict[str, float]:
    places = rows.reset_index(drop=True).groupby("class_name").groups
    return {str(name): roc_auc_score(rows["is_anomalous"].iloc[i], values[i]) for name, i in places.items()}


def interval(rows: pd.DataFrame, one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of the difference of two mean AUROCs."""
    rng, groups = np.random.default_rng(0), rows.reset_index(drop=True).groupby(["class_name", "is_anomalous"]).groups
    found = []
    for _ in range(2000):
        drawn = np.concatenate([rng.choice(i, len(i)) for i in groups.values()])
        sample = rows.iloc[drawn]
        a, b = (np.mean(list(auroc(sample, values[drawn]).values())) for values in (one, other))
        found.append(a - b)
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def main() -> None:
    params = load(w.PARAMS)
    data, frame, captions = params.prepare, manifest.read(w.MANIFEST), read_captions(w.CAPTIONS)
    frame = frame.assign(caption=[captions.get(image_id) for image_id in frame["image_id"]])
    detector = Detector.from_pretrained(w.DETECTOR)
    if not (detector.normals and detector.normals.described) or detector.params.captions != "none":
        print("skipped: the captions of this workspace are not those of `describe`, or its detector judges by captions")
        return
    training, held_out = frame[frame["split"] == "train"], frame[frame["split"] == "validation"].reset_index(drop=True)
    size = detector.pipeline.config.image_size
    images = [load_rgb(resolve(data.image_root, path), size, data.max_pixels) for path in held_out["path"]]
    spoiled = list(synthesise(images, held_out["class_name"].tolist(), 300))
    rows = [one.row for one in spoiled]
    judged = [*images, *(one.image for one in spoiled)]
    drawn = pd.concat([held_out, held_out.iloc[rows].assign(is_anomalous=True, image_id="")], ignore_index=True)
    # At the model's size, as the defects are drawn: a caption may differ from that of the original.
    drawn["caption"] = [describe(Image.fromarray(image)) for image in judged]
    without = None
    if detector.bank is not None:
        size = detector.pipeline.config.image_size
        others = (load_rgb(resolve(data.image_root, path), size, data.max_pixels) for path in training["path"])
        learn_again(detector, pd.concat([held_out, training]), chain(images, others))
        without = [*range(len(images)), *rows]
    maps = {"drawn": detector.standardised(judged, drawn["class_name"].tolist(), 16, None, without)}
    scores = pd.read_parquet(Path(w.EVALUATION) / "scores.parquet").set_index("image_id")["score"]
    test = frame[frame["split"] == "test"].reset_index(drop=True)
    maps["test"] = logit(test["image_id"].map(scores).to_numpy().clip(1e-9, 1 - 1e-9)) / detector.calibrated().slope
    tables = {"drawn": drawn, "test": test}
    texts = {name: of_captions(training, table) for name, table in tables.items()}
    means = {
        (name, share): np.mean(list(auroc(table, maps[name] + share * texts[name]).values()))
        for name, table in tables.items()
        for share in SHARES
    }
    best = max(SHARES, key=lambda share: means["drawn", share])
    table = Table("share of captions", "drawn defects", "test images", title="image AUROC, mean over products")
    for share in SHARES:
        chosen = " (chosen)" if share == best else ""
        table.add_row(f"{share:g}{chosen}", f"{means['drawn', share]:.4f}", f"{means['test', share]:.4f}")
    Console().print(table)
    parts = {"map": maps["test"], "captions": texts["test"], "both": maps["test"] + best * texts["test"]}
    table = Table("test images", *parts, title="image AUROC by product")
    found = {name: auroc(test, values) for name, values in parts.items()}
    for product in found["map"]:
        table.add_row(product, *(f"{values[product]:.3f}" for values in found.values()))
    table.add_row("mean", *(f"{np.mean(list(values.values())):.3f}" for values in found.values()))
    table.add_row("all in one ranking", *(f"{roc_auc_score(test['is_anomalous'], v):.3f}" for v in parts.values()))
    Console().print(table)
    for name, rows in tables.items():
        low, high = interval(rows, maps[name] + best * texts[name], maps[name])
        print(f"{name}: both minus map {low:+.4f} to {high:+.4f} (95 %)")


if __name__ == "__main__":
    main()
