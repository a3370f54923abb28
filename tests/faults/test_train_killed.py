"""kill -9 in the middle of training, then the same command: the weights are those of an undisturbed run."""

import contextlib
import hashlib
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest


def weights(folder: Path) -> dict[str, str]:
    files = sorted(folder.rglob("*.safetensors"))
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def checkpoints(states: Path) -> set[str]:
    """The checkpoints that there are, by what they say of themselves; one that is being replaced is skipped."""
    found = set()
    for file in states.glob("*/checkpoint/facts.json"):
        with contextlib.suppress(FileNotFoundError):
            found.add(file.read_text())
    return found


@pytest.mark.parametrize(
    ("stage", "out"),
    [("first_stage", "models/first_stage"), ("train", "models/vlmdiff")],
    ids=["first_stage", "train"],
)
def test_training_that_was_killed_ends_with_the_same_weights(workspace, stage, out):
    workspace.set_params(**{stage: {"steps": 40, "checkpoint_every": 4, "validate_every": 10}})
    workspace.run("vlmdiff", stage)
    undisturbed = weights(workspace.path / out)
    shutil.rmtree(workspace.path / out)

    states = workspace.path / ".cache/train"
    killed = 0
    for _ in range(2):
        process = subprocess.Popen(["vlmdiff", stage], cwd=workspace.path, stdout=subprocess.PIPE, text=True)
        before = checkpoints(states)
        while process.poll() is None:
            if checkpoints(states) - before:
                process.send_signal(signal.SIGKILL)
            time.sleep(0.005)
        killed += process.wait() == -signal.SIGKILL
    assert killed == 2 and not (workspace.path / out).exists()

    output = workspace.run("vlmdiff", stage).stdout
    assert f"{stage}: resumed at step" in output
    assert weights(workspace.path / out) == undisturbed
    assert not any(states.iterdir())
