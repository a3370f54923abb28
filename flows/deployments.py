"""What `make up` installs in a Prefect server: pool, deployments, the GPU's limit, automations; twice is as once."""

import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import yaml
from prefect.automations import AutomationCore, ChangeFlowRunState, EventTrigger, Posture, RunDeployment
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import StateType, WorkPool
from prefect.exceptions import ObjectNotFound
from prefect.workers.process import ProcessWorker

from vlmdiff.core.errors import InputError

FILE = Path("prefect.yaml")
GPU = "gpu"
DRIFT = "vlmdiff.drift.found"
HEARTBEAT = "prefect.flow-run.heartbeat"
ENDS = ("Completed", "Failed", "Cancelled", "Crashed")
# A run says every half minute that it lives (pyproject.toml).
SILENCE = timedelta(seconds=90)


def deployments() -> list[dict]:
    """Those of prefect.yaml whose flow's file exists."""
    if not FILE.is_file():
        raise InputError(f"{FILE} does not exist: it says what to deploy")
    listed = yaml.safe_load(FILE.read_text())["deployments"]
    return [each for each in listed if Path(each["entrypoint"].partition(":")[0]).is_file()]


def install(client: SyncPrefectClient, environment: dict[str, str]) -> tuple[list[str], list[WorkPool]]:
    """Install everything; the names of what was deployed, and the pools that it runs in.

    `environment` names the server for child processes. What a person has paused stays paused.
    """
    deployed = deployments()
    pools = [_pool(client, name) for name in sorted({each["work_pool"]["name"] for each in deployed})]
    names = [each["name"] for each in deployed]
    _deploy(names, environment)
    client.upsert_global_concurrency_limit_by_name(GPU, limit=1)
    for automation in _automations(client, names):
        _automate(client, automation)
    return names, pools


def _pool(client: SyncPrefectClient, name: str) -> WorkPool:
    try:
        return client.read_work_pool(name)
    except ObjectNotFound:
        template = ProcessWorker.get_default_base_job_template()
        return client.create_work_pool(
            WorkPoolCreate(
                name=name, type=ProcessWorker.type, base_job_template=template, description="vlmdiff's flows"
            )
        )


def _deploy(names: list[str], environment: dict[str, str]) -> None:
    chosen = [argument for name in names for argument in ("--name", name)]
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--prefect-file", str(FILE), *chosen]
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"{FILE} was not deployed:\n{(done.stdout + done.stderr)[-2000:]}")


def _automations(client: SyncPrefectClient, deployed: list[str]) -> list[AutomationCore]:
    found = [
        AutomationCore(
            name="vlmdiff: a run whose process died is Crashed",
            description=f"A run that was heard of and is silent for {SILENCE.seconds} seconds has no process any more.",
            trigger=EventTrigger(
                after={HEARTBEAT},
                expect={
                    HEARTBEAT,
                    *(f"prefect.flow-run.{end}" for end in ("Completed", "Failed", "Cancelled", "Crashed")),
                },
                match={"prefect.resource.id": ["prefect.flow-run.*"]},
                for_each={"prefect.resource.id"},
                posture=Posture.Proactive,
                threshold=1,
                within=SILENCE,
            ),
            actions=[ChangeFlowRunState(state=StateType.CRASHED, message="its process died: it is heard of no more")],
        )
    ]
    if "retrain" in deployed:
        retrain = client.read_deployment_by_name("retrain/retrain").id
        found.append(
            AutomationCore(
                name="vlmdiff: drift starts retrain",
                description=f"On the event {DRIFT}, which the flow monitor emits.",
                trigger=EventTrigger(
                    expect={DRIFT}, posture=Posture.Reactive, threshold=1, within=timedelta(seconds=0)
                ),
                actions=[RunDeployment(source="selected", deployment_id=retrain)],
            )
        )
    return found


def _automate(client: SyncPrefectClient, automation: AutomationCore) -> None:
    present = client.read_automations_by_name(automation.name)
    if not present:
        client.create_automation(automation)
    for old in present:
        # To update it is to forget whom it waits for: only where this version says something else. Whether a person
        # wants it stays as it is.
        if _said(old) != _said(automation):
            client.update_automation(old.id, automation.model_copy(update={"enabled": old.enabled}))


def _said(automation: AutomationCore) -> dict:
    said = automation.model_dump(mode="json", include={"name", "description", "trigger", "actions"})
    said["trigger"].pop("id", None)
    return {**said, "trigger": {key: sorted(v) if isinstance(v, list) else v for key, v in said["trigger"].items()}}
