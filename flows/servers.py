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
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import psutil
import typer

from flows.processes import end_family, end_group
from vlmdiff.core import lifeline
from vlmdiff.core.errors import InputError
from vlmdiff.core.files import write_json
from vlmdiff.core.lifeline import is_alive
from vlmdiff.core.params import load

STATE = Path(".cache/servers")
REPORTS = Path("reports")
WORKER = "worker"
START_TIMEOUT = 120.0
# The slots of a limit are in the database: leases in memory would leave them taken when the server dies.
PREFECT_SERVER = {"PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem"}

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


def address(page: Path) -> str:
    """Where a browser finds a page of reports/: at the server of `make up` or, without it, the file."""
    page = page.absolute()
    if (server := find("reports")) and page.is_relative_to(REPORTS.absolute()):
        return f"{server.url}/{page.relative_to(REPORTS.absolute()).as_posix()}"
    return page.as_uri()


def prefect_settings() -> dict[str, str]:
    """Settings for the server of `make up` where it runs, else for an API of this process, which ends with it."""
    if server := find("prefect"):
        return {"api.url": f"{server.url}/api"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "flows.servers", "api", str(port), str(os.getpid())]
    _start("prefect-api", command, lambda: _answers(f"http://127.0.0.1:{port}/api/health"))
    # It has no pages to link to.
    return {"api.url": f"http://127.0.0.1:{port}/api", "ui_url": ""}


def _start(
    name: str, command: list[str], ready: Callable[[], bool], environment: dict[str, str] | None = None
) -> subprocess.Popen:
    """Start a server as the leader of its own process group; InputError where it does not become `ready`."""
    STATE.mkdir(parents=True, exist_ok=True)
    log = STATE / f"{name}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            env=os.environ | (environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    deadline = time.monotonic() + START_TIMEOUT
    try:
        while not ready():
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
def up(prefect_port: Port = 4200, mlflow_port: Port = 5000, reports_port: Port = 5080) -> None:
    """Start what does not run yet, deploy the flows of prefect.yaml, and say where everything is.

    A server that the environment names, by PREFECT_API_URL or MLFLOW_TRACKING_URI, is used and not started.
    """
    store = os.environ.get("MLFLOW_TRACKING_URI") or load().registry.tracking_uri
    ours = os.environ.get("PREFECT_API_URL")
    if ours:
        print(f"prefect is not ours to start: {ours}")
    else:
        command = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(prefect_port)]
        # Its pages would ask at port 4200.
        pages = {"PREFECT_UI_API_URL": f"http://127.0.0.1:{prefect_port}/api"}
        _up("prefect", prefect_port, "/api/health", command, PREFECT_SERVER | pages)
    if store.startswith("http"):
        print(f"mlflow is not ours to start: {store}")
    else:
        # One worker: several that open a fresh SQLite store at once would break it.
        command = ["mlflow", "server", "--workers", "1", "--host", "127.0.0.1", "--port", str(mlflow_port)]
        # The address by the environment: it may hold a password. The page only shows: MLflow needs none of the
        # processes that evaluate language models for it.
        settings = {"MLFLOW_BACKEND_STORE_URI": store, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        _up("mlflow", mlflow_port, "/health", command, settings)
    # A browser follows no link from a server's page to a file.
    REPORTS.mkdir(exist_ok=True)
    command = ["http.server", str(reports_port), "--bind", "127.0.0.1", "--directory", str(REPORTS)]
    _up("reports", reports_port, "/", command)
    _deploy(ours or f"{find('prefect').url}/api")


def _deploy(api: str) -> None:
    """Install deployments, limit and automations in the server, and start a worker for each pool of processes."""
    # Prefect takes a second to import, and its settings from the environment.
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings
    from prefect.workers.process import ProcessWorker

    from flows import deployments

    # A run starts in a folder of its own before it comes here.
    environment = {"PREFECT_API_URL": api, "PREFECT_HOME": str(PREFECT_HOME.value().absolute())}
    with temporary_settings({PREFECT_API_URL: api}), get_client(sync_client=True) as client:
        names, pools = deployments.install(client, os.environ | environment)
        print(f"deployed: {', '.join(names)}")
        for pool in pools:
            page = f"{api.removesuffix('/api')}/work-pools/work-pool/{pool.name}"
            if pool.type != ProcessWorker.type:
                print(f"a worker for pool {pool.name} is not ours to start: it is of type {pool.type}")
            elif worker := find(f"{WORKER}-{pool.name}"):
                print(f"{worker.name} is already up: {worker.url}")
            else:
                name = f"{WORKER}-{uuid.uuid4().hex[:8]}"
                command = ["prefect", "worker", "start", "--pool", pool.name, "--name", name, "--type", pool.type]

                def is_polling(pool: str = pool.name, name: str = name) -> bool:
                    return any(
                        worker.name == name for worker in client.read_workers_for_work_pool(pool, limit=200, offset=0)
                    )

                _keep(f"{WORKER}-{pool.name}", page, command, is_polling, environment, ends_with_it=True)


def _up(name: str, port: int, health: str, command: list[str], environment: dict[str, str] | None = None) -> None:
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
    _keep(name, url, command, lambda: _answers(url + health), environment)


def _keep(
    name: str,
    url: str,
    module: list[str],
    ready: Callable[[], bool],
    environment: dict[str, str] | None,
    ends_with_it: bool = False,
) -> None:
    """Start a Python module in the background and note it for `find` and `down`.

    With `ends_with_it`, what the process starts ends with it, even where it is killed with -9 (core/lifeline.py).
    """
    command = [sys.executable, "-m", *module]
    prefix = ["sh", "-c", f'{lifeline.OWNER}=$$ exec "$@"', "sh"] if ends_with_it else []
    process = _start(name, prefix + command, ready, environment)
    write_json(STATE / f"{name}.json", asdict(Server(name, url, process.pid, command)))
    print(f"{name} is up: {url}")


@app.command()
def down() -> None:
    """End what `up` started, and the runs under way: the worker first, while it can still tell the server."""
    for file in sorted(STATE.glob("*.json"), key=lambda file: (not file.stem.startswith(WORKER), file.stem)):
        if server := find(file.stem):
            end_family(server.pid)
            print(f"{server.name} is down")
        file.unlink()


if __name__ == "__main__":
    try:
        app()
    except InputError as error:
        sys.exit(f"error: {error}")
