"""Judge photographs by the thousand: a row an image in a Parquet dataset and, where wanted, a heatmap an alarm."""

import contextlib
import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from PIL import Image
from rich.markup import escape
from rich.table import Table

from vlmdiff.core.console import say, track
from vlmdiff.core.device import process_group
from vlmdiff.core.errors import InputError
from vlmdiff.core.files import atomic_path
from vlmdiff.core.params import Params
from vlmdiff.data.images import decode, to_rgb
from vlmdiff.data.sources import Photograph, find_photographs
from vlmdiff.data.statistics import image_statistics
from vlmdiff.detection.detector import SETTINGS, Detection, Detector, batches
from vlmdiff.evaluation.report import heatmap

BATCH = 32
# Photographs that are read while the model judges others, and by how many threads.
AHEAD, READERS = 32, 4
# A part is written after so many images, or seconds: what a kill loses at most.
PART_ROWS, PART_SECONDS = 256, 60.0
HEATMAP_SIDE = 1024
# Readers of Parquet datasets pass over what begins with an underscore or a dot.
HEATMAPS, LOCK = "_heatmaps", ".lock"
SHOWN = 20

REGION = pa.struct([*((name, pa.int32()) for name in ("x0", "y0", "x1", "y1", "area")), ("peak", pa.float64())])
SCHEMA = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),  # absolute
        pa.field("image_id", pa.string()),  # sha256 of the file's bytes
        pa.field("score", pa.float64()),  # in [0, 1), 0.5 is the threshold; null where there is an error
        pa.field("is_anomalous", pa.bool_()),
        pa.field("regions", pa.list_(REGION)),  # in the photograph's own pixels, x1 and y1 exclusive
        pa.field("heatmap", pa.string()),  # of an alarm, relative to the dataset's folder
        pa.field("model", pa.string(), nullable=False),
        pa.field("error", pa.string()),  # why the photograph could not be read
        *(pa.field(name, pa.float64()) for name in ("brightness", "contrast", "sharpness", "red", "green", "blue")),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        # By which a later run knows that the file is still the same; null where it does not exist.
        pa.field("bytes", pa.int64()),
        pa.field("mtime_ns", pa.int64()),
        pa.field("scored_at", pa.timestamp("us", "UTC"), nullable=False),
    ]
)


@dataclass(frozen=True)
class Scored:
    """What came of a run; `known` of its `images` were in the dataset already, and `unreadable` of the others could not
    be read.

    `rows` has the images' rows where they are few, `errors` some sentences of why images could not be read; `judged`:
    of all the images, how many have a score. Seconds are those of judging.
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
        return (
            f"score: {self.images} images by {self.model}, {self.known} of them scored before; of {new} new ones "
            f"{self.alarms} alarms, {self.unreadable} could not be read; {new / max(self.seconds, 1e-9):.1f} images a "
            f"second; {self.out}"
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

    `pandas.read_parquet(out)` reads it: a row an image as in SCHEMA, in parts that are whole. What is in there with the
    file's size and time is not judged again; what has changed since replaces its row. An image that cannot be read has
    a row with its `error`. heatmaps: a PNG of each alarm in `out/_heatmaps`. model: a detector's folder, instead of the
    champion. class_name: of all photographs whose table does not say it, for a detector that judges by its classes'
    captions.

    Where `accelerate launch` started several processes, each judges its share; the result is the main one's, None in
    the others. Raises InputError, and writes nothing, where a source or the model is missing, the detector needs other
    captions, or `out` is something else, another model's, or being written.
    """
    here = process_group()
    folder, name, photographs = _from_main(here, lambda: (*_model(model, params), find_photographs(sources, out)))
    detector = Detector.from_pretrained(folder, str(here.device))
    name = name or f"sha256:{_sha256((folder / SETTINGS).read_bytes())[:16]}"
    captions = _captions(detector, photographs, class_name)
    with _alone(out) if here.is_main_process else contextlib.nullcontext():
        new = _from_main(here, lambda: _pending(out, photographs, name))
        began = time.perf_counter()
        own = new[here.process_index :: here.num_processes]
        read = partial(
            _read, size=detector.pipeline.config.image_size, max_pixels=params.prepare.max_pixels, keep=heatmaps
        )
        rows = _judge(detector, _ahead(read, own), captions, name, out)
        _write_parts(track(rows, "score", len(own)) if here.is_main_process else rows, len(own), out, here)
        here.wait_for_everyone()
        seconds = time.perf_counter() - began
        summary = _summary(out, name, photographs, new, seconds) if here.is_main_process else None
    here.destroy_process_group()
    return summary


def scores_table(scored: Scored) -> Table:
    """The rows of a few images, for the terminal."""
    table = Table(caption="0.5 is the threshold")
    table.add_column("photograph", overflow="fold")
    for title in ("score", "verdict", "regions"):
        table.add_column(title)
    for row in scored.rows:
        path = escape(min(row["path"], os.path.relpath(row["path"]), key=len))
        if row["error"] is not None:
            table.add_row(path, "", "[yellow]could not be read", "")
            continue
        verdict = "[bold red]anomalous" if row["is_anomalous"] else "[green]normal"
        table.add_row(path, f"{row['score']:.3f}", verdict, str(len(row["regions"])))
    return table


Found = TypeVar("Found")


def _from_main(here: PartialState, find: Callable[[], Found]) -> Found:
    """What the main process finds, in every process: a folder or the registry may be another a moment later."""
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


def _model(folder: Path | None, params: Params) -> tuple[Path, str | None]:
    """The detector's folder and, of a registered one, its name."""
    if folder is not None:
        return folder, None
    from vlmdiff.registry.promotion import champion

    version, folder = champion(params)
    return folder, f"{params.registry.model_name}/{version}"


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _captions(detector: Detector, photographs: list[Photograph], class_name: str | None) -> dict[str, str]:
    """The caption by which each photograph is judged, by its path; empty where the detector judges without."""
    match detector.params.captions:
        case "none":
            if class_name is not None:
                detector.captions_of([class_name])
            return {}
        case "image":
            given = {photograph.path: photograph.caption for photograph in photographs}
            missing, advice = "caption", "name them by a table with columns path and caption"
        case "class":
            given = {photograph.path: photograph.class_name or class_name for photograph in photographs}
            missing, advice = "class", "name it by --class-name, or a table's column class_name"
    for path, text in given.items():
        if text is None:
            raise InputError(f"{path}: this model judges a photograph by the caption of its {missing}, {advice}")
    return given if missing == "caption" else dict(zip(given, detector.captions_of(given.values()), strict=True))


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Nobody else writes there. Raises InputError where somebody does, or where it is no folder of scores."""
    foreign = [
        path.name
        for path in (out.iterdir() if out.is_dir() else [])
        if not path.name.startswith((".", "part-")) and path.name != HEATMAPS
    ]
    if foreign or (out.exists() and not out.is_dir()):
        raise InputError(f"{out} holds other files ({', '.join(foreign[:3])}): name a folder of its own by --out")
    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / LOCK, timeout=0):
            yield
    except Timeout:
        raise InputError(f"another `vlmdiff score` writes to {out}: wait for it, or name another --out") from None


def _parts(out: Path) -> list[Path]:
    return sorted(out.glob("part-*.parquet"))


def _pending(out: Path, photographs: list[Photograph], model: str) -> list[Photograph]:
    """The photographs that have no row yet; rows of files that have changed since are taken out."""
    for left in out.glob(".part-*.tmp"):
        left.unlink()
    listed, known = {photograph.path for photograph in photographs}, set()
    for part in _parts(out):
        try:
            table = pq.read_table(part, schema=SCHEMA)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{part} is not of this version's scores: name another --out ({error})") from error
        if others := set(table["model"].to_pylist()) - {model}:
            raise InputError(f"{out} has scores by {others.pop()}, and this is {model}: name another folder by --out")
        stamps = zip(*(table[column].to_pylist() for column in ("path", "bytes", "mtime_ns")), strict=True)
        stale = [path in listed and _stamp(path) != tuple(stamp) for path, *stamp in stamps]
        known.update(path for path, old in zip(table["path"].to_pylist(), stale, strict=True) if not old)
        if any(stale):
            _take_out(part, table, stale, out)
    return [photograph for photograph in photographs if photograph.path not in known]


def _take_out(part: Path, table: pa.Table, stale: list[bool], out: Path) -> None:
    for picture in filter(None, table.filter(pa.array(stale))["heatmap"].to_pylist()):
        (out / picture).unlink(missing_ok=True)
    if all(stale):
        part.unlink()
        return
    times = part.stat()
    with atomic_path(part) as temporary:
        pq.write_table(table.filter(pc.invert(pa.array(stale))), temporary)
        # The rows that stay are no newer than before.
        os.utime(temporary, ns=(times.st_atime_ns, times.st_mtime_ns))


def _stamp(path: str) -> tuple[int | None, int | None]:
    try:
        status = os.stat(path)
    except OSError:
        return None, None
    return status.st_size, status.st_mtime_ns


class _Read(NamedTuple):
    """What is known of a photograph before it is judged: columns of its row; uint8 (S, S, 3), None where it cannot be
    read; and where heatmaps are wanted, the photograph to lay one on.
    """

    row: dict[str, Any]
    image: np.ndarray | None = None
    shown: np.ndarray | None = None


def _read(photograph: Photograph, size: int, max_pixels: int, keep: bool) -> _Read:
    path = photograph.path
    row: dict[str, Any] = {"path": path}
    row["bytes"], row["mtime_ns"] = _stamp(path)
    try:
        with open(path, "rb") as stream:
            row["image_id"] = hashlib.file_digest(stream, "sha256").hexdigest()
            stream.seek(0)
            image = to_rgb(decode(stream, max_pixels, name=path))
    except InputError as error:
        return _Read(row | {"error": str(error)})
    # Pillow's decoders may raise anything for a damaged file, and thousands of others wait behind it.
    except Exception as error:
        return _Read(row | {"error": f"{path} cannot be read: {error!r}"})
    row |= image_statistics(np.asarray(image))
    small = np.array(image.resize((size, size), Image.Resampling.BILINEAR))
    if keep:
        image.thumbnail((HEATMAP_SIDE, HEATMAP_SIDE))
    return _Read(row, small, np.array(image) if keep else None)


Item, Result = TypeVar("Item"), TypeVar("Result")


def _ahead(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`function` of each item, in their order, computed in threads up to AHEAD items before it is asked for."""
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
    detector: Detector, photographs: Iterable[_Read], captions: dict[str, str], model: str, out: Path
) -> Iterator[dict[str, Any]]:
    """The row of each photograph."""
    for batch in batches(photographs, BATCH):
        readable = [read for read in batch if read.image is not None]
        texts = [captions[read.row["path"]] for read in readable] if captions else None
        found = iter(detector.detect([read.image for read in readable], captions=texts)) if readable else iter(())
        for read in batch:
            row = read.row | {"model": model, "scored_at": datetime.now(UTC)}
            if read.image is not None:
                detection = next(found)
                regions = detection.scaled_regions(int(row["width"]), int(row["height"]))
                row |= {
                    "score": detection.score,
                    "is_anomalous": detection.is_anomalous,
                    "regions": [asdict(region) for region in regions],
                }
                if detection.is_anomalous and read.shown is not None:
                    row["heatmap"] = _write_heatmap(row["path"], read.shown, detection, out)
            yield row


def _write_heatmap(path: str, photograph: np.ndarray, detection: Detection, out: Path) -> str:
    """Where under `out` it lies: a file of the photograph's name, and no other photograph's."""
    name = f"{HEATMAPS}/{Path(path).stem[:50]}-{_sha256(path.encode())[:12]}.png"
    with atomic_path(out / name) as temporary:
        Image.fromarray(heatmap(photograph, detection.anomaly_map, vmax=1.0)).save(temporary, format="PNG")
    return name


def _write_parts(rows: Iterable[dict[str, Any]], total: int, out: Path, here: PartialState) -> None:
    """Write rows as they come, some at a time; what was judged is written also where an error ends it."""
    part: list[dict[str, Any]] = []
    done, last = 0, time.monotonic()

    def flush() -> None:
        nonlocal part, done, last
        if part:
            # In the order in which they were written, whatever was there before.
            with atomic_path(out / f"part-{time.time_ns()}-{here.process_index}.parquet") as temporary:
                pq.write_table(pa.Table.from_pylist(part, SCHEMA), temporary)
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
        for row in pq.read_table(part, columns=["path", "score", "is_anomalous", "regions", "error"]).to_pylist():
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
