"""The flow `retrain`: every stage of dvc.yaml, then the registry and the gate."""

import os
import sys
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout
from prefect import flow, get_run_logger, task
from prefect.artifacts import create_link_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Completed, Failed
from prefect.tasks import Task
from rich.console import Console
from rich.markup import escape

from flows import servers
from flows.dvc import StageDisturbed, run_stage, stage_names
from vlmdiff import workspace as w
from vlmdiff.errors import InputError
from vlmdiff.evaluation.gate import Verdict, verdict_table
from vlmdiff.evaluation.metrics import METRICS, Results
from vlmdiff.evaluation.results import results_table
from vlmdiff.params import load

LOCK = Path(".cache/retrain.lock")
REPORT = w.EVALUATION / "report.html"


def _disturbed(task: Task, run: TaskRun, state: State) -> bool:
    return isinstance(state.result(raise_on_failure=False), StageDisturbed)


@task(cache_policy=NO_CACHE, retries=2, retry_delay_seconds=30, retry_condition_fn=_disturbed)
def stage(name: str) -> State:
    """Bring one stage up to date."""
    return Completed(message=run_stage(name, get_run_logger().info))


@task(task_run_name="register", cache_policy=NO_CACHE, retries=2, retry_delay_seconds=30)
def register() -> int:
    """Log and register the model; once, however often it is asked."""
    from vlmdiff.registry.packaging import register

    version = register(load())
    results = Results.read(w.METRICS)
    rows = [{"class": name, **_shown(values)} for name, values in [*results.classes.items(), ("mean", results.mean)]]
    create_table_artifact(rows, key="metrics", description="Metrics by class; a dash where not defined.")
    create_link_artifact(REPORT.absolute().as_uri(), link_text="Report of the evaluation", key="report")
    if server := servers.find("mlflow"):
        link = f"{server.url}/#/models/{load().registry.model_name}/versions/{version}"
        create_link_artifact(link, link_text=f"Version {version} in the registry", key="registry")
    return version


@task(task_run_name="promote", cache_policy=NO_CACHE, retries=2, retry_delay_seconds=30)
def promote(version: int) -> Verdict:
    """Judge the version by the gate; where it passes, it becomes champion."""
    from vlmdiff.registry.promotion import promote

    verdict = promote(load(), version)
    rows = [
        {
            "criterion": criterion.name,
            "measured": f"{criterion.measured:.4f}" if criterion.measured == criterion.measured else "not defined",
            "required": f"{criterion.relation} {criterion.required:g}",
            "passed": "yes" if criterion.passed else "no",
            "why": criterion.why,
        }
        for criterion in sorted(verdict.criteria, key=lambda criterion: criterion.passed)
    ]
    create_table_artifact(rows, key="gate", description=f"**{verdict.outcome}**")
    create_link_artifact(w.GATE_PAGE.absolute().as_uri(), link_text=verdict.outcome, key="verdict")
    return verdict


def _shown(values: dict[str, float]) -> dict[str, str]:
    return {title: f"{values[key]:.3f}" if values[key] == values[key] else "-" for key, title in METRICS.items()}


@flow(flow_run_name=lambda: f"retrain {datetime.now():%Y-%m-%d %H:%M:%S}")
def retrain(promote_model: bool = True) -> Verdict | State | None:
    """Bring the experiment up to date, register the model, and let the gate decide on promoting it."""
    LOCK.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(LOCK, timeout=0):
            for name in stage_names():
                state = stage.with_options(name=name, task_run_name=name)(name, return_state=True)
                if not state.is_completed():
                    error = state.result(raise_on_failure=False)
                    return Failed(message=str(error), data=error)
            version = register()
            return promote(version) if promote_model else None
    except Timeout:
        error = InputError("another retrain runs in this workspace: wait for it")
        return Failed(message=str(error), data=error)


def main() -> None:
    """Run the flow once and show what came of it."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    load()
    settings = {} if PREFECT_API_URL.value() else servers.prefect_settings()
    with temporary_settings(settings):
        state = retrain(return_state=True)
    if not state.is_completed():
        sys.exit(f"error: {state.message}")
    _show(state.result())


def _show(verdict: Verdict) -> None:
    console = Console()
    console.print()
    console.print(results_table(Results.read(w.METRICS)))
    console.print(verdict_table(verdict))
    for criterion in verdict.criteria:
        if not criterion.passed:
            console.print(f"  {escape(criterion.why)}")
    console.print()
    for what, where in {
        "Report": w.GATE_PAGE,
        "Data Docs": w.DATA_REPORT / "docs/index.html",
        "Registry, runs": "make up",
        "Photographs": "vlmdiff score IMAGE... --out DIR  (in .venv/bin)",
    }.items():
        console.print(f"{what:<16}{where}", highlight=False)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
