"""Make the latent space: train an image autoencoder, fine-tune a pretrained one, or project a backbone's features."""

from collections.abc import Callable
from pathlib import Path

import accelerate.utils
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from vlmdiff.core.console import say, track
from vlmdiff.core.device import process_group
from vlmdiff.core.errors import InputError
from vlmdiff.core.params import FirstStage, Part
from vlmdiff.model import pretrained
from vlmdiff.model.backbone import Backbone
from vlmdiff.model.feature_space import FeatureSpace
from vlmdiff.model.first_stage import FirstStageModel, downsampling
from vlmdiff.model.normalization import Normalization, from_uint8
from vlmdiff.training.adversarial import PatchDiscriminator, adversarial_loss, perceptual_distance
from vlmdiff.training.loop import History, batch_indices, fit, step_generator


def train_first_stage(
    images: np.ndarray, validation: np.ndarray, params: FirstStage, state: Path, device: torch.device
) -> tuple[FirstStageModel, History]:
    """The latent space of normal images: its decoder, and an autoencoder's encoder, fitted by L1 and squared error.

    An autoencoder has a small KL term beside these; a backbone's features are projected first, by all training images.

    To these come, where configured, a perceptual distance and a patch discriminator; validation is by L1 and the
    perceptual distance, and once there is a discriminator only weights that have met it are kept.

    images, validation: uint8 (N, S, S, 3), S the configured size; may be memory-mapped. `scaling_factor` is set so that
    the training images' latents have unit variance; a pretrained autoencoder keeps its own, which pretrained UNets
    know. With `steps: 0` the one row of the history measures the autoencoder as it is.
    """
    here = process_group()
    torch.manual_seed(params.seed)
    vae = start(params).to(device, memory_format=torch.channels_last)
    normalization = Normalization(params.image_mean, params.image_std)
    if isinstance(vae, FeatureSpace):
        parts = range(0, len(images), params.batch_size)
        batches = (normalization(from_uint8(images[i : i + params.batch_size], device)) for i in parts)
        kept = vae.fit(track(batches, "project features", total=len(parts)), params.backbone.whitening)
        if here.is_main_process:
            say(f"first_stage: {vae.config.latent_channels} components keep {kept:.1%} of the features' variance")
    features = Backbone.load(params.perceptual, device) if params.perceptual else None
    discriminator = None
    if params.discriminator:
        discriminator = PatchDiscriminator(params.discriminator.channels, params.discriminator.layers).to(device)
    if params.gradient_checkpointing and isinstance(vae, AutoencoderKL):
        vae.enable_gradient_checkpointing()

    def perceptual(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor | float:
        if features is None:
            return 0.0
        return params.perceptual.weight * perceptual_distance(
            features, normalization.inverse(y), normalization.inverse(x)
        )

    def loss(step: int, part: slice) -> torch.Tensor:
        rows = batch_indices(len(images), params.batch_size, step, params.seed)[part]
        x = normalization(from_uint8(images[rows], device))
        posterior = DiagonalGaussianDistribution(vae.encode(x).latent_dist.parameters.float())
        shape = (params.batch_size, *posterior.mean.shape[1:])
        noise = torch.randn(shape, generator=step_generator(params.seed, step))[part].to(device)
        z = posterior.mean + posterior.std * noise
        y = vae.decode(z).sample.float()
        reconstruction = F.l1_loss(y, x) + F.mse_loss(y, x) + perceptual(y, x)
        total = reconstruction + params.kl_weight * posterior.kl().mean() / z[0].numel()
        if discriminator is not None and step >= params.discriminator.start:
            total = total + adversarial_loss(
                discriminator,
                params.discriminator,
                photographs=x,
                reconstructions=y,
                reconstruction_loss=reconstruction,
                last_weight=vae.decoder.conv_out.weight,
                mean_over_processes=lambda gradient: accelerate.utils.reduce(gradient, "mean"),
            )
        return total

    def distance(of: np.ndarray, share: slice) -> float:
        total = 0.0
        for start in range(0, len(of), params.batch_size):
            batch = of[start : start + params.batch_size][share]
            if len(batch):
                x = normalization(from_uint8(batch, device))
                y = vae.decode(vae.encode(x).latent_dist.mode()).sample.float()
                total += float(F.l1_loss(y, x) + perceptual(y, x)) * len(batch)
        return total / len(of)

    sample = images[:: max(1, len(images) // 256)]
    if params.steps == 0:
        return vae, _measure(distance, sample, validation)
    history = fit(
        "first_stage",
        vae,
        loss,
        lambda share: distance(validation, share),
        params,
        state,
        adversary=discriminator,
        keep_from=params.discriminator.start + 1 if params.discriminator else 0,
    )
    if params.kind == "autoencoder_kl" and params.pretrained is None and here.is_main_process:
        with torch.no_grad():
            latents = torch.cat(
                [
                    vae.encode(
                        normalization(from_uint8(sample[start : start + params.batch_size], device))
                    ).latent_dist.mode()
                    for start in range(0, len(sample), params.batch_size)
                ]
            )
        vae.register_to_config(scaling_factor=1 / latents.std().item())
        say(f"first_stage: latents {tuple(latents.shape[1:])}, scaling factor {vae.config.scaling_factor:.3f}")
    return vae, history


def read_pretrained(source: Part) -> AutoencoderKL:
    """A pretrained autoencoder. Raises InputError where there is none."""
    return pretrained.load_network(AutoencoderKL, source, source.subfolder)


def start(
    params: FirstStage,
    read: Callable[[Part], AutoencoderKL] = read_pretrained,
) -> FirstStageModel:
    """What training starts from; `read` gives the autoencoder that `params.pretrained` names.

    Raises InputError where it cannot take images of `params.image_size`.
    """
    if params.kind == "backbone":
        return FeatureSpace.around(
            Backbone.load(params.backbone),
            Normalization(params.image_mean, params.image_std),
            sample_size=params.image_size,
            grid=params.backbone.grid,
            latent_channels=params.latent_channels,
            decoder_channels=params.backbone.decoder_channels,
        )
    if params.pretrained is None:
        return _untrained(params)
    vae = read(params.pretrained)
    if params.image_size % (factor := downsampling(vae)):
        raise InputError(
            f"first_stage.image_size must be a multiple of {factor}, the downsampling of {params.pretrained.model}"
        )
    vae.register_to_config(sample_size=params.image_size)
    return vae


def _untrained(params: FirstStage) -> AutoencoderKL:
    levels = len(params.block_channels)
    return AutoencoderKL(
        sample_size=params.image_size,
        latent_channels=params.latent_channels,
        block_out_channels=params.block_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        mid_block_add_attention=False,
        # Groups of one channel would wash out its level, and the decoder would draw specks to get it back.
        norm_num_groups=min(32, min(params.block_channels) // 4),
    )


def _measure(distance: Callable[[np.ndarray, slice], float], sample: np.ndarray, validation: np.ndarray) -> History:
    with torch.no_grad():
        seen, held_out = (distance(of, slice(None)) for of in (sample, validation))
    say(f"first_stage: as it is, loss {seen:.4f}, validation {held_out:.4f}")
    return [{"step": 0, "loss": seen, "validation_loss": held_out, "learning_rate": 0.0}]
