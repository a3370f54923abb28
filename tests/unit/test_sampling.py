"""Sampling: which timesteps are visited, and that each solver solves the equation it is meant to."""

from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st

from vlmdiff.core.errors import InputError
from vlmdiff.model.sampling import reconstruct, timesteps

SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
MEAN, STD = 0.7, 0.4


def scheduler(**config):
    return DDIMScheduler(**SCHEDULE, **config)


def normal(count, seed=0):
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def ideal(alphas, prediction="epsilon"):
    """What a perfect network says where the clean latents are N(MEAN, STD^2): the posterior mean, in closed form."""

    def denoise(latents, timestep):
        alpha = alphas[timestep]
        clean = MEAN + alpha.sqrt() * STD**2 * (latents - alpha.sqrt() * MEAN) / (alpha * STD**2 + 1 - alpha)
        noise = (latents - alpha.sqrt() * clean) / (1 - alpha).sqrt()
        return noise if prediction == "epsilon" else alpha.sqrt() * noise - (1 - alpha).sqrt() * clean

    return denoise


def flow(alphas, latents, start, end_alpha=1.0):
    """Where the probability flow takes latents of that noise: it keeps their distance in standard deviations."""
    start_alpha, end_alpha = alphas[start], torch.as_tensor(end_alpha)
    deviation = lambda alpha: (alpha * STD**2 + 1 - alpha).sqrt()  # noqa: E731
    distance = (latents - start_alpha.sqrt() * MEAN) / deviation(start_alpha)
    return end_alpha.sqrt() * MEAN + deviation(end_alpha) * distance


@given(level=st.integers(0, 999), share=st.floats(0, 1), spacing=st.sampled_from(["trailing", "leading"]))
def test_timesteps_fall_from_the_noise_level_without_repeating(level, share, spacing):
    steps = max(1, round(share * level))
    found = timesteps(level, steps, spacing)
    assert len(found) == steps and found == sorted(set(found), reverse=True)
    if spacing == "trailing":
        assert found[0] == level
        assert all(abs(a - b - level / steps) <= 1 for a, b in pairwise([*found, 0]))
    else:
        assert found[-1] == 1 and 0 <= found[0] <= max(level, 1)
        assert len({a - b for a, b in pairwise(found)}) <= 1


def test_leading_spacing_of_ten_steps_is_the_references():
    assert timesteps(999, 10, "leading") == [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]


@pytest.mark.parametrize(("level", "steps"), [(5, 6), (0, 2), (500, 0)])
def test_more_steps_than_levels_are_refused(level, steps):
    with pytest.raises(InputError, match="steps"):
        timesteps(level, steps)


@pytest.mark.parametrize("level", [-1, 1000])
def test_a_noise_level_that_is_not_there_is_refused(level):
    with pytest.raises(InputError, match="noise_level"):
        reconstruct(lambda x, t: x, normal(1), normal(1), scheduler(), level, 1)


@pytest.mark.parametrize("level", [1, 250, 500, 999])
def test_latents_are_noised_to_the_level_at_which_the_network_is_first_asked(level):
    clean, noise, seen = normal(2), normal(1, seed=1), []
    alpha = scheduler().alphas_cumprod[level]

    def denoise(latents, timestep):
        seen.append((int(timestep), latents))
        return torch.zeros_like(latents)

    reconstruct(denoise, clean, noise, scheduler(), level, min(level, 3))
    assert len(seen) == min(level, 3) and seen[0][0] == level
    torch.testing.assert_close(seen[0][1], alpha.sqrt() * clean + (1 - alpha).sqrt() * noise)


@pytest.mark.parametrize("steps", [1, 4, 10, 50])
def test_ddim_with_leading_spacing_is_that_of_diffusers(steps):
    theirs = scheduler(timestep_spacing="leading", steps_offset=1, set_alpha_to_one=False)
    theirs.set_timesteps(steps)
    clean, noise = normal(2), normal(2, seed=1)
    denoise = ideal(theirs.alphas_cumprod)
    expected = theirs.add_noise(clean, noise, torch.tensor([999]))
    for timestep in theirs.timesteps:
        expected = theirs.step(denoise(expected, timestep), timestep, expected, eta=0.0).prev_sample
    ours = reconstruct(denoise, clean, noise, theirs, 999, steps, spacing="leading")
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def relative_error(level, steps, spacing, solver):
    config, clean, noise = scheduler(), normal(2), normal(2, seed=1)
    alphas = config.alphas_cumprod
    latents = alphas[level].sqrt() * clean + (1 - alphas[level]).sqrt() * noise
    first = timesteps(level, steps, spacing)[0]
    exact = flow(alphas, latents, first, alphas[0] if spacing == "leading" else 1.0)
    found = reconstruct(ideal(alphas), clean, noise, config, level, steps, spacing, solver)
    return ((found - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("level", [300, 700, 999])
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_solvers_converge_to_the_probability_flow(level, spacing):
    for solver in ("ddim", "dpmsolver++"):
        # With as many steps as levels, every timestep is visited.
        errors = [relative_error(level, steps, spacing, solver) for steps in (20, 80, level)]
        assert errors == sorted(errors, reverse=True) and errors[-1] < 0.01


@pytest.mark.parametrize("level", [300, 700, 999])
@pytest.mark.parametrize("steps", [5, 10, 20, 40])
def test_the_solver_of_second_order_is_nearer_in_as_many_steps(level, steps):
    ddim, faster = (relative_error(level, steps, "trailing", solver) for solver in ("ddim", "dpmsolver++"))
    assert faster < ddim


def test_twice_the_steps_halve_the_error_of_ddim_and_do_more_for_the_faster_solver():
    halved, more = (
        relative_error(999, 250, "leading", solver) / relative_error(999, 500, "leading", solver)
        for solver in ("ddim", "dpmsolver++")
    )
    assert halved == pytest.approx(2, rel=0.1)
    # Four in the limit; near timestep 0 the signal-to-noise ratio rises too steeply for 500 steps to be there.
    assert more > 2.5


@pytest.mark.parametrize("solver", ["ddim", "dpmsolver++"])
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_noise_and_velocity_lead_to_the_same_latents(solver, spacing):
    clean, noise = normal(2), normal(2, seed=1)
    out = [
        reconstruct(
            ideal(scheduler().alphas_cumprod, kind),
            clean,
            noise,
            scheduler(prediction_type=kind),
            800,
            6,
            spacing,
            solver,
        )
        for kind in ("epsilon", "v_prediction")
    ]
    torch.testing.assert_close(*out, rtol=1e-3, atol=1e-4)
