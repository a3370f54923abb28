"""The flow `retrain`: every stage of dvc.yaml, then the registry and the gate."""

import base64
import contextlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Literal

import httpx
from filelock import FileLock, Timeout
from PIL import Image
from prefect import flow, get_run_logger, task
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State, TaskRun
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Completed, Failed
from prefect.tasks import Task
from rich.console import Console
from rich.markup import escape

from flows import dvc, servers
from flows.deployments import GPU
from flows.dvc import DvcFailed, StageDisturbed, default_remote, run_stage, stage_names, take_in
from vlmdiff.core import lifeline
from vlmdiff.core import workspace as w
from vlmdiff.core.errors import InputError
from vlmdiff.core.files import write_json
from vlmdiff.core.params import load
from vlmdiff.evaluation.metrics import METRICS, Results
from vlmdiff.evaluation.results import results_table
from vlmdiff.evaluation.verdict import Verdict, verdict_table
from vlmdiff.registry.lineage import commit_workspace
from vlmdiff.setup.init import use_preset

LOCK = Path(".cache/retrain.lock")
HOLDER = Path(".cache/retrain.json")
REPORT = w.EVALUATION / "report.html"
DATA_DOCS = w.DATA_REPORT / "docs/index.html"
# These compute on the GPU, where there is one: of all workspaces of a Prefect server one at a time.
TRAINING = {"first_stage", "encode", "train", "evaluate"}
LEASE = 60.0  # seconds after which the GPU of a run that died is free again
# Where a contract is judged, by stage.
CONTRACTS = {"validate": w.DATA_REPORT, "caption": w.CAPTION_REPORT}
PICTURES, PICTURE_WIDTH = 8, 720
PRESETS = {file.stem: file for file in sorted((Path(__file__).parents[1] / "presets").glob("*.yaml"))}
# What the form of Prefect's page offers.
AS_IT_IS = "as it is"
Preset = Literal[AS_IT_IS, *PRESETS]


def _disturbed(task: Task, run: TaskRun, state: State) -> bool:
    return isinstance(state.result(raise_on_failure=False), StageDisturbed)


def _dvc_failed(task: Task, run: TaskRun, state: State) -> bool:
    return isinstance(state.result(raise_on_failure=False), DvcFailed)


@task(task_run_name="data", cache_policy=NO_CACHE, retries=2, retry_delay_seconds=30, retry_condition_fn=_dvc_failed)
def data(remote: str | None) -> None:
    """Pull the data that are not here, add to DVC what has grown."""
    take_in(get_run_logger().info, remote)


@task(cache_policy=NO_CACHE, retries=2, retry_delay_seconds=30, retry_condition_fn=_disturbed)
def stage(name: str, force: bool = False, pull: bool = False) -> State:
    """Bring one stage up to date."""
    log = get_run_logger().info
    with _gpu(log) if name in TRAINING else contextlib.nullcontext():
        return Completed(message=run_stage(name, log, force, pull))


@contextlib.contextmanager
def _gpu(log: Callable[[str], None]) -> Iterator[None]:
    """Hold the GPU among the workspaces of this Prefect server, once it is free; one without such a limit has none."""
    with get_client(sync_client=True) as client:
        try:
            limit = client.read_global_concurrency_limit_by_name(GPU)
        except ObjectNotFound:
            yield
            return
    if limit.active_slots >= limit.limit:
        log(f"another run trains: waiting for the limit {GPU!r} of the Prefect server")
    with concurrency(GPU, lease_duration=LEASE):
        yield


@task(task_run_name="push", cache_policy=NO_CACHE, retries=2, retry_delay_seconds=30)
def push() -> None:
    """Bring data, models and reports to DVC's remote."""
    dvc.push(get_run_logger().info)


@task(task_run_name="commit", cache_policy=NO_CACHE)
def commit(branch: str) -> dict[str, str]:
    """Commit dvc.lock, and the workspace that it is of, on a branch of its own."""
    mean = Results.read(w.METRICS).mean
    numbers = [f"{title}: {mean[key]:.4f}" for key, title in METRICS.items() if mean[key] == mean[key]]
    made = commit_workspace(branch, "\n".join([flow_run.get_name() or "retrain", "", *numbers]))
    get_run_logger().info(f"branch {branch} is at {made['git.revision']}")
    return made


@task(task_run_name="register", cache_policy=NO_CACHE, retries=2, retry_delay_seconds=30)
def register(code: dict[str, str] | None = None) -> int:
    """Log and register the model; once, however often it is asked."""
    from vlmdiff.registry.packaging import register
    from vlmdiff.registry.store import tracking_uri

    params = load()
    version = register(params, code)
    results = Results.read(w.METRICS)
    rows = [{"class": name, **_shown(values)} for name, values in [*results.classes.items(), ("mean", results.mean)]]
    store = tracking_uri(params.registry)
    server = servers.find("mlflow")
    page = store if store.startswith("http") else server and server.url
    with _published():
        create_table_artifact(rows, key="metrics", description="Metrics by class; a dash where not defined.")
        create_markdown_artifact(
            _heatmaps(results),
            key="heatmaps",
            description="Photograph, reconstruction, anomaly map and truth; the hardest class first.",
        )
        _link("report", "Report of the evaluation", servers.address(REPORT), "Metrics by class, curves, photographs.")
        _link("data-docs", "Data Docs", servers.address(DATA_DOCS), "What was asked of the photographs, rule by rule.")
        if page:
            link = f"{page}/#/models/{params.registry.model_name}/versions/{version}?workflowType=machine_learning"
            _link("registry", f"Version {version} in the registry", link, "Its model card, what made it, its files.")
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
    with _published():
        create_table_artifact(rows, key="gate", description=f"**{verdict.outcome}**")
        _link("verdict", verdict.outcome, servers.address(w.GATE_PAGE), "The verdict and its reasons, as a page.")
    return verdict


def _link(key: str, text: str, address: str, description: str) -> None:
    create_link_artifact(address, link_text=text, key=key, description=description)


def _shown(values: dict[str, float]) -> dict[str, str]:
    return {title: f"{values[key]:.3f}" if values[key] == values[key] else "-" for key, title in METRICS.items()}


def _heatmaps(results: Results) -> str:
    """Photograph, map and truth of the classes that are hardest, as Markdown; a class without an AU-PRO comes last."""
    files = {file.stem: file for file in (w.EVALUATION / "heatmaps").glob("*.png")}

    def hardest(name: str) -> tuple[bool, float, str]:
        value = results.classes[name]["au_pro"]
        return value != value, value, name

    parts = []
    for name in sorted(files.keys() & results.classes.keys(), key=hardest)[:PICTURES]:
        with Image.open(files[name]) as picture:
            picture.thumbnail((PICTURE_WIDTH, PICTURE_WIDTH))
            data = io.BytesIO()
            picture.convert("RGB").save(data, "JPEG", quality=85)
        encoded = base64.b64encode(data.getvalue()).decode()
        title = f"{name}: AU-PRO {_shown(results.classes[name])[METRICS['au_pro']]}"
        parts.append(f"**{title}**\n\n![{title}](data:image/jpeg;base64,{encoded})")
    return "\n\n".join(parts) or "No class has an anomalous test image."


@contextlib.contextmanager
def _published() -> Iterator[None]:
    """For what a person sees of a run: that Prefect's server is away ends no run."""
    try:
        yield
    except (httpx.TransportError, PrefectHTTPStatusError) as error:
        get_run_logger().warning(f"Prefect's server did not take what the run has to show: {error}")


class Progress:
    """How far the run is, in Prefect's pages: a step is a stage, or one of the last two."""

    def __init__(self, steps: int) -> None:
        self.steps, self.done, self.artifact = steps, 0, None
        with _published():
            self.artifact = create_progress_artifact(0.0, key="progress", description=f"0 of {steps} steps")

    def step(self, name: str) -> None:
        """Count a step that is done."""
        self.done += 1
        with _published():
            if self.artifact:
                said = f"{self.done} of {self.steps} steps; last: {name}"
                update_progress_artifact(self.artifact, 100 * self.done / self.steps, said)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Hold the workspace; InputError that says who has it where another run does."""
    LOCK.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(LOCK, timeout=0):
            now = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
            write_json(HOLDER, {"run": flow_run.get_name(), "pid": os.getpid(), "since": now})
            yield
    except Timeout:
        who = "another run"
        # It writes its name right after it has the lock.
        with contextlib.suppress(OSError, ValueError, KeyError):
            holder = json.loads(HOLDER.read_text())
            who = f"the run {holder['run']!r} (process {holder['pid']}, since {holder['since']})"
        raise InputError(f"{who} holds this workspace: wait for it, or cancel it") from None


@flow(flow_run_name=lambda: f"retrain {datetime.now():%Y-%m-%d %H:%M:%S}")
def retrain(
    promote_model: bool = True, force: bool = False, preset: Preset = AS_IT_IS, branch: str = ""
) -> Verdict | State | None:
    """Bring the experiment up to date, register the model, and let the gate decide on promoting it.

    Args:
        promote_model: Let the gate decide whether the new version becomes champion. Off, it is registered only.
        force: Run every stage, also those that are up to date.
        preset: Have another model from now on: params.yaml gets what a file of presets/ says of it.
        branch: Commit dvc.lock, with the workspace as it is, on this git branch of its own. Empty, on none.
    """
    # Under a worker: end with it, and leave no training behind that nobody can cancel.
    lifeline.watch()
    try:
        with _alone():
            if preset != AS_IT_IS:
                use_preset(PRESETS[preset])
            load()
            names, remote = stage_names(), default_remote()
            progress = Progress(1 + len(names) + bool(remote) + bool(branch) + 2)
            data(remote)
            progress.step("data")
            for name in names:
                state = stage.with_options(name=name, task_run_name=name)(name, force, bool(remote), return_state=True)
                if not state.is_completed():
                    _show_contract(name)
                    error = state.result(raise_on_failure=False)
                    return Failed(message=str(error), data=error)
                progress.step(name)
            if remote:
                push()
                progress.step("push")
            code = None
            if branch:
                code = commit(branch)
                progress.step("commit")
            version = register(code)
            progress.step("register")
            verdict = promote(version) if promote_model else None
            progress.step("promote")
            return verdict
    except (InputError, DvcFailed) as error:
        return Failed(message=str(error), data=error)


def _show_contract(stage: str) -> None:
    """Where a stage failed on a contract: what is broken, by which files."""
    file = CONTRACTS.get(stage, Path()) / "validation.json"
    if not file.is_file():
        return
    broken = [finding for finding in json.loads(file.read_text())["findings"] if not finding["passed"]]
    rows = [
        {
            "rule": finding["rule"],
            "severity": finding["severity"],
            "what holds of good data": finding["what"],
            "broken by": finding["count"],
            "files": ", ".join(finding["files"]) + (", …" if finding["count"] > len(finding["files"]) else ""),
            "to do": finding["remedy"],
        }
        for finding in sorted(broken, key=lambda finding: finding["severity"])
    ]
    if rows:
        with _published():
            create_table_artifact(rows, key="contract", description=f"What stage {stage!r} found in the data.")
            _link("data-docs", "Data Docs", servers.address(file.with_name("docs") / "index.html"), "Rule by rule.")


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
