"""The flow `retrain`: every stage of dvc.yaml, then the registry and the gate."""

import contextlib
import os
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Literal

import httpx
from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Completed, Failed
from prefect.tasks import Task

from flows import gpu, pages, servers
from vlmdiff.core import dvc
from vlmdiff.core import workspace as w
from vlmdiff.core.dvc import DvcFailed, StageDisturbed
from vlmdiff.core.errors import InputError
from vlmdiff.core.git import commit_workspace
from vlmdiff.core.locks import hold
from vlmdiff.core.params import Params, load
from vlmdiff.core.text import plain
from vlmdiff.evaluation.metrics import METRICS, Results
from vlmdiff.evaluation.verdict import Verdict
from vlmdiff.setup.init import use_preset

LOCK = Path(".cache/retrain.lock")
# The stages that compute on the GPU, if there is one.
TRAINING = {"first_stage", "encode", "train", "evaluate"}
RETRIES = {"cache_policy": NO_CACHE, "retries": 2, "retry_delay_seconds": 30}
PRESETS = {file.stem: file for file in sorted((Path(__file__).parents[1] / "presets").glob("*.yaml"))}
# The choices that the form on Prefect's page offers.
AS_IT_IS = "as it is"
Preset = Literal[AS_IT_IS, *PRESETS]  # pyrefly: ignore[not-a-type, invalid-literal]


def _only(kind: type[Exception]) -> Callable[[Task, TaskRun, State], bool]:
    """Retry only after this kind of error."""
    return lambda task, run, state: isinstance(state.result(raise_on_failure=False), kind)


@task(task_run_name="data", retry_condition_fn=_only(DvcFailed), **RETRIES)
def data(remote: str | None) -> None:
    """Pull missing data, and add data that has grown to DVC."""
    dvc.take_in(get_run_logger().info, remote)


@task(retry_condition_fn=_only(StageDisturbed), **RETRIES)
def stage(name: str, force: bool, pull: bool) -> State:
    """Bring one stage up to date."""
    log = get_run_logger().info
    with gpu.hold(log) if name in TRAINING else contextlib.nullcontext():
        return Completed(message=dvc.run_stage(name, log, force, pull))


@task(task_run_name="push", **RETRIES)
def push() -> None:
    """Push data, models and reports to DVC's remote."""
    dvc.push(get_run_logger().info)


@task(task_run_name="commit", cache_policy=NO_CACHE)
def commit(branch: str) -> dict[str, str]:
    """Commit the workspace, with dvc.lock, on a branch of its own."""
    mean = Results.read(w.METRICS).mean
    numbers = [f"{title}: {mean[key]:.4f}" for key, title in METRICS.items() if mean[key] == mean[key]]
    message = "\n".join([flow_run.get_name() or "retrain", "", *numbers])
    made = commit_workspace(branch, message, load().registry.branches)
    get_run_logger().info(f"branch {branch} is at {made['git.revision']}")
    return made


@task(task_run_name="register", **RETRIES)
def register(code: dict[str, str] | None) -> int:
    """Log the model to MLflow and register it, if it is not registered yet."""
    from vlmdiff.registry.packaging import register

    params = load()
    version = register(params, code)
    pages.show_model(version, params.registry)
    return version


@task(task_run_name="promote", **RETRIES)
def promote(version: int) -> Verdict:
    """Judge the version by the gate. If it passes, it becomes champion."""
    from vlmdiff.registry.promotion import promote

    verdict = promote(load(), version)
    pages.show_verdict(verdict)
    return verdict


@flow(flow_run_name=lambda: f"retrain {datetime.now():%Y-%m-%d %H:%M:%S}")
def retrain(
    promote_model: bool = True, force: bool = False, preset: Preset = AS_IT_IS, branch: str = ""
) -> Verdict | State | None:
    """Bring the experiment up to date, register the model, and let the gate decide whether it becomes champion.

    Args:
        promote_model: Let the gate decide whether the new version becomes champion. Off: only register it.
        force: Run every stage, also those that are up to date.
        preset: Change the model from now on: copy the model of a file of presets/ into params.yaml.
        branch: Commit the workspace, with dvc.lock, on this git branch. Empty: no commit.
    """
    # A run that is cancelled, or whose worker is killed, leaves no training behind.
    servers.watch_run()
    try:
        with hold(LOCK, "this workspace", by=f"the run {flow_run.get_name()!r}"):
            if preset != AS_IT_IS:
                use_preset(PRESETS[preset])
            params = load()
            stages, remote = dvc.stage_names(), dvc.default_remote()
            progress = pages.Progress(len(stages) + sum(map(bool, ("data", remote, branch, "register", promote_model))))
            data(remote)
            progress.step("data")
            for name in stages:
                _check_unchanged(params)
                state = stage.with_options(name=name, task_run_name=name)(name, force, bool(remote), return_state=True)
                if not state.is_completed():
                    pages.show_contract(name)
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
            _check_unchanged(params)
            version = register(code)
            progress.step("register")
            if not promote_model:
                return None
            verdict = promote(version)
            progress.step("promote")
            return verdict
    except InputError as error:
        return Failed(message=str(error), data=error)


def _check_unchanged(params: Params) -> None:
    """Raise InputError if params.yaml has changed since the run began."""
    if load() != params:
        raise InputError(f"{w.PARAMS} changed while the run was under way: run again with what it has now")


def main() -> None:
    """Run the flow once and print what came of it."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    load()
    if url := PREFECT_API_URL.value():
        servers.check_api(url)
    settings = {} if url else servers.prefect_settings()
    with temporary_settings(settings):
        url = PREFECT_API_URL.value()
        servers.watch_api(url)
        try:
            state = retrain(return_state=True)  # pyrefly: ignore[no-matching-overload]
        except httpx.TransportError as error:
            raise InputError(f"the Prefect server at {url} failed ({error}): run again when it answers") from error
    if not state.is_completed():
        raise InputError(state.message or f"the run did not end: the Prefect server at {url} did not take its result")
    pages.print_summary(state.result())


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"error: {plain(str(error))}", file=sys.stderr)
        sys.exit(2)
