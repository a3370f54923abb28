"""Compare detection settings for this workspace's pipeline on synthesised defects, without using test images.

Each held-out normal image is judged unchanged and with five kinds of defect drawn on it, each in a small and a large
size: a line, a hole, a stain, a part of another image of its class, and a blurred part. The first row of the table is
`evaluate.detection` of params.yaml. Each argument is a YAML mapping that changes some of its keys and adds a row:

    python benchmarks/synthesised.py '{noise_level: 500}' '{smoothing: 6, samples: 8}'
"""

import sys

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table
from sklearn.metrics import roc_auc_score

from vlmdiff.captions.files import read_captions
from vlmdiff.core import workspace as w
from vlmdiff.core.device import pick_device
from vlmdiff.core.params import Detection, load
from vlmdiff.data import manifest
from vlmdiff.data.images import load_rgb, resolve
from vlmdiff.data.synthesised import synthesise
from vlmdiff.detection.detector import Detector
from vlmdiff.detection.normals import Normal
from vlmdiff.evaluation import aupro
from vlmdiff.model.pipeline import load_pipeline


def main() -> None:
    params = load(w.PARAMS)
    frame, data = manifest.read(w.MANIFEST), params.prepare
    training = frame[frame["split"] == "train"]
    frame = frame[frame["split"] == "validation"].reset_index(drop=True)
    pipeline = load_pipeline(w.PIPELINE, pick_device())
    size = pipeline.config.image_size
    normal = [load_rgb(resolve(data.image_root, path), size, data.max_pixels) for path in frame["path"]]
    known = [Normal(*row) for row in training[["image_id", "path", "class_name"]].itertuples(index=False)]
    training = [load_rgb(resolve(data.image_root, path), size, data.max_pixels) for path in training["path"]]
    classes, texts = frame["class_name"].to_numpy(), read_captions(w.CAPTIONS)
    spoiled = list(synthesise(normal, classes.tolist()))
    images = [*normal, *(one.image for one in spoiled)]
    rows = np.array([*range(len(normal)), *(one.row for one in spoiled)])
    masks = np.concatenate([np.zeros((len(normal), size, size), bool), [one.mask for one in spoiled]])
    truths = np.arange(len(images)) >= len(normal)

    table = Table("evaluate.detection", "AU-PRO", "image AUROC", title=f"{len(spoiled)} synthesised defects")
    for argument in ("{}", *sys.argv[1:]):
        detection = Detection.model_validate(params.evaluate.detection.model_dump() | yaml.safe_load(argument))
        if detection.captions == "class":
            sys.exit("this benchmark does not support captions: class")
        prompts = None if detection.captions == "none" else [texts[frame["image_id"][row]] for row in rows]
        detector = Detector(pipeline, detection)
        if detection.retrieval:
            detector.learn(training, known)
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
