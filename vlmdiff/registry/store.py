"""The MLflow store that the parameters name: one process at a time uses it, and one that is down says so soon."""

import contextlib
import hashlib
import logging
import os
import re
import tempfile
from collections.abc import Generator
from pathlib import Path

import sqlalchemy
from sqlalchemy.exc import SQLAlchemyError

from vlmdiff.core import workspace as w
from vlmdiff.core.dvc import check_output
from vlmdiff.core.errors import InputError
from vlmdiff.core.locks import hold
from vlmdiff.core.params import Registry

# MLflow's defaults wait four minutes for a server that is down, and PostgreSQL's for ever. They read these each time.
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "8", "PGCONNECT_TIMEOUT": "8"}
for name, value in {**PATIENCE, "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}.items():
    os.environ.setdefault(name, value)

import mlflow  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402
from mlflow.tracking import MlflowClient  # noqa: E402
from mlflow.utils.file_utils import local_file_uri_to_path  # noqa: E402
from mlflow.utils.uri import is_local_uri  # noqa: E402

# It would print the traceback of an error that is then raised.
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)

# Seconds to wait for another process: a registration uploads a model.
LIMIT = 600.0
SQLITE = "sqlite:///"
CHAMPION = "champion"
# A tag of versions and of runs: which model it is.
FINGERPRINT = "fingerprint"


def tracking_uri(params: Registry) -> str:
    """Return the store's address: the environment's MLFLOW_TRACKING_URI if it is set, else the parameters'."""
    return os.environ.get("MLFLOW_TRACKING_URI") or params.tracking_uri


@contextlib.contextmanager
def open_store(params: Registry) -> Generator[MlflowClient]:
    """Yield a client, as the only process of this machine that uses the store.

    Several processes that create the schema of an SQLite store at once break it, and MLflow has no compare-and-set:
    code that registers or promotes reads, decides and writes within this context.

    Raises InputError if the store does not answer, another process still uses it after LIMIT seconds, or it was moved
    or copied.
    """
    uri = tracking_uri(params)
    with hold(_lock_file(uri), f"the MLflow store {shown(uri)}", LIMIT):
        mlflow.set_tracking_uri(uri)
        try:
            if uri.startswith("postgresql"):
                # MLflow would try ten times, for two minutes and more.
                sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool).connect().close()
            client = MlflowClient(uri)
            _check_place(client, uri, params)
            yield client
        except (MlflowException, SQLAlchemyError) as error:
            said = str(error).partition("\n[SQL: ")[0]
            raise InputError(
                f"MLflow at {shown(uri)} failed: {shown(said)}\n"
                "Run the same command again when MLflow answers. Nothing is trained again."
            ) from error


def _check_place(client: MlflowClient, uri: str, params: Registry) -> None:
    """Raise InputError if a database and the artifacts beside it come from another folder: MLflow keeps absolute paths.

    A copy would write into the original, and what was moved is not found.
    """
    experiment = client.get_experiment_by_name(params.experiment) if uri.startswith(SQLITE) else None
    if experiment is None or not is_local_uri(experiment.artifact_location):
        return
    database, made = _database(uri), Path(local_file_uri_to_path(experiment.artifact_location))
    beside = database.parent.joinpath(*made.parts[-2:])
    if beside.is_dir() and not (made.is_dir() and beside.samefile(made)):
        there = made.parents[1]
        raise InputError(
            f"{database} was made in {there}, and MLflow keeps absolute paths: a copy would write there. Move the "
            f"folder back; or begin a new registry: remove {database} and {beside.parent}, then run `vlmdiff register`"
        )


def fingerprint_of(recorded: dict[str, str]) -> str:
    """Return what identifies the model of this workspace: the hashes of its detector and of its metrics.

    recorded: What `read_lock` returns. Raises InputError if the files are not those that dvc.lock records.
    """
    detector, metrics = (check_output(path, recorded) for path in (w.DETECTOR, w.METRICS))
    return f"{detector.removesuffix('.dir')}-{metrics}"


def shown(text: str) -> str:
    """Return the text without the passwords of the addresses in it."""
    return re.sub(r"(://[^/\s:@]*):[^/\s@]*@", r"\1:***@", text)


def _lock_file(uri: str) -> Path:
    if uri.startswith(SQLITE):
        database = _database(uri)
        return database.with_name(f"{database.name}.lock")
    digest = hashlib.sha256(uri.encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"vlmdiff-{os.getuid()}-{digest}.lock"


def _database(uri: str) -> Path:
    return Path(uri.removeprefix(SQLITE)).absolute()


def champion_version(client: MlflowClient, params: Registry) -> int | None:
    """Return the version that has the alias `champion`, None if none has it."""
    found = client.search_registered_models(f"name = '{params.model_name}'")
    return int(found[0].aliases[CHAMPION]) if found and CHAMPION in found[0].aliases else None
