"""The Prefect API of a run, and the pages of `make up`: on loopback, over the workspace's stores."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import psutil
import typer

from flows.processes import end_group
from vlmdiff.errors import InputError
from vlmdiff.files import write_json
from vlmdiff.lifeline import is_alive
from vlmdiff.params import load

STATE = Path(".cache/servers")
START_TIMEOUT = 120.0

app = typer.Typer(help=__doc__, add_completion=False, pretty_exceptions_enable=False)
Port = Annotated[int, typer.Option(min=1, max=65535)]


@dataclass(frozen=True)
class Server:
    """A server that `up` started, the leader of its own process group."""

    name: str
    url: str
    pid: int
    command: list[str]

    @property
    def is_up(self) -> bool:
        """Whether that process lives, and is no later one with its id."""
        try:
            process = psutil.Process(self.pid)
            return is_alive(process) and process.cmdline() == self.command
        except psutil.NoSuchProcess:
            return False


def find(name: str) -> Server | None:
    """The server of that name that `up` started and that still runs, if there is one."""
    file = STATE / f"{name}.json"
    server = Server(**json.loads(file.read_text())) if file.exists() else None
    return server if server and server.is_up else None


def prefect_settings() -> dict[str, str]:
    """Settings for the server of `make up` where it runs, else for an API of this process, which ends with it."""
    if server := find("prefect"):
        return {"api.url": f"{server.url}/api"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "flows.servers", "api", str(port), str(os.getpid())]
    _start("prefect-api", command, f"http://127.0.0.1:{port}/api/health")
    # It has no pages to link to.
    return {"api.url": f"http://127.0.0.1:{port}/api", "ui_url": ""}


def _start(name: str, command: list[str], health: str) -> subprocess.Popen:
    """Start a server as the leader of its own process group; InputError where `health` does not answer."""
    STATE.mkdir(parents=True, exist_ok=True)
    log = STATE / f"{name}.log"
    # The page only shows: MLflow needs none of the processes that evaluate language models for it.
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    deadline = time.monotonic() + START_TIMEOUT
    try:
        while not _answers(health):
            if process.poll() is not None or time.monotonic() > deadline:
                raise InputError(f"{name} did not start; {log} says why:\n{log.read_text()[-2000:]}")
            time.sleep(0.1)
    except BaseException:
        end_group(process.pid)
        raise
    return process


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


@app.command()
def api(port: int, owner: int) -> None:
    """Serve the Prefect API until the process `owner` is gone."""
    import uvicorn
    from prefect.server.api.server import create_app

    server = uvicorn.Server(uvicorn.Config(create_app(ephemeral=True), port=port, log_level="error"))

    def end_with_owner() -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(owner)
            while is_alive(process):
                time.sleep(0.5)
        server.should_exit = True

    threading.Thread(target=end_with_owner, daemon=True).start()
    server.run()


@app.command()
def up(prefect_port: Port = 4200, mlflow_port: Port = 5000) -> None:
    """Start what does not run yet, wait until it answers, and say where."""
    _up("prefect", prefect_port, "/api/health", ["prefect", "server", "start"])
    store = os.environ.get("MLFLOW_TRACKING_URI") or load().registry.tracking_uri
    if store.startswith("http"):
        print(f"mlflow is not ours to start: {store}")
    else:
        # One worker: several that open a fresh SQLite store at once would break it.
        command = ["mlflow", "server", "--workers", "1", "--backend-store-uri", store]
        _up("mlflow", mlflow_port, "/health", command)


def _up(name: str, port: int, health: str, command: list[str]) -> None:
    if server := find(name):
        print(f"{name} is already up: {server.url}")
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            other = f"make up {name.upper()}_PORT={port + 1}"
            raise InputError(f"port {port} is taken: choose another, as in `{other}`") from error
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", *command, "--host", "127.0.0.1", "--port", str(port)]
    process = _start(name, command, url + health)
    write_json(STATE / f"{name}.json", asdict(Server(name, url, process.pid, command)))
    print(f"{name} is up: {url}")


@app.command()
def down() -> None:
    """End the servers that `up` started."""
    for file in sorted(STATE.glob("*.json")):
        if server := find(file.stem):
            end_group(server.pid)
            print(f"{server.name} is down")
        file.unlink()


if __name__ == "__main__":
    try:
        app()
    except InputError as error:
        sys.exit(f"error: {error}")
