"""From features to a map and a score: analytic cases."""

import numpy as np
import pytest
import torch

from vlmdiff.detection.anomaly_map import SMALLEST_POOLED, compare, image_scores, smooth
from vlmdiff.detection.features import absolute_difference, cosine_distance


def test_maps_of_layers_are_resized_and_averaged():
    zero = [torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 4, 4)]
    one = [torch.full((1, 1, 2, 2), 1.0), torch.full((1, 1, 4, 4), 3.0)]
    maps = compare(zero, one, absolute_difference, 8)
    torch.testing.assert_close(maps, torch.full((1, 8, 8), 2.0))


def test_corners_meet_corners_only_where_they_are_aligned():
    """A ramp 0, 1 on a grid of two: aligned, it rises from edge to edge; else it is flat outside the grid's centres."""
    ramp = torch.tensor([[0.0, 1.0], [0.0, 1.0]])[None, None]
    row = lambda aligned: compare([0 * ramp], [ramp], absolute_difference, 8, aligned)[0, 0]  # noqa: E731
    torch.testing.assert_close(row(True), torch.linspace(0, 1, 8))
    torch.testing.assert_close(row(False), ((torch.arange(8) + 0.5) / 4 - 0.5).clamp(0, 1))


@pytest.mark.parametrize("angle", [0.0, 0.5, np.pi / 2, np.pi])
def test_cosine_distance_is_one_minus_the_cosine(angle):
    a, b = torch.tensor([3.0, 0.0]), 5 * torch.tensor([np.cos(angle), np.sin(angle)], dtype=torch.float32)
    distance = cosine_distance(a.view(1, 2, 1, 1), b.view(1, 2, 1, 1)).item()
    assert distance == pytest.approx(1 - np.cos(angle), abs=1e-6)


def test_smoothing_spreads_a_point_into_a_gaussian_of_that_sigma():
    maps = np.zeros((2, 61, 61))
    maps[1, 30, 30] = 1
    empty, spread = smooth(maps, 5.0)
    assert (empty == 0).all() and spread.sum() == pytest.approx(1)
    across = spread.sum(axis=0)
    # Cut at four sigma, its variance is a little under 25.
    assert across @ (np.arange(61) - 30) ** 2 == pytest.approx(25, rel=0.01)


def test_without_smoothing_a_map_stays_as_it_is():
    maps = np.random.default_rng(0).random((2, 9, 9))
    np.testing.assert_array_equal(smooth(maps, 0.0), maps)


def test_the_score_is_the_maximum_of_each_map():
    maps = np.random.default_rng(0).random((3, 9, 9))
    assert image_scores(maps).tolist() == [m.max() for m in maps]


def test_the_pooled_score_of_a_point_is_the_peak_of_eight_boxes_convolved():
    maps = np.zeros((2, 128, 128))
    maps[1, 64, 64] = 1.0
    kernel = np.ones(1)
    for _ in range(8):
        kernel = np.convolve(kernel, np.full(8, 1 / 8))
    np.testing.assert_allclose(image_scores(maps, "pooled_max"), [0, kernel.max() ** 2], rtol=1e-12)


def test_the_pooled_score_keeps_a_flat_map_down_to_the_smallest():
    flat = np.full((1, SMALLEST_POOLED, SMALLEST_POOLED), 0.25)
    assert image_scores(flat, "pooled_max") == pytest.approx([0.25])
    with pytest.raises(RuntimeError):
        image_scores(flat[:, 1:, 1:], "pooled_max")
