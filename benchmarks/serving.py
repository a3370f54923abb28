"""Measure errors, throughput and latency of the champion, served by `mlflow models serve` on loopback.

Each request sends test images as base64. Each client thread sends its next request as soon as it has an answer. Run it
in a workspace that has a champion:

    python benchmarks/serving.py
"""

import argparse
import base64
import contextlib
import os
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import mlflow
from rich.console import Console
from rich.table import Table

from vlmdiff.core import workspace as w
from vlmdiff.core.params import load
from vlmdiff.core.processes import end_group
from vlmdiff.data import manifest
from vlmdiff.data.images import resolve
from vlmdiff.registry.store import CHAMPION, tracking_uri

PATIENCE = 180.0


@contextlib.contextmanager
def serve(model: str, store: str) -> Iterator[str]:
    """Yield the address of a server of the model; the server stops when the block ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = ["mlflow", "models", "serve", "-m", model, "--env-manager", "local", "-h", "127.0.0.1", "-p", port]
    environment = os.environ | {"MLFLOW_TRACKING_URI": store}
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            deadline, url = time.monotonic() + PATIENCE, f"http://127.0.0.1:{port}"
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"{url}/ping").is_success:
                        break
                if server.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise SystemExit(f"the server did not start:\n{log.read()}")
                time.sleep(0.2)
            yield url
        finally:
            end_group(server.pid)
            server.wait()


def main() -> None:
    params = load(w.PARAMS)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--model", default=f"models:/{params.registry.model_name}@{CHAMPION}", help="MLflow URI of the model"
    )
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rows", type=int, default=1, help="images per request")
    asked = parser.parse_args()

    store = tracking_uri(params.registry)
    mlflow.set_tracking_uri(store)
    frame = manifest.read(w.MANIFEST)
    test = frame[frame["split"] == "test"]
    wanted = mlflow.models.get_model_info(asked.model).signature.inputs.required_input_names()
    if "caption" in wanted:
        raise SystemExit("this model needs a caption for each image; this benchmark does not send captions")
    rows = []
    for path, class_name in zip(test["path"], test["class_name"], strict=True):
        data = Path(resolve(params.prepare.image_root, path)).read_bytes()
        row = {"image": base64.b64encode(data).decode()}
        rows.append(row | {"class_name": class_name} if "class_name" in wanted else row)

    with serve(asked.model, store) as url, httpx.Client(base_url=url, timeout=120) as client:

        def ask(number: int) -> tuple[float, str]:
            """Return the seconds that the answer took, and its error, empty if there is none."""
            start = number * asked.rows
            body = {"dataframe_records": [rows[i % len(rows)] for i in range(start, start + asked.rows)]}
            began = time.perf_counter()
            try:
                answer = client.post("/invocations", json=body)
                good = answer.is_success and len(answer.json()["predictions"]) == asked.rows
                wrong = "" if good else f"{answer.status_code}: {answer.text[:200]}"
            except httpx.HTTPError as error:
                wrong = repr(error)
            return time.perf_counter() - began, wrong

        with ThreadPoolExecutor(asked.clients) as pool:
            # Warm up: the first request of each client is not counted.
            list(pool.map(ask, range(asked.clients)))
            began = time.perf_counter()
            answers = list(pool.map(ask, range(asked.requests)))
            taken = time.perf_counter() - began

    errors = [wrong for _, wrong in answers if wrong]
    cuts = statistics.quantiles((1000 * seconds for seconds, _ in answers), n=100, method="inclusive")
    table = Table("measure", "value", title=f"{asked.model}, {asked.clients} clients, {os.cpu_count()} CPU cores")
    table.add_row("requests", f"{asked.requests} of {asked.rows} image(s)")
    table.add_row("errors", str(len(errors)))
    table.add_row("throughput", f"{asked.requests * asked.rows / taken:.1f} images/s")
    for percent in (50, 95, 99):
        table.add_row(f"latency, {percent}th percentile", f"{cuts[percent - 1]:.0f} ms")
    Console().print(table)
    if errors:
        raise SystemExit(f"the first error: {errors[0]}")


if __name__ == "__main__":
    main()
