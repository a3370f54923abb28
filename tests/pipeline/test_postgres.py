"""Prefect and MLflow on a real PostgreSQL, each by one address in the environment."""

import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.services import free_ports, services

pytestmark = pytest.mark.services

FLOW = (sys.executable, "-m", "flows.retrain")
PASSWORD = "not-to-be-shown"


def program(name: str) -> str | None:
    places = [str(place) for place in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]
    return shutil.which(name, path=os.pathsep.join([os.environ["PATH"], *places]))


@pytest.fixture(scope="module")
def postgres(tmp_path_factory) -> Iterator[str]:
    """A server of its own with databases `prefect` and `mlflow`; user, password and address, less the database."""
    if not (program("initdb") and program("postgres") and program("psql")):
        pytest.skip("there is no PostgreSQL on this machine: initdb, postgres and psql are not found")
    folder = tmp_path_factory.mktemp("postgres")
    # It refuses to run as root.
    user = None if os.getuid() else "nobody"
    if user:
        owner = pwd.getpwnam(user)
        os.chown(folder, owner.pw_uid, owner.pw_gid)
        for parent in [folder, *folder.parents][:-2]:
            parent.chmod(parent.stat().st_mode | 0o011)
    (folder / "password").write_text(PASSWORD)
    (folder / "password").chmod(0o644)
    (port,) = free_ports(1)
    data = str(folder / "data")

    def run(*command: str) -> None:
        environment = os.environ | {"PGPASSWORD": PASSWORD}
        done = subprocess.run(command, cwd=folder, user=user, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr + done.stdout

    run(program("initdb"), "-D", data, "-U", "vlmdiff", "--pwfile", str(folder / "password"), "-A", "scram-sha-256")
    log = (folder / "log").open("w")
    options = ["-D", data, "-h", "127.0.0.1", "-p", str(port), "-k", "", "-c", "fsync=off"]
    server = subprocess.Popen(
        [program("postgres"), *options], cwd=folder, user=user, stdout=log, stderr=subprocess.STDOUT
    )
    try:
        for name in ("prefect", "mlflow"):
            # The first one waits until the server answers.
            script = (
                f"until {program('psql')} -h 127.0.0.1 -p {port} -U vlmdiff -d postgres -c 'create database {name}'"
            )
            run("timeout", "60", "sh", "-c", f"{script}; do sleep 0.2; done")
        yield f"vlmdiff:{PASSWORD}@127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()
        log.close()


def test_servers_and_a_run_keep_everything_in_postgres(postgres, tiny_line, tmp_path):
    pytest.importorskip("psycopg", reason="the extra `postgres` is not installed")
    addresses = {
        "PREFECT_API_DATABASE_CONNECTION_URL": f"postgresql+asyncpg://{postgres}/prefect",
        "MLFLOW_TRACKING_URI": f"postgresql+psycopg://{postgres}/mlflow",
    }
    with services(tmp_path / "workspace", tiny_line, **addresses) as here:
        said = here.up()
        assert "started worker-vlmdiff" in said
        run = here.trigger()
        assert here.end(run, 200).state.is_completed(), here.logs(run)
        shown = here.artifacts(run)
        assert "version 1 passes the gate and is champion" in shown["verdict"] and "registry" in shown
        champion = here.workspace.run("vlmdiff", "gate", "1", **here.environment).stdout
        assert "champion" in champion

        assert not list(here.workspace.path.rglob("mlflow.db")) and not list(here.workspace.path.rglob("prefect.db"))
        commands = [" ".join(process.cmdline()) for process in here.processes()]
        kept = [file.read_text() for file in (here.workspace.path / ".cache/servers").iterdir()]
        for text in [said, here.logs(run), *commands, *kept]:
            assert PASSWORD not in text


def test_a_store_that_is_down_is_named_without_its_password(workspace):
    (port,) = free_ports(1)
    address = f"postgresql+psycopg://vlmdiff:{PASSWORD}@127.0.0.1:{port}/mlflow"
    done = workspace.run("vlmdiff", "register", check=False, MLFLOW_TRACKING_URI=address)
    assert done.returncode == 2 and "MLflow at" in done.stdout and PASSWORD not in done.stdout
