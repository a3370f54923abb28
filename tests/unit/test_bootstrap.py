"""Bootstrap over images: a sample is what its images, repeated as drawn, would be judged as."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmdiff.core.errors import InputError
from vlmdiff.evaluation.bootstrap import Resampled, Statistics
from vlmdiff.evaluation.metrics import METRICS, evaluate_classes


def judged(seed, images=12, side=16, shift=1.0, levels=None):
    """Maps, masks, scores and truths; every second image has a defect, which scores higher."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((images, side, side), bool)
    for mask in masks[::2]:
        for _ in range(rng.integers(1, 4)):
            y, x = rng.integers(0, side - 5, 2)
            mask[y : y + rng.integers(1, 5), x : x + rng.integers(1, 5)] = True
    maps = rng.normal(size=masks.shape) + shift * masks
    scores = rng.normal(size=images) + shift * masks.any((1, 2))
    if levels:
        maps, scores = np.round(maps * levels), np.round(scores * levels)
    return maps, masks, scores, masks.any((1, 2))


def resample(statistics, samples=1000):
    return Resampled({name: of_class.draw(name, samples=samples) for name, of_class in statistics.items()})


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.lists(st.integers(0, 3), min_size=12, max_size=12), st.sampled_from([0.1, 0.3, 1.0]))
def test_weights_are_repetitions(seed, weights, max_fpr):
    # Of so few distinct scores none share a group.
    maps, masks, scores, truths = judged(seed, levels=4)
    found = Statistics.of(maps, masks, scores, truths).metrics(np.array([weights]), max_fpr)
    rows = np.repeat(np.arange(12), weights)
    exact = evaluate_classes(["nut"] * len(rows), maps[rows], masks[rows], scores[rows], max_fpr, None, truths[rows])
    for metric in METRICS:
        expected = exact.classes["nut"][metric] if len(rows) else np.nan
        assert found[metric][0] == pytest.approx(expected, abs=1e-6, nan_ok=True)


def test_groups_of_scores_cost_little_precision():
    maps, masks, scores, truths = judged(1, images=40, side=64)
    found = Statistics.of(maps, masks, scores, truths).metrics(np.ones((1, 40)), 0.3)
    exact = evaluate_classes(["nut"] * 40, maps, masks, scores, 0.3, None, truths).classes["nut"]
    for metric in METRICS:
        assert found[metric][0] == pytest.approx(exact[metric], abs=2e-3)


def test_an_image_whose_mask_is_not_known_counts_as_an_image_alone():
    maps, masks, scores, truths = judged(2, levels=4)
    known = [None if i == 0 else mask for i, mask in enumerate(masks)]
    found = Statistics.of(maps, known, scores, truths).metrics(np.ones((1, 12)), 0.3)
    exact = evaluate_classes(["nut"] * 12, maps, known, scores, 0.3, None, truths).classes["nut"]
    assert {metric: value[0] for metric, value in found.items()} == pytest.approx(exact, abs=1e-6)


def test_two_models_are_drawn_the_same_images():
    statistics = {name: Statistics.of(*judged(seed)) for seed, name in enumerate(("bolt", "nut"))}
    difference = resample(statistics, samples=50) - resample(statistics, samples=50)
    assert all((values == 0).all() for of_class in difference.classes.values() for values in of_class.values())
    # Every pixel of one model's is ranked as the other's: all that differs is another scale.
    rescaled = {}
    for seed, name in enumerate(("bolt", "nut")):
        maps, *others = judged(seed, levels=4)
        rescaled[name] = Statistics.of(2 * maps, *others), Statistics.of(maps, *others)
    a, b = (resample({name: pair[i] for name, pair in rescaled.items()}, samples=50) for i in (0, 1))
    assert (a - b).interval("au_pro") == pytest.approx((0, 0), abs=1e-6)
    one = resample(statistics, samples=50) - resample({"nut": statistics["nut"]}, samples=50)
    assert list(one.classes) == ["nut"]


def test_samples_are_read_as_they_were_written(tmp_path):
    found = resample({"ein 'Stück'": Statistics.of(*judged(0)), "nut": Statistics.of(*judged(1))}, samples=20)
    found.save(tmp_path / "samples.npz")
    again = Resampled.load(tmp_path / "samples.npz")
    assert list(again.classes) == list(found.classes)
    for name, metrics in found.classes.items():
        for metric, values in metrics.items():
            np.testing.assert_array_equal(again.classes[name][metric], values.astype(np.float32))
    (tmp_path / "text.npz").write_text("no samples")
    for file, said in (("text.npz", "has no bootstrap samples"), ("no.npz", "does not exist")):
        with pytest.raises(InputError, match=said):
            Resampled.load(tmp_path / file)


def test_the_lower_bound_is_what_the_mean_exceeds_in_that_share_of_samples():
    samples = np.arange(1001) / 1000
    found = Resampled({"nut": dict.fromkeys(METRICS, samples), "bolt": dict.fromkeys(METRICS, samples)})
    assert found.lower_bound("au_pro", 0.95) == pytest.approx(0.05)
    assert np.isnan(Resampled({}).lower_bound("au_pro", 0.95))


def test_a_class_without_defects_has_no_interval_and_is_left_out_of_the_mean():
    maps, masks, scores, truths = judged(3)
    good = ~truths
    one = {"bolt": Statistics.of(maps, masks, scores, truths)}
    two = {**one, "nut": Statistics.of(maps[good], masks[good], scores[good], truths[good])}
    found = resample(two, samples=100)
    assert np.isnan(found.interval("au_pro", "nut")).all()
    assert found.interval("au_pro") == resample(one, samples=100).interval("au_pro")
    assert np.isnan(resample({}).interval("au_pro")).all()


def test_nine_in_ten_intervals_of_ninety_percent_have_what_more_images_would_show(record_property):
    maps, masks, scores, truths = judged(4, images=4000, side=8)
    everything = evaluate_classes(["nut"] * 4000, maps, masks, scores, 0.3, None, truths).classes["nut"]
    tests = np.random.default_rng(0).permutation(4000).reshape(80, 50)
    hits = dict.fromkeys(("au_pro", "image_auroc", "pixel_auroc"), 0)
    for rows in tests:
        found = resample({"nut": Statistics.of(maps[rows], masks[rows], scores[rows], truths[rows])}, samples=200)
        for metric in hits:
            low, high = found.interval(metric, "nut", level=0.9)
            hits[metric] += low <= everything[metric] <= high
    record_property("intervals of 90 % that hold, of 80", hits)
    # Of 80 tries at 0.9 fewer than 62 come once in a thousand; with 25 images of a kind intervals are a little narrow.
    assert all(count >= 60 for count in hits.values())
