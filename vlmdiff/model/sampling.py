"""Reconstruct clean latents from noised ones: timesteps and solvers."""

from collections.abc import Callable

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from vlmdiff.core.errors import InputError
from vlmdiff.core.params import Solver, Spacing

# Maps latents (B, C, h, w) and a scalar timestep to the network's output, of kind `prediction_type`.
Denoise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# DPM-Solver++ of order one is DDIM with eta 0 (Lu et al., 2022).
ORDER: dict[Solver, int] = {"ddim": 1, "dpmsolver++": 2}


def timesteps(noise_level: int, steps: int, spacing: Spacing = "trailing") -> list[int]:
    """Return the falling timesteps at which the network runs in a reconstruction from `noise_level`.

    "trailing" divides noise_level..0 evenly and begins at `noise_level`. "leading", the reference's spacing, is
    1, 1 + stride, ... with stride = (noise_level + 1) // steps, reversed; it begins below `noise_level`.
    Raises InputError if there are more steps than levels.
    """
    if not 1 <= steps <= max(noise_level, 1):
        raise InputError(f"`steps` is {steps}, but must be from 1 to `noise_level` = {noise_level}.")
    if spacing == "leading":
        stride = (noise_level + 1) // steps
        return [1 + stride * i for i in reversed(range(steps))]
    return torch.linspace(noise_level, 0, steps + 1).round().long().tolist()[:-1]


def reconstruct(
    denoise: Denoise,
    clean: torch.Tensor,
    noise: torch.Tensor,
    scheduler: DDIMScheduler,
    noise_level: int,
    steps: int,
    spacing: Spacing = "trailing",
    solver: Solver = "ddim",
) -> torch.Tensor:
    """Noise the latents to `noise_level`, denoise them deterministically, and return the result (B, C, h, w).

    `clean` has shape (B, C, h, w); `noise` broadcasts to it. "trailing" ends at the clean latents that the last step
    predicts. "leading" ends, as the reference does, with the noise of timestep 0, and its first step treats the latents
    as noised to its own timestep instead of `noise_level`. Raises InputError as `timesteps` does.
    """
    config = scheduler.config
    levels = timesteps(noise_level, steps, spacing)
    if not 0 <= noise_level < config.num_train_timesteps:
        raise InputError(f"`noise_level` is {noise_level}, but must be from 0 to {config.num_train_timesteps - 1}.")
    stepper = DPMSolverMultistepScheduler(
        num_train_timesteps=config.num_train_timesteps,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule=config.beta_schedule,
        prediction_type=config.prediction_type,
        rescale_betas_zero_snr=config.rescale_betas_zero_snr,
        solver_order=ORDER[solver],
        final_sigmas_type="sigma_min" if spacing == "leading" else "zero",
    )
    stepper.set_timesteps(timesteps=levels, device=clean.device)
    latents = scheduler.add_noise(clean, noise, torch.tensor([noise_level], device=clean.device))
    for timestep in stepper.timesteps:
        latents = stepper.step(denoise(latents, timestep), timestep, latents).prev_sample
    return latents
