"""kill -9 in the middle of training, then the same command: the weights are those of an undisturbed run."""

import contextlib
import hashlib
import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest


def weights(folder: Path) -> dict[str, str]:
    files = sorted(folder.rglob("*.safetensors"))
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def checkpoints(states: Path) -> set[str]:
    """The checkpoints that there are, by what they say of themselves; one that is being replaced is skipped."""
    found = set()
    for file in states.glob("*/checkpoint/0*/facts.json"):
        with contextlib.suppress(FileNotFoundError):
            found.add(file.read_text())
    return found


def loss_curve(workspace, stage: str) -> list[dict[str, float]]:
    return json.loads((workspace.path / f"reports/{stage}/loss.json").read_text())


def run_and_kill(workspace, command: list[str]) -> bool:
    """Start training, kill -9 all of it as soon as there is a new checkpoint; whether it died of that."""
    states = workspace.path / ".cache/train"
    process = subprocess.Popen(command, cwd=workspace.path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    before = checkpoints(states)
    while process.poll() is None:
        if checkpoints(states) - before:
            for child in psutil.Process(process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            process.kill()
        time.sleep(0.005)
    process.stdout.close()
    return process.wait() == -signal.SIGKILL


@pytest.mark.parametrize(
    ("stage", "out", "settings"),
    [
        # Killed before and after the discriminator joins: both networks' moments are in the checkpoint.
        pytest.param(
            "first_stage",
            "models/first_stage",
            {"discriminator": {"start": 6, "channels": 8, "layers": 2}},
            marks=pytest.mark.services,
        ),
        ("train", "models/vlmdiff", {}),
    ],
    ids=["first_stage", "train"],
)
def test_training_that_was_killed_ends_with_the_same_weights(workspace, stage, out, settings):
    workspace.set_params(**{stage: {"steps": 40, "checkpoint_every": 4, "validate_every": 10, **settings}})
    workspace.run("vlmdiff", stage)
    undisturbed = weights(workspace.path / out)
    shutil.rmtree(workspace.path / out)

    for _ in range(2):
        assert run_and_kill(workspace, ["vlmdiff", stage])
    assert not (workspace.path / out).exists()

    output = workspace.run("vlmdiff", stage).stdout
    assert f"{stage}: resumed at step" in output
    assert weights(workspace.path / out) == undisturbed
    assert not any((workspace.path / ".cache/train").iterdir())


# Of one thread each: more would wait for each other on two cores.
TWO = ["env", "OMP_NUM_THREADS=1", "accelerate", "launch", "--multi_gpu", "--num_machines=1"]
TWO += [
    "--mixed_precision=no",
    "--dynamo_backend=no",
    "--main_process_port=0",
    "--num_processes=2",
    "-m",
    "vlmdiff.cli",
]


def assert_same_curve(curve, other) -> None:
    assert [row["step"] for row in curve] == [row["step"] for row in other]
    for key in ("loss", "validation_loss", "learning_rate"):
        assert [row[key] for row in curve] == pytest.approx([row[key] for row in other], abs=1e-4)


@pytest.mark.services
def test_two_processes_train_as_one_does_and_go_on_after_a_kill_in_the_middle_of_an_epoch(workspace):
    # An epoch is 61 images, or more than seven steps: a checkpoint every three lies in the middle of one.
    # In bf16 the sum of two processes' gradients rounds another way than one process's.
    steps = {"steps": 20, "checkpoint_every": 3, "validate_every": 5, "accumulate": 2}
    workspace.set_params(train={**steps, "precision": "fp32"})
    out = workspace.path / "models/vlmdiff"
    workspace.run("vlmdiff", "train")
    one = loss_curve(workspace, "train")
    workspace.run(*TWO, "train")
    two, undisturbed = loss_curve(workspace, "train"), weights(out)
    assert_same_curve(two, one)
    shutil.rmtree(out)

    assert run_and_kill(workspace, [*TWO, "train"])
    output = workspace.run(*TWO, "train").stdout
    # Only the main process speaks, as only it writes.
    assert output.count("train: resumed at step") == 1
    # The sum of two gradients has one order: it is the same to the bit.
    assert weights(out) == undisturbed
    assert loss_curve(workspace, "train") == two
    assert not any((workspace.path / ".cache/train").iterdir())


@pytest.mark.services
def test_two_processes_train_an_autoencoder_against_a_discriminator_as_one_does(workspace):
    # The weight of the discriminator is a ratio of gradients over the whole batch, not over a process's share.
    adversary = {"start": 2, "channels": 8, "layers": 2}
    steps = {"steps": 5, "validate_every": 1, "precision": "fp32"}
    workspace.set_params(first_stage={**steps, "discriminator": adversary})
    workspace.run("vlmdiff", "first_stage")
    one = loss_curve(workspace, "first_stage")
    workspace.run(*TWO, "first_stage")
    assert_same_curve(loss_curve(workspace, "first_stage"), one)
