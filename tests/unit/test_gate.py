"""The gate: floors, gain over the champion, and what is not defined."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmdiff.errors import InputError
from vlmdiff.evaluation.gate import Verdict, judge
from vlmdiff.evaluation.metrics import METRICS, Results
from vlmdiff.params import Gate

GATE = Gate(min_mean=0.8, min_class=0.6, min_improvement=0.01)
UNIT = st.floats(0, 1)


def results(**values: float) -> Results:
    return Results({name: dict.fromkeys(METRICS, value) for name, value in values.items()})


def failed(criteria) -> set[str]:
    return {criterion.name for criterion in criteria if not criterion.passed}


def test_a_model_on_every_floor_passes_without_a_champion():
    assert failed(judge(results(nut=0.6, bolt=1.0), None, GATE)) == set()


def test_a_mean_below_its_floor_fails_with_the_numbers():
    (criterion,) = [c for c in judge(results(nut=0.79, bolt=0.79), None, GATE) if not c.passed]
    assert criterion.name == "mean"
    assert criterion.why == "mean AU-PRO is 0.7900, at least 0.800 required"


def test_one_class_below_its_floor_fails_whatever_the_mean():
    assert failed(judge(results(nut=0.59, bolt=1.0, screw=1.0), None, GATE)) == {"nut"}


def test_a_model_no_better_than_the_champion_fails():
    model = results(nut=0.9)
    assert failed(judge(model, model, GATE)) == {"improvement"}
    assert failed(judge(model, results(nut=0.95), GATE)) == {"improvement"}


def test_exactly_the_required_gain_passes():
    assert failed(judge(results(nut=0.91), results(nut=0.90), GATE)) == set()


def test_the_gain_is_over_the_classes_that_both_know():
    assert failed(judge(results(nut=0.9, new=0.7), results(nut=0.8, old=1.0), GATE)) == set()


def test_a_champion_of_other_classes_leaves_the_gain_undefined_which_fails():
    assert failed(judge(results(nut=0.9), results(bolt=0.1), GATE)) == {"improvement"}


@given(values=st.dictionaries(st.sampled_from("abcd"), UNIT), floor=UNIT)
def test_nan_never_passes(values, floor):
    gate = Gate(min_mean=floor, min_class=floor, min_improvement=-1)
    broken = results(**{**values, "nan": math.nan})
    assert {"mean", "nan"} <= failed(judge(broken, None, gate))
    assert "improvement" in failed(judge(broken, broken, gate))


def test_no_class_at_all_never_passes():
    assert failed(judge(Results({}), None, Gate(min_mean=0, min_class=0))) == {"mean"}


@given(values=st.dictionaries(st.sampled_from("abcd"), UNIT, min_size=1), floor=UNIT)
def test_raising_a_floor_never_lets_more_pass(values, floor):
    model = results(**values)
    low, high = (judge(model, None, Gate(min_mean=f, min_class=f)) for f in (floor / 2, floor))
    assert failed(low) <= failed(high)


def test_a_verdict_is_read_as_it_was_written(tmp_path):
    criteria = judge(results(nut=0.9, bad=math.nan), results(nut=0.8), GATE)
    verdict = Verdict(3, "au_pro", 2, False, criteria)
    verdict.write(tmp_path / "gate.json")
    again = Verdict.read(tmp_path / "gate.json")
    assert again.reasons == verdict.reasons and not again.passed
    assert "not defined" in again.reasons[0]


def test_reading_what_is_no_verdict_is_an_error_that_names_the_file(tmp_path):
    (tmp_path / "gate.json").write_text("[]")
    with pytest.raises(InputError, match=r"gate\.json"):
        Verdict.read(tmp_path / "gate.json")
    with pytest.raises(InputError, match="does not exist"):
        Verdict.read(tmp_path / "nothing.json")
