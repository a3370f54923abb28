"""Seeded fuzzing: mutated files and requests for each reader, and what an input may not do.

`python -m tests.fuzz TARGET COUNT [FIRST]` tries inputs FIRST to FIRST + COUNT of a target. Input 7 of a target is
always the same.
"""

import base64
import contextlib
import faulthandler
import functools
import gc
import io
import json
import random
import shutil
import struct
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.tiny import save_tiny_detector
from vlmdiff.captions.brought import FromFile
from vlmdiff.captions.files import read_captions
from vlmdiff.core.dvc import read_lock
from vlmdiff.core.errors import InputError
from vlmdiff.core.files import read_json
from vlmdiff.core.network import refusal
from vlmdiff.core.params import CaptionFile, Params, Prepare, Retrieval, load
from vlmdiff.data import manifest
from vlmdiff.data.images import decode, mask_values, read_image
from vlmdiff.data.layouts import LAYOUTS
from vlmdiff.data.sources import find_photographs
from vlmdiff.detection.cells import Cells
from vlmdiff.detection.detector import Detector
from vlmdiff.detection.retrieval import PatchBank
from vlmdiff.detection.settings import Settings
from vlmdiff.evaluation.metrics import PER_CLASS, Results
from vlmdiff.evaluation.verdict import Verdict
from vlmdiff.model.pipeline import Index
from vlmdiff.production.monitor import monitor, read_reference
from vlmdiff.production.score import SCHEMA
from vlmdiff.registry.served import Inspector

# Seconds of the processor for one input, and megabytes that a process may grow by after its first inputs.
SECONDS, MEGABYTES = 3, 100
MAX_PIXELS = 10**6
Try = Callable[[random.Random], Any]

WEIRD = [None, True, 0, -1, 0.5, 1e308, float("nan"), float("inf"), -0.0, 10**30, 2**63, [], {}, [None], [[[[]]]]]
WEIRD += ["", "x", "x" * 5000, "\ud800", "\0", "../../etc/passwd", "/etc/passwd", "evil.Net", {"": 0}, [1e9] * 50]
WORDS = [b"", b"\0", b"\xff", b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\x80\0\0\0", b"\n", b'"', b",",
         b"\t", b"{}", b"[", b"NaN", b"1e999", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"../", b"=1+1", b"\r\n"]  # fmt: skip


def mutated(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """Return the bytes with a few changes: other bits, words, cuts, repeats, parts of other inputs."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        place = rng.randrange(len(changed) + 1)
        length = min(rng.choice((1, 2, 4, 16, 256)), len(changed) - place)
        match rng.randrange(7):
            case 0 if length:
                changed[place % len(changed)] ^= 1 << rng.randrange(8)
            case 1:
                changed[place : place + length] = rng.randbytes(length)
            case 2:
                changed[place:place] = rng.choice(WORDS)
            case 3:
                del changed[place : place + length]
            case 4:
                changed[place:place] = changed[place : place + length] * rng.choice((1, 3, 50))
            case 5:
                other = rng.choice(others)
                start = rng.randrange(len(other) + 1)
                changed[place : place + length] = other[start : start + length]
            case 6:
                del changed[place:]
    return bytes(changed)


def mutated_json(rng: random.Random, value: Any) -> bytes:
    """Return a JSON text in which a few values, keys or entries are others, or whose bytes are changed."""
    if rng.random() < 0.3:
        text = json.dumps(value).encode()
        return mutated(rng, text, [text])
    value = _copy(value)
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            break
        parent, key = rng.choice(places)
        match rng.randrange(4):
            case 0 if isinstance(parent, dict):
                parent[rng.choice(("", "more", "\ud800", key.upper()))] = parent.pop(key)
            case 1:
                del parent[key]
            case 2:
                parent[key] = _copy(rng.choice((rng.choice(places)[0], [parent[key]] * 3, {"value": parent[key]})))
            case _:
                parent[key] = _copy(rng.choice(WEIRD))
    return json.dumps(value).encode()


def _copy(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _places(value: Any):
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


def mutated_table(rng: random.Random, frame: pd.DataFrame, schema: pa.Schema, file: Path) -> None:
    """Write the table as Parquet with other values, types, columns or bytes."""
    frame = frame.copy()
    for _ in range(rng.choice((1, 1, 2, 3))):
        name = rng.choice(list(frame.columns))
        match rng.randrange(6):
            case 0:
                frame = frame.drop(columns=name) if len(frame.columns) > 1 else frame
            case 1:
                kind = rng.choice(("string", "object", "float32", "int64", "bool", "category"))
                frame[name] = pd.Series([rng.choice((0, 1)) for _ in range(len(frame))]).astype(kind)
            case 2:
                frame[name] = None
            case 3:
                weird = rng.choice(("", "x" * 5000, "\0", float("nan"), float("inf"), -1e300, 2**31 - 1, None))
                column = frame[name].astype(object)
                column[rng.randrange(len(frame))] = weird
                frame[name] = column
            case 4:
                frame = frame.iloc[: rng.randrange(len(frame))] if rng.random() < 0.3 else pd.concat([frame, frame])
                frame = frame.reset_index(drop=True)
            case 5:
                frame = frame.rename(columns={name: rng.choice(("", "path", "more", name.upper()))})
        if frame.empty or not frame.columns.is_unique:
            break
    buffer = io.BytesIO()
    try:
        # Where the values still fit.
        table = pa.Table.from_pandas(frame, schema=schema, preserve_index=False)
    except (pa.ArrowException, KeyError, ValueError, TypeError, OverflowError):
        table = None
    try:
        pq.write_table(pa.Table.from_pandas(frame, preserve_index=False) if table is None else table, buffer)
    except (pa.ArrowException, ValueError, TypeError, OverflowError, ArithmeticError):  # no table has such columns
        buffer.write(b"no table")
    data = buffer.getvalue()
    file.write_bytes(mutated(rng, data, [data]) if rng.random() < 0.3 else data)


def pictures() -> list[bytes]:
    """Small photographs of every format and mode that the loader reads."""
    noise = np.random.default_rng(0).integers(0, 255, (24, 20, 4), np.uint8)
    rgb, saved = Image.fromarray(noise[..., :3]), []
    exif = Image.Exif()
    exif[0x0112] = 6
    grey16 = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    for image, kind, options in (
        *((rgb.convert(mode), "PNG", {}) for mode in ("L", "RGB", "P", "1", "LA", "RGBA")),
        (grey16, "PNG", {}),
        *((rgb.convert(mode), "JPEG", {"quality": 70}) for mode in ("L", "RGB", "CMYK")),
        (rgb, "JPEG", {"progressive": True, "exif": exif, "subsampling": 2}),
        *((rgb.convert(mode), "BMP", {}) for mode in ("L", "RGB", "1", "P")),
        *(
            (rgb, "TIFF", {"compression": name})
            for name in (None, "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")
        ),
        (grey16, "TIFF", {}),
        (Image.fromarray(noise[..., 0] / np.float32(255)), "TIFF", {}),
        (rgb, "WEBP", {}),
        (Image.fromarray(noise, "RGBA"), "WEBP", {"lossless": True, "exif": exif}),
    ):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        saved.append(buffer.getvalue())
    return saved


def with_checksums(data: bytes) -> bytes:
    """Return a PNG whose checksums are right, so that a decoder looks at what was changed."""
    done, place = [data[:8]], 8
    while place + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, place)
        body = data[place + 4 : place + 8 + length]
        done += [data[place : place + 4], body, struct.pack(">I", zlib.crc32(body))]
        place += 12 + length
    return b"".join(done)


def images(folder: Path) -> Try:
    whole, file = pictures(), folder / "photograph.png"

    def read(rng: random.Random) -> None:
        data = rng.choice(whole)
        changed = mutated(rng, data, whole)
        file.write_bytes(with_checksums(changed) if data[:4] == b"\x89PNG" and rng.random() < 0.7 else changed)
        if rng.random() < 0.8:
            read_image(file, MAX_PIXELS)
        else:
            mask_values(decode(file, MAX_PIXELS))

    return read


@functools.cache
def model() -> Path:
    return save_tiny_detector(Path(tempfile.mkdtemp(prefix="vlmdiff-fuzz-")))


def settings(folder: Path) -> Try:
    facts, file = json.loads((model() / "detector.json").read_text()), folder / "detector.json"

    def read(rng: random.Random) -> None:
        file.write_bytes(mutated_json(rng, facts))
        Settings.read(folder)

    return read


def indexes(folder: Path) -> Try:
    facts, file = json.loads((model() / "model_index.json").read_text()), folder / "model_index.json"

    def read(rng: random.Random) -> None:
        file.write_bytes(mutated_json(rng, facts))
        read_json(file, Index)

    return read


def banks(folder: Path) -> Try:
    import torch

    file = folder / "bank.safetensors"
    cells = Cells(torch.ones(6, 4), torch.ones(2, 4), torch.tensor([2, 4]))
    PatchBank(torch.eye(8)[:, :4], cells, torch.ones(6), Retrieval(), {"thing": 6}).save(file)
    whole = file.read_bytes()

    def read(rng: random.Random) -> None:
        file.write_bytes(mutated(rng, whole, [whole]))
        PatchBank.load(file, Retrieval(), 8)

    return read


def detectors(folder: Path) -> Try:
    """Whole folders, with one file changed."""
    shutil.copytree(model(), folder / "model")
    files = {file: file.read_bytes() for file in sorted((folder / "model").rglob("*")) if file.is_file()}

    def read(rng: random.Random) -> None:
        file, data = rng.choice(list(files.items()))
        # Of weights, the header says what is read.
        head = data[:2000] if file.suffix == ".safetensors" else data
        is_json = file.suffix == ".json" and rng.random() < 0.7
        changed = mutated_json(rng, json.loads(data)) if is_json else mutated(rng, head, [data[:4000]]) + data[2000:]
        try:
            file.write_bytes(changed)
            Detector.from_pretrained(folder / "model")
        finally:
            file.write_bytes(data)

    return read


def manifests(folder: Path) -> Try:
    file = folder / "manifest.parquet"
    frame = _manifest()

    def read(rng: random.Random) -> None:
        mutated_table(rng, frame, manifest.SCHEMA, file)
        manifest.across_splits(manifest.read(file))

    return read


def _manifest() -> pd.DataFrame:
    facts = {"class_name": "thing", "split": "train", "is_anomalous": False, "defect": None, "mask_path": None}
    size = {"width": 64, "height": 64, "mode": "RGB", "problem": None}
    rows = [{"image_id": f"{i:064x}", "path": f"a/{i}.png", **facts, **size} for i in range(4)]
    return pd.DataFrame(rows).astype({"width": "int32", "height": "int32"})


def captions(folder: Path) -> Try:
    frame = _manifest()
    pairs = {path: f"a photo of {i}" for i, path in enumerate(frame["path"])}
    coco = {
        "images": [{"id": i, "file_name": path} for i, path in enumerate(pairs)],
        "annotations": [{"image_id": i, "caption": text} for i, text in enumerate(pairs.values())],
    }
    texts = {
        "a.jsonl": "\n".join(json.dumps({"path": path, "caption": text}) for path, text in pairs.items()),
        "a.tsv": "\n".join(f"{path}\t{text}" for path, text in pairs.items()),
        "list.txt": "\n".join(pairs.values()),
    }
    objects = {"a.json": pairs, "coco.json": coco, "list.json": [[text] for text in pairs.values()]}
    (folder / "names.txt").write_text("\n".join(pairs))
    everything = [text.encode() for text in texts.values()]
    ours = "".join(json.dumps({"image_id": i, "caption": t}) + "\n" for i, t in pairs.items()).encode()

    def read(rng: random.Random) -> None:
        name = rng.choice([*texts, *objects, "captions.jsonl"])
        if name == "captions.jsonl":
            (folder / name).write_bytes(mutated(rng, ours, everything))
            read_captions(folder / name)
            return
        changed = (
            mutated_json(rng, objects[name]) if name in objects else mutated(rng, texts[name].encode(), everything)
        )
        (folder / name).write_bytes(changed)
        lists = Path("names.txt") if name.startswith("list") else None
        FromFile(CaptionFile(kind="file", file=Path(name), images=lists), frame, folder)

    return read


def tables(folder: Path) -> Try:
    """What lists photographs: CSV, and the JSON of Real-IAD and COCO-AD."""
    rows = [(f"a/{i}.png", "thing", ("train", "test")[i % 2], "normal", "") for i in range(4)]
    (folder / "a").mkdir()
    for path, *_ in rows:
        (folder / path).touch()
    csv = "\n".join(",".join(row) for row in [("path", "class_name", "split", "label", "defect"), *rows]).encode()
    one = {"category": "thing", "anomaly_class": "OK", "image_path": "0.png", "mask_path": None}
    iad = {"meta": {"normal_class": "OK", "prefix": "a/"}, "train": [one, one], "test": [one]}
    two = {"img_path": "a/0.png", "mask_path": None, "cls_name": "thing", "specie_name": "", "anomaly": 0}
    coco = {"train": {"thing": [two]}, "test": {"thing": [two]}}
    (folder / "iad").mkdir()
    layouts = {
        "table": (folder / "rows.csv", {"table": {"file": "rows.csv"}}),
        "real_iad": (folder / "iad/thing.json", {"real_iad": {"jsons": "iad", "images": "."}}),
        "coco_ad": (folder / "meta_20_0.json", {"coco_ad": {"split": 0}}),
    }
    asked = {kind: Prepare(layout=kind, root=folder, **more) for kind, (_, more) in layouts.items()}

    def read(rng: random.Random) -> None:
        kind = rng.choice([*layouts, "sources"])
        if kind == "sources":
            (folder / "rows.csv").write_bytes(mutated(rng, csv, [csv]))
            find_photographs([str(folder / "rows.csv")], folder / "out")
            return
        changed = (
            mutated(rng, csv, [csv]) if kind == "table" else mutated_json(rng, iad if kind == "real_iad" else coco)
        )
        layouts[kind][0].write_bytes(changed)
        list(LAYOUTS[kind](folder, asked[kind]))

    return read


def states(folder: Path) -> Try:
    """Small files of a workspace: parameters, lock, metrics, verdict."""
    params = Path(__file__).parents[1].joinpath("params.yaml").read_bytes()[:3000]
    lock = b"schema: '2.0'\nstages:\n  a:\n    cmd: x\n    outs:\n    - path: b\n      hash: md5\n      md5: c\n"
    criterion = {"name": "a", "measured": 0.5, "relation": ">=", "required": 0.1, "why": ""}
    verdict = {"version": 1, "champion": None, "rejudged": False, "is_champion": False, "criteria": [criterion]}
    verdict["override"] = {"by": "a", "reason": "b"}
    metrics = {PER_CLASS: {"thing": {"au_pro": 0.5, "image_auroc": None}}}
    (folder / "dvc.lock").touch()

    def read(rng: random.Random) -> None:
        match rng.randrange(4):
            case 0:
                (folder / "params.yaml").write_bytes(mutated(rng, params, [lock]))
                load(folder / "params.yaml")
            case 1:
                (folder / "dvc.lock").write_bytes(mutated(rng, lock, [params]))
                with contextlib.chdir(folder):
                    read_lock()
            case 2:
                (folder / "metrics.json").write_bytes(mutated_json(rng, metrics))
                Results.read(folder / "metrics.json")
            case 3:
                (folder / "gate.json").write_bytes(mutated_json(rng, verdict))
                Verdict.read(folder / "gate.json")

    return read


def _scores(count: int) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    values = {name: rng.random(count) for name in ("brightness", "contrast", "sharpness", "red", "green", "blue")}
    names = {"path": [f"/a/{i}.png" for i in range(count)], "image_id": [f"{i:064x}" for i in range(count)]}
    facts = {
        "is_anomalous": False,
        "verdict": "normal",
        "product": "thing",
        "p_value": 0.5,
        "regions": None,
        "explanation": "Normal.",
        "nearest": None,
        "heatmap": None,
        "model": "m",
        "error": None,
    }
    size = {"width": np.int32(64), "height": np.int32(64), "bytes": 1, "mtime_ns": 1}
    when = pd.Timestamp("2026-01-01", tz="UTC")
    frame = pd.DataFrame({**names, "score": rng.random(count) / 2, **facts, **values, **size, "scored_at": when})
    return frame[SCHEMA.names]


def scores(folder: Path) -> Try:
    """What the monitor compares: a table of scores, and the calibration images of a model."""
    from vlmdiff.production.score import folder_name

    home = folder / "model"
    home.mkdir()
    shutil.copy(model() / "detector.json", home)
    frame, params = _scores(60), Params()
    frame["model"] = folder_name(home)
    reference = frame.assign(class_name="thing")
    reference.to_parquet(home / "reference.parquet")

    def read(rng: random.Random) -> None:
        if rng.random() < 0.3:
            mutated_table(rng, reference, SCHEMA, home / "reference.parquet")
            frame.to_parquet(folder / "scores.parquet")
        else:
            reference.to_parquet(home / "reference.parquet")
            mutated_table(rng, frame, SCHEMA, folder / "scores.parquet")
        if rng.random() < 0.1:
            monitor(folder / "scores.parquet", folder / "out", params, home, last=rng.choice((None, 5)))
        else:
            read_reference(home)

    return read


def requests(folder: Path) -> Try:
    """Frames as MLflow's server hands them to the model, and their parameters."""
    from mlflow.exceptions import MlflowException

    inspector = Inspector()
    inspector.load_context(
        SimpleNamespace(artifacts={"detector": str(model())}, model_config={"max_pixels": MAX_PIXELS})
    )
    inspector.root = folder
    whole = pictures()
    (folder / "a.png").write_bytes(whole[0])
    strange = [None, "", "x", "a.png", "../a.png", "/etc/passwd", "\0", "a" * 5000, float("nan"), 7, b"", b"x", [], "é"]

    def read(rng: random.Random) -> None:
        text = base64.b64encode(rng.choice(whole)).decode()
        kinds = [text, base64.b64encode(mutated(rng, rng.choice(whole), whole)).decode(), rng.choice(strange)]
        kinds.append(mutated(rng, text.encode(), [b"=", b"+/"]).decode("latin-1"))
        rows = rng.choice((0, 1, 1, 1, 2, 300))
        names = rng.choice((["image"], ["path"], ["image", "path"], ["image", "more"], []))
        frame = pd.DataFrame({name: [rng.choice(kinds[1:]) for _ in range(rows)] for name in names})
        if len(frame) > 0 and rng.random() < 0.05:
            frame = frame.astype(object)
            frame.loc[0, "image"] = text
        asked = rng.choice((None, {}, {"threshold": rng.choice((0.5, -1.0, 2.0, float("nan"), None)), "heatmap": True}))
        try:
            inspector.predict(None, frame, asked)
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise

    return read


def headers(folder: Path) -> Try:
    """What a server of this machine is asked with; nothing of another host or page may pass."""
    server = ("127.0.0.1", 4200)
    names = ["Host", "host", "Origin", "Sec-Fetch-Site", "Sec-Fetch-Mode", "Sec-Fetch-Dest", "X-Forwarded-Host", ""]
    values = [
        "127.0.0.1:4200",
        "localhost:4200",
        "evil.example",
        "http://127.0.0.1:4200",
        "http://evil.example",
        "null",
    ]
    values += ["same-origin", "cross-site", "none", "navigate", "document", "127.0.0.1", "[::1]:4200", "@", ""]
    everything = [value.encode() for value in values]

    def read(rng: random.Random) -> None:
        sent = [(rng.choice(names), rng.choice(values)) for _ in range(rng.randrange(6))]
        if rng.random() < 0.5:
            sent = [(n, mutated(rng, v.encode(), everything).decode("latin-1")) for n, v in sent]
        # The user at the other end is asked of the system last, so what passes may go on to that.
        why = refusal(rng.choice(("GET", "POST", "")), sent, ("127.0.0.1", 1), server)
        hosts = [value for name, value in sent if name.lower() == "host"]
        passed = why is None or "user" in why
        assert not passed or (len(hosts) == 1 and hosts[0] in ("127.0.0.1:4200", "localhost:4200")), sent
        origins = {value for name, value in sent if name.lower() == "origin"}
        assert not passed or origins <= {f"http://{host}" for host in hosts}, sent

    return read


# How many inputs of each target `make fuzz` tries: a million together.
TARGETS: dict[Callable[[Path], Try], int] = {
    images: 300_000,
    captions: 180_000,
    headers: 165_000,
    tables: 120_000,
    indexes: 100_000,
    settings: 60_000,
    banks: 40_000,
    states: 15_000,
    requests: 12_000,
    manifests: 5_000,
    detectors: 2_000,
    scores: 1_000,
}


def run(target: Callable[[Path], Try], count: int, first: int = 0) -> float:
    """Try inputs; return by how many megabytes the process has grown since the first tenth of them.

    Raises AssertionError that names the input which raised something else than InputError or took too long.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        stack.callback(faulthandler.cancel_dump_traceback_later)
        attempt, process, began = target(folder), psutil.Process(), 0
        armed = time.monotonic() - SECONDS
        for number in range(first, first + count):
            if number - first == count // 10:
                began = process.memory_info().rss
            if time.monotonic() - armed >= SECONDS:
                # A reader in C cannot be interrupted: the process ends, and says where it was.
                faulthandler.dump_traceback_later(60 + SECONDS, exit=True, file=sys.__stderr__)
                armed = time.monotonic()
            clock = time.process_time()
            try:
                attempt(random.Random(f"{target.__name__} {number}"))
            except InputError:
                pass
            except Exception as error:
                raise AssertionError(f"{target.__name__} {number}: {type(error).__name__}: {error}") from error
            taken = time.process_time() - clock
            assert taken < SECONDS, f"{target.__name__} {number} takes {taken:.1f} s"
        gc.collect()
        return (process.memory_info().rss - began) / 1e6


if __name__ == "__main__":
    chosen = {target.__name__: target for target in TARGETS}[sys.argv[1]]
    grown = run(chosen, *map(int, sys.argv[2:]))
    print(f"grew by {grown:.0f} MB")
    assert grown < MEGABYTES, f"{sys.argv[1]} grew by {grown:.0f} MB"
