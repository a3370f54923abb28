"""Judge new photographs: a row and a heatmap each."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlmdiff.console import track
from vlmdiff.data.images import load_rgb
from vlmdiff.detection.detector import Detector
from vlmdiff.errors import InputError
from vlmdiff.evaluation.report import heatmap
from vlmdiff.files import atomic_folder


def predict(
    files: Sequence[Path], detector: Detector, out: Path, max_pixels: int, class_name: str | None = None
) -> list[dict[str, Any]]:
    """Judge `files` and write the folder `out`: `predictions.jsonl`, and under `heatmaps/` a PNG a photograph.

    A row has `path`, `score` in [0, 1) (0.5 is the threshold), `is_anomalous`, `regions` (boxes x0, y0, x1, y1 in
    pixels of the photograph, `peak`), `heatmap`. class_name: of all the photographs, for a detector that judges by its
    classes' captions. All files are read before any is judged: InputError, and nothing written, where one cannot be
    read, `out` exists, or the detector needs another or no class.
    """
    if out.exists():
        raise InputError(f"{out} exists: name a new folder with --out")
    if detector.params.captions == "image":
        raise InputError("this model judges a photograph by its own caption: call Detector.detect with captions")
    if detector.params.captions == "class" and class_name is None:
        raise InputError("this model judges a photograph by its class's caption: name the class with --class-name")
    captions = None if class_name is None else detector.captions_of([class_name] * len(files))
    for file in files:
        load_rgb(file, None, max_pixels)
    rows = []
    found = detector.stream((load_rgb(file, None, max_pixels) for file in files), captions=captions)
    with atomic_folder(out) as temporary:
        (temporary / "heatmaps").mkdir()
        for number, (file, detection) in enumerate(track(zip(files, found, strict=True), "judge", len(files))):
            image = load_rgb(file, None, max_pixels)
            height, width = image.shape[:2]
            # Heatmap and boxes are laid on the photograph as it came, not on the model's small version of it.
            large = Image.fromarray(detection.anomaly_map).resize((width, height), Image.Resampling.BILINEAR)
            picture = f"heatmaps/{number:04}_{file.stem}.png"
            Image.fromarray(heatmap(image, np.asarray(large), vmax=1.0)).save(temporary / picture)
            regions = [
                {"box": [r.x0, r.y0, r.x1, r.y1], "peak": round(r.peak, 4)}
                for r in detection.scaled_regions(width, height)
            ]
            rows.append(
                {
                    "path": str(file),
                    "score": round(detection.score, 6),
                    "is_anomalous": detection.is_anomalous,
                    "regions": regions,
                    "heatmap": picture,
                }
            )
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (temporary / "predictions.jsonl").write_text(lines, encoding="utf-8")
    return rows
