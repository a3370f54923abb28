"""What `make up` brings up, in a workspace of a test: real servers and a real worker on free ports."""

import contextlib
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

import psutil
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterId,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.client.schemas.objects import FlowRun
from prefect.settings import temporary_settings

from tests.conftest import ROOT, Workspace
from tests.processes import kill_all, wait_for

NAMES = ("prefect", "mlflow", "reports")


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


@dataclass(frozen=True)
class Services:
    """`make up` and `make down` of a workspace; `client` speaks to its Prefect server."""

    workspace: Workspace
    ports: dict[str, int]
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def api(self) -> str:
        return f"http://127.0.0.1:{self.ports['prefect']}/api"

    @property
    def connection(self) -> dict[str, str]:
        """The settings by which a program reaches its Prefect server."""
        password = (self.workspace.path / ".cache/servers/password").read_text()
        return {"PREFECT_API_URL": self.api, "PREFECT_API_AUTH_STRING": password}

    def up(self) -> str:
        options = [text for name, port in self.ports.items() for text in (f"--{name}-port", str(port))]
        command = (sys.executable, "-m", "flows.servers", "up", *options)
        return self.workspace.run(*command, **self.environment).stdout

    def down(self) -> str:
        return self.workspace.run(sys.executable, "-m", "flows.servers", "down", **self.environment).stdout

    def processes(self) -> list[psutil.Process]:
        """All that works in the workspace, servers and worker and what they started."""
        # Of one that ends meanwhile there is no folder.
        listed = [(process, process.info["cwd"]) for process in psutil.process_iter(["cwd", "cmdline", "name"])]
        return [process for process, cwd in listed if cwd and Path(cwd).is_relative_to(self.workspace.path)]

    def process(self, *words: str) -> psutil.Process:
        """The one process of the workspace whose command has these words, one after the other."""
        found = [process for process in self.processes() if " ".join(words) in " ".join(process.info["cmdline"] or [])]
        # A shell that runs a stage's command has its words too.
        found = [process for process in found if process.info["name"] != "sh"]
        assert len(found) == 1, [process.info["cmdline"] for process in found]
        return found[0]

    @contextlib.contextmanager
    def client(self) -> Iterator[SyncPrefectClient]:
        with temporary_settings(self.connection), get_client(sync_client=True) as client:
            yield client

    def trigger(self, **parameters: object) -> UUID:
        """Ask for a run of the deployment `retrain`, as a person does in the UI."""
        with self.client() as client:
            deployment = client.read_deployment_by_name("retrain/retrain")
            return client.create_flow_run_from_deployment(deployment.id, parameters=parameters).id

    def run(self, run: UUID) -> FlowRun:
        with self.client() as client:
            return client.read_flow_run(run)

    def end(self, run: UUID, seconds: float = 200) -> FlowRun:
        """The run at its end."""
        wait_for(lambda: self.run(run).state.is_final(), seconds, lambda: (self.run(run).state, self.logs(run)[-3000:]))
        return self.run(run)

    def logs(self, run: UUID) -> str:
        with self.client() as client:
            found = client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run])), limit=200)
        return "\n".join(log.message for log in found)

    def artifacts(self, run: UUID) -> dict[str, object]:
        """What a run shows: the data of its artifacts by key."""
        with self.client() as client:
            found = client.read_artifacts(
                artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run])),
                flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run])),
            )
        return {artifact.key: artifact.data for artifact in found}


@contextlib.contextmanager
def services(path: Path, line: Workspace, **environment: str) -> Iterator[Services]:
    """A copy of a workspace, with the flows and what deploys them; nothing of it runs afterwards."""
    shutil.copytree(line.path, path, symlinks=True)
    for name in ("flows", "presets", "prefect.yaml", "pyproject.toml"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, path / name)
    # Its own state: not the one that the tests share.
    environment = {"PREFECT_HOME": str(path / ".prefect"), **environment}
    here = Services(Workspace(path), dict(zip(NAMES, free_ports(len(NAMES)), strict=True)), environment)
    try:
        yield here
    finally:
        here.down()
        kill_all(here.processes())
