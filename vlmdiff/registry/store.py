"""The MLflow store that parameters name: opened once under a lock, and quick to say that it is down."""

import contextlib
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock
from sqlalchemy.exc import SQLAlchemyError

from vlmdiff.core.errors import InputError
from vlmdiff.core.params import Registry

# MLflow's own would wait four minutes for a server that is down; it reads them at each request.
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "8"}
for name, value in {**PATIENCE, "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}.items():
    os.environ.setdefault(name, value)

import mlflow  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402
from mlflow.tracking import MlflowClient  # noqa: E402

CHAMPION = "champion"
# A tag of versions and of runs alike: which model it is.
FINGERPRINT = "fingerprint"


def tracking_uri(params: Registry) -> str:
    """The store's address: the environment's MLFLOW_TRACKING_URI or, where not set, the parameters'."""
    return os.environ.get("MLFLOW_TRACKING_URI") or params.tracking_uri


@contextlib.contextmanager
def open_store(params: Registry) -> Iterator[MlflowClient]:
    """A client, alone with the store among the processes of this machine.

    Several that create an SQLite store's schema at once would break it, and MLflow has no compare-and-set: who
    registers or promotes reads, decides and writes in here. Raises InputError where the store does not answer.
    """
    uri = tracking_uri(params)
    with FileLock(_lock_file(uri)):
        mlflow.set_tracking_uri(uri)
        try:
            yield MlflowClient(uri)
        except (MlflowException, SQLAlchemyError) as error:
            raise InputError(
                f"MLflow at {shown(uri)} did not do as asked: {shown(str(error))}\n"
                "Run the same command again once it answers: nothing needs to be trained anew."
            ) from error


def shown(text: str) -> str:
    """Text in which an address may stand, without the address's password."""
    return re.sub(r"(://[^/\s:@]*):[^/\s@]*@", r"\1:***@", text)


def _lock_file(uri: str) -> Path:
    if uri.startswith("sqlite:///"):
        database = Path(uri.removeprefix("sqlite:///")).absolute()
        database.parent.mkdir(parents=True, exist_ok=True)
        return database.with_name(f"{database.name}.lock")
    digest = hashlib.sha256(uri.encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"vlmdiff-{os.getuid()}-{digest}.lock"


def champion_version(client: MlflowClient, params: Registry) -> int | None:
    """The version that carries the alias, if one does."""
    found = client.search_registered_models(f"name = '{params.model_name}'")
    return int(found[0].aliases[CHAMPION]) if found and CHAMPION in found[0].aliases else None
