"""The threshold from normal images: what it promises, counted over every image that could be the new one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import f1_score

from vlmdiff.detection.calibration import Calibration, conformal_threshold, f1_optimal, that_count

RATES = st.sampled_from([0.001, 0.01, 0.05, 0.1, 0.25, 0.5])


def calibration(images: int, rate: float) -> Calibration:
    return Calibration(1.0, [1.0], 1.0, images, rate)


@given(st.integers(1, 60), RATES, st.integers(0, 2**32))
def test_each_image_being_the_new_one_as_often_the_rate_is_the_one_guaranteed(images, rate, seed):
    scores = np.random.default_rng(seed).permutation(images + 1).astype(float)
    alarms = [scores[i] > conformal_threshold(np.delete(scores, i), rate) for i in range(images + 1)]
    said = calibration(images, rate)
    assert np.mean(alarms) == pytest.approx(said.guarantee)
    enough = images >= 1 / rate - 1 - 1e-9
    assert (said.guarantee <= rate + 1e-9) == enough
    assert not enough or said.guarantee > rate - 1 / (images + 1) - 1e-9


@pytest.mark.parametrize(
    ("images", "rate", "enough"),
    [(18, 0.05, 19), (13, 0.05, 19), (2, 0.05, 19), (1, 0.05, 19), (98, 0.01, 99), (1, 0.5, None), (19, 0.05, None)],
)
def test_a_rate_that_the_images_cannot_promise_is_said_with_what_would_do(images, rate, enough):
    words = calibration(images, rate).shortfall
    assert (words is None) == (enough is None)
    if words is not None:
        assert words.startswith(f"a threshold by {images} normal image") and f"it takes {enough} or more" in words
        assert calibration(enough, rate).shortfall is None
        assert calibration(images, float(words.split("rate of ")[-1].split(" ")[0])).shortfall is None


@given(st.lists(st.integers(0, 3), min_size=2, max_size=30), RATES)
def test_ties_only_lower_the_rate(scores, rate):
    scores = np.array(scores, float)
    alarms = [scores[i] > conformal_threshold(np.delete(scores, i), rate) for i in range(len(scores))]
    assert np.mean(alarms) <= calibration(len(scores) - 1, rate).guarantee + 1e-9


def test_nine_in_ten_calibrations_have_a_rate_in_the_range_that_is_said():
    rng, said = np.random.default_rng(0), calibration(72, 0.05)
    thresholds = np.array([conformal_threshold(rng.random(72), 0.05) for _ in range(4000)])
    low, high = said.rate_range(0.9)
    # Of evenly distributed scores the share above the threshold is known.
    assert np.mean((1 - thresholds > low) & (1 - thresholds < high)) == pytest.approx(0.9, abs=0.02)
    assert np.mean(1 - thresholds) == pytest.approx(said.guarantee, abs=0.002)


DRAWN = {
    "normal": stats.norm,
    "laplace": stats.laplace,
    "logistic": stats.logistic,
    "student": stats.t(3),
    "skewed": stats.gamma(4),
}


def quantiles(count: int) -> np.ndarray:
    """Normally distributed scores without chance."""
    return stats.norm.ppf((np.arange(count) + 0.5) / count)


@pytest.mark.parametrize("odd", [1, 3])
def test_with_few_images_an_odd_one_does_not_set_the_threshold_and_hide_every_defect(odd):
    scores = np.append(quantiles(30), [9.0] * odd)
    learned, _ = calibration(30 + odd, 0.05).learn(scores[:, None], ["cookie"] * (30 + odd))
    assert (learned.images, learned.left_out) == (30, odd)
    assert learned.odds(np.array([4.0]), ["cookie"]) > 0.5
    # What is known of all of them stays, for the p-value.
    assert len(learned.normal) == 30 + odd


@pytest.mark.parametrize(
    "scores",
    [
        quantiles(31),
        np.append(quantiles(80), 9.0),  # four of 81 may lie above the threshold
        np.append(quantiles(23), 9.0),  # 23 are not ample for 5 %
        np.append(quantiles(30), 5.0),
        np.append(np.zeros(30), 9.0),
        np.repeat(1.0, 40),
    ],
)
def test_all_images_set_the_threshold_where_none_hides_defects_or_the_others_are_too_few(scores):
    assert that_count(scores, 0.05).all()


@pytest.mark.parametrize("draw", DRAWN)
@pytest.mark.parametrize("images", [20, 25, 31, 45])
def test_images_that_are_left_out_do_not_break_the_promise(draw, images):
    rng = np.random.default_rng(0)
    rates, left_out = [], 0
    for scores in DRAWN[draw].rvs(size=(4000, images), random_state=rng):
        counts = that_count(scores, 0.05)
        left_out += not counts.all()
        rates.append(DRAWN[draw].sf(conformal_threshold(scores[counts], 0.05)))
    assert np.mean(rates) < 0.05
    assert left_out or images < 25 or draw in ("normal", "logistic")


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=20))
def test_no_threshold_has_a_better_f1(images):
    scores, truth = (np.array(values) for values in zip(*images, strict=True))
    found = f1_optimal(scores, truth)
    if truth.all() or not truth.any():
        assert found is None
        return
    best = max(f1_score(truth, scores >= threshold) for threshold in scores)
    assert f1_score(truth, scores >= found) == pytest.approx(best)
