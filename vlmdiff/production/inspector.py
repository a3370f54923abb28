"""The inspector's page: what `score` found, a photograph at a time, and what people say of it.

The page itself is `page/`: plain HTML, CSS and JavaScript, which call the addresses below.
"""

import base64
import binascii
import hashlib
import io
import json
import tempfile
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from anyio import to_thread
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from vlmdiff.core import workspace as w
from vlmdiff.core.errors import InputError, explained
from vlmdiff.core.network import Guard
from vlmdiff.core.params import Params
from vlmdiff.data import excluded, manifest
from vlmdiff.data.feedback import Statement, give_feedback, withdraw
from vlmdiff.data.images import BYTES, decode, mask_values, opened
from vlmdiff.production.pictures import colours, pictures_of
from vlmdiff.production.queue import Queue, Wanted

if TYPE_CHECKING:
    from vlmdiff.detection.decoded import Decoded
    from vlmdiff.detection.detection import Detection
    from vlmdiff.detection.detector import Detector

PAGE = Path(__file__).with_name("page")
FILES = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js"}
# Everything is from here, and nothing in the page runs that is not in its file.
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
# Bytes of a request that is not a photograph: a mask as PNG, and names.
MESSAGE = 8_000_000
# Photographs that one answer may be about.
AT_ONCE = 300
NAME = 100


@dataclass
class Model:
    """The model that judges photographs which people bring. It is loaded when the first one comes."""

    folder: Path
    name: str
    _detector: "Detector | None" = field(default=None, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def captions(self) -> str:
        """The detector's `captions`. Raises InputError if the folder is not a detector's."""
        file = self.folder / "detector.json"
        with explained(file, "Name a folder that `vlmdiff evaluate` wrote"):
            return json.loads(file.read_text(encoding="utf-8"))["detection"]["captions"]

    def judge(self, data: bytes, name: str, max_pixels: int, caption: str | None = None) -> "tuple[Decoded, Detection]":
        """Judge a photograph in a file's bytes. Raises InputError if it cannot be read, or the model needs a caption.

        caption: for a model that judges by captions: the photograph's, or the name of its class.
        """
        # They take seconds to import, and the page is there before.
        from vlmdiff.detection.decoded import Decoded
        from vlmdiff.detection.detector import Detector

        with self._lock:
            self._detector = detector = self._detector or Detector.from_pretrained(self.folder)
            with opened(io.BytesIO(data), max_pixels, name) as image:
                photograph = Decoded.of(image, detector, False)
            texts = None
            if detector.params.captions != "none":
                if not caption:
                    raise InputError(f"this model needs the photograph's {_CAPTION[detector.params.captions]}")
                texts = detector.captions_of([caption]) if detector.params.captions == "class" else [caption]
            (detection,) = detector.detect([photograph.judged], captions=texts)
        return photograph, detection


_CAPTION = {"class": "product", "image": "caption"}


class Inspector:
    """What the page asks for and says. Each method answers a request with JSON, or raises InputError."""

    def __init__(self, params: Params, scores: Path, model: Model | None):
        self.params, self.model = params, model
        self.queues = {"scores": Queue(scores, params), "suspects": Queue(w.SUSPECTS, params, is_training=True)}
        self.brought = tempfile.TemporaryDirectory(prefix="vlmdiff-inspect-")

    def about(self) -> dict[str, Any]:
        """Return what stays the same: the products, whether masks are required, and the model."""
        frame = manifest.read(w.MANIFEST) if w.MANIFEST.exists() else None
        return {
            "classes": [] if frame is None else sorted(set(frame["class_name"])),
            "masks": self.params.validate_.masks == "required",
            "model": self.model.name if self.model else "",
            "captions": self.model.captions if self.model else "none",
            "suspects": any(w.SUSPECTS.glob("part-*.parquet")),
            "scores": str(self.queues["scores"].scores),
        }

    def listed(self, source: str, **wanted: str) -> dict[str, Any]:
        """Return the photographs of a source, `scores` or `suspects`, that a filter lets through."""
        return self._queue(source).listed(Wanted(**wanted))

    def picture(self, source: str, image_id: str, kind: str) -> bytes | None:
        return self._queue(source).picture(image_id, kind)

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        """Record what a person says of photographs. Each is taken by itself: `problems` says by id what was refused."""
        queue, by, ids = self._queue(body.get("source")), _name(body), _ids(body)
        truth, problems = body.get("truth"), {}
        if queue.is_training:
            images = [(image_id, _inside(queue, image_id, self.params)) for image_id in ids]
            why = _text(body, "defect") or ("" if truth == "excluded" else "it is as it should be")
            excluded.decide(images, truth == "excluded", why, by, self.params.prepare.root)
            return {"said": _only(queue.answers(), ids), "problems": {}}
        class_name, defect = _text(body, "class_name"), _text(body, "defect") or "anomaly"
        if not class_name:
            raise InputError("say which product it is")
        said = Statement(class_name, None if truth == "normal" else defect, by)
        with tempfile.TemporaryDirectory(prefix="vlmdiff-mask-") as folder:
            for image_id in ids:
                try:
                    file = queue.file(image_id)
                    mask = self._mask(body, file, Path(folder)) if said.defect is not None else None
                    give_feedback([file], said, self.params, w.FEEDBACK, mask)
                except InputError as error:
                    problems[image_id] = str(error)
        return {"said": _only(queue.answers(), ids), "problems": problems}

    def undo(self, body: dict[str, Any]) -> dict[str, Any]:
        """Take back what was said of photographs."""
        queue, by, ids, problems = self._queue(body.get("source")), _name(body), _ids(body), {}
        for image_id in ids:
            try:
                if queue.is_training:
                    image = (image_id, _inside(queue, image_id, self.params))
                    excluded.decide([image], None, "taken back", by, self.params.prepare.root)
                else:
                    withdraw(image_id, by, self.params, w.FEEDBACK)
            except InputError as error:
                problems[image_id] = str(error)
        return {"said": _only(queue.answers(), ids), "problems": problems}

    def answers(self, source: str) -> dict[str, Any]:
        """Return what people have said so far, also others."""
        return {"said": self._queue(source).answers()}

    def judge(self, data: bytes, name: str, caption: str) -> dict[str, Any]:
        """Judge a photograph that a person brings, and list it first. Returns its id."""
        if self.model is None:
            raise InputError("there is no champion that could judge it: name a detector's folder with --model")
        image_id = hashlib.sha256(data).hexdigest()
        file = Path(self.brought.name, f"{image_id[:16]}{Path(name).suffix.lower()}")
        photograph, detection = self.model.judge(data, name, self.params.prepare.max_pixels, caption)
        file.write_bytes(data)
        row = {"path": str(file), "image_id": image_id} | photograph.verdict(detection)
        pictures = pictures_of(detection.anomaly_map, detection.reconstruction)
        self.queues["scores"].add(row, pictures)
        return {"id": image_id}

    def _queue(self, source: Any) -> Queue:
        if source not in self.queues:
            raise InputError(f"there is no list {source!r}")
        return self.queues[source]

    def _mask(self, body: dict[str, Any], file: Path, folder: Path) -> Path | None:
        """Write the mask that the page drew, at the size of its photograph."""
        if not (drawn := body.get("mask")):
            return None
        try:
            data = base64.b64decode(str(drawn).removeprefix("data:image/png;base64,"), validate=True)
        except binascii.Error as error:
            raise InputError(f"the mask is not base64: {error}") from None
        pixels = mask_values(decode(io.BytesIO(data), self.params.prepare.max_pixels, "the mask")) > 127
        # The page shows a photograph upright.
        size = decode(file, self.params.prepare.max_pixels).size
        path = folder / "mask.png"
        Image.fromarray(np.where(pixels, 255, 0).astype(np.uint8)).resize(size, Image.Resampling.NEAREST).save(path)
        return path


def _inside(queue: Queue, image_id: str, params: Params) -> str:
    """Return the path in the dataset of one of its images."""
    file, root = Path(queue.row(image_id)["path"]), params.prepare.image_root.resolve()
    return str(file.relative_to(root)) if file.is_relative_to(root) else str(file)


def _only(said: dict[str, Any], ids: list[str]) -> dict[str, Any]:
    return {image_id: said.get(image_id) for image_id in ids}


def _text(body: dict[str, Any], key: str) -> str:
    value = body.get(key) or ""
    if not isinstance(value, str):
        raise InputError(f"`{key}` must be text")
    return value.strip()


def _name(body: dict[str, Any]) -> str:
    by = _text(body, "by")
    if not by or len(by) > NAME or not by.isprintable():
        raise InputError("say who you are: a name of at most 100 letters")
    return by


def _ids(body: dict[str, Any]) -> list[str]:
    ids = body.get("ids")
    if not isinstance(ids, list) or not 0 < len(ids) <= AT_ONCE or not all(isinstance(each, str) for each in ids):
        raise InputError(f"`ids` must list 1 to {AT_ONCE} photographs")
    return ids


def application(params: Params, scores: Path, model: Model | None) -> Guard:
    """Return the page as an ASGI application."""
    inspector = Inspector(params, scores, model)
    colours()  # takes seconds the first time: before the first photograph is waited for

    async def page(request: Request) -> Response:
        return FileResponse(PAGE / FILES[request.url.path], headers=HEADERS | {"Cache-Control": "no-cache"})

    async def answered(work: Callable[[], Any]) -> Response:
        """Run what reads files or waits for locks in a thread."""
        try:
            return JSONResponse(await to_thread.run_sync(work), headers=HEADERS)
        except InputError as error:
            return JSONResponse({"error": str(error)}, 409, HEADERS)

    async def picture(request: Request) -> Response:
        try:
            data = await to_thread.run_sync(partial(inspector.picture, **request.path_params))
        except InputError as error:
            return JSONResponse({"error": str(error)}, 404, HEADERS)
        if data is None:
            return Response(status_code=204, headers=HEADERS)
        kind = "image/png" if data.startswith(b"\x89PNG") else "image/jpeg"
        # The address has the hash of what it shows.
        return Response(data, media_type=kind, headers=HEADERS | {"Cache-Control": "private, max-age=3600"})

    def post(work: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            data = await _body(request, MESSAGE)
            try:
                body = json.loads(data) if data is not None else None
            except ValueError:
                body = None
            if not isinstance(body, dict):
                return JSONResponse({"error": "the request is no JSON, or too long"}, 400, HEADERS)
            return await answered(partial(work, body))

        return answer

    async def judge(request: Request) -> Response:
        name = request.query_params.get("name", "photograph")[:255]
        data = await _body(request, BYTES * params.prepare.max_pixels)
        if not data:
            return JSONResponse({"error": f"{name} is empty or too long"}, 413, HEADERS)
        return await answered(partial(inspector.judge, data, name, request.query_params.get("caption", "")))

    async def queue(request: Request) -> Response:
        asked = request.query_params
        wanted = {key: asked[key] for key in ("show", "product", "date") if asked.get(key)}
        return await answered(partial(inspector.listed, asked.get("source", "scores"), **wanted))

    async def answers(request: Request) -> Response:
        return await answered(partial(inspector.answers, request.query_params.get("source", "scores")))

    async def about(request: Request) -> Response:
        return await answered(inspector.about)

    routes = [
        *(Route(path, page) for path in FILES),
        Route("/about", about),
        Route("/queue", queue),
        Route("/answers", answers),
        Route("/picture/{source}/{image_id}/{kind}", picture),
        Route("/answer", post(inspector.answer), methods=["POST"]),
        Route("/undo", post(inspector.undo), methods=["POST"]),
        Route("/judge", judge, methods=["POST"]),
    ]
    return Guard(Starlette(routes=routes))


async def _body(request: Request, limit: int) -> bytes | None:
    """Return a request's body, None if it is longer than `limit` bytes."""
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > limit:
            return None
    return bytes(data)


def serve(params: Params, scores: Path, model: Path | None, address: str, port: int) -> None:
    """Serve the page until the process ends.

    scores: a folder that `vlmdiff score` wrote; model: a detector's folder, by default the champion, to judge
    photographs that people bring. Raises InputError if there is no such folder and no champion.
    """
    import uvicorn

    found = None
    try:
        if model is None:
            from vlmdiff.registry.promotion import champion

            version, folder = champion(params)
            found = Model(folder, f"version {version} of {params.registry.model_name}, the champion")
        else:
            found = Model(model, str(model))
            found.captions  # noqa: B018, a wrong folder is said now
    except InputError:
        # Scores can be looked at without a model.
        if model is not None or not scores.is_dir():
            raise
    app = application(params, scores, found)
    print(f"the inspector's page: http://{address}:{port}", flush=True)
    uvicorn.run(app, host=address, port=port, log_level="warning", server_header=False)
