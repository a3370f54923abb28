"""Train the denoiser: UNet and SGN together, on latents, hints and text embeddings computed once."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from vlmdiff.model.pipeline import VLMDiffPipeline
from vlmdiff.model.sgn import SemanticGuidedNetwork
from vlmdiff.params import Train
from vlmdiff.training.encoded import Encoded
from vlmdiff.training.loop import History, batch_indices, fit, step_generator


def build(vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, params: Train) -> VLMDiffPipeline:
    """A pipeline with an untrained denoiser of the given size around a trained first stage and text encoder."""
    torch.manual_seed(params.seed)
    levels = len(params.block_channels)
    shape = dict(
        in_channels=vae.config.latent_channels,
        block_out_channels=params.block_channels,
        # Attention at the finest resolution costs the most and says the least.
        down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * (levels - 1)),
        layers_per_block=params.layers_per_block,
        cross_attention_dim=text_encoder.config.hidden_size,
        attention_head_dim=tuple(max(1, channels // params.head_size) for channels in params.block_channels),
    )
    unet = UNet2DConditionModel(
        sample_size=vae.config.sample_size // 2 ** (len(vae.config.block_out_channels) - 1),
        out_channels=vae.config.latent_channels,
        up_block_types=(*("CrossAttnUpBlock2D",) * (levels - 1), "UpBlock2D"),
        **shape,
    )
    sgn = SemanticGuidedNetwork(hint_channels=params.hint_channels, only_mid_control=params.only_mid_control, **shape)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=params.prediction,
        # Without it the last step still shows the image, and what is learned there is wrong (Lin et al., 2024).
        rescale_betas_zero_snr=params.prediction == "v_prediction",
        clip_sample=False,
        timestep_spacing="trailing",
    )
    return VLMDiffPipeline(vae, text_encoder, tokenizer, unet, sgn, scheduler, image_size=vae.config.sample_size)


def train_denoiser(pipeline: VLMDiffPipeline, data: Encoded, params: Train, state: Path) -> History:
    """Train the pipeline's UNet and SGN in place; what is frozen is not touched."""
    device = pipeline.device
    scheduler = pipeline.scheduler
    denoiser = nn.ModuleDict({"unet": pipeline.unet, "sgn": pipeline.sgn}).to(memory_format=torch.channels_last)
    training = np.flatnonzero(data.index["split"] == "train")
    held_out = np.flatnonzero(data.index["split"] == "validation")
    captions = data.index["caption"].to_numpy()

    def prediction_loss(
        rows: np.ndarray,
        latents: torch.Tensor,
        noise: torch.Tensor,
        levels: torch.Tensor,
        text_rows: np.ndarray,
    ) -> torch.Tensor:
        noise, levels = noise.to(device), levels.to(device)
        noisy = scheduler.add_noise(latents, noise, levels)
        hint = pipeline.normalize(torch.from_numpy(data.hints[rows]).to(device).permute(0, 3, 1, 2).float() / 255)
        output = pipeline.denoise(noisy, levels, data.prompt_embeds(text_rows).to(device), hint)
        target = noise
        if scheduler.config.prediction_type == "v_prediction":
            target = scheduler.get_velocity(latents, noise, levels)
        return F.mse_loss(output, target)

    def loss(step: int) -> torch.Tensor:
        rows = training[batch_indices(len(training), params.batch_size, step, params.seed)]
        generator = step_generator(params.seed, step)
        mean, std = torch.from_numpy(data.mean[rows]), torch.from_numpy(data.std[rows])
        latents = (mean + std * torch.randn(mean.shape, generator=generator)).to(device)
        noise = torch.randn(mean.shape, generator=generator)
        levels = torch.randint(0, scheduler.config.num_train_timesteps, (len(rows),), generator=generator)
        dropped = torch.rand(len(rows), generator=generator).numpy() < params.caption_dropout
        return prediction_loss(rows, latents, noise, levels, np.where(dropped, 0, captions[rows]))

    def validation_loss() -> float:
        # The same levels and noise each time: a curve that falls means a model that is better.
        generator = step_generator(params.seed, 2**32)
        total = 0.0
        for start in range(0, len(held_out), params.batch_size):
            rows = held_out[start : start + params.batch_size]
            latents = torch.from_numpy(data.mean[rows])
            noise = torch.randn(latents.shape, generator=generator)
            levels = torch.randint(0, scheduler.config.num_train_timesteps, (len(rows),), generator=generator)
            total += prediction_loss(rows, latents.to(device), noise, levels, captions[rows]).item() * len(rows)
        return total / len(held_out)

    return fit("train", denoiser, loss, validation_loss, params, state)
