"""`vlmdiff feedback`: what a person said of photographs becomes training and test data, once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from vlmdiff import stages
from vlmdiff.cli import app
from vlmdiff.core import workspace as w
from vlmdiff.core.errors import InputError
from vlmdiff.core.files import sha256
from vlmdiff.core.params import load
from vlmdiff.core.processes import login_name
from vlmdiff.data import contract, listing, manifest
from vlmdiff.data.excluded import decide
from vlmdiff.data.feedback import Statement, answers, give_feedback, withdraw

GOOD = {"folder": "bottle/good", "mvtec_ad": "bottle/train/good"}
SPLIT = {"folder": "bottle/crack", "mvtec_ad": "bottle/test/crack"}
MASK = {"folder": "bottle/masks/crack/{}.png", "mvtec_ad": "bottle/ground_truth/crack/{}_mask.png"}


def photograph(file: Path, seed: int) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (36, 48, 3), dtype=np.uint8)).save(file)
    return file


def mask(file: Path, shape=(36, 48), value=255) -> Path:
    pixels = np.zeros(shape, np.uint8)
    pixels[:3] = value
    Image.fromarray(pixels).save(file)
    return file


@pytest.fixture(params=["folder", "mvtec_ad"])
def layout(request, tmp_path, monkeypatch) -> str:
    """A dataset of one class with four normal images and one defective, in a workspace that is the current folder."""
    monkeypatch.chdir(tmp_path)
    name = request.param
    for seed in range(4):
        photograph(Path("data/raw", GOOD[name], f"{seed}.png"), seed)
    photograph(Path("data/raw", SPLIT[name], "0.png"), 10)
    if name == "mvtec_ad":
        photograph(Path("data/raw/bottle/test/good/0.png"), 11)
    params = {"prepare": {"layout": name}, "validate": {"masks": "optional"}}
    Path("params.yaml").write_text(yaml.safe_dump(params))
    return name


def require_masks(layout: str) -> None:
    Path("params.yaml").write_text(yaml.safe_dump({"prepare": {"layout": layout}}))


def give(*arguments: str, by: str | None = "Ada Lovelace") -> str:
    """The command's output; InputError where it fails."""
    name = [] if by is None else ["--by", by]
    result = CliRunner().invoke(app, ["feedback", "--class-name", "bottle", *map(str, arguments), *name])
    if result.exception:
        raise result.exception
    return result.output


def tree() -> set[str]:
    return {str(file) for file in Path("data").rglob("*") if file.is_file()}


def refused(*arguments, words: tuple[str, ...]) -> None:
    """The command fails with all of the words in its message, and changes no file."""
    before = tree()
    with pytest.raises(InputError) as caught:
        give(*arguments)
    for word in words:
        assert word in str(caught.value)
    assert tree() == before


def records() -> dict[str, tuple[str, str | None, str | None]]:
    params = load().prepare
    frame = listing.build(params, params.root)
    return {
        row.image_id: ("test" if row.split == "test" else "train", row.defect, row.mask_path)
        for row in frame.itertuples()
    }


def test_confirmed_photographs_join_the_training_data_and_rejected_ones_the_test_data(layout) -> None:
    before = records()
    good, bad = photograph(Path("new/a.png"), 20), photograph(Path("new/b.PNG"), 21)
    said = give("normal", good)
    assert "1 added" in said and "dvc repro" in said and "dvc add" not in said
    give("anomalous", bad, "--defect", "crack", "--mask", mask(Path("m.png")))

    new = {image_id: where for image_id, where in records().items() if image_id not in before}
    assert len(new) == 2
    (normal,) = [image_id for image_id, where in new.items() if where[1] is None]
    (defective,) = set(new) - {normal}
    stem = next(Path("data/raw", SPLIT[layout]).glob(f"{defective[:16]}*")).stem
    assert new[defective] == ("test", "crack", MASK[layout].format(stem))
    if layout == "mvtec_ad":
        assert new[normal][0] == "train"


def test_the_log_says_what_was_said_and_by_whom(layout) -> None:
    give("normal", photograph(Path("a.png"), 20))
    give("anomalous", photograph(Path("b.png"), 21), by=None)
    first, second = (json.loads(line) for line in Path("data/feedback.jsonl").read_text().splitlines())
    assert (first["truth"], first["class_name"], first["by"]) == ("normal", "bottle", "Ada Lovelace")
    assert (second["truth"], second["defect"]) == ("anomalous", "anomaly") and second["by"]
    assert first["image_id"] in records() and second["when"] >= first["when"]


def test_twice_is_as_good_as_once(layout) -> None:
    file = photograph(Path("a.png"), 20)
    copy = photograph(Path("copy.png"), 20)
    give("normal", file, copy)
    before = {name: Path(name).read_bytes() for name in tree()}
    assert "0 added, 2 in the dataset already" in give("normal", file, copy)
    assert {name: Path(name).read_bytes() for name in tree()} == before


def test_a_killed_feedback_is_finished_by_the_same_command(layout) -> None:
    file, drawn = photograph(Path("a.png"), 20), mask(Path("m.png"))
    give("anomalous", file, "--defect", "crack", "--mask", drawn)
    whole = tree()
    for name in sorted(whole):
        if "feedback" in name or "mask" in name or "ground_truth" in name:
            Path(name).unlink()
    give("anomalous", file, "--defect", "crack", "--mask", drawn)
    assert tree() == whole


def test_a_photograph_that_is_in_the_other_set_is_refused(layout) -> None:
    trained_on = Path("data/raw", GOOD[layout], "1.png")
    refused("anomalous", trained_on, words=("1.png is in the dataset already, as", "cannot be in"))
    tested_on = Path("data/raw", SPLIT[layout], "0.png")
    refused("normal", photograph(Path("a.png"), 20), tested_on, words=("0.png is in the dataset already",))


def test_a_mask_that_is_required_is_asked_for_before_anything_is_copied(layout) -> None:
    require_masks(layout)
    refused("anomalous", photograph(Path("a.png"), 20), words=("validate.masks is required", "--mask"))
    assert "1 added" in give("anomalous", "a.png", "--mask", mask(Path("m.png")))


def test_what_is_no_photograph_is_refused_and_the_ones_beside_it_are_not_copied(layout) -> None:
    good = photograph(Path("a.png"), 20)
    cut = Path("cut.png")
    cut.write_bytes(good.read_bytes()[:200])
    refused("normal", good, cut, words=("cut.png cannot be decoded",))
    refused("normal", good, Path("none.png"), words=("none.png does not exist",))
    good.rename("a.dat")
    refused("normal", Path("a.dat"), words=("a.dat", "must end in"))


def test_a_mask_that_does_not_fit_is_refused(layout) -> None:
    file, other = photograph(Path("a.png"), 20), photograph(Path("b.png"), 21)
    refused(
        "anomalous",
        file,
        "--mask",
        mask(Path("small.png"), (18, 24)),
        words=("each mask has the size", "24 x 18", "48 x 36"),
    )
    refused(
        "anomalous",
        file,
        "--mask",
        mask(Path("black.png"), value=0),
        words=("black.png", "mask of an anomalous image is not empty"),
    )
    refused("anomalous", file, "--mask", other, words=("b.png", "each mask has two values"))
    fitting = mask(Path("m.png"))
    refused("anomalous", file, other, "--mask", fitting, words=("one photograph, and there are 2",))
    refused("normal", file, "--mask", fitting, words=("a normal photograph has no mask",))


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("RGBA", ("one of the modes RGB, L", "this one: RGBA", "validate.modes")),
        ("CMYK", ("this one: CMYK",)),
        ("I;16", ("this one: I;16",)),
        ("P", ("this one: P",)),
        ("small", ("at least 32 pixels a side", "8 x 8", "validate.min_side")),
    ],
)
def test_what_validate_would_refuse_does_not_come_in(layout, form, words) -> None:
    file = photograph(Path("new.tif"), 20)
    with Image.open(file) as image:
        image.load()
    if form == "small":
        image.resize((8, 8)).save(file)
    elif form == "I;16":
        Image.fromarray(np.asarray(image)[..., 0].astype(np.uint16) * 257).save(file)
    else:
        image.convert(form).save(file)
    refused("normal", photograph(Path("a.png"), 21), file, words=("new.tif breaks the data contract", *words))
    # The contract agrees: the file in the dataset stops validate.
    file.rename(Path("data/raw", GOOD[layout], "new.tif"))
    frame = listing.build(load().prepare, load().prepare.root)
    found = contract.check_dataset(frame, load().prepare, load().validate_, 64, Path("report"))
    assert {"mode", "size"} & {finding.rule for finding in found.broken("error")}


def test_another_mask_of_the_same_photograph_is_refused_and_the_first_stays(layout) -> None:
    file, drawn = photograph(Path("a.png"), 20), mask(Path("m.png"))
    give("anomalous", file, "--defect", "crack", "--mask", drawn)
    mask(drawn, value=1)
    refused("anomalous", file, "--defect", "crack", "--mask", drawn, words=("has another mask already",))
    with Image.open(drawn) as image:
        image.save("m.bmp")
    refused("anomalous", file, "--defect", "crack", "--mask", "m.bmp", words=("has another mask already",))


def test_a_last_line_of_the_log_that_a_kill_cut_off_is_removed(layout) -> None:
    log = Path("data/feedback.jsonl")
    for seed in (20, 21):
        give("normal", photograph(Path(f"{seed}.png"), seed))
    whole = log.read_bytes()
    first = whole.splitlines(keepends=True)[0]
    for kept in (len(first) + 1, len(first) + 40, len(whole) - 2):
        log.write_bytes(whole[:kept])
        assert "the last line was cut off and is removed" in give("normal", Path("21.png"))
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        assert len(rows) == 2 and rows[0] == json.loads(first)
    # A whole line without its end is whole.
    log.write_bytes(whole[:-1])
    give("normal", photograph(Path("22.png"), 22))
    assert len([json.loads(line) for line in log.read_text().splitlines()]) == 3


@pytest.mark.parametrize("line", ["garbage", "[1]", '{"image_id": "x"}', "\0\0"])
def test_a_damaged_line_of_the_log_is_named_and_nothing_is_copied(layout, line) -> None:
    log = Path("data/feedback.jsonl")
    log.write_text(f"{line}\n")
    refused("normal", photograph(Path("a.png"), 20), words=("feedback.jsonl, line 1: not a line of feedback",))


@pytest.mark.parametrize("layout", ["folder"], indirect=True)
def test_several_people_at_once_are_all_in_the_log(layout) -> None:
    command = [sys.executable, "-m", "vlmdiff.cli", "feedback", "normal", "--class-name", "bottle", "--by", "Ada"]
    files = [photograph(Path(f"{seed}.png"), seed) for seed in range(20, 24)]
    running = [subprocess.Popen([*command, file], stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for file in files]
    said = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0] * 4, said
    rows = [json.loads(line) for line in Path("data/feedback.jsonl").read_text().splitlines()]
    assert len({row["image_id"] for row in rows}) == 4


def test_a_login_without_a_name_is_asked_for_one(layout, monkeypatch) -> None:
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000)
    with pytest.raises(InputError, match="your login has no name here: say who you are by --by NAME"):
        give("normal", photograph(Path("a.png"), 20), by=None)
    # The inspector's page begins with an empty field, and asks too.
    assert login_name() == ""
    with pytest.raises(InputError, match="say who you are"):
        give_feedback([Path("a.png")], Statement("nut", None, " "), load(), Path("log.jsonl"))


@pytest.mark.parametrize("name", ["good", "masks", "../else", ".hidden", " ", "crack ", "crack\n"])
def test_a_defect_that_cannot_be_a_folder_of_its_own_is_refused(layout, name) -> None:
    refused("anomalous", photograph(Path("a.png"), 20), "--defect", name, words=(repr(name),))


def test_a_name_that_is_too_long_for_a_file_is_refused(layout) -> None:
    file = photograph(Path("a.png"), 20)
    refused("anomalous", file, "--defect", "é" * 130, words=("the kind of defect 'éé", "260 bytes", "shorter"))
    with pytest.raises(InputError, match=r"the class 'x+…' has 300 bytes"):
        give("normal", file, "--class-name", "x" * 300)


def test_an_unknown_class_is_refused_with_the_known_ones(layout) -> None:
    photograph(Path("a.png"), 20)
    result = CliRunner().invoke(app, ["feedback", "normal", "a.png", "--class-name", "botle"])
    assert "no class 'botle', only bottle" in str(result.exception)


def test_data_that_dvc_tracks_by_itself_is_to_be_added_again(layout) -> None:
    Path("data/raw.dvc").write_text("outs: []\n")
    assert f"`dvc add {os.path.join('data', 'raw')}`" in give("normal", photograph(Path("a.png"), 20))


def small_demo(root: Path) -> dict:
    return {"demo": {"train": 2, "test_good": 1, "test_per_defect": 1, "size": 64}}


def small_btad(root: Path) -> dict:
    for i, name in enumerate(("train/ok/0.png", "train/ok/1.png", "test/ok/0.png", "test/ko/1.png")):
        photograph(root / "bottle" / name, i)
    return {}


def small_table(root: Path) -> dict:
    for i in range(4):
        photograph(root / f"{i}.png", i)
    rows = ["path,class_name,label", *(f"{i}.png,bottle,{'normal' if i < 3 else 'anomaly'}" for i in range(4))]
    (root / "images.csv").write_text("\n".join(rows))
    return {}


@pytest.mark.parametrize(
    ("name", "fill", "class_name"),
    [("demo", small_demo, "cable"), ("btad", small_btad, "bottle"), ("table", small_table, "bottle")],
)
def test_a_layout_without_a_place_for_feedback_has_it_in_a_folder_of_its_own(
    tmp_path, monkeypatch, name, fill, class_name
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data/raw").mkdir(parents=True)
    Path("params.yaml").write_text(yaml.safe_dump({"prepare": {"layout": name, **fill(Path("data/raw"))}}))
    params = load()

    def prepare() -> pd.DataFrame:
        stages.prepare(params.prepare, w.MADE, w.MANIFEST)
        return manifest.read(w.MANIFEST).set_index("image_id")

    def say(*arguments) -> str:
        result = CliRunner().invoke(app, ["feedback", *map(str, arguments), "--class-name", class_name, "--by", "Ada"])
        if result.exception:
            raise result.exception
        return result.output

    before = prepare()
    good, bad = photograph(Path("a.png"), 20), photograph(Path("b.png"), 21)
    say("normal", good)
    say("anomalous", bad, "--defect", "crack", "--mask", mask(Path("m.png")))
    after = prepare()
    assert set(before.index) < set(after.index)
    normal, defective = after.loc[sha256(good)], after.loc[sha256(bad)]
    assert normal["split"] in ("train", "validation") and normal["class_name"] == class_name
    assert (defective["split"], defective["defect"]) == ("test", "crack") and "masks" in defective["mask_path"]
    # Images that the stage makes are images of the dataset too.
    known = Path(params.prepare.image_root, before[before["is_anomalous"]]["path"].iloc[0])
    with pytest.raises(InputError, match="is in the dataset already"):
        say("normal", known)
    with pytest.raises(InputError, match=r"no class 'botle', only .*" + class_name):
        give_feedback([good], Statement("botle", None, "Ada"), params, w.FEEDBACK)
    # What was said can be taken back.
    withdraw(sha256(bad), "Grace Hopper", params, w.FEEDBACK)
    assert not list(Path("data/raw").rglob(f"{sha256(bad)[:16]}*")) and set(answers(w.FEEDBACK)) == {sha256(good)}


def test_what_was_said_can_be_taken_back_and_said_again(layout) -> None:
    file, drawn = photograph(Path("a.png"), 20), mask(Path("m.png"))
    before = tree()
    give("anomalous", file, "--defect", "crack", "--mask", drawn)
    taken = withdraw(sha256(file), "Grace Hopper", load(), w.FEEDBACK)
    assert (taken["truth"], taken["by"]) == ("anomalous", "Ada Lovelace")
    assert tree() - {str(w.FEEDBACK)} == before - {str(w.FEEDBACK)} and not answers(w.FEEDBACK)
    with pytest.raises(InputError, match="nothing to take back"):
        withdraw(sha256(file), "Grace Hopper", load(), w.FEEDBACK)
    give("normal", file)
    rows = [json.loads(line) for line in w.FEEDBACK.read_text().splitlines()]
    assert [(row["truth"], row["by"]) for row in rows] == [
        ("anomalous", "Ada Lovelace"),
        ("withdrawn", "Grace Hopper"),
        ("normal", "Ada Lovelace"),
    ]
    # Images that feedback did not add stay.
    trained_on = Path("data/raw", GOOD[layout], "1.png")
    give("normal", trained_on)
    withdraw(sha256(trained_on), "Grace Hopper", load(), w.FEEDBACK)
    assert trained_on.exists()


def test_the_second_of_two_who_disagree_learns_what_the_first_said(layout) -> None:
    file = photograph(Path("a.png"), 20)
    give("normal", file)
    refused("anomalous", file, words=("Ada Lovelace said at", "that it is normal"))


def test_an_excluded_image_is_left_out_and_nothing_is_deleted(layout) -> None:
    path = Path(GOOD[layout], "1.png")
    image_id = sha256(Path("data/raw", path))
    before, files = set(records()), tree()
    decide([(image_id, str(path))], True, "a scratch", "Ada Lovelace", Path("data/raw"))
    assert set(records()) == before - {image_id}
    assert tree() == files | {"data/raw/excluded.jsonl"}
    (row,) = (json.loads(line) for line in Path("data/raw/excluded.jsonl").read_text().splitlines())
    assert (row["why"], row["by"], row["path"]) == ("a scratch", "Ada Lovelace", str(path)) and row["when"]
    decide([(image_id, str(path))], False, "only dust", "Grace Hopper", Path("data/raw"))
    assert set(records()) == before
    with pytest.raises(InputError, match="who decides, and why"):
        decide([(image_id, str(path))], True, " ", "Ada Lovelace", Path("data/raw"))
