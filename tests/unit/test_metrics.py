"""Metrics of classes against scikit-learn; metrics.json, plots and the terminal's table."""

import io
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

from vlmdiff.core.errors import InputError
from vlmdiff.evaluation import aupro
from vlmdiff.evaluation.metrics import METRICS, Results, evaluate_classes
from vlmdiff.evaluation.plots import curves, write_plots
from vlmdiff.evaluation.results import results_table

BOTH_KINDS = np.array([[[False, False], [False, False]], [[True, False], [False, False]]])


def by_scikit_learn(truth, scores):
    precision, recall, _ = precision_recall_curve(truth, scores)
    both = precision + recall
    f1 = np.divide(2 * precision * recall, both, out=np.zeros_like(both), where=both > 0)
    return [roc_auc_score(truth, scores), average_precision_score(truth, scores), f1.max()]


def judged(seed, classes=("nut", "bolt", "cable"), images=6, levels=None, side=24):
    """Classes, maps, masks and image scores; every second image has a defect, which scores higher."""
    rng = np.random.default_rng(seed)
    names = [name for name in classes for _ in range(images)]
    masks = np.zeros((len(names), side, side), bool)
    for mask in masks[::2]:
        y, x = rng.integers(0, side - 6, 2)
        mask[y : y + rng.integers(1, 6), x : x + rng.integers(1, 6)] = True
    maps = rng.normal(size=masks.shape) + masks
    scores = rng.normal(size=len(names)) + masks.any((1, 2))
    if levels:
        maps, scores = np.round(maps * levels), np.round(scores * levels)
    return names, maps.astype(np.float32), masks, scores


@pytest.mark.parametrize("levels", [None, 1, 3])
def test_each_class_has_what_scikit_learn_computes(levels):
    names, maps, masks, scores = judged(0, levels=levels)
    results = evaluate_classes(names, maps, masks, scores, 0.3)
    assert list(results.classes) == ["bolt", "cable", "nut"]
    for name, values in results.classes.items():
        here = np.array(names) == name
        truth, flat = masks[here].ravel(), maps[here].ravel()
        images = [values["image_auroc"], values["image_ap"], values["image_f1_max"]]
        pixels = [values["pixel_auroc"], values["pixel_ap"], values["pixel_f1_max"]]
        assert images == pytest.approx(by_scikit_learn(masks[here].any((1, 2)), scores[here]), abs=1e-12)
        assert pixels == pytest.approx(by_scikit_learn(truth, flat), abs=1e-12)
        assert values["au_pro"] == pytest.approx(aupro(maps[here], masks[here], 0.3), abs=1e-12)
        assert list(values) == list(METRICS)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=12), st.sampled_from([1e-30, 1e30]))
def test_ties_and_extreme_scales_agree_with_scikit_learn(samples, scale):
    scores = np.array([score for score, _ in samples]) * scale
    truth = np.array([anomalous for _, anomalous in samples])
    maps, masks = scores.reshape(-1, 1, 1), truth.reshape(-1, 1, 1)
    values = evaluate_classes(["nut"] * len(samples), maps, masks, scores).classes["nut"]
    one_sided = len(set(truth)) == 1
    expected = [math.nan] * 3 if one_sided else by_scikit_learn(truth, scores)
    for level in ("image", "pixel"):
        found = [values[f"{level}_auroc"], values[f"{level}_ap"], values[f"{level}_f1_max"]]
        assert found == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_worse_than_chance_is_reported_as_it_is():
    names, maps, masks, scores = judged(1)
    upright = evaluate_classes(names, maps, masks, scores).mean
    upside_down = evaluate_classes(names, -maps, masks, -scores).mean
    for metric in ("image_auroc", "pixel_auroc"):
        assert upside_down[metric] == pytest.approx(1 - upright[metric], abs=1e-12)
        assert upside_down[metric] < 0.5


def test_constant_maps_and_scores_have_the_values_of_chance():
    masks = np.zeros((4, 10, 10), bool)
    masks[0, :5, :4] = True
    values = evaluate_classes(["nut"] * 4, np.ones(masks.shape), masks, np.ones(4), 0.2).classes["nut"]
    assert values == pytest.approx(
        {
            "au_pro": 0.1,
            "image_auroc": 0.5,
            "image_ap": 1 / 4,
            "image_f1_max": 2 / 5,
            "pixel_auroc": 0.5,
            "pixel_ap": 20 / 400,
            "pixel_f1_max": 40 / 420,
        }
    )


def test_a_class_without_defects_is_not_defined_and_left_out_of_the_mean(tmp_path):
    names, maps, masks, scores = judged(2, classes=("bolt", "nut"))
    masks[6:] = False
    results = evaluate_classes(names, maps, masks, scores)
    assert all(math.isnan(value) for value in results.classes["nut"].values())
    assert results.mean == results.classes["bolt"]
    assert results.left_out == {metric: ["nut"] for metric in METRICS}
    results.write(tmp_path / "metrics.json")
    assert json.loads((tmp_path / "metrics.json").read_text())["per_class"]["nut"] == dict.fromkeys(METRICS)


def test_a_class_of_anomalous_images_only_keeps_its_pixel_metrics():
    names, maps, masks, scores = judged(3, classes=("bolt", "nut"))
    kept = [*range(6), 6, 8, 10]  # of the nuts, only those with a defect
    results = evaluate_classes([names[i] for i in kept], maps[kept], masks[kept], scores[kept])
    nut = results.classes["nut"]
    assert results.left_out == {metric: ["nut"] for metric in ("image_auroc", "image_ap", "image_f1_max")}
    assert nut["pixel_auroc"] == pytest.approx(roc_auc_score(masks[6::2].ravel(), maps[6::2].ravel()))
    assert results.mean["image_auroc"] == results.classes["bolt"]["image_auroc"]
    assert results.mean["au_pro"] == pytest.approx((nut["au_pro"] + results.classes["bolt"]["au_pro"]) / 2)


def test_wholly_anomalous_maps_are_not_defined_over_pixels():
    masks = np.stack([np.ones((3, 3), bool)] * 2)
    values = evaluate_classes(["nut"] * 2, np.zeros(masks.shape), masks, [0.0, 1.0]).classes["nut"]
    assert all(math.isnan(value) for value in values.values())


def test_the_mean_over_no_class_is_not_defined():
    results = evaluate_classes([], [], [], [])
    assert results.classes == {} and results.left_out == {}
    assert all(math.isnan(value) for value in results.mean.values())


def test_labels_given_for_images_count_before_masks():
    # A defect can be lost when its mask is scaled down.
    values = evaluate_classes(["nut"] * 2, np.zeros((2, 2, 2)), BOTH_KINDS, [1.0, 0.0]).classes["nut"]
    assert values["image_auroc"] == 0
    relabelled = evaluate_classes(["nut"] * 2, np.zeros((2, 2, 2)), BOTH_KINDS, [1.0, 0.0], is_anomalous=[True, False])
    assert relabelled.classes["nut"]["image_auroc"] == 1
    assert relabelled.classes["nut"]["pixel_auroc"] == values["pixel_auroc"]


def test_what_is_not_finite_is_named_by_its_id():
    maps = np.zeros((2, 2, 2))
    with pytest.raises(InputError, match=r"score of b\.png is nan"):
        evaluate_classes(["nut"] * 2, maps, BOTH_KINDS, [0.0, math.nan], ids=["a.png", "b.png"])
    maps[1, 0, 0] = math.inf
    with pytest.raises(InputError, match=r"anomaly map of b\.png holds NaN or infinity"):
        evaluate_classes(["bolt", "nut"], maps, BOTH_KINDS, [0.0, 1.0], ids=["a.png", "b.png"])
    with pytest.raises(InputError, match="anomaly map of image 1"):
        evaluate_classes(["bolt", "nut"], maps, BOTH_KINDS, [0.0, 1.0])


def test_inputs_of_different_lengths_are_refused():
    with pytest.raises(InputError, match=r"differ in length: \[1, 2\]"):
        evaluate_classes(["nut"] * 2, np.zeros((2, 2, 2)), BOTH_KINDS, [0.0])


def test_metrics_json_has_the_mean_and_au_pro_first_and_few_digits(tmp_path):
    path = tmp_path / "reports" / "metrics.json"
    evaluate_classes(*judged(4)).write(path)
    written = json.loads(path.read_text())
    assert list(written) == ["mean", "per_class"]
    assert list(written["per_class"]) == ["bolt", "cable", "nut"]
    for values in (written["mean"], *written["per_class"].values()):
        assert next(iter(values)) == "au_pro"
        assert all(value == round(value, 6) for value in values.values())
    for metric, value in written["mean"].items():
        over_classes = np.mean([values[metric] for values in written["per_class"].values()])
        assert value == pytest.approx(over_classes, abs=1e-6)


def test_metrics_json_survives_being_read_and_written(tmp_path):
    # Rounded first their mean is 0.1, rounded last 0.100001.
    values = {"a": 0.1000004, "b": math.nan, "c": 0.1000004, "d": 0.1000008}
    results = Results({name: dict.fromkeys(METRICS, value) for name, value in values.items()})
    results.write(tmp_path / "first.json")
    read = Results.read(tmp_path / "first.json")
    read.write(tmp_path / "second.json")
    assert (tmp_path / "first.json").read_bytes() == (tmp_path / "second.json").read_bytes()
    assert read.classes["a"] == pytest.approx(results.classes["a"], abs=1e-6)
    assert read.left_out == results.left_out == {metric: ["b"] for metric in METRICS}
    assert read.mean == pytest.approx(results.mean, abs=1e-6)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"per_class": [1]}', '{"per_class": {"nut": 3}}', '{"per_class": {"nut": {"au_pro": 1}}}']
)
def test_another_file_in_place_of_metrics_json_is_named(tmp_path, text):
    path = tmp_path / "metrics.json"
    with pytest.raises(InputError, match=r"metrics\.json does not exist"):
        Results.read(path)
    path.write_text(text)
    with pytest.raises(InputError, match=r"metrics\.json is not a metrics file"):
        Results.read(path)


def test_curves_are_short_and_lie_on_those_of_scikit_learn():
    names, maps, masks, _ = judged(5, classes=("bolt", "nut"), images=60)
    rows = curves(names, maps, masks, 0.3)
    truth, scores = masks[:60].ravel(), maps[:60].ravel()
    bolt = {name: [row for row in points if row["class_name"] == "bolt"] for name, points in rows.items()}
    assert all(50 < len(points) <= 200 for points in bolt.values())

    fpr, tpr, _ = roc_curve(truth, scores, drop_intermediate=False)
    x, y = np.array([row["fpr"] for row in bolt["roc"]]), np.array([row["tpr"] for row in bolt["roc"]])
    nearest = [np.hypot(fpr - a, tpr - b).min() for a, b in zip(x, y, strict=True)]
    assert max(nearest) < 2e-6
    assert np.trapezoid(y, x) == pytest.approx(roc_auc_score(truth, scores), abs=1e-3)

    precision, recall, _ = precision_recall_curve(truth, scores)
    for row in bolt["precision_recall"]:
        assert np.hypot(recall - row["recall"], precision - row["precision"]).min() < 2e-6

    x, y = np.array([row["fpr"] for row in bolt["pro"]]), np.array([row["pro"] for row in bolt["pro"]])
    assert x[-1] == 0.3
    assert np.trapezoid(y, x) / 0.3 == pytest.approx(aupro(maps[:60], masks[:60]), abs=2e-3)


def test_plots_are_lists_of_rows_and_empty_where_nothing_is_defined(tmp_path):
    names, maps, masks, _ = judged(6, classes=("bolt", "nut"))
    masks[6:] = False
    write_plots(tmp_path / "plots", curves(names, maps, masks))
    columns = {"pro": {"fpr", "pro"}, "roc": {"fpr", "tpr"}, "precision_recall": {"recall", "precision"}}
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {f"{name}.json" for name in columns}
    for name, axes in columns.items():
        rows = json.loads((tmp_path / "plots" / f"{name}.json").read_text())
        assert {row["class_name"] for row in rows} == {"bolt"}
        assert all(set(row) == {"class_name", *axes} for row in rows)
        assert all(0 <= row[axis] <= 1 for row in rows for axis in axes)
    assert curves(names[6:], maps[6:], masks[6:]) == {"pro": [], "roc": [], "precision_recall": []}


def test_the_table_has_au_pro_first_the_mean_last_and_a_dash_where_nothing_is_defined():
    names, maps, masks, scores = judged(7, classes=("bolt", "nut"))
    masks[6:] = False
    results = evaluate_classes(names, maps, masks, scores)
    table = results_table(results)
    assert [column.header for column in table.columns][:2] == ["class", "AU-PRO"]
    assert table.rows[-1].style == "bold"
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table)
    lines = [line.split() for line in console.export_text().splitlines() if line.strip()]
    assert [line[0] for line in lines[-4:]] == ["bolt", "nut", "mean", "-"]
    assert lines[-4][1] == f"{results.classes['bolt']['au_pro']:.3f}"
    assert lines[-3][1:] == ["-"] * 7
    assert "nut" in lines[-1]
