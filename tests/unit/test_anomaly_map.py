"""From features to a map and a score: analytic cases."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tests.tiny import SIZE, tiny_pipeline
from vlmdiff.core.params import Latents, Pixels
from vlmdiff.detection.anomaly_map import SMALLEST_POOLED, compare, image_scores, smooth
from vlmdiff.detection.features import cosine_distance, rms_difference, spaces


def test_maps_of_layers_are_resized_and_averaged():
    zero = [torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 4, 4)]
    one = [torch.full((1, 1, 2, 2), 1.0), torch.full((1, 1, 4, 4), 3.0)]
    maps = compare(zero, one, rms_difference, 8)
    torch.testing.assert_close(maps, torch.full((1, 8, 8), 2.0))


def test_corners_meet_corners_only_where_they_are_aligned():
    """A ramp 0, 1 on a grid of two: aligned, it rises from edge to edge; else it is flat outside the grid's centres."""
    ramp = torch.tensor([[0.0, 1.0], [0.0, 1.0]])[None, None]
    row = lambda aligned: compare([0 * ramp], [ramp], rms_difference, 8, aligned)[0, 0]  # noqa: E731
    torch.testing.assert_close(row(True), torch.linspace(0, 1, 8))
    torch.testing.assert_close(row(False), ((torch.arange(8) + 0.5) / 4 - 0.5).clamp(0, 1))


def test_colours_are_compared_by_their_root_mean_square():
    photograph = torch.tensor([0.3, 0.5, 0.1]).view(1, 3, 1, 1)
    repainted = torch.tensor([0.3, 0.1, 0.4]).view(1, 3, 1, 1)
    assert rms_difference(photograph, repainted).item() == pytest.approx((0.25 / 3) ** 0.5)


def test_pixels_are_means_of_what_a_window_covers():
    ((extract, distance),) = spaces([Pixels(kind="pixels", window=3)], tiny_pipeline())
    black = torch.zeros(1, 3, SIZE, SIZE)
    dots = black.clone()
    dots[..., 0, 0] = dots[..., 10, 10] = 1.0
    (found,) = (distance(a, b)[0] for a, b in zip(extract(black, None), extract(dots, None), strict=True))
    expected = torch.zeros(SIZE, SIZE)
    # In the corner the window covers four pixels, elsewhere nine.
    expected[0, 0], expected[0, 1], expected[1, 0], expected[1, 1] = 1 / 4, 1 / 6, 1 / 6, 1 / 9
    expected[9:12, 9:12] = 1 / 9
    torch.testing.assert_close(found, expected)


def test_a_window_without_a_middle_is_refused():
    with pytest.raises(ValidationError, match="odd"):
        Pixels(kind="pixels", window=4)


def test_latents_are_compared_as_the_denoiser_gives_them():
    ((extract, distance),) = spaces([Latents(kind="latents")], tiny_pipeline())
    x, y = (torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert extract(torch.rand(1, 3, SIZE, SIZE), x) == [x]
    assert distance(x, x).abs().max() == 0
    of_one_place = (x - y)[0, :, 3, 5]
    torch.testing.assert_close(distance(x, y)[0, 3, 5], (of_one_place @ of_one_place / len(of_one_place)).sqrt())


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


def test_the_top_percent_is_the_mean_of_the_highest_hundredth():
    maps = np.random.default_rng(0).permutation(20 * 30 * 2).reshape(2, 20, 30).astype(float)
    expected = [np.sort(one.ravel())[-6:].mean() for one in maps]
    assert image_scores(maps, "top_percent") == pytest.approx(expected)
    # Of few pixels it is the highest.
    assert image_scores(np.arange(9.0).reshape(1, 3, 3), "top_percent") == pytest.approx([8])


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
