"""One training at a time on the GPU, among all workspaces of a Prefect server."""

import contextlib
from collections.abc import Callable, Generator

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound

GPU = "gpu"
# Seconds after which the GPU of a run that died is free again.
LEASE = 60.0


def install(client: SyncPrefectClient) -> None:
    """Create the limit in a Prefect server."""
    client.upsert_global_concurrency_limit_by_name(GPU, limit=1)


@contextlib.contextmanager
def hold(log: Callable[[str], None]) -> Generator[None]:
    """Wait for the GPU, and hold it. A server without the limit lets every run pass."""
    with get_client(sync_client=True) as client:
        try:
            limit = client.read_global_concurrency_limit_by_name(GPU)
        except ObjectNotFound:
            yield
            return
    if limit.active_slots >= limit.limit:
        log(f"another run uses the GPU: waiting for the limit {GPU!r} of the Prefect server")
    with concurrency(GPU, lease_duration=LEASE):
        yield
