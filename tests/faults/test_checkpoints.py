"""Checkpoints: killed anywhere while one is written, or damaged on disk, training goes on from a whole one."""

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from vlmdiff.training import checkpoint

STEPS = (2, 4, 6)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch) -> None:
    """A process that is killed loses nothing that it has written; only a loss of power does."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def save(folder: Path, step: int) -> None:
    checkpoint.save(folder, step, {"weight": torch.full((64,), float(step))}, {"step": step, "best_loss": float("inf")})


def step_of(folder: Path) -> int | None:
    """The step of the checkpoint that is loaded, after a look at its tensors."""
    if (found := checkpoint.load(folder)) is None:
        return None
    tensors, facts = found
    assert torch.equal(tensors["weight"], torch.full((64,), float(facts["step"])))
    return facts["step"]


def killed_at(moment: int, folder: Path) -> bool:
    """Save the last step in a process that is killed at that system call which changes or syncs files."""
    if not (child := os.fork()):
        calls = 0

        def count(event: str, _: object = None) -> None:
            nonlocal calls
            if event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "open", "fsync"):
                calls += 1
                if calls == moment:
                    os._exit(9)

        os.fsync = lambda descriptor: count("fsync")
        sys.addaudithook(count)
        save(folder, STEPS[-1])
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_killed_at_any_call_that_changes_files_training_goes_on_from_a_whole_checkpoint(tmp_path, record_property):
    for step in STEPS[:-1]:
        save(tmp_path / "before", step)
    moment, seen, killed = 0, [], True
    while killed:
        moment += 1
        folder = tmp_path / str(moment)
        shutil.copytree(tmp_path / "before", folder)
        killed = killed_at(moment, folder)
        seen.append(step_of(folder))
        if moment % 8 == 0:
            # What the kill left does not stand in the way, and is gone after the next checkpoints.
            for step in (8, 10):
                save(folder, step)
            assert step_of(folder) == 10
            names = sorted(each.name for each in folder.iterdir())
            assert names == ["000000008", "000000010", "newest.json"]
    assert moment > 20 and seen == sorted(seen) and set(seen) == set(STEPS[1:])
    record_property("system calls at which a checkpoint was killed", moment - 1)


def damage(file: Path, how: str) -> None:
    whole = file.read_bytes()
    match how:
        case "absent":
            file.unlink()
        case "garbage":
            file.write_bytes(os.urandom(len(whole)))
        case "flipped":
            file.write_bytes(bytes([*whole[:-9], whole[-9] ^ 1, *whole[-8:]]))
        case quarter:
            file.write_bytes(whole[: len(whole) * int(quarter) // 4])


@pytest.mark.parametrize("how", ["absent", "garbage", "flipped", "0", "1", "2", "3"])
@pytest.mark.parametrize("name", ["state.safetensors", "facts.json", "sha256.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, capsys, name, how):
    for step in STEPS:
        save(tmp_path, step)
    assert step_of(tmp_path) == 6
    damage(tmp_path / "000000006" / name, how)
    assert step_of(tmp_path) == 4
    assert f"warning: the checkpoint {tmp_path / '000000006'} is damaged" in capsys.readouterr().out
    damage(tmp_path / "000000004" / name, how)
    assert step_of(tmp_path) is None
    assert f"warning: the checkpoint {tmp_path / '000000004'} is damaged" in capsys.readouterr().out


@pytest.mark.parametrize("how", ["absent", "garbage", "0", "1", "2", "3"])
def test_a_damaged_pointer_costs_nothing(tmp_path, how):
    for step in STEPS:
        save(tmp_path, step)
    damage(tmp_path / "newest.json", how)
    assert step_of(tmp_path) == 6
