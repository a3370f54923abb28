"""What the tests share: no telemetry, a Prefect API of their own, scratch workspaces with git and DVC."""

import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from filelock import FileLock
from hypothesis import settings

# How long an example takes says more of what else the machine does than of the code.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

ROOT = Path(__file__).parents[1]
# What a workspace has of the repository: the graph, the sources that its stages depend on, DVC's settings.
WORKSPACE_FILES = (
    "dvc.yaml",
    ".dvc/config",
    ".dvc/.gitignore",
    ".dvcignore",
    ".gitignore",
    "data/raw/README.md",
    "vlmdiff",
)

# The whole line in about a minute: every component real, and small.
TINY: dict[str, Any] = {
    "prepare": {"demo": {"train": 12, "test_good": 3, "test_per_defect": 1, "size": 64}},
    "validate": {"min_images": {"train": 4, "validation": 1, "test": 2}},
    "first_stage": {"image_size": 32, "block_channels": [32, 32], "steps": 6, "batch_size": 8},
    "encode": {"text_encoder": {"kind": "trained", "hidden_size": 16, "layers": 1, "heads": 2, "steps": 2}},
    "train": {
        "block_channels": [32, 32],
        "head_size": 16,
        "sgn": True,
        "hint_channels": [8, 16],
        "steps": 6,
        "batch_size": 8,
        "checkpoint_every": 2,
    },
    "evaluate": {"detection": {"steps": 1}, "examples": 1},
    "gate": {"floors": {}, "max_false_alarm_rate": None},
}

# nohup's "ignore" would pass to the processes that the tests start and hang up; a handler does not.
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)

_private = Path(tempfile.mkdtemp(prefix="vlmdiff-tests-"))

# Before anything imports the tools that read these.
os.environ.update(
    DO_NOT_TRACK="true",
    DVC_NO_ANALYTICS="1",
    GX_ANALYTICS_ENABLED="false",
    MLFLOW_DISABLE_TELEMETRY="true",
    PREFECT_SERVER_ANALYTICS_ENABLED="false",
    PREFECT_HOME=str(_private / "prefect"),
    DVC_SITE_CACHE_DIR=str(_private / "dvc"),
    # `make test` runs several at once: threads of theirs would wait for each other.
    OMP_NUM_THREADS="1",
    # Commits of scratch workspaces: the user's configuration plays no part.
    GIT_CONFIG_GLOBAL=os.devnull,
    GIT_AUTHOR_NAME="Tests",
    GIT_AUTHOR_EMAIL="tests@localhost",
    GIT_COMMITTER_NAME="Tests",
    GIT_COMMITTER_EMAIL="tests@localhost",
    PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
)
for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "VLMDIFF_OWNER"):
    os.environ.pop(name, None)


def pytest_unconfigure() -> None:
    shutil.rmtree(_private)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show what tests have measured, by `record_property`: a bound that holds does not say how well."""
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, [])]
    measured = [f"{name}: {value}" for report in reports for name, value in report.user_properties]
    if measured:
        terminalreporter.section("measured")
        terminalreporter.write_line("\n".join(measured))


@dataclass(frozen=True)
class Workspace:
    """A folder in which the line runs: a git repository with DVC."""

    path: Path

    def run(self, *command: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command there; its standard output and error come back as text, together in `stdout`."""
        result = subprocess.run(
            command,
            cwd=self.path,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if check:
            assert result.returncode == 0, f"{command} exited with {result.returncode}:\n{result.stdout}"
        return result

    def vlmdiff(
        self, *arguments: str, check: bool = True, tracking_uri: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command of `vlmdiff` as `run` does, in this process: imports take most of the time of another."""
        from vlmdiff.cli import main

        status, output = 0, io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), redirect_stderr(output):
            patch.chdir(self.path)
            patch.setattr(sys, "argv", ["vlmdiff", *arguments])
            # MLflow keeps a store that it has opened by its address: each workspace has one of its own.
            patch.setenv("MLFLOW_TRACKING_URI", tracking_uri or f"sqlite:///{self.path / 'mlflow.db'}")
            try:
                main()
            except SystemExit as end:
                status = int(end.code or 0)
        if check:
            assert status == 0, f"{arguments} exited with {status}:\n{output.getvalue()}"
        return subprocess.CompletedProcess(arguments, status, output.getvalue())

    def set_params(self, **sections: dict[str, Any]) -> None:
        """Set keys of params.yaml, nested as there: `set_params(train={"steps": 8})`."""
        file = self.path / "params.yaml"
        file.write_text(yaml.safe_dump(_merge(yaml.safe_load(file.read_text()), sections), sort_keys=False))

    def commit(self) -> None:
        """Commit whatever git does not ignore."""
        self.run("git", "add", "--all")
        self.run("git", "commit", "--quiet", "--allow-empty", "--message", "State of the workspace")


def _merge(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return values | {
        key: _merge(values[key], change) if isinstance(change, dict) and isinstance(values.get(key), dict) else change
        for key, change in changes.items()
    }


def make_workspace(path: Path, dvc_yaml: dict[str, Any] | None = None) -> Workspace:
    """A fresh workspace: the repository's stages with parameters TINY or, where given, another graph."""
    from vlmdiff.core.params import Params

    path.mkdir(parents=True)
    for name in WORKSPACE_FILES:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, path / name)
    if dvc_yaml is not None:
        (path / "dvc.yaml").write_text(yaml.safe_dump(dvc_yaml))
    params = Params.model_validate(TINY).model_dump(mode="json", by_alias=True)
    (path / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    workspace = Workspace(path)
    workspace.run("git", "init", "--quiet")
    workspace.commit()
    return workspace


@pytest.fixture
def new_workspace(tmp_path: Path) -> Callable[..., Workspace]:
    """Make a workspace in which nothing has run: `new_workspace()`, or `new_workspace(dvc_yaml)`."""
    return lambda dvc_yaml=None: make_workspace(tmp_path / "workspace", dvc_yaml)


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """A folder of this name that is filled once, whichever process of `make test` comes first. Not to be changed."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def folder(name: str, fill: Callable[[Path], None]) -> Path:
        path, filled = shared / name, shared / f"{name}.filled"
        with FileLock(shared / f"{name}.lock"):
            if not filled.exists():
                shutil.rmtree(path, ignore_errors=True)
                fill(path)
                filled.touch()
        return path

    return folder


@pytest.fixture(scope="session")
def tiny_line(once: Callable[..., Path]) -> Workspace:
    """The line with parameters TINY, every stage run and committed."""

    def fill(path: Path) -> None:
        workspace = make_workspace(path)
        workspace.run("dvc", "repro")
        workspace.commit()

    return Workspace(once("tiny", fill))


@pytest.fixture
def workspace(tiny_line: Workspace, tmp_path: Path) -> Workspace:
    """A copy of the tiny line for a test to change."""
    shutil.copytree(tiny_line.path, tmp_path / "workspace", symlinks=True)
    return Workspace(tmp_path / "workspace")


@pytest.fixture(scope="session")
def made_store(once) -> Path:
    """An MLflow store with its schema and nothing in it: MLflow takes many seconds to make one."""

    def fill(folder: Path) -> None:
        folder.mkdir()
        make = "from mlflow.tracking import MlflowClient as C; C('sqlite:///mlflow.db').search_registered_models()"
        subprocess.run([sys.executable, "-c", make], cwd=folder, check=True, capture_output=True)

    return once("store", fill) / "mlflow.db"


@pytest.fixture
def empty_store(workspace, made_store) -> None:
    shutil.copy(made_store, workspace.path)


@pytest.fixture(autouse=True)
def any_precision() -> Iterator[None]:
    """Accelerate allows one precision a process: each test may choose its own, as each of our processes does."""
    yield
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state()


@pytest.fixture
def page(browser) -> Iterator[Any]:
    """A new page of the module's browser."""
    from tests.browser import open_page

    page = open_page(browser)
    yield page
    page.close()


@pytest.fixture(scope="session")
def prefect_api() -> Iterator[str]:
    """The address of a Prefect API: for flows in the tests' process and, as PREFECT_API_URL, in others."""
    from prefect.settings import PREFECT_API_URL
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=60):
        yield PREFECT_API_URL.value()


@pytest.fixture
def recorded(prefect_api: str) -> Callable[[str], list[dict[str, Any]]]:
    """What Prefect has of the flow runs that this test began, and of no other's: `recorded("artifacts")`."""
    question = {"flow_runs": {"start_time": {"after_": datetime.now(UTC).isoformat()}}}

    def ask(what: str) -> list[dict[str, Any]]:
        return httpx.post(f"{prefect_api}/{what}/filter", json=question).raise_for_status().json()

    return ask
