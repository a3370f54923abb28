"""AU-PRO against analytic values and an oracle that tries every threshold in exact arithmetic."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from vlmdiff.core.errors import InputError
from vlmdiff.evaluation import aupro
from vlmdiff.evaluation.aupro import collect, curve, rank


def regions_by_flood_fill(mask):
    """Sets of (row, column), 8-connected."""
    open_pixels = {tuple(pixel) for pixel in np.argwhere(mask)}
    regions = []
    while open_pixels:
        region, frontier = set(), [open_pixels.pop()]
        while frontier:
            y, x = frontier.pop()
            region.add((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & open_pixels
            open_pixels -= near
            frontier += near
        regions.append(region)
    return regions


def aupro_by_every_threshold(maps, masks, max_fpr):
    """The definition, threshold by threshold, in fractions: no rounding anywhere."""
    limit = Fraction(max_fpr)
    normal = [score for scores, mask in zip(maps, masks, strict=True) for score in scores[~mask].tolist()]
    regions = [
        [scores[pixel].item() for pixel in region]
        for scores, mask in zip(maps, masks, strict=True)
        for region in regions_by_flood_fill(mask)
    ]
    points = [(Fraction(0), Fraction(0))]
    for threshold in sorted({score for scores in maps for score in scores.ravel().tolist()}, reverse=True):
        fpr = Fraction(sum(score >= threshold for score in normal), len(normal))
        overlaps = [Fraction(sum(score >= threshold for score in region), len(region)) for region in regions]
        points.append((fpr, sum(overlaps) / len(overlaps)))
    area = Fraction(0)
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 < limit and x1 > x0:
            x = min(x1, limit)
            y = y0 + (y1 - y0) * (x - x0) / (x1 - x0)
            area += (x - x0) * (y0 + y) / 2
    return float(area / limit)


@st.composite
def judged_maps(draw):
    """One to three small maps, often with ties, at any scale, with at least one pixel of each kind."""
    count, height, width = draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(2, 6))
    size = count * height * width
    levels = draw(st.sampled_from([1, 2, 4, 1000]))
    scores = draw(st.lists(st.integers(0, levels - 1), min_size=size, max_size=size))
    scale = draw(st.sampled_from([1e-30, 1e-3, 1.0, 1e30]))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    maps = (np.array(scores) * (scale / levels) - scale / 3).astype(dtype).reshape(count, height, width)
    truth = draw(st.lists(st.booleans(), min_size=size, max_size=size).filter(lambda x: len(set(x)) == 2))
    return maps, np.array(truth).reshape(count, height, width)


@settings(max_examples=300, deadline=None)
@given(judged_maps(), st.one_of(st.sampled_from([0.05, 0.25, 0.3, 0.5, 1.0]), st.floats(1e-6, 1)))
@example((np.zeros((1, 1, 2)), np.array([[[True, False]]])), 0.3)
def test_it_is_the_area_over_every_distinct_threshold(judged, max_fpr):
    expected = aupro_by_every_threshold(*judged, max_fpr)
    assert aupro(*judged, max_fpr) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int16])
@pytest.mark.parametrize("max_fpr", [0.01, 0.3, 1.0])
def test_it_agrees_with_the_oracle_on_larger_maps(dtype, max_fpr):
    rng = np.random.default_rng(7)
    masks = rng.random((3, 20, 24)) > 0.9
    maps = (rng.normal(size=masks.shape) * 50 + 40 * masks).astype(dtype)
    expected = aupro_by_every_threshold(maps, masks, max_fpr)
    assert aupro(maps, masks, max_fpr) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("max_fpr", [1e-6, 0.05, 0.3, 1 / 3, 1.0])
class TestAnalyticValues:
    mask = np.zeros((1, 8, 8), bool)
    mask[0, 2:5, 3:7] = True

    def test_a_perfect_map_is_1(self, max_fpr):
        assert aupro(self.mask.astype(float), self.mask, max_fpr) == pytest.approx(1, abs=1e-15)

    def test_an_inverted_map_is_0_below_the_full_rate(self, max_fpr):
        assert aupro(1.0 - self.mask, self.mask, max_fpr) == 0

    def test_a_constant_map_is_chance(self, max_fpr):
        constant = np.full(self.mask.shape, 0.7)
        assert aupro(constant, self.mask, max_fpr) == pytest.approx(max_fpr / 2, rel=1e-12)


def test_a_curve_drawn_by_hand():
    # Half the region is found at rate 0, half at 1/4: (0.5 x 0.5 + 0.25 x 0.5) / 0.5.
    scores = np.array([[0.9, 0.3, 0.5, 0.2, 0.1, 0.0]])
    mask = np.array([[True, True, False, False, False, False]])
    assert aupro([scores], [mask], 0.5) == pytest.approx(0.75, abs=1e-15)


def test_a_score_shared_with_normal_pixels_is_a_ramp_cut_at_the_limit():
    # The region shares its score with the rates from 1/4 to 3/4; a limit of 1/2 takes half the ramp's run.
    scores = np.array([[0.5, 0.9, 0.5, 0.5, 0.1]])
    mask = np.array([[True, False, False, False, False]])
    assert aupro([scores], [mask], 0.5) == pytest.approx((0.25 * 0.5 / 2) / 0.5, abs=1e-15)


def test_regions_weigh_the_same_whatever_their_size():
    mask = np.zeros((10, 10), bool)
    mask[:6, :6] = True
    mask[9, 9] = True
    only_the_pixel = np.zeros((10, 10))
    only_the_pixel[9, 9] = 1
    # One region at once; the other along the ramp of the tie, which a limit of 0.3 cuts at 0.3.
    assert aupro([only_the_pixel], [mask], 0.3) == pytest.approx(0.5 + 0.5 * 0.15, abs=1e-12)


def test_pixels_that_touch_at_a_corner_are_one_region():
    scores = np.zeros((5, 5))
    scores[0, 0] = 1
    diagonal, apart = np.zeros((5, 5), bool), np.zeros((5, 5), bool)
    diagonal[[0, 1, 2], [0, 1, 2]] = True
    apart[[0, 2, 4], [0, 2, 4]] = True
    apart[2, 3] = True
    # What is found adds its share at once, the rest along the ramp of a constant map: 0.15 of it.
    assert aupro([0 * scores, scores], [diagonal, apart]) == pytest.approx(1 / 4 + 3 / 4 * 0.15)
    assert aupro([scores, 0 * scores], [diagonal, apart]) == pytest.approx(1 / 12 + 11 / 12 * 0.15)


def test_regions_do_not_reach_across_an_edge_or_into_the_next_image():
    masks = np.zeros((2, 4, 6), bool)
    masks[0, :, 0] = masks[0, :, -1] = masks[1, :, 0] = True  # three regions, left and right edges
    scores = np.zeros((2, 4, 6))
    scores[0, :, 0] = 1
    assert aupro(scores, masks) == pytest.approx(1 / 3 + 2 / 3 * 0.15)


def test_only_the_order_of_scores_counts():
    rng = np.random.default_rng(3)
    maps, masks = rng.integers(0, 500, (4, 30, 30)) / 7, rng.random((4, 30, 30)) > 0.8
    exact = aupro(maps, masks)
    _, ranks = np.unique(maps, return_inverse=True)
    assert aupro(ranks.reshape(maps.shape), masks) == exact
    assert aupro(np.exp(maps / 10), masks) == exact
    assert aupro(maps * 1e30 - 5, masks) == exact
    assert aupro(maps * 1e-300, masks) == exact


def test_images_may_differ_in_size_and_masks_be_of_0_and_255():
    rng = np.random.default_rng(5)
    maps = [rng.random((5, 9)), rng.random((12, 4)), rng.random((1, 1))]
    masks = [rng.random(scores.shape) > 0.6 for scores in maps]
    expected = aupro_by_every_threshold(maps, masks, 0.3)
    images = [(255 * mask).astype(np.uint8) for mask in masks]
    assert aupro(maps, images) == pytest.approx(expected, abs=1e-12)


def pro_curve(maps, masks, max_fpr=0.3):
    """The curve as the report plots it."""
    return curve(rank(*collect(maps, masks)), max_fpr)


def test_maps_and_masks_are_left_as_they_were():
    rng = np.random.default_rng(5)
    maps, masks = rng.random((1, 16, 16)), np.zeros((1, 16, 16), bool)
    masks[0, :3] = True
    for inputs in ([maps, masks], [np.concatenate([maps, maps]), np.concatenate([masks, 0 * masks])]):
        before = [array.copy() for array in inputs]
        aupro(*inputs)
        pro_curve(*inputs)
        assert all(np.array_equal(array, copy) for array, copy in zip(inputs, before, strict=True))


def test_without_a_region_or_a_normal_pixel_it_is_not_defined():
    scores = np.ones((2, 3, 3))
    for masks in (np.zeros((2, 3, 3), bool), np.ones((2, 3, 3), bool)):
        assert math.isnan(aupro(scores, masks))
        assert [len(axis) for axis in pro_curve(scores, masks)] == [0, 0]
    assert math.isnan(aupro([], []))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("anomalous", [False, True])
def test_a_score_that_is_not_finite_names_its_map(bad, anomalous):
    maps, masks = np.zeros((3, 4, 4)), np.zeros((3, 4, 4), bool)
    masks[:, 0, 0] = True
    maps[2][masks[2] == anomalous] = bad
    with pytest.raises(InputError, match="anomaly map 2 holds NaN or infinity"):
        aupro(maps, masks)


def test_shapes_that_do_not_match_name_the_map():
    with pytest.raises(InputError, match=r"anomaly map 1 has shape \(2, 3\), its mask \(3, 2\)"):
        aupro([np.zeros((2, 2)), np.zeros((2, 3))], [np.zeros((2, 2)), np.zeros((3, 2))])
    with pytest.raises(InputError, match="anomaly map 0 has shape"):
        aupro(np.zeros((3, 3)), np.zeros((3, 3)))
    with pytest.raises(InputError, match="2 anomaly maps, but 1 masks"):
        aupro(np.zeros((2, 3, 3)), np.zeros((1, 3, 3)))


@pytest.mark.parametrize("limit", [0, -0.1, 1.0001, math.nan])
def test_a_limit_outside_0_to_1_is_refused(limit):
    with pytest.raises(InputError, match="max_fpr"):
        aupro(np.zeros((1, 2, 2)), np.eye(2)[None], limit)


@pytest.mark.parametrize("max_fpr", [0.3, 1.0])
def test_the_curve_for_plotting_is_short_and_has_the_area(max_fpr):
    rng = np.random.default_rng(11)
    masks = np.zeros((4, 60, 60), bool)
    masks[:, 10:25, 30:50] = masks[:2, 50, 50] = True
    maps = rng.normal(size=masks.shape) + 1.5 * masks
    fpr, pro = pro_curve(maps, masks, max_fpr)
    assert len(fpr) == len(pro) <= 200
    assert (fpr[0], pro[0]) == (0, 0)
    assert fpr[-1] == max_fpr
    assert (np.diff(fpr) >= 0).all() and (np.diff(pro) >= 0).all()
    assert np.trapezoid(pro, fpr) / max_fpr == pytest.approx(aupro(maps, masks, max_fpr), abs=2e-3)


@settings(max_examples=100, deadline=None)
@given(judged_maps(), st.sampled_from([0.1, 0.3, 1.0]))
@example((np.array([[[1.0, 0.0]]]), np.array([[[False, True]]])), 1.0)
def test_a_curve_of_few_points_is_exact(judged, max_fpr):
    maps, masks = judged
    assume(masks.sum() < 90)  # a curve has about two points an anomalous pixel
    fpr, pro = pro_curve(maps, masks, max_fpr)
    assert np.trapezoid(pro, fpr) / max_fpr == pytest.approx(aupro(maps, masks, max_fpr), abs=1e-12)
