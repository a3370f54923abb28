"""The flow `score`: the champion judges photographs, in a child process."""

import sys
from datetime import UTC, datetime
from pathlib import Path

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from flows import pages, servers
from vlmdiff.core.errors import InputError
from vlmdiff.core.params import Registry, load
from vlmdiff.core.processes import run_child


@flow(flow_run_name=lambda: f"score {datetime.now():%Y-%m-%d %H:%M:%S}")
def score(sources: list[str], out: str = "reports/scores", heatmaps: bool = False) -> State:
    """Judge photographs by the champion. A second run judges only new and changed photographs.

    Args:
        sources: Photographs, folders, patterns such as `incoming/**/*.png`, or tables (CSV, Parquet) with a column
            `path`; on the worker's machine, relative to the workspace.
        out: A folder. Each champion writes to a folder NAME-VERSION in it, which `pandas.read_parquet` reads.
        heatmaps: Also write a picture of each new anomalous photograph, into the folder `_heatmaps` there.
    """
    # A run that is cancelled, or whose worker is killed, leaves no process behind.
    servers.watch_run()
    began = datetime.now(UTC)
    try:
        folder = Path(out, _champion(load().registry))
    except InputError as error:
        return Failed(message=str(error), data=error)
    options = ["--out", str(folder), *(["--heatmaps"] if heatmaps else [])]
    command = [sys.executable, "-m", "vlmdiff.cli", "score", *options, "--", *sources]
    status, printed = run_child(command, get_run_logger().info)
    summary = printed.rpartition("\n")[2]
    if any(folder.glob("part-*.parquet")):
        pages.show_scores(folder, began, summary)
    return Failed(message=printed, data=InputError(printed)) if status else Completed(message=summary)


def _champion(registry: Registry) -> str:
    """Return the champion's name and version, as the name of a folder."""
    from vlmdiff.registry.store import champion_version, open_store

    with open_store(registry) as client:
        version = champion_version(client, registry)
    if version is None:
        raise InputError(f"{registry.model_name} has no champion: run the flow `retrain` first")
    return f"{registry.model_name}-{version}"
