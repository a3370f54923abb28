"""The flow `monitor`: compare new photographs with those at calibration, and emit an event if they have drifted."""

from dataclasses import asdict
from datetime import datetime
from pathlib import Path

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.events import emit_event
from prefect.states import Completed, Failed

from flows import pages, servers
from flows.deployments import DRIFT
from vlmdiff.core import workspace as w
from vlmdiff.core.errors import InputError
from vlmdiff.core.params import Positive, load
from vlmdiff.production.monitor import monitor as check


@flow(flow_run_name=lambda: f"monitor {datetime.now():%Y-%m-%d %H:%M:%S}")
def monitor(
    scores: str = str(w.SCORES), model: str | None = None, last: Positive | None = None, out: str = str(w.MONITOR)
) -> State:
    """Compare the newest photographs with those of the model's calibration. Drift is an event, not a failure.

    Args:
        scores: What the flow `score` wrote: a Parquet file, or a folder of them.
        model: A detector's folder. Empty: the champion.
        last: How many of the newest photographs. Empty: `monitor.last` of params.yaml.
        out: The folder for the page and monitor.json; both are replaced.
    """
    # A run that is cancelled, or whose worker is killed, leaves no process behind.
    servers.watch_run()
    try:
        params = load()
        found = check(Path(scores), Path(out), params, Path(model) if model else None, last)
    except InputError as error:
        return Failed(message=str(error), data=error)
    pages.show_drift(found, Path(out))
    if found.drift:
        name = params.registry.model_name
        emit_event(
            DRIFT,
            resource={"prefect.resource.id": f"vlmdiff.monitor.{name}", "prefect.resource.name": name},
            payload={"outcome": found.outcome, "images": found.images, "found": [asdict(test) for test in found.found]},
        )
    return Completed(message=found.outcome, data=found)
