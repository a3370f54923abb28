"""The gate: floors, limits, the comparison with the champion, and what is not defined."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmdiff.core.errors import InputError
from vlmdiff.core.params import Floor, Gate
from vlmdiff.evaluation.bootstrap import Resampled
from vlmdiff.evaluation.evidence import Evidence
from vlmdiff.evaluation.gate import judge
from vlmdiff.evaluation.metrics import METRICS, Results
from vlmdiff.evaluation.verdict import Override, Verdict, verdict_table

UNIT = st.floats(0, 1)
NO_FLOORS = Gate(floors={}, max_class_drop=None, max_false_alarm_rate=None, no_worse_verdicts=False)


def verdicts(**classes: tuple[int, int]) -> pd.DataFrame:
    """Ten defective and ten normal images of each class, and how many of each raise an alarm."""
    rows = []
    for name, alarms in (classes or {"nut": (10, 0)}).items():
        for is_anomalous, count in zip((True, False), alarms, strict=True):
            kind = "crack" if is_anomalous else None
            rows += [(name, f"{kind}{i}", kind, is_anomalous, 0.6 if i < count else 0.4, i < count) for i in range(10)]
    return pd.DataFrame(rows, columns=["class_name", "image_id", "defect", "is_anomalous", "score", "verdict"])


def decided(**changes) -> Gate:
    """A gate of nothing but these criteria of the verdicts."""
    return Gate(
        **{
            "floors": {},
            "max_class_drop": None,
            "max_false_alarm_rate": None,
            "no_worse_verdicts": False,
            "margin": -1.0,
            **changes,
        }
    )


def evidence(spread=0.0, latency_ms=10.0, size_mb=1.0, test_set="a", seed=0, scores=None, **values: float) -> Evidence:
    """A model of these values in every metric; each bootstrap sample is off by `spread` on average."""
    rng = np.random.default_rng(seed)
    drawn = {name: value + spread * rng.normal(size=1000) for name, value in values.items()}
    return Evidence(
        Results({name: dict.fromkeys(METRICS, value) for name, value in values.items()}),
        Resampled({name: dict.fromkeys(METRICS, samples) for name, samples in drawn.items()}),
        verdicts() if scores is None else scores,
        test_set,
        latency_ms,
        size_mb,
    )


def failed(criteria) -> set[str]:
    return {criterion.name for criterion in criteria if not criterion.passed}


def floors(mean=None, every_class=None) -> Gate:
    return NO_FLOORS.model_copy(update={"floors": {"au_pro": Floor(mean=mean, every_class=every_class)}})


def test_a_model_on_every_floor_passes_without_a_champion():
    assert failed(judge(evidence(nut=0.6, bolt=1.0), None, floors(0.8, 0.6))) == set()


def test_a_mean_below_its_floor_fails_with_the_numbers():
    (criterion,) = judge(evidence(nut=0.79, bolt=0.79), None, floors(0.8))
    assert not criterion.passed
    assert criterion.why == "mean AU-PRO is 0.7900, at least 0.8 required"


def test_one_class_below_its_floor_fails_whatever_the_mean():
    assert failed(judge(evidence(nut=0.59, bolt=1.0, screw=1.0), None, floors(0.8, 0.6))) == {"AU-PRO of nut"}


def test_a_floor_is_of_its_own_metric():
    model = evidence(nut=0.9)
    model.results.classes["nut"]["pixel_ap"] = 0.2
    gate = decided(floors={"au_pro": Floor(mean=0.8), "pixel_ap": Floor(mean=0.3, every_class=0.1)})
    assert failed(judge(model, None, gate)) == {"mean pixel AP"}


@pytest.mark.parametrize(("limit", "value", "name"), [("max_latency_ms", 10, "latency"), ("max_size_mb", 1, "size")])
def test_limits_are_what_is_allowed_at_most(limit, value, name):
    model = evidence(nut=0.9)
    assert failed(judge(model, None, decided(**{limit: value}))) == set()
    (broken,) = failed(judge(model, None, decided(**{limit: 0.99 * value})))
    assert broken.startswith(name)


def test_the_same_model_is_no_better_than_itself():
    model = evidence(nut=0.9, spread=0.1)
    assert failed(judge(model, model, NO_FLOORS)) == {"gain in mean AU-PRO"}


def test_a_gain_counts_where_it_is_certain():
    champion = evidence(nut=0.80, bolt=0.80)
    certain, lucky = evidence(nut=0.83, bolt=0.83, spread=0.01), evidence(nut=0.83, bolt=0.83, spread=0.05)
    assert failed(judge(certain, champion, NO_FLOORS)) == set()
    (criterion,) = judge(lucky, champion, NO_FLOORS)
    assert not criterion.passed and criterion.measured < 0
    assert "differs from the champion's by +0.0300, with 95% confidence by more than -0.0" in criterion.why


def test_the_bound_is_the_quantile_that_was_asked_for():
    champion, model = evidence(nut=0.8), evidence(nut=0.82, spread=0.02)
    for confidence, z in ((0.9, 1.2816), (0.99, 2.3263)):
        (criterion,) = judge(model, champion, decided(confidence=confidence))
        assert criterion.measured == pytest.approx(0.82 - 0.8 - z * 0.02, abs=0.004)


def test_the_gain_must_exceed_the_margin():
    champion = evidence(nut=0.80)
    gate = decided(margin=0.01)
    assert failed(judge(evidence(nut=0.81), champion, gate)) == {"gain in mean AU-PRO"}
    assert failed(judge(evidence(nut=0.8101), champion, gate)) == set()


def test_a_class_that_falls_too_far_fails_whatever_the_gain():
    champion = evidence(nut=0.80, bolt=0.50)
    gate = decided(max_class_drop=0.05, margin=0.0)
    assert failed(judge(evidence(nut=0.75, bolt=0.99), champion, gate)) == set()
    criteria = judge(evidence(nut=0.7499, bolt=0.99), champion, gate)
    assert failed(criteria) == {"largest fall of a class in AU-PRO"}
    assert "AU-PRO of nut falls by 0.0501 to 0.7499, at most 0.05 allowed" in criteria[-1].why


def test_the_comparison_is_in_the_classes_that_both_know():
    assert failed(judge(evidence(nut=0.9, new=0.1), evidence(nut=0.8, old=1.0), NO_FLOORS)) == set()
    other = judge(evidence(nut=0.9), evidence(bolt=0.1), decided(max_class_drop=0.05))
    assert len(failed(other)) == 2 and "is not defined" in other[0].why


def test_a_champion_that_could_not_be_judged_lets_nobody_pass():
    (criterion,) = judge(evidence(nut=0.9), InputError("its weights are gone"), NO_FLOORS)
    assert not criterion.passed
    assert criterion.why == "the champion could not be evaluated on these test images: its weights are gone"


def test_models_of_other_test_images_are_not_compared():
    with pytest.raises(ValueError, match="same test images"):
        judge(evidence(nut=0.9), evidence(nut=0.8, test_set="b"), NO_FLOORS)


@given(values=st.dictionaries(st.sampled_from("abcd"), UNIT), floor=UNIT)
def test_nan_never_passes(values, floor):
    gate = floors(floor, floor).model_copy(update={"max_class_drop": 0.05})
    broken = evidence(**{**values, "nan": math.nan})
    assert {"mean AU-PRO", "AU-PRO of nan"} <= failed(judge(broken, None, gate))
    sound = evidence(**{name: 0.0 for name in values}, nan=0.0)
    assert {"gain in mean AU-PRO", "largest fall of a class in AU-PRO"} <= failed(judge(broken, sound, gate))


def test_floors_of_the_verdicts_are_pooled_or_by_class():
    model = evidence(scores=verdicts(nut=(9, 0), bolt=(5, 0)))
    assert failed(judge(model, None, decided(floors={"recall": Floor(pooled=0.7, mean=0.7, every_class=0.5)}))) == set()
    short = judge(model, None, decided(floors={"recall": Floor(pooled=0.71, every_class=0.51)}))
    assert failed(short) == {"pooled recall", "recall of bolt"}
    assert short[0].why == "pooled recall is 0.7000, at least 0.71 required"
    assert failed(judge(model, None, decided(floors={"image_auroc": Floor(pooled=0.9)}))) == {"pooled image AUROC"}


def test_a_pooled_floor_needs_a_pooled_metric():
    with pytest.raises(ValueError, match="au_pro has no pooled value"):
        Gate(floors={"au_pro": Floor(pooled=0.5)})
    with pytest.raises(ValueError, match="false_alarm_rate"):
        Gate(floors={"false_alarm_rate": Floor(pooled=0.5)})


def test_false_alarms_must_be_few_for_certain():
    gate = decided(max_false_alarm_rate=0.2)
    # Of 20 images without an alarm, one cannot say with 95 % confidence that the rate is below 0.139.
    assert failed(judge(evidence(scores=verdicts(nut=(10, 0), bolt=(10, 0))), None, gate)) == set()
    (criterion,) = judge(evidence(scores=verdicts(nut=(10, 1), bolt=(10, 0))), None, gate)
    assert not criterion.passed and criterion.measured == pytest.approx(0.2161, abs=1e-4)
    assert "1 of 20 normal test images raise an alarm: the rate is at most 0.2161 with 95% confidence" in criterion.why
    only_defects = verdicts()[lambda table: table["is_anomalous"]]
    (criterion,) = judge(evidence(scores=only_defects), None, gate)
    assert not criterion.passed and "is not defined" in criterion.why


def test_verdicts_worse_than_the_champions_fail_whatever_the_ranking():
    gate, champion = decided(no_worse_verdicts=True), evidence(nut=0.8, scores=verdicts(nut=(10, 0)))
    assert failed(judge(champion, champion, gate)) == set()
    assert failed(judge(evidence(nut=0.9, scores=verdicts(nut=(6, 0))), champion, gate)) == set()  # 4 by chance
    criteria = judge(evidence(nut=0.9, scores=verdicts(nut=(7, 2))), champion, gate)
    assert failed(criteria) == {"verdicts no worse than the champion's, p"}
    assert criteria[-1].measured == 1 / 32
    assert (
        "only this model is right about 0 defective and 0 normal images, only the champion about 3 defective and 2 "
        "normal images: exact McNemar p = 0.0312 for being worse, more than 0.05 required"
    ) in criteria[-1].why
    assert failed(judge(champion, evidence(nut=0.8, scores=verdicts(nut=(5, 0))), gate)) == set()


def test_verdicts_are_compared_image_by_image_in_any_order():
    gate, ours = decided(no_worse_verdicts=True), verdicts(nut=(8, 1), bolt=(2, 0))
    model, shuffled = evidence(nut=0.9, scores=ours), evidence(nut=0.9, scores=ours.sample(frac=1, random_state=0))
    assert judge(model, shuffled, gate)[-1].measured == 1


def test_a_verdict_counts_the_defects_that_it_gains_against_the_false_alarms():
    gate, cautious = decided(no_worse_verdicts=True), evidence(nut=0.8, scores=verdicts(nut=(2, 0)))
    assert failed(judge(evidence(nut=0.8, scores=verdicts(nut=(10, 6))), cautious, gate)) == set()
    assert len(failed(judge(evidence(nut=0.8, scores=verdicts(nut=(2, 6))), cautious, gate))) == 1


@settings(deadline=None)
@given(st.integers(0, 10), st.integers(0, 10), st.integers(0, 10), st.integers(0, 10))
def test_the_default_gate_lets_no_model_pass_that_finds_less_and_raises_more(found, alarms, less, more):
    one = evidence(nut=0.9, scores=verdicts(nut=(found, alarms)))
    worse = evidence(nut=0.9, scores=verdicts(nut=(max(found - less, 0), min(alarms + more, 10))))
    assert failed(judge(one, None, Gate())) <= failed(judge(worse, None, Gate()))


def test_no_class_at_all_never_passes():
    assert failed(judge(evidence(), None, floors(0.0, 0.0))) == {"mean AU-PRO"}


@given(values=st.dictionaries(st.sampled_from("abcd"), UNIT, min_size=1), floor=UNIT)
def test_raising_a_floor_never_lets_more_pass(values, floor):
    low, high = (judge(evidence(**values), None, floors(f, f)) for f in (floor / 2, floor))
    assert failed(low) <= failed(high)


@pytest.mark.parametrize("override", [None, Override("Ada", "the line stands still")])
def test_a_verdict_is_read_as_it_was_written(tmp_path, override):
    criteria = judge(evidence(nut=0.9, bad=math.nan), evidence(nut=0.8, bad=0.1), floors(0.8))
    verdict = Verdict(3, 2, True, override is not None, criteria, override)
    verdict.write(tmp_path / "gate.json")
    again = Verdict.read(tmp_path / "gate.json")
    assert again.reasons == verdict.reasons and not again.passed and "not defined" in again.reasons[0]
    assert (again.outcome, again.override, again.rejudged) == (verdict.outcome, override, True)
    assert verdict_table(again)


def test_the_outcome_says_who_is_champion_and_who_said_so():
    good = judge(evidence(nut=0.9), None, floors(0.8))
    assert Verdict(3, None, False, True, good).outcome == "version 3 passes the gate and is champion"
    bad = judge(evidence(nut=0.7), None, floors(0.8))
    assert Verdict(3, 2, False, False, bad).outcome == "version 3 does not pass the gate; version 2 is champion"
    assert Verdict(None, None, False, False, bad).outcome == "the model does not pass the gate; there is no champion"
    forced = Verdict(3, 2, False, True, bad, Override("Ada", "it is urgent")).outcome
    assert forced == "version 3 does not pass the gate, was promoted by Ada (it is urgent) and is champion"


def test_reading_what_is_no_verdict_is_an_error_that_names_the_file(tmp_path):
    (tmp_path / "gate.json").write_text("[]")
    with pytest.raises(InputError, match=r"gate\.json"):
        Verdict.read(tmp_path / "gate.json")
    with pytest.raises(InputError, match="does not exist"):
        Verdict.read(tmp_path / "nothing.json")
