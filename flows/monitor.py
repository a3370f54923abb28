"""The flow `monitor`: have photographs drifted from those at calibration? Where they have, an event says so."""

from dataclasses import asdict
from datetime import datetime
from pathlib import Path

from prefect import flow
from prefect.artifacts import create_link_artifact, create_table_artifact
from prefect.client.schemas.objects import State
from prefect.events import emit_event
from prefect.states import Completed, Failed

from flows import servers
from vlmdiff.core import lifeline
from vlmdiff.core import workspace as w
from vlmdiff.core.errors import InputError
from vlmdiff.core.params import Positive, load
from vlmdiff.production.monitor import DriftCheck

# What automations wait for: this event, of a resource called so and the model's name.
DRIFT = "vlmdiff.drift.found"
RESOURCE = "vlmdiff.monitor."


@flow(flow_run_name=lambda: f"monitor {datetime.now():%Y-%m-%d %H:%M:%S}")
def monitor(
    scores: str = str(w.SCORES), model: str | None = None, last: Positive | None = None, out: str = str(w.MONITOR)
) -> State:
    """Compare the newest photographs with those that the model was calibrated on; drift is an event, not a failure.

    Args:
        scores: What the flow `score` wrote: a Parquet file, or a folder of them.
        model: A detector's folder. Empty, it is the champion's.
        last: How many of the newest photographs. Empty, it is `monitor.last` of params.yaml.
        out: The folder for the page and monitor.json, which are replaced.
    """
    from vlmdiff.production.monitor import monitor

    # Under a worker: end with it.
    lifeline.watch()
    try:
        params = load()
        found = monitor(Path(scores), Path(out), params, Path(model) if model else None, last)
    except InputError as error:
        return Failed(message=str(error), data=error)
    _show(found, Path(out))
    if found.drift:
        emit_event(
            DRIFT,
            resource={
                "prefect.resource.id": f"{RESOURCE}{params.registry.model_name}",
                "prefect.resource.name": params.registry.model_name,
            },
            payload={"outcome": found.outcome, "images": found.images, "found": [asdict(test) for test in found.found]},
        )
    return Completed(message=found.outcome, data=found)


def _show(found: DriftCheck, out: Path) -> None:
    rows = [
        {
            "what": test.what,
            "then": f"{test.then:.4g}",
            "now": f"{test.now:.4g}",
            "corrected p": f"{test.corrected:.2g}",
            "as before": "yes" if test.passed else "no",
            "why": test.why,
        }
        for test in sorted(found.tests, key=lambda test: test.corrected)
    ]
    create_table_artifact(rows, key="monitor", description=f"**{found.outcome}**")
    page = servers.address(out / "monitor.html")
    create_link_artifact(page, link_text=found.outcome, key="monitor-page", description="Then and now, as a page.")
