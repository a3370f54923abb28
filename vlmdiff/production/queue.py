"""What an inspector looks at: the photographs that `score` judged, what people said of them, and their pictures."""

import io
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from vlmdiff.core import workspace as w
from vlmdiff.core.errors import InputError
from vlmdiff.core.files import sha256
from vlmdiff.core.params import Params
from vlmdiff.data import excluded, feedback, manifest
from vlmdiff.data.images import read_image, resolve
from vlmdiff.production.pictures import PICTURES, coloured, read_pictures

# Photographs that a list shows at once.
SHOWN = 300
# Of the photographs that nobody asked about, so many of the most unusual ones are asked about too.
UNUSUAL = 100
# The side of pictures on the page, in pixels.
SIDE = 1280
COLUMNS = ("path", "image_id", "score", "is_anomalous", "regions", "explanation", "nearest", "width", "height")
# Columns that only some scores have.
OPTIONAL = ("product", "class_name", "verdict", "p_value")
ALARM, REVIEW, PASS = "alarm", "review", "pass"
RANK = {ALARM: 0, REVIEW: 1, PASS: 2}


@dataclass(frozen=True)
class Wanted:
    """A filter. show: `open`, `answered`, ALARM, REVIEW, PASS or `all`; product and date: empty for any."""

    show: str = "open"
    product: str = ""
    date: str = ""


class Queue:
    """The photographs of a folder that `score` or `suspects` wrote, each once, and others that were judged since.

    is_training: they are images of the dataset, so that the question is whether they stay in it.
    """

    def __init__(self, scores: Path, params: Params, is_training: bool = False):
        self.scores, self.params, self.is_training = scores, params, is_training
        self._stamp: Any = None
        self._rows = pd.DataFrame()
        self._judged: dict[str, dict[str, Any]] = {}

    def add(self, row: dict[str, Any], pictures: dict[str, bytes | None]) -> None:
        """Add a photograph that is not in the folder: a row of `score` and its pictures."""
        self._judged[row["image_id"]] = row | pictures | {"kind": ALARM if row["is_anomalous"] else PASS}

    def rows(self) -> pd.DataFrame:
        """Return a row for each photograph, by its id, the one to ask about first first.

        Raises InputError if the folder holds something else.
        """
        # The flow `score` writes a folder for each version of the model.
        parts = sorted(part for part in self.scores.rglob("part-*.parquet") if part.parent.name != PICTURES)
        stamp = [(str(part), part.stat().st_mtime_ns) for part in parts]
        if stamp != self._stamp:
            tables = [self._read(part) for part in parts]
            rows = (
                pd.concat(tables, ignore_index=True)
                if tables
                else pd.DataFrame(columns=[*COLUMNS, "scored_at", "kind", "day"])
            )
            rows = rows.sort_values("scored_at", kind="stable").drop_duplicates("image_id", keep="last")
            rows = rows.sort_values("score", ascending=False, kind="stable")
            rows = rows.iloc[rows["kind"].map(RANK).argsort(kind="stable")]
            self._rows, self._stamp = rows.set_index("image_id"), stamp
        return self._rows

    @staticmethod
    def _read(part: Path) -> pd.DataFrame:
        try:
            file = pq.ParquetFile(part)
            names = [name for name in (*COLUMNS, *OPTIONAL, "scored_at") if name in file.schema_arrow.names]
            rows = file.read(names).to_pandas()
        except (pa.ArrowException, OSError) as error:
            raise InputError(
                f"{part} does not hold scores ({error}): name a folder that `vlmdiff score` wrote"
            ) from None
        # Scores of an earlier release have no explanation.
        rows = rows.reindex(columns=[*dict.fromkeys([*COLUMNS, *rows])])
        rows = rows[rows["score"].notna()].assign(part=str(part))
        rows["kind"] = np.where(rows["is_anomalous"].astype(bool), ALARM, PASS)
        if "verdict" in rows:
            rows["kind"] = rows["kind"].where(rows["verdict"] != REVIEW, REVIEW)
        rows["day"] = rows["scored_at"].dt.strftime("%Y-%m-%d")
        return rows

    def answers(self) -> dict[str, dict[str, Any]]:
        """Return what people said: by the photograph's id, `truth`, `defect`, `class_name`, `by` and `when`."""
        if not self.is_training:
            return feedback.answers(w.FEEDBACK)
        rows = excluded.decisions(self.params.prepare.root)
        return {
            image_id: {"truth": "excluded" if row["excluded"] else "kept", "defect": row["why"], "class_name": None}
            | row
            for image_id, row in rows.items()
        }

    def known(self) -> dict[str, str]:
        """Return, by id, what the dataset says of the photographs that it has."""
        if self.is_training or not w.MANIFEST.exists():
            return {}
        frame = manifest.read(w.MANIFEST)
        said = frame["class_name"] + ", " + frame["defect"].fillna("normal") + ", " + frame["split"]
        return dict(zip(frame["image_id"], said, strict=True))

    def listed(self, wanted: Wanted) -> dict[str, Any]:
        """Return what the page lists, as JSON: `items`, how many there are in `total`, and what filters offer."""
        rows, said, known = self.rows(), self.answers(), self.known()
        # Whatever is open can be asked, except where the dataset knows the answer.
        is_open = ~rows.index.isin({*said, *known})
        match wanted.show:
            case "open":
                passes = is_open & (rows["kind"] == PASS)
                chosen = is_open & ((rows["kind"] != PASS) | (passes.cumsum() <= UNUSUAL))
            case "answered":
                chosen = rows.index.isin(said)
            case "all":
                chosen = np.ones(len(rows), bool)
            case kind:
                chosen = rows["kind"] == kind
        product = _products(rows, self.is_training)
        if wanted.product:
            chosen = chosen & (product == wanted.product)
        if wanted.date:
            chosen = chosen & (rows["day"] == wanted.date)
        chosen = rows[chosen]
        judged = self._judged if wanted == Wanted() or wanted.show == "all" else {}
        shown = [*((key, pd.Series(row)) for key, row in judged.items()), *chosen.head(SHOWN).iterrows()]
        return {
            "items": [self._item(str(key), row, said.get(str(key)), known.get(str(key))) for key, row in shown],
            "total": len(chosen) + len(judged),
            "open": int((is_open & (rows["kind"] != PASS)).sum()),
            "products": sorted({name for name in product if name}),
            "dates": sorted(set(rows["day"]), reverse=True),
        }

    def _item(self, image_id: str, row: pd.Series, said: dict[str, Any] | None, known: str | None) -> dict[str, Any]:
        name = row.get("product")
        return {
            "id": image_id,
            # Many folders have a 000.png.
            "name": "/".join(Path(row["path"]).parts[-2:]),
            "path": row["path"],
            "score": round(float(row["score"]), 3),
            "kind": row["kind"],
            "product": name if isinstance(name, str) else _class_of(image_id if self.is_training else row["nearest"]),
            "date": _text(row.get("day")),
            "text": _text(row["explanation"]),
            "nearest": _text(row["nearest"]),
            "said": said,
            "known": known,
        }

    def row(self, image_id: str) -> dict[str, Any]:
        """Return a photograph's row. Raises InputError if there is none."""
        if image_id in self._judged:
            return self._judged[image_id]
        rows = self.rows()
        if image_id not in rows.index:
            raise InputError("this photograph is not in the scores any more: reload the page")
        return {str(key): value for key, value in rows.loc[image_id].items()} | {"image_id": image_id}

    def file(self, image_id: str) -> Path:
        """Return a photograph's file. Raises InputError if it has changed since it was judged, or is gone."""
        file = Path(self.row(image_id)["path"])
        if not file.is_file() or sha256(file) != image_id:
            raise InputError(f"{file} has changed since it was judged, or is gone: run `vlmdiff score` again")
        return file

    def picture(self, image_id: str, kind: str) -> bytes | None:
        """Return a picture of a photograph, PNG or JPEG: `photograph`, `map`, `reconstruction` or `nearest`.

        None where there is none. Raises InputError if a file cannot be read.
        """
        row, data = self.row(image_id), self.params.prepare
        match kind:
            case "photograph":
                return _shown(Path(row["path"]), data.max_pixels)
            case "nearest" if isinstance(row["nearest"], str):
                file = resolve(data.image_root, row["nearest"])
                # The training images need not be where the model is used.
                return _shown(file, data.max_pixels) if file.is_file() else None
            case "map" | "reconstruction":
                found = row.get(kind) or self._precomputed(row["part"], image_id).get(kind)
                return None if found is None else coloured(found) if kind == "map" else found
        return None

    def _precomputed(self, part: str, image_id: str) -> dict[str, bytes]:
        file = Path(part).parent / PICTURES / Path(part).name
        return read_pictures(str(file), file.stat().st_mtime_ns).get(image_id, {}) if file.exists() else {}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _products(rows: pd.DataFrame, is_training: bool) -> pd.Series:
    """Return the products of rows: what the model recognised, else the class of the most similar training image."""
    ids = pd.Series(rows.index, rows.index) if is_training else rows["nearest"]
    found = ids.map(_class_of)
    return rows["product"].where(rows["product"].notna(), found) if "product" in rows else found


def _class_of(image: Any) -> str:
    """Return the class of an image of the dataset, named by its path or its id; empty if it is not known."""
    return _classes(w.MANIFEST.stat().st_mtime_ns if w.MANIFEST.exists() else 0).get(image, "")


@lru_cache(maxsize=2)
def _classes(stamp: int) -> dict[str, str]:
    if not stamp:
        return {}
    frame = manifest.read(w.MANIFEST)
    names = frame["class_name"]
    return dict(zip([*frame["path"], *frame["image_id"]], [*names, *names], strict=True))


def _shown(file: Path, max_pixels: int) -> bytes:
    """Return an image file as the page shows it, at most SIDE pixels a side."""
    image = read_image(file, max_pixels)
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    # What is small is shown enlarged: without the marks of a JPEG.
    if max(image.size) <= 512:
        image.save(buffer, "PNG", compress_level=1)
    else:
        image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
