"""A disk that is full or read-only and too little memory, in every stage and command: a sentence, and nothing lost."""

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import psutil
import pytest
from PIL import Image

from tests.conftest import Workspace
from tests.processes import wait_for

MODEL = ("--model", "models/detector")
COMMANDS = {
    "prepare": ("prepare",),
    "validate": ("validate",),
    "caption": ("caption",),
    "first_stage": ("first_stage",),
    "encode": ("encode",),
    "train": ("train",),
    "evaluate": ("evaluate",),
    "register": ("register",),
    "gate": ("gate",),
    "promote": ("promote", "1"),
    "score": ("score", "data/made/cable/test", *MODEL, "--out", "out", "--heatmaps"),
    "score by the champion": ("score", "data/made/cable/test", "--out", "out"),
    "monitor": ("monitor", "scores", *MODEL, "--out", "drift"),
    "feedback": ("feedback", "normal", "new.png", "--class-name", "cable", "--by", "Ada"),
    "init": ("init", "--data", "photographs"),
}
# What commands keep for themselves, or record of the time.
OWN = (".cache", "mlflow.db", "mlruns", ".dvc", ".git", "tmp", "reports")
DISK = 256 * 2**20


@pytest.fixture(scope="module")
def line(tiny_line, made_store, tmp_path_factory) -> Workspace:
    """The tiny line without links, with a champion, scores, and a folder that takes feedback."""
    path = tmp_path_factory.mktemp("line") / "workspace"
    shutil.copytree(tiny_line.path, path, ignore=shutil.ignore_patterns("cache"))
    workspace = Workspace(path)
    shutil.copy(made_store, path)
    workspace.vlmdiff("score", "data/made/cable/test", *MODEL, "--out", "scores")
    return workspace


@pytest.fixture
def disk(line, tmp_path, monkeypatch) -> Iterator[Workspace]:
    """A copy of the line on a small disk of its own; where none may be mounted, in a folder."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = not subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(place)]).returncode
    try:
        shutil.copytree(line.path, place / "workspace", symlinks=True)
        (place / "workspace/tmp").mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(place / "workspace/tmp"))
        yield Workspace(place / "workspace")
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(place)], check=True)


@contextlib.contextmanager
def full(place: Path, free: int) -> Iterator[None]:
    """So many bytes are free on the disk; where it has none of its own, no file may become larger than them."""
    if not place.parent.is_mount():
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (free, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        return
    ballast = place.parent / "ballast"
    with ballast.open("wb") as file:
        left = os.statvfs(place)
        os.posix_fallocate(file.fileno(), 0, max(left.f_bavail * left.f_frsize - free, 1))
    try:
        yield
    finally:
        ballast.unlink()


def ready(disk: Workspace, name: str) -> None:
    """Bring about what a command needs."""
    if name in ("gate", "promote", "score by the champion"):
        disk.vlmdiff("register")
    if name == "score by the champion":
        disk.vlmdiff("promote", "1")
    if name in ("feedback", "init"):
        shutil.copytree(disk.path / "data/made", disk.path / "photographs")
        Image.new("RGB", (64, 64), "red").save(disk.path / "new.png")
    if name == "feedback":
        disk.set_params(prepare={"layout": "mvtec_ad", "root": "photographs"})


def tree(place: Path) -> dict[str, str]:
    """What the workspace has of the dataset, models and results, by hash."""
    found = {}
    for file in sorted(place.rglob("*")):
        relative = file.relative_to(place)
        if file.is_file() and relative.parts[0] not in OWN:
            found[str(relative)] = sha256(file.read_bytes()).hexdigest()
    return found


def assert_a_sentence(name: str, done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 2 and "Traceback" not in done.stdout, f"{name}: {done.returncode}: {done.stdout}"
    errors = [text for text in done.stdout.splitlines() if text.startswith("error: ")]
    assert len(errors) == 1, f"{name}: {done.stdout}"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_is_a_sentence_and_once_there_is_room_the_same_command_goes_on(disk, name) -> None:
    ready(disk, name)
    before, said = tree(disk.path), []
    for free in (0, 2**17):
        with full(disk.path, free):
            done = disk.vlmdiff(*COMMANDS[name], check=False)
        if not done.returncode:
            break
        said.append(done.stdout)
        assert_a_sentence(name, done)
        after = tree(disk.path)
        assert {path: after.get(path) for path in before} == before
        assert not [path for path in after if path.endswith((".tmp", ".old"))]
    assert said
    disk.vlmdiff(*COMMANDS[name])


@pytest.mark.parametrize("name", COMMANDS)
def test_a_read_only_disk_is_a_sentence(disk, tmp_path, name) -> None:
    if not disk.path.parent.is_mount():
        pytest.skip("no disk may be mounted here")
    ready(disk, name)
    before, place = tree(disk.path), tmp_path / "read-only"
    place.mkdir()
    subprocess.run(["mount", "--bind", str(disk.path.parent), str(place)], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(place)], check=True)
        done = Workspace(place / "workspace").vlmdiff(*COMMANDS[name], check=False)
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)
    assert_a_sentence(name, done)
    assert tree(disk.path) == before


def short_of_memory(workspace: Workspace, spare: int, command: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """Run a command in a child process that may take so many bytes more than this process has."""
    answer = workspace.path.parent / "answer"
    if not (child := os.fork()):
        # All at once: memory that this process has freed would be there too.
        limit = psutil.Process().memory_info().vms + spare
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        try:
            done = workspace.vlmdiff(*command, check=False)
            answer.write_text(f"{done.returncode}\n{done.stdout}")
        except BaseException as error:
            answer.write_text(f"-1\n{error!r}")
        finally:
            os._exit(0)
    wait_for(lambda: os.waitpid(child, os.WNOHANG)[0], 120, lambda: os.kill(child, signal.SIGKILL))
    assert answer.exists(), f"{command} with {spare} bytes ended without a word"
    status, _, said = answer.read_text().partition("\n")
    answer.unlink()
    return subprocess.CompletedProcess(command, int(status), said)


# Not `train`: PyTorch's backward pass may end the process by a signal, which is StageDisturbed in the flow.
IN_MEMORY = ("prepare", "validate", "caption", "first_stage", "encode", "evaluate", "score", "monitor", "feedback")


@pytest.mark.parametrize("name", IN_MEMORY)
def test_too_little_memory_is_a_sentence_and_with_enough_the_same_command_goes_on(disk, name) -> None:
    ready(disk, name)
    before = tree(disk.path)
    done = short_of_memory(disk, 2**20, COMMANDS[name])
    # What needs no more than there is may succeed.
    if done.returncode:
        assert_a_sentence(name, done)
        assert "not enough memory" in done.stdout
        assert tree(disk.path) == before
    disk.vlmdiff(*COMMANDS[name])
