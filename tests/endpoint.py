"""An OpenAI-compatible endpoint on loopback that behaves as a test tells it; also a process of its own, to be killed.

Images are told apart by their width in pixels: that of photograph n is 16 + n.
"""

import base64
import io
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from PIL import Image


@dataclass
class Reply:
    """What the endpoint does with a request: `body` None drops the connection, `promised` bytes are announced."""

    body: dict | str | None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    promised: int | None = None


def completion(text: str | None, reason="stop", **message: Any) -> Reply:
    """A good answer."""
    choice = {"index": 0, "finish_reason": reason, "message": {"role": "assistant", "content": text, **message}}
    return Reply({"object": "chat.completion", "choices": [choice]})


def caption(number: int) -> str:
    return f"Photograph {number} shows a thing."


class Endpoint(ThreadingHTTPServer):
    """`behave(number, attempt)` answers request `attempt` (from 0) for photograph `number`."""

    request_queue_size = 64

    def __init__(self, behave: Callable[[int, int], Reply] = lambda number, _: completion(caption(number)), port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.behave = behave
        self.lock = threading.Lock()
        self.asked: list[int] = []
        self.answered: list[int] = []
        self.times: list[float] = []
        self.requests: list[dict] = []
        self.in_flight = self.most_in_flight = 0

    def handle_error(self, request, client_address) -> None:
        pass  # a client that went away

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def __enter__(self) -> "Endpoint":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Endpoint

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        server, request = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        number = image_of(request).width - 16
        with server.lock:
            attempt = Counter(server.asked)[number]
            server.asked.append(number)
            server.times.append(time.monotonic())
            server.requests.append({"path": self.path, "key": self.headers.get("Authorization"), **request})
            server.in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
        try:
            reply = server.behave(number, attempt)
        finally:
            with server.lock:
                server.in_flight -= 1
        if reply.body is None:
            self.close_connection = True
            return
        body = (reply.body if isinstance(reply.body, str) else json.dumps(reply.body)).encode()
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(reply.promised or len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()
        if reply.promised:
            self.close_connection = True
        elif reply.status == 200:
            with server.lock:
                server.answered.append(number)


def image_of(request: dict) -> Image.Image:
    """The photograph in a request's message."""
    (url,) = (part["image_url"]["url"] for part in request["messages"][0]["content"] if part["type"] == "image_url")
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def main() -> None:
    """PORT LOG: serve, a line in LOG for each photograph that was answered."""

    def behave(number: int, _: int) -> Reply:
        time.sleep(0.05)
        return completion(caption(number))

    with Path(sys.argv[2]).open("a", buffering=1) as log:

        class Logged(list):
            def append(self, number: int) -> None:
                log.write(f"{number}\n")

        endpoint = Endpoint(behave, int(sys.argv[1]))
        endpoint.answered = Logged()
        print("ready", flush=True)
        endpoint.serve_forever()


if __name__ == "__main__":
    main()
