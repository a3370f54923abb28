"""Judge many photographs: a Parquet dataset with a row for each and, on request, a heatmap of each alarm."""

import contextlib
import hashlib
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from rich.table import Table
from rich.text import Text

from vlmdiff.core.console import say, track
from vlmdiff.core.device import process_group
from vlmdiff.core.errors import InputError
from vlmdiff.core.files import atomic_path, check_out, sha256
from vlmdiff.core.locks import hold
from vlmdiff.core.params import Params
from vlmdiff.core.text import counted, plain
from vlmdiff.data.images import check_bytes, opened
from vlmdiff.data.sources import Photograph, find_photographs
from vlmdiff.data.statistics import image_statistics
from vlmdiff.detection.decoded import Decoded
from vlmdiff.detection.detector import Detector, batches
from vlmdiff.detection.settings import SETTINGS
from vlmdiff.production.pictures import PICTURE_SCHEMA, PICTURES, pictures_of

BATCH = 32
# How many photographs are read while the model judges others, and by how many threads.
AHEAD, READERS = 32, 4
# A part is written after this many images or seconds: a kill loses no more than that.
PART_ROWS, PART_SECONDS = 256, 60.0
# Readers of Parquet datasets ignore names that begin with an underscore or a dot.
HEATMAPS, LOCK = "_heatmaps", ".lock"
SHOWN = 20
SUMMED = ["path", "score", "is_anomalous", "verdict", "regions", "error"]
# Of a part's photographs that raise no alarm, so many have pictures for the inspector's page: the most unusual ones.
PICTURED = 32

REGION = pa.struct(
    [
        *((name, pa.int32()) for name in ("x0", "y0", "x1", "y1", "area")),
        *((name, pa.float64()) for name in ("peak", "share")),
    ]
)
SCHEMA = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),  # absolute
        pa.field("image_id", pa.string()),  # sha256 of the file's bytes
        pa.field("score", pa.float64()),  # in [0, 1), 0.5 is the threshold; null if there is an error
        pa.field("is_anomalous", pa.bool_()),
        pa.field("verdict", pa.string()),  # normal, anomalous, review or unknown product
        pa.field("product", pa.string()),  # null if the photograph shows none that the model knows
        pa.field("p_value", pa.float64()),  # the share of normal images, with this one, that are as unusual
        pa.field("regions", pa.list_(REGION)),  # in the photograph's own pixels, x1 and y1 exclusive
        pa.field("explanation", pa.string()),  # the verdict, the regions, and what differs from normal images, in words
        pa.field("nearest", pa.string()),  # the most similar normal training image: its path in the dataset
        pa.field("heatmap", pa.string()),  # of an alarm, relative to the dataset's folder
        pa.field("model", pa.string(), nullable=False),
        pa.field("error", pa.string()),  # why the photograph could not be read
        *(pa.field(name, pa.float64()) for name in ("brightness", "contrast", "sharpness", "red", "green", "blue")),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        # A later run knows by these that the file has not changed; null where it does not exist.
        pa.field("bytes", pa.int64()),
        pa.field("mtime_ns", pa.int64()),
        pa.field("scored_at", pa.timestamp("us", "UTC"), nullable=False),
    ]
)


@dataclass(frozen=True)
class Scored:
    """The result of a run.

    images: how many were named; known: how many of them the dataset had already; alarms and unreadable: how many of
    the new ones are anomalous or cannot be read; judged: how many of all have a score; seconds: the time of judging;
    rows: the images' rows, where there are at most SHOWN; errors: why images cannot be read, at most SHOWN sentences.
    """

    out: Path
    model: str
    images: int
    known: int
    alarms: int
    unreadable: int
    judged: int
    seconds: float
    rows: list[dict[str, Any]]
    errors: list[str]

    def __str__(self) -> str:
        new = self.images - self.known
        alarms, pace = counted(self.alarms, "alarm"), new / max(self.seconds, 1e-9)
        return (
            f"score: {counted(self.images, 'image')} by {self.model}, {self.known} of them scored before; {new} new: "
            f"{alarms}, {self.unreadable} could not be read; {pace:.1f} images a second; {self.out}"
        )


def score(
    sources: Sequence[str],
    out: Path,
    params: Params,
    model: Path | None = None,
    class_name: str | None = None,
    heatmaps: bool = False,
) -> Scored | None:
    """Judge the photographs of `sources` (as `find_photographs` lists them) and add their rows to the dataset `out`.

    `pandas.read_parquet(out)` reads the dataset: a row for each image, as in SCHEMA. A file that has not changed since
    it was judged is not judged again; one that has changed gets a new row. An image that cannot be read has a row with
    its `error`, and is tried again by each run. Alarms and the most unusual of the others get small pictures for the
    inspector's page, in `out/_pictures`. heatmaps: also write a PNG of each alarm into `out/_heatmaps`. model: a
    detector's folder, by default the champion. class_name: the class of photographs whose table does not name one, for
    a detector that judges by the captions of classes.

    Under `accelerate launch`, each process judges its share; the main process returns the result, the others None.
    Raises InputError, and writes nothing, if a source or the model is missing, the detector needs other captions, or
    `out` holds other files or another model's scores, or another process writes to it. Raises ModelError where the
    model's score of a photograph is not finite; the rows before it are written.
    """
    check_out(out, lambda name: name.startswith("part-") or name in (HEATMAPS, PICTURES))
    here = process_group()
    folder, name, photographs = _from_main(here, lambda: (*find_model(model, params), find_photographs(sources, out)))
    detector = Detector.from_pretrained(folder, str(here.device))
    name = name or folder_name(folder)
    captions, products = (find(detector, photographs, class_name) for find in (_captions, _products))
    with hold(out / LOCK, f"the folder {out}") if here.is_main_process else contextlib.nullcontext():
        new = _from_main(here, lambda: _pending(out, photographs, name))
        began = time.perf_counter()
        own = new[here.process_index :: here.num_processes]
        read = partial(_read, detector=detector, max_pixels=params.prepare.max_pixels, draw=heatmaps)
        rows = _judge(detector, _ahead(read, own), captions, products, name, out)
        _write_parts(track(rows, "score", len(own)) if here.is_main_process else rows, len(own), out, here)
        here.wait_for_everyone()
        seconds = time.perf_counter() - began
        summary = _summary(out, name, photographs, new, seconds) if here.is_main_process else None
    here.destroy_process_group()
    return summary


def scores_table(scored: Scored) -> Table:
    """Return the rows of a few images as a table for the terminal."""
    table = Table(caption="0.5 is the threshold")
    table.add_column("photograph", overflow="fold")
    for title in ("score", "verdict", "regions"):
        table.add_column(title)
    for row in scored.rows:
        path = Text(plain(min(row["path"], os.path.relpath(row["path"]), key=len)))
        if row["error"] is not None:
            table.add_row(path, "", "[yellow]could not be read", "")
            continue
        # Rows of earlier releases have no words.
        verdict = row["verdict"] or ("anomalous" if row["is_anomalous"] else "normal")
        verdict = Text(plain(verdict), "bold red" if row["is_anomalous"] else "green")
        table.add_row(path, f"{row['score']:.3f}", verdict, str(len(row["regions"])))
    return table


Found = TypeVar("Found")


def _from_main(here: PartialState, find: Callable[[], Found]) -> Found:
    """Return in every process what the main one finds: a folder or the registry may change a moment later."""
    found: tuple[Found | None, InputError | None] = None, None
    if here.is_main_process:
        try:
            found = find(), None
        except InputError as error:
            # The others wait for an answer.
            found = None, error
    value, error = broadcast_object_list([found])[0]
    if error is not None:
        raise error
    return value


def find_model(folder: Path | None, params: Params) -> tuple[Path, str | None]:
    """Return a detector's folder and None, or those of the champion: its folder and its registered name."""
    if folder is not None:
        return folder, None
    from vlmdiff.registry.promotion import champion

    version, folder = champion(params)
    return folder, f"{params.registry.model_name}/{version}"


def folder_name(folder: Path) -> str:
    """Return the name of a detector without a registered one: a hash of its settings."""
    if not (file := folder / SETTINGS).is_file():
        raise InputError(f"{folder} is not a detector's folder: it has no {SETTINGS}, which `vlmdiff evaluate` writes")
    return f"sha256:{sha256(file)[:16]}"


def _captions(detector: Detector, photographs: list[Photograph], class_name: str | None) -> dict[str, str]:
    """Return captions by path, as the detector needs them; empty where it judges without captions."""
    match detector.params.captions:
        case "none":
            return {}
        case "image":
            given = {photograph.path: photograph.caption for photograph in photographs}
            missing, advice = "caption", "give a table with columns path and caption"
        case "class":
            given = {photograph.path: photograph.class_name or class_name for photograph in photographs}
            missing, advice = "class", "give --class-name, or a table with columns path and class_name"
    for path, text in given.items():
        if text is None:
            raise InputError(f"{path}: this model needs the photograph's {missing}: {advice}")
    texts = {path: text for path, text in given.items() if text is not None}
    return texts if missing == "caption" else dict(zip(texts, detector.captions_of(texts.values()), strict=True))


def _products(detector: Detector, photographs: list[Photograph], class_name: str | None) -> dict[str, str]:
    """Return the products by path that are told and known; the others are recognised."""
    known = detector.calibrated().products
    if class_name is not None and class_name not in known:
        raise InputError(f"this model does not know the class {class_name!r}, only {', '.join(sorted(known))}")
    given = {photograph.path: photograph.class_name or class_name for photograph in photographs}
    return {path: name for path, name in given.items() if name in known}


def _parts(out: Path) -> list[Path]:
    return sorted(out.glob("part-*.parquet"))


def _pending(out: Path, photographs: list[Photograph], model: str) -> list[Photograph]:
    """Return the photographs that have no row, after removing the rows of files that have changed or have an error."""
    for left in (*out.glob(".part-*.tmp"), *out.glob(f"{PICTURES}/.part-*.tmp")):
        left.unlink()
    listed, known = {photograph.path for photograph in photographs}, set()
    for part in _parts(out):
        try:
            table = pq.read_table(part, schema=SCHEMA)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{part} does not hold scores of this version ({error}): give another --out") from error
        if others := set(table["model"].to_pylist()) - {model}:
            raise InputError(f"{out} has scores by {others.pop()}, and this is {model}: give another --out")
        columns = (table[column].to_pylist() for column in ("path", "score", "bytes", "mtime_ns"))
        # What could not be read may be readable now: a share was away, a right or a limit has changed. Earlier releases
        # wrote scores that are not finite.
        stale = [
            path in listed and (score is None or not math.isfinite(score) or _stamp(path) != tuple(stamp))
            for path, score, *stamp in zip(*columns, strict=True)
        ]
        known.update(path for path, old in zip(table["path"].to_pylist(), stale, strict=True) if not old)
        if any(stale):
            _remove_rows(part, table, stale, out)
    return [photograph for photograph in photographs if photograph.path not in known]


def _remove_rows(part: Path, table: pa.Table, stale: list[bool], out: Path) -> None:
    for picture in filter(None, table.filter(pa.array(stale))["heatmap"].to_pylist()):
        (out / picture).unlink(missing_ok=True)
    if all(stale):
        part.unlink()
        (out / PICTURES / part.name).unlink(missing_ok=True)
        return
    times = part.stat()
    with atomic_path(part) as temporary:
        pq.write_table(table.filter(pa.array([not old for old in stale])), temporary)
        # The rows that remain are as old as before.
        os.utime(temporary, ns=(times.st_atime_ns, times.st_mtime_ns))


def _stamp(path: str) -> tuple[int | None, int | None]:
    try:
        status = os.stat(path)
    except OSError:
        return None, None
    return status.st_size, status.st_mtime_ns


Read = tuple[dict[str, Any], Decoded | None]


def _read(photograph: Photograph, detector: Detector, max_pixels: int, draw: bool) -> Read:
    """Return the columns of a photograph's row that need no model, and the photograph where it can be read."""
    file = Path(photograph.path)
    row: dict[str, Any] = {"path": photograph.path}
    row["bytes"], row["mtime_ns"] = _stamp(photograph.path)
    try:
        check_bytes(row["bytes"] or 0, max_pixels, str(file))
        row["image_id"] = sha256(file)
        with opened(file, max_pixels) as image:
            return row | image_statistics(image), Decoded.of(image, detector, draw)
    except InputError as error:
        return row | {"error": str(error)}, None
    except OSError as error:
        return row | {"error": f"{file} cannot be read ({error.strerror}): replace or remove it"}, None


Item = TypeVar("Item")
Result = TypeVar("Result")


def _ahead(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield `function` of each item, in their order, computed in threads up to AHEAD items in advance."""
    with ThreadPoolExecutor(READERS) as pool:
        waiting: deque = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _judge(
    detector: Detector,
    photographs: Iterable[Read],
    captions: dict[str, str],
    products: dict[str, str],
    model: str,
    out: Path,
) -> Iterator[dict[str, Any]]:
    """Yield the row of each photograph, with its pictures."""
    for batch in batches(photographs, BATCH):
        readable = [(row["path"], decoded.judged) for row, decoded in batch if decoded is not None]
        images, names = [image for _, image in readable], [path for path, _ in readable]
        texts = [captions[name] for name in names] if captions else None
        told = [products.get(name) for name in names]
        found = iter(detector.detect(images, captions=texts, names=names, products=told) if readable else ())
        for read, decoded in batch:
            row = read | {"model": model, "scored_at": datetime.now(UTC)}
            if decoded is not None:
                detection = next(found)
                row |= decoded.verdict(detection) | pictures_of(detection.anomaly_map, detection.reconstruction)
                if detection.is_anomalous and decoded.shown is not None:
                    # The photograph's name, and a hash of its path, since names may be the same.
                    digest = hashlib.sha256(row["path"].encode()).hexdigest()
                    row["heatmap"] = f"{HEATMAPS}/{Path(row['path']).stem[:50]}-{digest[:12]}.png"
                    with atomic_path(out / row["heatmap"]) as temporary:
                        decoded.heatmap(detection).save(temporary, format="PNG")
            yield row


def write_part(rows: list[dict[str, Any]], out: Path, number: int) -> None:
    """Write rows of photographs as a part of the dataset `out`, and their pictures beside it."""
    # Names sort by the time of writing.
    name = f"part-{time.time_ns()}-{number}.parquet"
    judged = sorted((row for row in rows if "map" in row), key=lambda row: (not row["is_anomalous"], -row["score"]))
    kept = judged[: sum(row["is_anomalous"] for row in judged) + PICTURED]
    # Before the rows: a row that is there has its pictures.
    with atomic_path(out / PICTURES / name) as temporary:
        pq.write_table(pa.Table.from_pylist(kept, PICTURE_SCHEMA), temporary)
    with atomic_path(out / name) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), temporary)


def _write_parts(rows: Iterable[dict[str, Any]], total: int, out: Path, here: PartialState) -> None:
    """Write rows in parts as they come, also those before an error."""
    part: list[dict[str, Any]] = []
    done, last = 0, time.monotonic()

    def flush() -> None:
        nonlocal part, done, last
        if part:
            write_part(part, out, here.process_index)
            done, part, last = done + len(part), [], time.monotonic()
            if here.is_main_process:
                say(f"score: {done * here.num_processes} of about {total * here.num_processes} images")

    try:
        for row in rows:
            part.append(row)
            if len(part) >= PART_ROWS or time.monotonic() - last > PART_SECONDS:
                flush()
    finally:
        flush()


def _summary(out: Path, model: str, photographs: list[Photograph], new: list[Photograph], seconds: float) -> Scored:
    listed = {photograph.path: i for i, photograph in enumerate(photographs)}
    added = {photograph.path for photograph in new}
    alarms, judged, errors, rows = 0, 0, [], []
    for part in _parts(out):
        for row in pq.read_table(part, columns=SUMMED, schema=SCHEMA).to_pylist():
            if row["path"] in listed:
                judged += row["error"] is None
                if len(listed) <= SHOWN:
                    rows.append(row)
            if row["path"] in added:
                alarms += bool(row["is_anomalous"])
                if row["error"] is not None:
                    errors.append(row["error"])
    return Scored(
        out=out,
        model=model,
        images=len(listed),
        known=len(listed) - len(added),
        alarms=alarms,
        unreadable=len(errors),
        judged=judged,
        seconds=seconds,
        rows=sorted(rows, key=lambda row: listed[row["path"]]),
        errors=errors[:SHOWN],
    )
