"""What verdicts are worth: counted by hand and by scikit-learn, with intervals that hold what they promise."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    f1_score,
    precision_score,
    recall_score,
    roc_auc_score,
)

from vlmdiff.core.params import Costs, Decision
from vlmdiff.evaluation.decision import (
    DECISION,
    OF_CLASS,
    OF_DEFECTS,
    Decisions,
    clopper_pearson,
    mcnemar,
    regions_found,
    summarise,
    upper_bound,
    values_of,
)

# class, kind of defect ("" is normal), score, and each region: its share of the image, and whether it is found
ROWS = [
    ("nut", "crack", 0.9, [(0.002, True), (0.02, False)]),
    ("nut", "crack", 0.4, [(0.02, False)]),
    ("nut", "hole", 0.6, [(0.2, True)]),
    ("nut", "", 0.55, []),
    ("nut", "", 0.3, []),
    ("bolt", "crack", 0.8, []),  # its mask is not known
    ("bolt", "", 0.1, []),
    ("bolt", "", 0.2, []),
]


def table(rows=ROWS) -> pd.DataFrame:
    names, kinds, scores, regions = zip(*rows, strict=True)
    frame = pd.DataFrame({"class_name": names, "defect": [kind or None for kind in kinds], "score": scores})
    areas, found = ([[region[i] for region in of_image] for of_image in regions] for i in (0, 1))
    return frame.assign(
        is_anomalous=[bool(kind) for kind in kinds],
        verdict=frame["score"] > 0.5,
        regions=pd.Series(areas, dtype=object),
        regions_found=pd.Series(found, dtype=object),
    )


def many(seed: int, images: int = 60, levels: int | None = None) -> pd.DataFrame:
    """Images of two classes, half of them with one of two kinds of defect and up to three regions."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(images):
        kind = ("", "", "crack", "hole")[i % 4]
        score = float(np.clip(rng.normal(0.55 if kind else 0.4, 0.12), 0, 0.999))
        score = round(score * levels) / levels if levels else score
        regions = [(float(10 ** rng.uniform(-4, -0.5)), bool(rng.random() < score)) for _ in range(rng.integers(4))]
        rows.append((("nut", "bolt")[i // 4 % 2], kind, score, regions if kind else []))
    return table(rows)


def pooled(frame: pd.DataFrame) -> dict[str, float]:
    return Decisions.of(frame).metrics["decision"]["decision"]


def test_the_rates_are_those_of_the_counts():
    found = Decisions.of(table()).metrics
    all_together, nut, bolt = found["decision"]["decision"], *(found["per_class_decision"][n] for n in ("nut", "bolt"))
    assert list(all_together) == list(DECISION) and list(nut) == list(OF_CLASS)
    assert all_together["recall"] == 3 / 4 and all_together["false_alarm_rate"] == 1 / 4
    assert all_together["precision"] == 3 / 4 and all_together["f1"] == 3 / 4
    assert all_together["balanced_accuracy"] == 3 / 4
    assert all_together["region_recall"] == 2 / 4
    # Of 16 pairs of a defective and a normal image, one is the wrong way round: 0.4 below 0.55.
    assert all_together["image_auroc"] == 15 / 16
    assert (nut["recall"], nut["false_alarm_rate"], nut["precision"]) == (2 / 3, 1 / 2, 2 / 3)
    assert (bolt["recall"], bolt["false_alarm_rate"], bolt["f1"]) == (1, 0, 1)
    assert math.isnan(bolt["region_recall"])


def test_kinds_belong_to_their_class_and_regions_to_their_own_size():
    decisions = Decisions.of(table())
    found, counts = decisions.metrics, decisions.counts()
    assert {name: row["recall"] for name, row in found["per_defect"].items()} == {
        "bolt/crack": 1,
        "nut/crack": 1 / 2,
        "nut/hole": 1,
    }
    assert list(found["per_defect"]["nut/hole"]) == list(OF_DEFECTS)
    # The first image has a small region beside a large one: the defect is large, the region small.
    assert {name: (row["defective"], row["regions"]) for name, row in counts["per_size"].items()} == {
        "below 0.3 %": ([0, 0], [1, 1]),
        "1 to 3 %": ([1, 2], [0, 2]),
        "10 % and more": ([1, 1], [1, 1]),
    }
    assert counts["decision"]["decision"] == {"defective": [3, 4], "normal": [1, 4], "regions": [2, 4]}


@settings(max_examples=30)
@given(st.integers(0, 2**32), st.sampled_from([None, 4, 20]))
def test_pooled_and_by_class_metrics_are_what_scikit_learn_computes(seed, levels):
    frame = many(seed, levels=levels)
    found = Decisions.of(frame).metrics
    parts = {"": (frame, found["decision"]["decision"])}
    parts |= {name: (part, found["per_class_decision"][name]) for name, part in frame.groupby("class_name")}
    for part, row in parts.values():
        truth, called, scores = (part[name].to_numpy() for name in ("is_anomalous", "verdict", "score"))
        assert row["recall"] == pytest.approx(recall_score(truth, called))
        if called.any():
            assert row["precision"] == pytest.approx(precision_score(truth, called))
        assert row["f1"] == pytest.approx(f1_score(truth, called))
        assert row["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(truth, called))
        for metric, score in (("image_auroc", roc_auc_score), ("image_ap", average_precision_score)):
            if metric in row:
                assert row[metric] == pytest.approx(score(truth, scores))
        for metric, rate in (("recall_at_1", 0.01), ("recall_at_5", 0.05)):
            # The best of all thresholds that keep to the rate.
            rates = {t: ((scores > t)[~truth].mean(), (scores > t)[truth].mean()) for t in [*scores, -1]}
            assert row[metric] == pytest.approx(max(recall for alarms, recall in rates.values() if alarms <= rate))


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.lists(st.integers(0, 3), min_size=24, max_size=24))
def test_weights_are_repetitions(seed, weights):
    frame = many(seed, images=24, levels=10)
    repeated = frame.loc[np.repeat(frame.index, weights)].reset_index(drop=True)
    assume(len(repeated))
    found, expected = Decisions.of(frame).weighted(np.array([weights])), Decisions.of(repeated).metrics
    for key, rows in found.items():
        for name, row in rows.items():
            for metric, value in row.items():
                # A group without a drawn image is not listed.
                wanted = expected[key].get(name, {}).get(metric, math.nan)
                assert value[0] == pytest.approx(wanted, nan_ok=True), (key, name, metric)


@settings(max_examples=40)
@given(st.integers(0, 2**32))
def test_the_recall_at_a_rate_rises_with_the_rate_and_ranks_alone_matter(seed):
    frame = many(seed)
    found = pooled(frame)
    assert found["recall_at_1"] <= found["recall_at_5"]
    squared = pooled(frame.assign(score=frame["score"] ** 2))
    for metric in ("recall_at_1", "recall_at_5", "image_auroc", "image_ap"):
        assert squared[metric] == pytest.approx(found[metric])


def test_a_rate_of_five_in_a_hundred_lets_exactly_five_pass():
    normal = [("nut", "", 0.3 + i / 1000, []) for i in range(100)]
    # Normal scores reach 0.399; five of them exceed 0.394, one 0.398.
    defects = [("nut", "crack", score, []) for score in (0.3985, 0.398, 0.3945, 0.394, 0.1)]
    found = pooled(table(normal + defects))
    assert (found["recall_at_1"], found["recall_at_5"]) == (1 / 5, 3 / 5)


def test_what_is_not_defined_is_nan_and_null():
    only_good = table([row for row in ROWS if not row[1]])
    found = pooled(only_good)
    assert found["false_alarm_rate"] == 1 / 4 and found["precision"] == 0
    assert all(math.isnan(found[metric]) for metric in ("recall", "f1", "balanced_accuracy", "image_auroc", "image_ap"))
    only_bad = pooled(table([row for row in ROWS if row[1]]))
    assert only_bad["recall"] == 3 / 4 and only_bad["precision"] == 1
    undefined = ("false_alarm_rate", "balanced_accuracy", "recall_at_1", "image_auroc", "image_ap")
    assert all(math.isnan(only_bad[metric]) for metric in undefined)
    silent = pooled(table([("nut", "crack", 0.2, []), ("nut", "", 0.1, [])]))
    assert math.isnan(silent["precision"]) and silent["f1"] == 0
    summary = values_of(summarise(Decisions.of(only_good), samples=10))
    assert summary["decision"]["recall"] is None
    assert values_of(summarise(Decisions.of(only_good), samples=10), "intervals")["decision"]["recall"] is None


def test_a_table_of_an_earlier_release_has_verdicts_and_no_regions():
    frame = table().drop(columns=["regions", "regions_found"])
    found = Decisions.of(frame).metrics
    assert found["decision"]["decision"]["recall"] == 3 / 4
    assert math.isnan(found["decision"]["decision"]["region_recall"]) and found["per_size"] == {}


def test_a_region_is_found_where_one_of_its_pixels_is_marked():
    mask, marked = np.zeros((10, 10), bool), np.zeros((10, 10), bool)
    mask[1:3, 1:3] = mask[3, 3] = True  # joined at the corner
    mask[6:8, 6:9] = True
    marked[7, 8] = marked[0, 0] = True
    assert regions_found(mask, marked) == ([0.05, 0.06], [False, True])
    assert regions_found(np.zeros((4, 4), bool), np.ones((4, 4), bool)) == ([], [])


@given(st.integers(0, 60), st.integers(0, 60), st.sampled_from([0.8, 0.95, 0.99]))
def test_exact_intervals_are_scipys(found, missed, level):
    pair = clopper_pearson(found, found + missed, level)
    if found + missed == 0:
        assert all(math.isnan(value) for value in pair)
    else:
        exact = stats.binomtest(found, found + missed).proportion_ci(level, method="exact")
        assert pair == pytest.approx((exact.low, exact.high), abs=1e-12)


@pytest.mark.parametrize("images", [1, 12, 72])
def test_exact_intervals_hold_the_true_share_at_least_as_often_as_promised(images):
    pairs = np.array([clopper_pearson(found, images, 0.9) for found in range(images + 1)])
    bounds = np.array([upper_bound(found, images, 0.95) for found in range(images + 1)])
    for share in np.linspace(0.005, 0.995, 100):
        chances = stats.binom.pmf(np.arange(images + 1), images, share)
        assert chances @ ((pairs[:, 0] <= share) & (share <= pairs[:, 1])) >= 0.9
        assert chances @ (share <= bounds) >= 0.95


def test_the_upper_bound_without_an_alarm_is_the_rule_of_three():
    assert upper_bound(0, 72, 0.95) == pytest.approx(1 - 0.05 ** (1 / 72))
    assert upper_bound(0, 300, 0.95) == pytest.approx(3 / 300, rel=0.01)
    assert math.isnan(upper_bound(0, 0, 0.95))


@given(st.integers(0, 30), st.integers(0, 30))
def test_mcnemar_is_the_binomial_test_of_the_images_about_which_one_model_is_right(lost, won):
    expected = stats.binomtest(won, lost + won, 0.5, alternative="less").pvalue if lost + won else 1.0
    assert mcnemar(lost, won) == pytest.approx(expected)
    assert mcnemar(lost + 1, won) < mcnemar(lost, won + 1)


def test_five_lost_images_are_worse_by_one_in_32():
    assert mcnemar(5, 0) == 1 / 32 and mcnemar(0, 0) == 1


@settings(max_examples=20)
@given(st.integers(0, 2**32))
def test_the_interval_of_a_share_has_the_share_in_it(seed):
    decisions = Decisions.of(many(seed))
    intervals = decisions.intervals(samples=100, seed=seed)
    for key, rows in decisions.metrics.items():
        for name, row in rows.items():
            for metric, value in row.items():
                low, high = intervals[key][name][metric]
                if math.isnan(value):
                    assert math.isnan(low) and math.isnan(high)
                    continue
                assert 0 <= low <= high <= 1
                if metric not in ("f1", "balanced_accuracy", "image_auroc", "image_ap"):
                    assert low <= value <= high, (key, name, metric)


def test_regions_of_one_image_count_as_one():
    normal = [("nut", "", 0.1, [])]
    apart = table([("nut", "crack", 0.9, [(0.01, True)])] * 20 + normal)
    joined = table([("nut", "crack", 0.9, [(0.01, True)] * 20), *normal])
    wide, narrow = (
        Decisions.of(frame).intervals(samples=2)["decision"]["decision"]["region_recall"] for frame in (joined, apart)
    )
    assert narrow == pytest.approx(clopper_pearson(20, 20)) and wide == pytest.approx(clopper_pearson(1, 1))


def test_nine_in_ten_bootstrap_intervals_have_what_more_images_would_show(record_property):
    everything, rng = many(0, images=20000), np.random.default_rng(0)
    exact = pooled(everything)
    hits = dict.fromkeys(("f1", "balanced_accuracy", "recall_at_5", "image_auroc", "image_ap"), 0)
    for _ in range(80):
        test = everything.sample(120, random_state=rng).reset_index(drop=True)
        intervals = Decisions.of(test).intervals(0.9, samples=200)["decision"]["decision"]
        for metric in hits:
            low, high = intervals[metric]
            hits[metric] += low <= exact[metric] <= high
    record_property("intervals of 90 % that hold, of 80", hits)
    # Of 80 tries at 0.9 fewer than 62 come once in a thousand.
    assert all(count >= 60 for count in hits.values())


def test_the_same_images_have_the_same_intervals():
    decisions = Decisions.of(many(1))
    first, again = (decisions.intervals(samples=50) for _ in range(2))
    assert first["decision"] == again["decision"]


def test_the_expected_cost_weighs_misses_and_false_alarms_by_how_often_they_come():
    decisions, costs = Decisions.of(table()), Costs(miss=50, false_alarm=2)
    # A quarter of the defects is missed, a quarter of the normal images raises an alarm.
    assert decisions.expected_cost(costs, 0.1) == pytest.approx(0.1 * 50 / 4 + 0.9 * 2 / 4)
    summary = values_of(summarise(decisions, Decision(costs=costs, defect_rate=0.1), samples=2))
    assert summary["decision"]["expected_cost"] == pytest.approx(1.7)
    assert "expected_cost" not in values_of(summarise(decisions, samples=2))["decision"]


@settings(max_examples=15)
@given(st.integers(0, 2**32), st.floats(0.1, 1000), st.floats(0.001, 0.999))
def test_no_threshold_costs_less_than_the_lowest_point_of_the_curve(seed, ratio, defect_rate):
    frame = many(seed, images=24, levels=20)
    costs = Costs(miss=ratio, false_alarm=1)
    curve = Decisions.of(frame).cost_curve(costs, defect_rate)
    assert curve["cost"].to_numpy() == pytest.approx((curve["misses"] + curve["false_alarms"]).to_numpy())
    assert (curve["misses"].diff().dropna() >= -1e-12).all() and (curve["false_alarms"].diff().dropna() <= 1e-12).all()

    def cost(threshold: float) -> float:
        judged = frame.assign(verdict=frame["score"] > threshold)
        return Decisions.of(judged).expected_cost(costs, defect_rate)

    for threshold in np.linspace(0, 1, 21):
        assert cost(threshold) >= curve["cost"].min() - 1e-12
    for row in curve.itertuples():
        assert cost(row.threshold) == pytest.approx(row.cost)


def test_without_an_image_of_each_kind_there_is_no_cost_curve():
    assert Decisions.of(table(ROWS[3:5])).cost_curve(Costs(miss=1, false_alarm=1), 0.5).empty
