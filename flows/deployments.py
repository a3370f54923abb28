"""Install pools, deployments, the GPU's limit and automations in a Prefect server. A second time changes nothing."""

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

from flows import gpu
from vlmdiff.core.errors import InputError

FILE = Path("prefect.yaml")
# The event that the flow `monitor` emits and an automation waits for.
DRIFT = "vlmdiff.drift.found"
HEARTBEAT = "prefect.flow-run.heartbeat"
ENDS = ("Completed", "Failed", "Cancelled", "Crashed")
# A run sends a heartbeat every half minute (pyproject.toml).
SILENCE = timedelta(seconds=90)


def _deployments() -> list[dict]:
    """Return the deployments of prefect.yaml whose flow's file exists."""
    if not FILE.is_file():
        raise InputError(f"{FILE} does not exist: run this command in a workspace that has it")
    listed = yaml.safe_load(FILE.read_text(encoding="utf-8"))["deployments"]
    return [each for each in listed if Path(each["entrypoint"].partition(":")[0]).is_file()]


def install(client: SyncPrefectClient, environment: dict[str, str]) -> tuple[list[str], list[WorkPool]]:
    """Install everything. Return the names of the deployments, and the pools that they run in.

    A schedule or an automation that a person has paused stays paused. `environment` is that of child processes; it
    names the server. Raises InputError if there is no prefect.yaml, or Prefect does not accept it.
    """
    deployed = _deployments()
    pools = [_pool(client, name) for name in sorted({each["work_pool"]["name"] for each in deployed})]
    names = [each["name"] for each in deployed]
    _deploy(names, environment)
    gpu.install(client)
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
                name=name, type=ProcessWorker.type, base_job_template=template, description="Runs of vlmdiff's flows."
            )
        )


def _deploy(names: list[str], environment: dict[str, str]) -> None:
    chosen = [argument for name in names for argument in ("--name", name)]
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--prefect-file", str(FILE), *chosen]
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8")
    if done.returncode:
        raise InputError(f"`prefect deploy` did not accept {FILE}:\n{(done.stdout + done.stderr)[-2000:]}")


def _automations(client: SyncPrefectClient, deployed: list[str]) -> list[AutomationCore]:
    found = [
        AutomationCore(
            name="vlmdiff: a run whose process died is Crashed",
            description=f"A run that has sent heartbeats, and sends none for {SILENCE.seconds} s, has no process.",
            trigger=EventTrigger(
                after={HEARTBEAT},
                expect={HEARTBEAT, *(f"prefect.flow-run.{end}" for end in ENDS)},
                match={"prefect.resource.id": ["prefect.flow-run.*"]},
                for_each={"prefect.resource.id"},
                posture=Posture.Proactive,
                threshold=1,
                within=SILENCE,
            ),
            actions=[ChangeFlowRunState(state=StateType.CRASHED, message="its process died: it sends no heartbeats")],
        )
    ]
    if "retrain" in deployed:
        retrain = client.read_deployment_by_name("retrain/retrain").id
        found.append(
            AutomationCore(
                name="vlmdiff: drift starts retrain",
                description=f"On the event {DRIFT}, which the flow `monitor` emits, runs the deployment `retrain`.",
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
        # An update forgets the runs that the automation waits for: update only what has changed, and keep it paused if
        # a person has paused it.
        if _content(old) != _content(automation):
            client.update_automation(old.id, automation.model_copy(update={"enabled": old.enabled}))


def _content(automation: AutomationCore) -> dict:
    """Return what this module decides of an automation, with lists in one order."""
    content = automation.model_dump(mode="json", include={"name", "description", "trigger", "actions"})
    content["trigger"].pop("id", None)
    trigger = {key: sorted(v) if isinstance(v, list) else v for key, v in content["trigger"].items()}
    return {**content, "trigger": trigger}
