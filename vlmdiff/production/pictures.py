"""The small pictures that `score` keeps for the inspector's page, which shows them without a model."""

import io
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from vlmdiff.data.images import decode

# Below the folder of scores. Readers of Parquet datasets ignore names that begin with an underscore.
PICTURES = "_pictures"
MAP_PIXELS = 4096**2

# A file of `_pictures` has the name of the part that it belongs to.
PICTURE_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string()),
        pa.field("map", pa.binary()),  # PNG, 8-bit grey: the anomaly map times 255, at the model's resolution
        pa.field("reconstruction", pa.binary()),  # JPEG, as if the photograph were normal
    ]
)


def pictures_of(anomaly_map: np.ndarray, reconstruction: np.ndarray | None = None) -> dict[str, bytes | None]:
    """Return the columns of PICTURE_SCHEMA of a photograph, except its id."""
    level, rebuilt = io.BytesIO(), io.BytesIO()
    Image.fromarray(np.rint(255 * anomaly_map).astype(np.uint8)).save(level, "PNG", compress_level=1)
    if reconstruction is not None:
        Image.fromarray(reconstruction).save(rebuilt, "JPEG", quality=90)
    return {"map": level.getvalue(), "reconstruction": rebuilt.getvalue() or None}


@lru_cache(maxsize=8)
def read_pictures(file: str, stamp: int) -> dict[str, dict[str, bytes]]:
    """Return the columns of a file of `_pictures`, by the photographs' ids. stamp: another one reads it again."""
    rows: Iterator[dict[str, Any]] = iter(pq.read_table(file).to_pylist())
    return {row.pop("image_id"): row for row in rows}


@lru_cache(maxsize=1)
def colours() -> np.ndarray:
    """Return the colours of an anomaly map, uint8 (256, 3), from clear to bright yellow."""
    import matplotlib

    return np.rint(255 * matplotlib.colormaps["inferno"](np.arange(256))[:, :3]).astype(np.uint8)


@lru_cache(maxsize=256)
def coloured(grey: bytes) -> bytes:
    """Return a map of `score` in colours, transparent where nothing is unusual."""
    level = np.asarray(decode(io.BytesIO(grey), MAP_PIXELS, "the map"))
    rgba = np.dstack([colours()[level], level])
    buffer = io.BytesIO()
    Image.fromarray(rgba).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
