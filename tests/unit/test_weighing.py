"""Defects drawn on normal images, and the share of retrieval that is chosen on them."""

from collections import Counter

import numpy as np
import pytest
from scipy import stats

from tests.tiny import SIZE, tiny_detector
from vlmdiff.core.errors import InputError
from vlmdiff.core.params import Costs
from vlmdiff.data.synthesised import KINDS, SIZES, HeldOut, synthesise
from vlmdiff.detection.calibration import Calibration, conformal_threshold, least_cost_rate
from vlmdiff.detection.normals import Normal
from vlmdiff.evaluation.weighing import DEFECTS, Costing, Weighing


def normal(count=6, size=64):
    return list(np.random.default_rng(0).integers(90, 110, (count, size, size, 3)).astype(np.uint8))


def test_every_image_gets_every_kind_in_both_sizes_and_nothing_changes_outside_the_mask():
    images = normal()
    drawn = list(synthesise(images, ["a"] * 6))
    assert Counter((one.row, one.kind, one.size) for one in drawn) == {
        (row, kind, size): 1 for row in range(6) for kind in KINDS for size in SIZES
    }
    for one in drawn:
        assert one.image.shape == (64, 64, 3) and one.image.dtype == np.uint8 and one.mask.any()
        changed = (one.image != images[one.row]).any(axis=2)
        grown = np.pad(one.mask, 4)
        near = np.lib.stride_tricks.sliding_window_view(grown, (9, 9)).any(axis=(2, 3))
        assert not (changed & ~near).any()


def test_the_same_images_get_the_same_defects_and_another_seed_others():
    once, again, other = (list(synthesise(normal(), ["a"] * 6, seed=seed)) for seed in (0, 0, 1))
    assert all(np.array_equal(a.image, b.image) for a, b in zip(once, again, strict=True))
    assert any(not np.array_equal(a.image, b.image) for a, b in zip(once, other, strict=True))


@pytest.mark.parametrize("limit", [7, 20, 35, 60])
def test_a_limit_spreads_what_is_drawn_over_images_and_kinds(limit):
    drawn = list(synthesise(normal(30), ["a"] * 30, limit))
    assert limit / 2 < len(drawn) <= limit
    assert {one.kind for one in drawn} == set(KINDS) or limit < 10
    assert len({one.row for one in drawn}) >= min(limit / 3, 30) - 1


class Detector:
    """One kind of evidence sees the defects, the other is noise of the same size."""

    def __init__(self, seeing: int):
        self.seeing, self.rng = seeing, np.random.default_rng(0)

    def see(self, images, normal):
        noise = self.rng.random((len(images), 2, 64, 64)).astype(np.float32)
        for i, image in enumerate(images):
            others = [np.abs(image.astype(float) - one).max(axis=2) for one in normal]
            noise[i, self.seeing] += 1.0 * (min(others, key=np.sum) > 0)
        return noise

    def evidence(self, images, batch_size, captions, without):
        return self.see(images, normal())

    def image_scores(self, maps):
        return maps.max(axis=(1, 2))


@pytest.mark.parametrize(("seeing", "expected"), [(0, 0.0), (1, 1.0)])
def test_the_evidence_that_sees_the_defects_carries_the_map(seeing, expected):
    detector = Detector(seeing)
    weighing = Weighing(detector, HeldOut(normal(), ["a", "a", "a", "b", "b", "b"]), 8, 0.3)
    chosen = weighing(detector.see(normal(), normal()))
    assert abs(chosen - expected) <= 0.4
    worst = min(weighing.rows(), key=lambda row: row["au_pro"])
    assert worst["weight"] == 1 - expected and len(weighing.rows()) == 11
    assert DEFECTS >= 100


class Alike(Detector):
    """Both kinds of evidence are the same."""

    def see(self, images, normal):
        found = super().see(images, normal)
        return np.repeat(found[:, self.seeing][:, None], 2, axis=1)


def test_reconstruction_counts_only_where_it_gains():
    detector = Alike(0)
    weighing = Weighing(detector, HeldOut(normal(), ["a"] * 6), 8, 0.3)
    assert weighing(detector.see(normal(), normal())) == 1.0


@pytest.mark.parametrize("miss", [0.1, 1, 3, 10, 100, 1e6])
@pytest.mark.parametrize("share", [0.01, 0.2, 0.7])
def test_the_rate_of_least_expected_cost_is_the_cheapest_of_those_that_can_be_promised(miss, share):
    rng = np.random.default_rng(int(miss))
    normal, defective = rng.normal(0, 1, 39), rng.normal(2, 1, 60)
    found = least_cost_rate(normal, ["a"] * 39, defective, ["a"] * 60, Costs(miss=miss, false_alarm=1), share)
    # Without the thresholds' own code: with the rate k / 40, the k - 1 highest normal scores raise an alarm.
    missed = [(defective <= np.sort(normal)[::-1][k - 1]).mean() for k in range(1, 40)]
    expected = [share * miss * missed[k - 1] + (1 - share) * k / 40 for k in range(1, 40)]
    assert found == pytest.approx((1 + int(np.argmin(expected))) / 40)


def test_products_with_enough_images_are_costed_by_their_own_thresholds():
    """Normal images of `a` score low, and its defects lie between them and those of `b`."""
    normal, classes = np.concatenate([np.linspace(0, 1, 399), np.linspace(10, 11, 399)]), ["a"] * 399 + ["b"] * 399
    costs = Costs(miss=1, false_alarm=1)
    found = least_cost_rate(normal, classes, np.full(50, 5.0), ["a"] * 50, costs, 0.5)
    # By one threshold, half of the normal images would have to raise an alarm.
    assert found < 0.05


def test_the_promise_holds_where_costs_have_chosen_it():
    """Over many calibrations: half of the images choose, the others set the threshold."""
    rng, promised, real = np.random.default_rng(0), [], []
    costs = Costs(miss=20, false_alarm=1)
    for _ in range(400):
        normal, defective = rng.normal(0, 1, 40), rng.normal(1.5, 1, 150)
        rate = least_cost_rate(normal[:20], ["a"] * 20, defective, ["a"] * 150, costs, 0.02)
        calibration = Calibration(1.0, [1.0], 0.0, 20, rate)
        threshold = conformal_threshold(normal[20:], rate)
        promised.append(calibration.guarantee)
        real.append(stats.norm.sf(threshold))
    error = np.std(np.array(real) - promised) / 20
    assert np.mean(real) <= np.mean(promised) + 2 * error


def test_expensive_misses_lower_the_threshold_and_expensive_false_alarms_raise_it():
    rng = np.random.default_rng(0)
    images = list(rng.integers(60, 120, (40, SIZE, SIZE, 3)).astype(np.uint8))
    classes = ["a", "b"] * 20
    detector = tiny_detector(samples=1, steps=1)
    detector.learn(images, [Normal(str(i), f"{i}.png", name) for i, name in enumerate(classes)])
    thresholds, rates = [], []
    for costs in (Costs(miss=1e6, false_alarm=1), Costs(miss=1, false_alarm=1e6)):
        costing = Costing(detector, HeldOut(images, classes), 16, costs, 0.02)
        detector.calibrate(images, products=classes, rate=costing)
        calibration = detector.calibrated()
        thresholds.append(calibration.threshold)
        rates.append(calibration.false_alarm_rate)
        # Half of the images choose.
        assert calibration.images == 20 and calibration.shortfall is None
        assert {name: scale.images for name, scale in calibration.products.items()} == {"a": 10, "b": 10}
    assert thresholds[0] < thresholds[1] and rates[0] > rates[1] == pytest.approx(1 / 21)


def test_costs_need_a_product_with_two_images():
    images = list(np.random.default_rng(0).integers(60, 120, (2, SIZE, SIZE, 3)).astype(np.uint8))
    detector = tiny_detector(samples=1, steps=1)
    detector.learn(images, [Normal(str(i), f"{i}.png", name) for i, name in enumerate("ab")])
    costing = Costing(detector, HeldOut(images, ["a", "b"]), 16, Costs(miss=1, false_alarm=1), 0.02)
    with pytest.raises(InputError, match="no product has two held-out normal images"):
        detector.calibrate(images, products=["a", "b"], rate=costing)
