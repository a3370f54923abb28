"""The photographs of this workspace, for the benchmarks that compare methods on them."""

from collections.abc import Iterable
from functools import cached_property

import numpy as np
import pandas as pd

from vlmdiff.core import workspace as w
from vlmdiff.core.params import load
from vlmdiff.data import manifest
from vlmdiff.data.images import load_mask, load_rgb, resolve
from vlmdiff.detection.detector import Detector
from vlmdiff.detection.normals import Normal


def learn_again(detector: Detector, rows: pd.DataFrame, images: Iterable[np.ndarray]) -> None:
    """Let a loaded detector learn normal images again: the file of a bank does not say which image a patch is from.

    rows: those of the manifest, the held-out images first, as in `evaluate`; images: of each, uint8 (S, S, 3).
    """
    columns = rows[["image_id", "path", "class_name"]]
    detector.learn(images, [Normal(*row) for row in columns.itertuples(index=False)], 16)


class Dataset:
    """Images at the model's resolution. normal: the rows of the manifest that are not tested; test: those that are.

    Ends the process, with the reason, where presets/photographs.yaml has not run.
    """

    def __init__(self):
        if not (w.DETECTOR / "bank.safetensors").is_file():
            print("skipped: this is not a workspace where presets/photographs.yaml has run")
            raise SystemExit(0)
        self.params = load(w.PARAMS)
        self.size = self.params.first_stage.image_size
        frame = manifest.read(w.MANIFEST)
        tested = frame["split"] == "test"
        self.normal, self.test = frame[~tested].reset_index(drop=True), frame[tested].reset_index(drop=True)
        self.classes, self.truths = self.test["class_name"].tolist(), self.test["is_anomalous"].tolist()

    def read(self, path: str) -> np.ndarray:
        """Return an image, uint8 (S, S, 3)."""
        data = self.params.prepare
        return load_rgb(resolve(data.image_root, path), self.size, data.max_pixels)

    def images(self, rows: pd.DataFrame) -> np.ndarray:
        """Return the images of rows, uint8 (N, S, S, 3)."""
        return np.stack([self.read(path) for path in rows["path"]])

    @cached_property
    def masks(self) -> np.ndarray:
        """The masks of the test images, bool (N, S, S)."""
        data, empty = self.params.prepare, np.zeros((self.size, self.size), bool)
        return np.stack(
            [
                empty if path is None else load_mask(resolve(data.image_root, path), self.size, data.max_pixels)
                for path in self.test["mask_path"]
            ]
        )
