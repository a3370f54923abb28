"""Train the image autoencoder whose latents the denoiser works in."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from vlmdiff.console import say
from vlmdiff.params import FirstStage
from vlmdiff.training.loop import History, batch_indices, fit, step_generator


def to_tensor(images: np.ndarray, device: torch.device) -> torch.Tensor:
    """uint8 (B, H, W, 3) to float (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_autoencoder(
    images: np.ndarray, validation: np.ndarray, params: FirstStage, state: Path, device: torch.device
) -> tuple[AutoencoderKL, History]:
    """An `AutoencoderKL` fitted to normal images by L1, squared error and a small KL term.

    images, validation: uint8 (N, S, S, 3), S the configured size; may be memory-mapped. `scaling_factor` is set so that
    the training images' latents have unit variance.
    """
    torch.manual_seed(params.seed)
    levels = len(params.block_channels)
    vae = AutoencoderKL(
        sample_size=params.image_size,
        latent_channels=params.latent_channels,
        block_out_channels=params.block_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        mid_block_add_attention=False,
        # Groups of one channel would wash out its level, and the decoder would draw specks to get it back.
        norm_num_groups=min(32, min(params.block_channels) // 4),
    ).to(device, memory_format=torch.channels_last)

    def loss(step: int) -> torch.Tensor:
        x = to_tensor(images[batch_indices(len(images), params.batch_size, step, params.seed)], device)
        posterior = vae.encode(x).latent_dist
        z = posterior.mean + posterior.std * torch.randn(
            posterior.mean.shape, generator=step_generator(params.seed, step)
        ).to(device)
        y = vae.decode(z).sample
        return F.l1_loss(y, x) + F.mse_loss(y, x) + params.kl_weight * posterior.kl().mean() / z[0].numel()

    def validation_loss() -> float:
        total = 0.0
        for start in range(0, len(validation), params.batch_size):
            x = to_tensor(validation[start : start + params.batch_size], device)
            total += F.l1_loss(vae.decode(vae.encode(x).latent_dist.mode()).sample, x).item() * len(x)
        return total / len(validation)

    history = fit("first_stage", vae, loss, validation_loss, params, state)
    with torch.no_grad():
        sample = images[:: max(1, len(images) // 256)]
        latents = torch.cat(
            [
                vae.encode(to_tensor(sample[start : start + params.batch_size], device)).latent_dist.mode()
                for start in range(0, len(sample), params.batch_size)
            ]
        )
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    say(f"first_stage: latents {tuple(latents.shape[1:])}, scaling factor {vae.config.scaling_factor:.3f}")
    return vae, history
