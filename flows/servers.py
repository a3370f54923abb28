"""Start and stop servers on loopback, over the workspace's stores: a Prefect API for one run, or all of `make up`."""

import base64
import contextlib
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

from vlmdiff.core import lifeline
from vlmdiff.core.errors import InputError
from vlmdiff.core.files import atomic_path, write_json
from vlmdiff.core.lifeline import is_alive
from vlmdiff.core.locks import hold
from vlmdiff.core.network import Guard, Message, owner, refusal
from vlmdiff.core.params import load
from vlmdiff.core.processes import end_family, end_group

STATE = Path(".cache/servers")
LOCK = Path(".cache/servers.lock")
# What programs show to the Prefect server of `make up`, as USER:PASSWORD. Only the user may read it.
PASSWORD = STATE / "password"
REPORTS = Path("reports")
WORKER = "worker"
# Seconds.
START_TIMEOUT = 120.0
# Seconds after which a flow says that the Prefect server is silent, and after which it ends.
PATIENCE, SILENCE = 30.0, 600.0
PREFECT_SERVER = {
    # The slots of a limit are in the database. Leases in memory would leave them taken if the server died.
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    "PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED": "true",
    # Pages ask the server that they came from, by whichever name. Without it, they ask port 4200.
    "PREFECT_UI_API_URL": "/api",
}

app = typer.Typer(help=__doc__, add_completion=False, pretty_exceptions_enable=False)
Port = Annotated[int, typer.Option(min=1, max=65535)]


@dataclass(frozen=True)
class Server:
    """A server that `up` started. It is the leader of a process group."""

    name: str
    url: str
    pid: int
    command: list[str]

    @property
    def is_up(self) -> bool:
        """Whether the process runs, and is not another one that has got its id."""
        try:
            process = psutil.Process(self.pid)
            return is_alive(process) and process.cmdline() == self.command
        except psutil.NoSuchProcess:
            return False


def find(name: str) -> Server | None:
    """Return the server of that name if `up` started it and it still runs, else None."""
    file = STATE / f"{name}.json"
    try:
        server = Server(**json.loads(file.read_bytes()))
        return server if server.is_up else None
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, OSError, psutil.Error):
        # A kill in mid-write of an earlier release, or a damaged disk. `up` says if something has the port.
        print(f"warning: {file} is damaged and ignored: if that server still runs, end it by hand", file=sys.stderr)
        return None


def address(page: Path) -> str:
    """Return the address of a page of reports/: at the server of `make up` if it runs, else that of the file."""
    page = page.absolute()
    if (server := find("reports")) and page.is_relative_to(REPORTS.absolute()):
        return f"{server.url}/{page.relative_to(REPORTS.absolute()).as_posix()}"
    return page.as_uri()


def prefect_settings() -> dict[Any, str]:
    """Return Prefect settings for the server of `make up` if it runs, else for an API that ends with this process."""
    if server := find("prefect"):
        _check(server, "/api/health")
        return {"api.url": f"{server.url}/api", "api.auth_string": password()}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "flows.servers", "prefect", str(port), "--owner", str(os.getpid())]
    known = _new_password()
    environment = PREFECT_SERVER | {"PREFECT_SERVER_API_AUTH_STRING": known}
    _start("prefect-api", command, lambda: _answers(f"http://127.0.0.1:{port}/api/health"), environment)
    # It has no pages to link to.
    return {"api.url": f"http://127.0.0.1:{port}/api", "api.auth_string": known, "ui_url": ""}


def password() -> str:
    """Return the password of the Prefect server of `make up`. Raises InputError if others may read it."""
    remedy = "run `make down`, remove that file, then run `make up`"
    try:
        found = PASSWORD.read_text(encoding="utf-8")
        if PASSWORD.stat().st_mode & 0o077:
            raise InputError(f"{PASSWORD} may be read by other users: {remedy}")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{PASSWORD} cannot be read ({error}): {remedy}") from error
    if not re.fullmatch(r"\w+:[\w-]{20,}", found):
        raise InputError(f"{PASSWORD} holds no password: {remedy}")
    return found


def _new_password() -> str:
    return f"vlmdiff:{secrets.token_urlsafe(32)}"


def _make_password() -> None:
    """Write a password, for a server that does not run yet, unless there is one."""
    if not PASSWORD.exists() and not find("prefect"):
        with atomic_path(PASSWORD) as temporary:
            temporary.touch(mode=0o600)
            temporary.write_text(_new_password(), encoding="utf-8")


def _start(
    name: str,
    command: list[str],
    ready: Callable[[], bool],
    environment: dict[str, str] | None = None,
    note: Callable[[int], None] = lambda pid: None,
) -> None:
    """Start a server as the leader of a process group, and pass its id to `note` at once.

    Raises InputError if it is not `ready` in START_TIMEOUT. It ends if this function ends early.
    """
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
        note(process.pid)
        while not ready():
            if process.poll() is not None or time.monotonic() > deadline:
                said = log.read_text(encoding="utf-8", errors="replace")[-2000:]
                raise InputError(f"{name} did not start. The end of {log}:\n{said}")
            time.sleep(0.1)
    except BaseException:
        end_group(process.pid)
        raise


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except urllib.error.HTTPError as error:
        return error.code in (401, 403)  # it wants to know who asks
    except OSError:
        return False


def check_api(url: str) -> None:
    """Raise InputError if there is no Prefect server at `url` that answers."""
    _wait_for_answer(
        f"{url}/health", f"the Prefect server at {url} does not answer: start it, or unset PREFECT_API_URL"
    )


def _check(server: Server, health: str) -> None:
    """Raise InputError if a server that runs does not answer."""
    stopped = f"the server {server.name} (process {server.pid}) runs, and does not answer at {server.url}"
    _wait_for_answer(
        server.url + health,
        f"{stopped}. If it is stopped, `kill -CONT {server.pid}` lets it go on; `make down` ends it",
    )


def _wait_for_answer(url: str, otherwise: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not _answers(url):
        if time.monotonic() > deadline:
            raise InputError(otherwise)
        time.sleep(0.5)


def watch_run() -> None:
    """End the process of a run with its worker, or when Prefect's server is silent. Other callers go on."""
    lifeline.watch()
    if lifeline.OWNER in os.environ:
        from prefect.settings import PREFECT_API_URL

        watch_api(PREFECT_API_URL.value())


def watch_api(url: str) -> None:
    """End this process with status 2 once Prefect's server at `url` has been silent for SILENCE seconds.

    Prefect's client would try each request again for minutes, also those at the end of the process, and say nothing.
    """
    threading.Thread(target=_watch_api, args=(url,), name="watch of Prefect", daemon=True).start()


def _watch_api(url: str) -> None:
    heard, said = time.monotonic(), False
    while (silent := time.monotonic() - heard) < SILENCE:
        time.sleep(min(PATIENCE, SILENCE) / 6)
        if _answers(f"{url}/health"):
            heard, said = time.monotonic(), False
        elif silent > PATIENCE and not said:
            said = True
            print(f"waiting: the Prefect server at {url} does not answer", file=sys.stderr, flush=True)
    print(
        f"error: the Prefect server at {url} has not answered for {SILENCE:g} s. Start it, or let it go on if it is "
        "stopped; then run again: checkpoints and finished stages are kept",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)


class _OwnBrowser:
    """ASGI middleware: Prefect's pages, in a browser of the user who started the server, need no password."""

    def __init__(self, app: Callable) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Callable, send: Callable) -> None:
        from prefect.settings import PREFECT_SERVER_API_AUTH_STRING, temporary_settings

        headers = dict(scope.get("headers", []))
        # No page of another site can send this, and the system tells the user. Other programs show the password.
        is_own = headers.get(b"sec-fetch-site") == b"same-origin" and scope["type"] == "http"
        if is_own and owner(scope["client"], scope["server"]) == os.getuid():
            if scope["path"].endswith("/ui-settings"):
                # The answer says whether the pages must ask for it.
                with temporary_settings({PREFECT_SERVER_API_AUTH_STRING: None}):
                    return await self.app(scope, receive, send)
            known = base64.b64encode(PREFECT_SERVER_API_AUTH_STRING.value().encode())
            scope = scope | {"headers": [*scope["headers"], (b"authorization", b"Basic " + known)]}
        await self.app(scope, receive, send)


@app.command()
def prefect(port: int, owner: int | None = None) -> None:
    """Serve Prefect's API and pages on loopback; with `owner`, only the API, until that process ends."""
    import uvicorn
    from prefect.server.api.server import create_app

    prefect_app = create_app(ephemeral=owner is not None, final=True)
    server = uvicorn.Server(uvicorn.Config(Guard(_OwnBrowser(prefect_app)), port=port, log_level="warning"))

    def end_with_owner() -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(owner)
            while is_alive(process):
                time.sleep(0.5)
        server.should_exit = True

    if owner is not None:
        threading.Thread(target=end_with_owner, daemon=True).start()
    server.run()


def mlflow() -> Guard:
    """Return MLflow's app for `mlflow server --app-name vlmdiff` (pyproject.toml)."""
    from mlflow.server.fastapi_app import app

    return Guard(app)


class _Reports(SimpleHTTPRequestHandler):
    """Files of a folder: only regular ones, only those that lie in it, only to the user."""

    def parse_request(self) -> bool:
        if not super().parse_request():
            return False
        why = refusal(self.command, self.headers.items(), self.client_address, self.connection.getsockname())
        if why is None:
            return True
        self.send_error(HTTPStatus.FORBIDDEN, why)
        return False

    def send_head(self):
        file = Path(self.translate_path(self.path)).resolve()
        inside = file.is_relative_to(Path(self.directory).resolve())
        if not inside or not (file.is_dir() or file.is_file()):
            self.send_error(HTTPStatus.NOT_FOUND)
            return None
        return super().send_head()


@app.command()
def reports(port: int) -> None:
    """Serve the files of reports/ on loopback."""
    with ThreadingHTTPServer(("127.0.0.1", port), partial(_Reports, directory=str(REPORTS))) as server:
        server.serve_forever()


@app.command()
def up(prefect_port: Port = 4200, mlflow_port: Port = 5000, reports_port: Port = 5080) -> None:
    """Start the servers and workers that do not run yet, and deploy the flows of prefect.yaml.

    A server that PREFECT_API_URL or MLFLOW_TRACKING_URI names is used, not started.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        # As Ctrl-C does, they end what is starting. `nohup` ignores one of them.
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    # Two at once would both find that nothing runs.
    with hold(LOCK, "the servers of this workspace", 2 * START_TIMEOUT):
        _up_all(prefect_port, mlflow_port, reports_port)


def _up_all(prefect_port: int, mlflow_port: int, reports_port: int) -> None:
    store = os.environ.get("MLFLOW_TRACKING_URI") or load().registry.tracking_uri
    # By what programs reach the Prefect server, beside the settings of the environment.
    if ours := os.environ.get("PREFECT_API_URL"):
        print(f"prefect: use {ours} (PREFECT_API_URL)")
        connection: dict[Any, str] = {"PREFECT_API_URL": ours}
    else:
        _make_password()
        command = ["flows.servers", "prefect", str(prefect_port)]
        environment = PREFECT_SERVER | {"PREFECT_SERVER_API_AUTH_STRING": password()}
        url = _up("prefect", prefect_port, "/api/health", command, environment)
        connection = {"PREFECT_API_URL": f"{url}/api", "PREFECT_API_AUTH_STRING": password()}
    if store.startswith("http"):
        from vlmdiff.registry.store import shown

        print(f"mlflow: use {shown(store)} (MLFLOW_TRACKING_URI or registry.tracking_uri)")
    else:
        # One worker: several that open a fresh SQLite store at once would break it.
        command = ["mlflow", "server", "--workers", "1", "--host", "127.0.0.1", "--port", str(mlflow_port)]
        command += ["--app-name", "vlmdiff"]
        # The address goes by the environment: it may hold a password. Jobs are processes that evaluate language models,
        # which nobody needs here.
        settings = {"MLFLOW_BACKEND_STORE_URI": store, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        _up("mlflow", mlflow_port, "/health", command, settings)
    # A browser does not follow a link from a server's page to a file.
    REPORTS.mkdir(exist_ok=True)
    command = ["flows.servers", "reports", str(reports_port)]
    _up("reports", reports_port, "/", command)
    _deploy(connection)


def _deploy(connection: dict[Any, str]) -> None:
    """Install the deployments in the Prefect server, and start a worker for each pool of processes."""
    # Prefect takes a second to import, and reads its settings from the environment then.
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_HOME, temporary_settings
    from prefect.workers.process import ProcessWorker

    from flows import deployments

    # A run starts in a temporary folder before it changes to the workspace.
    environment = {**connection, "PREFECT_HOME": str(PREFECT_HOME.value().absolute())}
    with temporary_settings(connection), get_client(sync_client=True) as client:
        names, pools = deployments.install(client, os.environ | environment)
        print(f"deployed {', '.join(names)}")
        for pool in pools:
            page = f"{connection['PREFECT_API_URL'].removesuffix('/api')}/work-pools/work-pool/{pool.name}"
            if pool.type != ProcessWorker.type:
                print(f"pool {pool.name} is of type {pool.type}: start its worker yourself")
            elif worker := find(f"{WORKER}-{pool.name}"):
                print(f"{worker.name} already runs: {worker.url}")
            else:
                name = f"{WORKER}-{uuid.uuid4().hex[:8]}"
                command = ["prefect", "worker", "start", "--pool", pool.name, "--name", name, "--type", pool.type]

                def is_polling(pool: str = pool.name, name: str = name) -> bool:
                    return any(
                        worker.name == name for worker in client.read_workers_for_work_pool(pool, limit=200, offset=0)
                    )

                _keep(f"{WORKER}-{pool.name}", page, command, is_polling, environment, ends_with_it=True)


def _up(name: str, port: int, health: str, command: list[str], environment: dict[str, str] | None = None) -> str:
    """Start a server if `up` has not started it, and return its address."""
    if server := find(name):
        _check(server, health)
        print(f"{name} already runs: {server.url}")
        return server.url
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            other = f"make up {name.upper()}_PORT={port + 1}"
            raise InputError(f"port {port} is in use: choose another one, such as `{other}`") from error
    url = f"http://127.0.0.1:{port}"
    _keep(name, url, command, lambda: _answers(url + health), environment)
    return url


def _keep(
    name: str,
    url: str,
    module: list[str],
    ready: Callable[[], bool],
    environment: dict[str, str] | None,
    ends_with_it: bool = False,
) -> None:
    """Start a Python module in the background, and record it for `find` and `down`.

    ends_with_it: Processes that it starts end with it, even if it is killed with -9 (vlmdiff/core/lifeline.py).
    """
    command = [sys.executable, "-m", *module]
    prefix = ["sh", "-c", f'{lifeline.OWNER}=$$ exec "$@"', "sh"] if ends_with_it else []

    def note(pid: int) -> None:
        # At once: if `up` is killed meanwhile, `down` finds it.
        write_json(STATE / f"{name}.json", asdict(Server(name, url, pid, command)))

    _start(name, prefix + command, ready, environment, note)
    print(f"started {name}: {url}")


@app.command()
def down() -> None:
    """Stop what `up` started, and the runs in progress: the worker first, while it can still tell the server."""
    for file in sorted(STATE.glob("*.json"), key=lambda file: (not file.stem.startswith(WORKER), file.stem)):
        if server := find(file.stem):
            end_family(server.pid)
            print(f"stopped {server.name}")
        file.unlink(missing_ok=True)


if __name__ == "__main__":
    try:
        app()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
