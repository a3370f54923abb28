"""`vlmdiff init` on folders of photographs: what it finds, what it writes, what it leaves alone."""

import shutil
from pathlib import Path

import pytest
import yaml
from PIL import Image

from tests.conftest import ROOT, Workspace
from vlmdiff.core.errors import InputError
from vlmdiff.core.params import load
from vlmdiff.setup.init import look, use_preset, write_params


@pytest.fixture
def fresh(new_workspace) -> Workspace:
    """A workspace as it is cloned: params.yaml is the demo's, nothing has run."""
    workspace = new_workspace()
    shutil.copy(ROOT / "params.yaml", workspace.path)
    workspace.commit()
    return workspace


def photographs(folder: Path, good: int = 6, first: int = 0) -> Path:
    """A dataset in layout `folder`: two classes, good ones and one kind of defect with masks; sizes differ."""
    for i, name in enumerate(("bolt", "nut")):
        for kind, count in (("good", good), ("scratch", 2), ("masks/scratch", 2)):
            (folder / name / kind).mkdir(parents=True, exist_ok=True)
            for number in range(first if kind == "good" else 0, count):
                colour = (number * 20 + i, 100, len(kind) * 10)
                Image.new("RGB", (64 + 16 * i, 48), colour).save(folder / name / kind / f"{number}.png")
    return folder


def init(workspace: Workspace, *options: object, check: bool = True) -> str:
    return workspace.run("vlmdiff", "init", *map(str, options), check=check).stdout


def comments(text: str) -> list[str]:
    return [line.partition("#")[2] for line in text.splitlines() if "#" in line]


def test_a_folder_becomes_parameters_and_data_under_dvc(fresh):
    photographs(fresh.path / "data/raw/parts")
    before = (fresh.path / "params.yaml").read_text()

    said = init(fresh, "--data", "data/raw/parts")

    assert "layout folder" in said and "16 images of 2 classes" in said and "2 of 2" in said
    assert "64 × 48" in said and "80 × 48" in said and "vlmdiff doctor" in said
    after = (fresh.path / "params.yaml").read_text()
    assert comments(after) == comments(before)
    changed = {a for a, b in zip(after.splitlines(), before.splitlines(), strict=True) if a != b}
    assert {line.partition("#")[0].strip() for line in changed} == {"layout: folder", "root: data/raw/parts"}
    assert fresh.run("git", "status", "--short").stdout.split() == ["M", "params.yaml", "??", "data/raw/parts.dvc"]
    assert "16 images of 2 classes" in fresh.run("dvc", "repro", "prepare").stdout


def test_grown_data_is_taken_in_and_edits_stay(fresh):
    photographs(fresh.path / "data/raw/parts")
    init(fresh, "--data", "data/raw/parts")
    fresh.run("dvc", "repro", "prepare")
    file = fresh.path / "params.yaml"
    file.write_text(file.read_text().replace("steps: 420", "steps: 421"))
    edited = file.read_text()
    tracked = (fresh.path / "data/raw/parts.dvc").read_text()

    photographs(fresh.path / "data/raw/parts", good=9, first=6)
    preset = ROOT / "presets/photographs.yaml"
    said = init(fresh, "--data", "data/raw/parts", "--preset", preset)

    assert "since the last run of prepare: 6 new, 0 removed" in said
    assert f"train.steps: 421, here {yaml.safe_load(preset.read_text())['train']['steps']}" in said
    assert file.read_text() == edited
    assert (fresh.path / "data/raw/parts.dvc").read_text() != tracked


def test_a_preset_is_written_with_the_folder_in_its_place(fresh):
    photographs(fresh.path / "data/raw/parts")
    init(fresh, "--data", "data/raw/parts", "--preset", ROOT / "presets/photographs.yaml")
    written, preset = (
        yaml.safe_load(file.read_text()) for file in (fresh.path / "params.yaml", ROOT / "presets/photographs.yaml")
    )
    assert written == preset | {"prepare": {"layout": "folder", "root": "data/raw/parts"}}
    again = init(fresh, "--data", "data/raw/parts", "--preset", ROOT / "presets/photographs.yaml")
    assert "params.yaml is up to date" in again


def test_an_image_in_two_splits_is_named_and_one_side_is_left_out_in_writing(fresh):
    root = fresh.path / "data/raw/parts"
    for i in range(6):
        place = root / "nut" / ("train/good" if i < 5 else "test/good")
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 48), (20 * i, 0, 0)).save(place / f"{i}.png")
    shutil.copy(root / "nut/train/good/1.png", root / "nut/test/good/9.png")
    # Copies within a split are prepare's to leave out.
    shutil.copy(root / "nut/train/good/2.png", root / "nut/train/good/8.png")
    command = ("init", "--data", "data/raw/parts")
    said = " ".join(fresh.vlmdiff(*command).stdout.split())
    assert "1 image is in two splits (nut/train/good/1.png = nut/test/good/9.png)" in said
    assert "--copies keep_test" in said and load(fresh.path / "params.yaml").prepare.copies == "error"
    fresh.set_params(train={"steps": 421})
    assert "two splits" not in fresh.vlmdiff(*command, "--copies", "keep_test").stdout
    written = load(fresh.path / "params.yaml")
    assert written.prepare.copies == "keep_test" and written.train.steps == 421
    assert "two splits" not in fresh.vlmdiff(*command).stdout
    assert "1 image is left out, with the same bytes as an image of another split" in fresh.vlmdiff("prepare").stdout


def test_a_folder_elsewhere_is_read_in_place_and_followed(fresh, tmp_path):
    outside = photographs(tmp_path / "elsewhere/my parts")
    said = init(fresh, "--data", outside)
    assert "outside of this workspace" in said.replace("\n", " ")
    assert "16 images of 2 classes" in fresh.run("dvc", "repro", "prepare").stdout
    photographs(outside, good=7, first=6)
    assert "18 images of 2 classes" in fresh.run("dvc", "repro", "prepare").stdout


def test_what_fits_no_layout_is_told_layout_by_layout(fresh):
    (fresh.path / "data/raw/parts/bolt/fine").mkdir(parents=True)
    said = init(fresh, "--data", "data/raw/parts", check=False)
    assert "fits no layout" in said and "folder: data/raw/parts/bolt has no good" in said
    assert "data/raw/nowhere is not a folder" in init(fresh, "--data", "data/raw/nowhere", check=False)
    assert "choose one of" in init(fresh, "--data", "data/raw/parts", "--layout", "heap", check=False)
    assert yaml.safe_load((fresh.path / "params.yaml").read_text())["prepare"]["layout"] == "demo"


def test_the_folder_whose_readme_git_tracks_is_read_and_not_taken_in(fresh):
    photographs(fresh.path / "data/raw")
    said = init(fresh, "--data", "data/raw").replace("\n", " ")
    assert "data/raw/README.md" in said and "does not push it" in said
    assert not list((fresh.path / "data").glob("**/*.dvc"))


@pytest.mark.parametrize("preset", sorted((ROOT / "presets").glob("*.yaml")), ids=lambda file: file.stem)
def test_a_presets_model_for_the_data_that_are_there(tmp_path, preset):
    file = tmp_path / "params.yaml"
    shutil.copy(ROOT / "params.yaml", file)
    ours, theirs = load(file), load(preset)
    use_preset(preset, file)
    now = load(file)
    for section in type(now).model_fields:
        source = theirs if section in ("caption", "first_stage", "encode", "train", "evaluate") else ours
        assert getattr(now, section) == getattr(source, section), section
    # Sections stay in their order, and bring their comments.
    assert list(yaml.safe_load(file.read_text())) == list(yaml.safe_load((ROOT / "params.yaml").read_text()))
    assert set(comments(preset.read_text().partition("train:")[2].partition("evaluate:")[0])) <= set(
        comments(file.read_text())
    )


OURS = """\
# Line 3.
prepare: {layout: folder, root: 'data/raw/our parts'}

train:
  steps: 5 # ours
# Strict: nobody looks at these parts again.
gate:
    floors: {au_pro: {mean: 0.5, every_class: 0.5}}   # by class, as agreed with the customer, who looks at each by hand
    max_latency_ms: null
"""
PRESET = """\
encode: {mirror: [horizontal]}

train: # of the preset
  steps: 7

  # slow
  learning_rate: 0.0001
"""


def test_a_preset_changes_no_line_outside_of_the_model(tmp_path):
    file, preset = tmp_path / "params.yaml", tmp_path / "preset.yaml"
    file.write_text(OURS)
    preset.write_text(PRESET)
    use_preset(preset, file)
    train = PRESET.partition("\n\n")[2]
    expected = OURS.replace("train:\n  steps: 5 # ours\n", train)
    for other in ("caption: {}", "first_stage: {}", "encode: {mirror: [horizontal]}", "evaluate: {}"):
        expected += f"\n{other}\n"
    assert file.read_text() == expected


def test_a_key_that_stands_twice_is_refused_by_its_line(tmp_path):
    file = tmp_path / "params.yaml"
    file.write_text("train: {steps: 3}\ntrain: {steps: 4}\n")
    with pytest.raises(InputError, match=r"params\.yaml, line 2: found duplicate key \"train\""):
        use_preset(ROOT / "presets/visa_fast.yaml", file)


@pytest.mark.parametrize(
    "text", ["", "prepare: {layout: demo}\n", "# ours\nprepare:\n  # see wiki\n  test_fraction: 0.5\n"]
)
def test_layout_and_root_are_added_where_they_are_not_written(tmp_path, text):
    file = tmp_path / "preset.yaml"
    file.write_text(text)
    photographs(tmp_path / "parts")
    found = look(tmp_path / "parts", load(file).prepare, None)
    write_params(found, file, tmp_path / "params.yaml")
    now = load(tmp_path / "params.yaml").prepare
    assert (now.layout, now.root) == ("folder", tmp_path / "parts")
    assert now.test_fraction == load(file).prepare.test_fraction
    assert comments((tmp_path / "params.yaml").read_text()) == comments(text)


def test_a_preset_that_is_none_leaves_params_as_they_are(tmp_path):
    file, preset = tmp_path / "params.yaml", tmp_path / "preset.yaml"
    shutil.copy(ROOT / "params.yaml", file)
    before = file.read_text()
    preset.write_text("train: {stepps: 3}\n")
    with pytest.raises(InputError, match="stepps"):
        use_preset(preset, file)
    assert file.read_text() == before and sorted(tmp_path.iterdir()) == [file, preset]
