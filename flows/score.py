"""The flow `score`: photographs judged by the champion, in a child process."""

import sys
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from flows.processes import run_child
from vlmdiff.core import lifeline
from vlmdiff.core.errors import InputError
from vlmdiff.core.params import Params, load

WORST = 20


@flow(flow_run_name=lambda: f"score {datetime.now():%Y-%m-%d %H:%M:%S}")
def score(sources: list[str], out: str = "reports/scores", heatmaps: bool = False) -> State:
    """Judge photographs by the champion. Run again, it judges only those that are new or have changed.

    Args:
        sources: Photographs, folders, patterns such as `incoming/**/*.png`, or tables (CSV, Parquet) with a column
            `path`; on the machine of the worker, relative to the workspace.
        out: A folder. In it each champion has one of its own, NAME-VERSION, which `pandas.read_parquet` reads.
        heatmaps: Keep a picture of each new alarm too, in the folder `_heatmaps` there.
    """
    # Under a worker: end with it.
    lifeline.watch()
    log = get_run_logger().info
    began = datetime.now(UTC)
    try:
        folder = Path(out, _champion(load()))
    except InputError as error:
        return Failed(message=str(error), data=error)
    options = ["--out", str(folder), *(["--heatmaps"] if heatmaps else [])]
    status, said = run_child([sys.executable, "-m", "vlmdiff.cli", "score", *options, "--", *sources], log)
    summary = said.rpartition("\n")[2]
    if any(folder.glob("part-*.parquet")):
        _show(folder, began, summary)
    return Failed(message=said, data=InputError(said)) if status else Completed(message=summary)


def _champion(params: Params) -> str:
    """The champion's name and version, as a folder's name."""
    from vlmdiff.registry.store import champion_version, open_store

    with open_store(params.registry) as client:
        version = champion_version(client, params.registry)
    if version is None:
        raise InputError(f"{params.registry.model_name} has no champion: run the flow `retrain` first")
    return f"{params.registry.model_name}-{version}"


def _show(folder: Path, began: datetime, summary: str) -> None:
    """The photographs of this run: the highest scores as a table, and what there is to know of all."""
    columns = ["path", "score", "is_anomalous", "heatmap", "error", "scored_at"]
    frame = pd.read_parquet(folder, columns=columns, filters=[("scored_at", ">=", began)])
    unreadable = frame[frame["error"].notna()]
    worst = frame[frame["error"].isna()].nlargest(WORST, "score")
    rows = [
        {
            "photograph": row.path,
            "score": f"{row.score:.3f}",
            "verdict": "anomalous" if row.is_anomalous else "normal",
            "heatmap": str((folder / row.heatmap).absolute()) if isinstance(row.heatmap, str) else "",
        }
        for row in worst.itertuples()
    ]
    create_table_artifact(rows, key="scores", description="The highest scores of this run; 0.5 is the threshold.")
    lines = [
        "| | photographs of this run |",
        "| --- | --- |",
        f"| judged | {len(frame) - len(unreadable)} |",
        f"| alarms | {int(frame['is_anomalous'].fillna(False).sum())} |",
        f"| could not be read | {len(unreadable)} |",
        "",
        *(f"- {error}" for error in unreadable["error"].head(WORST)),
        "",
        summary,
        "",
        f"All of them, and those of earlier runs: `pandas.read_parquet({str(folder.absolute())!r})`",
    ]
    create_markdown_artifact("\n".join(lines), key="score-summary", description="What came of the run.")
