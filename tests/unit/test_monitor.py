"""The monitor on made-up photographs: what is drift, what is none, and what the command reads and writes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from tests.monitoring import CLASSES, photographs, write_model, write_scores
from vlmdiff.cli import app
from vlmdiff.core.errors import InputError
from vlmdiff.core.params import Monitor
from vlmdiff.evaluation.decision import clopper_pearson
from vlmdiff.production.monitor import DriftCheck, Known, check, read_reference

EVENLY = dict.fromkeys(CLASSES, 67)


@pytest.fixture
def model(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text("{}\n")
    return write_model(tmp_path / "model")


def judge(model: Path, rows: pd.DataFrame, **settings) -> DriftCheck:
    reference, calibration = read_reference(model)
    rows = rows.assign(is_anomalous=rows["score"] > 0.5)
    return check(rows, Known.of(reference), calibration, Monitor(**settings))


def run(*arguments) -> tuple[dict, str, str]:
    """monitor.json, monitor.html and what the command prints; InputError where it fails."""
    result = CliRunner().invoke(app, ["monitor", *map(str, arguments), "--out", "out"])
    if result.exception:
        raise result.exception
    return json.loads(Path("out/monitor.json").read_text()), Path("out/monitor.html").read_text(), result.output


def found(check: DriftCheck) -> set[str]:
    return {test.what for test in check.found}


def test_photographs_like_those_at_calibration_are_no_drift(model) -> None:
    said = judge(model, photographs(1, EVENLY))
    assert said.verdict == "no drift" and not said.drift and said.images == 201
    assert len(said.tests) == 11 and all(0 < test.corrected <= 1 for test in said.tests)


@pytest.mark.parametrize("name", CLASSES)
def test_a_day_of_one_product_alone_is_no_drift(model, name) -> None:
    assert judge(model, photographs(1, {name: 200})).verdict == "no drift"


@pytest.mark.parametrize("factor", [0.85, 1.15])
def test_other_light_is_drift_and_named(model, factor) -> None:
    light = dict.fromkeys(("brightness", "contrast", "red", "green", "blue"), factor)
    said = judge(model, photographs(1, EVENLY, **light))
    assert said.drift and "brightness" in found(said) and "width" not in found(said)
    (brightness,) = (test for test in said.tests if test.what == "brightness")
    assert brightness.now / brightness.then == pytest.approx(factor, abs=0.05)


def test_a_camera_out_of_focus_is_drift_and_named(model) -> None:
    assert "sharpness" in found(judge(model, photographs(1, EVENLY, sharpness=0.2)))


def test_a_camera_of_another_resolution_is_drift_and_named(model) -> None:
    assert "width" in found(judge(model, photographs(1, EVENLY, width=1.01)))


@pytest.mark.parametrize("name", CLASSES)
def test_a_new_product_is_drift_and_found_as_a_new_kind(tmp_path, name) -> None:
    known = write_model(tmp_path / "model", tuple(set(CLASSES) - {name}))
    assert "new kinds" in found(judge(known, photographs(1, EVENLY)))


def test_scores_that_rise_are_drift_while_the_photographs_stay(model) -> None:
    assert found(judge(model, photographs(1, EVENLY, score=1.1))) == {"score"}


def test_more_alarms_than_guarantee_and_defects_explain_are_drift(model) -> None:
    rows = photographs(1, EVENLY)
    rows.loc[rows.index % 3 == 0, "score"] = 0.9
    said = judge(model, rows)
    assert "alarms" in found(said)
    assert "67 alarms in 201 images" in said.found[[test.what for test in said.found].index("alarms")].why
    assert "alarms" not in found(judge(model, rows, defect_rate=0.33))


def test_the_stated_share_of_false_alarms_holds_over_calibrations_and_mixes_of_products(tmp_path, record_property):
    """At 0.2, where 60 checks can tell: one without correction for the number of tests would exceed it."""
    rng, alarms, trials = np.random.default_rng(0), 0, 60
    for trial in range(trials):
        known = write_model(tmp_path / str(trial), seed=1000 + trial)
        counts = dict(zip(CLASSES, rng.multinomial(100, rng.dirichlet(np.ones(3))).tolist(), strict=True))
        alarms += judge(known, photographs(trial, counts), false_alarm_rate=0.2).drift
    record_property("false alarms of the monitor, at most 0.2 stated", alarms / trials)
    assert alarms / trials <= 0.2


def test_classes_that_look_alike_raise_no_false_alarms(tmp_path) -> None:
    alarms = 0
    for trial in range(20):
        folder = write_model(tmp_path / str(trial), seed=1000 + trial)
        reference = pd.read_parquet(folder / "reference.parquet")
        reference["class_name"] += np.where(np.arange(len(reference)) % 2, " left", " right")
        reference.to_parquet(folder / "reference.parquet")
        alarms += judge(folder, photographs(trial, EVENLY), false_alarm_rate=0.05).drift
    assert alarms <= 3


@pytest.mark.parametrize("images", [1, 2, 5])
def test_few_photographs_at_calibration_make_a_check_cautious_not_wrong(tmp_path, images) -> None:
    folder = write_model(tmp_path / "model")
    reference = pd.read_parquet(folder / "reference.parquet").groupby("class_name").head(images)
    reference.to_parquet(folder / "reference.parquet")
    assert judge(folder, photographs(1, EVENLY)).verdict == "no drift"


def test_too_few_photographs_of_today_say_nothing(model) -> None:
    write_scores(Path("scores.parquet"), photographs(1, {"bolt": 12}), model)
    said, page, _ = run("scores.parquet", "--model", model)
    assert said["verdict"] == "too few photographs" and not said["drift"] and said["tests"] == []
    assert "12 images are too few for a check: monitor.min_images is 50" in page
    assert [row["images"] for row in said["classes"]] == [12]


def test_the_command_writes_the_verdict_first_then_tests_then_distributions(model) -> None:
    write_scores(Path("scores.parquet"), photographs(1, EVENLY, sharpness=0.2), model)
    said, page, output = run("scores.parquet", "--model", model)
    assert said["drift"] and said["outcome"].startswith("drift in the last 200 images: ")
    (sharpness,) = (test for test in said["tests"] if test["what"] == "sharpness")
    assert not sharpness["passed"] and sharpness["corrected"] <= 0.01 and "the mean was" in sharpness["why"]
    assert "Drift in the last 200 images" in page and page.count("<svg") == 9 and "http:" not in page
    assert page.index("Drift in the last") < page.index("<table") < page.index("<svg")
    assert "drift in the last 200" in output and "out/monitor.html" in output


def test_alarms_are_counted_by_the_class_that_a_photograph_is_most_like(model) -> None:
    rows = photographs(1, {"bolt": 40, "cable": 20})
    rows.loc[rows.index[:10], "score"] = 0.7  # bolts
    write_scores(Path("scores.parquet"), rows, model)
    said, page, output = run("scores.parquet", "--model", model)
    bolt, cable = said["classes"]
    assert (bolt["class_name"], bolt["alarms"], bolt["images"], bolt["then"]) == ("bolt", 10, 40, 0)
    assert (cable["class_name"], cable["alarms"], cable["images"]) == ("cable", 0, 20)
    assert (bolt["low"], bolt["high"]) == pytest.approx(clopper_pearson(10, 40))
    assert "10 of 40" in page and "25.0 %" in page and "12.7 – 41.2 %" in page
    assert "most like" in output and "25.0%" in output


def test_the_newest_photographs_are_looked_at_each_once(model) -> None:
    old, new = photographs(1, EVENLY, sharpness=0.2), photographs(2, EVENLY)
    write_scores(Path("scores/b/part-0.parquet"), old, model, day=1)
    write_scores(Path("scores/a/part-0.parquet"), new, model, day=2)
    write_scores(Path("scores/a/part-1.parquet"), new.head(5), model, day=3)
    said, _, _ = run("scores", "--model", model)
    assert (said["images"], said["drift"]) == (200, False)
    said, _, _ = run("scores", "--model", model, "--last", 402)
    assert (said["images"], said["drift"]) == (402, True)
    assert run("scores", "--model", model, "--last", 1000)[0]["images"] == 402


def test_rows_by_another_model_and_photographs_that_could_not_be_read_do_not_count(model) -> None:
    new = photographs(2, EVENLY)
    new.loc[:9, ["score", "sharpness"]] = None
    new.loc[:4, "image_id"] = None
    write_scores(Path("scores/a.parquet"), photographs(1, EVENLY, score=1.5), "vlmdiff/1")
    write_scores(Path("scores/b.parquet"), new, model)
    said, page, _ = run("scores", "--model", model, "--last", 1000)
    assert (said["images"], said["unreadable"], said["others"], said["drift"]) == (191, 10, 201, False)
    assert "10 more could not be read" in page and "201 images were judged by other models" in page


def test_what_is_missing_or_something_else_is_said(model) -> None:
    with pytest.raises(InputError, match=r"none has no Parquet files"):
        run("none", "--model", model)
    Path("text.parquet").write_text("no")
    with pytest.raises(InputError, match=r"text.parquet was not written by `vlmdiff score`"):
        run("text.parquet", "--model", model)
    rows = photographs(1, EVENLY)
    file = write_scores(Path("scores.parquet"), rows, model)
    with pytest.raises(InputError, match=r"not a detector's folder"):
        run(file, "--model", "out")
    (model / "reference.parquet").unlink()
    with pytest.raises(InputError, match=r"model has no reference.parquet.*Run `vlmdiff evaluate`"):
        run(file, "--model", model)
    pd.read_parquet(file).drop(columns="sharpness").to_parquet(file)
    shutil.rmtree(model)
    with pytest.raises(InputError, match=r"sharpness"):
        run(file, "--model", write_model(model))


@pytest.mark.parametrize("value", [np.nan, np.inf, None])
@pytest.mark.parametrize("column", ["score", "sharpness"])
def test_a_value_that_is_not_finite_is_named_and_not_compared(model, column, value) -> None:
    file = write_scores(Path("scores.parquet"), photographs(1, EVENLY), model)
    rows = pd.read_parquet(file)
    rows.loc[3, column] = value
    rows.to_parquet(file)
    with pytest.raises(InputError, match=rf"scores\.parquet is damaged: the row of {rows['path'][3]} has no {column}"):
        run(file, "--model", model)
    write_scores(file, photographs(1, EVENLY), model)
    reference = pd.read_parquet(model / "reference.parquet")
    reference.loc[3, column] = np.nan
    reference.to_parquet(model / "reference.parquet")
    with pytest.raises(InputError, match=r"reference\.parquet is damaged: the row of"):
        run(file, "--model", model)
