"""Whole writes: what exists is complete, what is not ours stays, and what a killed process left is removed."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Workspace
from tests.monitoring import CLASSES, photographs, write_model, write_scores
from vlmdiff.core.errors import InputError
from vlmdiff.core.files import atomic_folder, atomic_path

KILLED = """\
import os, sys
from pathlib import Path
from vlmdiff.core import files

out = Path("models/out")
what = sys.argv[1]
if what == "between":
    replaced = os.replace
    def replace(source, target):
        replaced(source, target)
        os._exit(9)
    files.os.replace = replace
with (files.atomic_path if what == "file" else files.atomic_folder)(out) as temporary:
    (temporary if what == "file" else temporary / "new").write_text("new")
    if what != "between":
        os._exit(9)
"""


def tree(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def place(tmp_path, monkeypatch) -> Workspace:
    """A workspace in which a model has scored photographs, and folders of a person's own."""
    workspace = Workspace(tmp_path / "around/here")
    workspace.path.mkdir(parents=True)
    monkeypatch.chdir(workspace.path)
    Path("params.yaml").write_text("{}\n")
    Path("mine/deep").mkdir(parents=True)
    Path("mine/deep/thesis.txt").write_text("ten years")
    Path("file").write_text("mine")
    Path("link").symlink_to("mine")
    Path("nowhere").symlink_to("gone")
    model = write_model(workspace.path / "model")
    write_scores(Path("scores/part-1.parquet"), photographs(1, dict.fromkeys(CLASSES, 67)), model)
    return workspace


@pytest.mark.parametrize("command", ["monitor", "score"])
@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("mine", "mine holds other files (deep)"),
        (".", "is the current folder or contains it"),
        ("..", "is the current folder or contains it"),
        ("file", "file is a file"),
        ("file/out", "file is a file"),
        ("link", "link is a link"),
        ("nowhere", "nowhere is a link"),
    ],
)
def test_output_replaces_and_removes_nothing_of_others(place, command, out, words) -> None:
    before = tree(place.path)
    done = place.vlmdiff(command, "scores", "--model", "model", "--out", out, check=False)
    assert done.returncode == 2 and words in done.stdout
    assert tree(place.path) == before


def test_the_monitor_replaces_its_own_two_files_alone(place) -> None:
    Path("day").mkdir()
    Path("day/.hidden").write_text("mine")
    for _ in range(2):
        place.vlmdiff("monitor", "scores", "--model", "model", "--out", "day")
    assert sorted(file.name for file in Path("day").iterdir()) == [".hidden", "monitor.html", "monitor.json"]


@pytest.mark.parametrize("root", ["data/made", "data/made/parts", "models", "./reports/x/../photographs"])
def test_a_dataset_where_the_stages_write_is_refused_before_they_do(place, root) -> None:
    photograph = Path(root, "nut/good/0.png")
    photograph.parent.mkdir(parents=True)
    photograph.write_text("mine")
    Path("params.yaml").write_text(f"prepare: {{layout: folder, root: {root}}}\n")
    done = place.vlmdiff("prepare", check=False)
    assert done.returncode == 2 and "prepare.root: " in done.stdout and "the stages replace what is in" in done.stdout
    assert photograph.read_text() == "mine"


@pytest.mark.parametrize("what", ["file", "link", "dangling link"])
def test_a_folder_is_not_written_over_a_file_or_a_link(place, what) -> None:
    before = tree(place.path)
    with (
        pytest.raises(InputError, match="and a folder is written there"),
        atomic_folder(Path({"file": "file", "link": "link", "dangling link": "nowhere"}[what])),
    ):
        pytest.fail("work began")
    assert tree(place.path) == before


def test_a_file_is_not_written_over_a_folder(place) -> None:
    with pytest.raises(InputError, match="mine is a folder, and a file is written there"), atomic_path(Path("mine")):
        pytest.fail("work began")


@pytest.mark.parametrize("what", ["file", "folder", "between"])
def test_what_a_killed_process_left_is_removed_and_what_it_was_replacing_is_restored(place, what) -> None:
    Path("models").mkdir()
    if what == "file":
        Path("models/out").write_text("old")
    else:
        Path("models/out").mkdir()
        Path("models/out/old").write_text("old")
    before = tree(Path("models"))
    killed = subprocess.run([sys.executable, "-c", KILLED, what], stderr=subprocess.PIPE)
    assert killed.returncode == 9 and len(list(Path("models").iterdir())) == 2
    assert Path("models/out").exists() == (what != "between")
    # As a process of another machine leaves it, which may still run.
    other = Path("models/.out.elsewhere-1-0a0a0a0a.tmp")
    other.write_text("its")
    with atomic_path(Path("models/another")) as temporary:
        temporary.touch()
    for path in (other, Path("models/another")):
        path.unlink()
    assert tree(Path("models")) == before
