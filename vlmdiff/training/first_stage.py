"""Make the latent space: train an image autoencoder, fine-tune a pretrained one, or project a backbone's features."""

import contextlib
from collections.abc import Iterator
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
from vlmdiff.core.params import FirstStage
from vlmdiff.model.backbone import Backbone
from vlmdiff.model.feature_space import FeatureSpace, certain
from vlmdiff.model.first_stage import FirstStageModel, downsampling, load_autoencoder
from vlmdiff.model.normalization import Normalization, from_uint8
from vlmdiff.model.tiny_autoencoder import TinyAutoencoder
from vlmdiff.training.adversarial import PatchDiscriminator, adversarial_loss, perceptual_distance
from vlmdiff.training.loop import History, Problem, batch_indices, fit, step_generator

# Images that a backbone's features are projected and decoded by. Their features fit into memory. A projection fitted to
# 120 photographs of two products keeps 92.2 % of the variance of 240, and one fitted to all 240 keeps 92.4 %.
SEEN = 300


def train_first_stage(
    images: np.ndarray, validation: np.ndarray, params: FirstStage, state: Path, device: torch.device
) -> tuple[FirstStageModel, History]:
    """Fit the latent space to normal images.

    Training fits an autoencoder, or the decoder of a backbone's features, by L1 and squared error. An autoencoder has a
    small KL term as well. A backbone's features are projected first, by at most SEEN of the images. A perceptual
    distance and a patch discriminator join where configured. Validation is by L1 and the perceptual distance; with a
    discriminator, only weights that have met it are kept.

    images, validation: uint8 (N, S, S, 3), S the configured size; may be memory-mapped. `scaling_factor` is set so that
    the training images' latents have unit variance; a pretrained autoencoder keeps its own, which pretrained UNets
    know. With `steps: 0` the one row of the history measures the autoencoder as it is.
    """
    vae, seen, codes = prepare(images, params, device)
    reconstruction = Reconstruction(vae, seen, validation, params, device, codes)
    sample = images[:: max(1, len(images) // 256)]
    if params.steps == 0:
        return vae, _measure(reconstruction, sample, validation)
    history = fit(reconstruction.problem(), params, state)
    if params.kind == "autoencoder_kl" and params.pretrained is None and process_group().is_main_process:
        latents = reconstruction.latents(sample)
        vae.register_to_config(scaling_factor=1 / latents.std().item())
        say(f"first_stage: latents {tuple(latents.shape[1:])}, scaling factor {vae.config.scaling_factor:.3f}")
    return vae, history


def prepare(
    images: np.ndarray, params: FirstStage, device: torch.device
) -> tuple[FirstStageModel, np.ndarray, torch.Tensor | None]:
    """Return the model that training starts from, on the device; a backbone's features are projected.

    The other values are the images to train on and, for a backbone, their codes (N, C, h, w) in bfloat16, so that
    training the decoder does not run the backbone again. For a backbone, these are at most SEEN images.
    """
    torch.manual_seed(params.seed)
    vae = start(params).to(device, memory_format=torch.channels_last)
    if not isinstance(vae, FeatureSpace):
        if params.gradient_checkpointing:
            vae.enable_gradient_checkpointing()
        return vae, images, None
    normalization, size = Normalization(params.image_mean, params.image_std), params.batch_size
    # Spread evenly, so that every class has its part.
    chosen = np.linspace(0, len(images) - 1, min(len(images), SEEN)).round().astype(int)
    images, kept = images[chosen], []

    def extract() -> Iterator[torch.Tensor]:
        for i in track(range(0, len(images), size), "extract features", total=-(-len(images) // size)):
            features = vae.features(normalization(from_uint8(images[i : i + size], device)))
            kept.append(features.bfloat16().cpu())
            yield features

    share = vae.fit(extract(), params.backbone.whitening)
    if process_group().is_main_process:
        say(f"first_stage: {vae.config.latent_channels} components keep {share:.1%} of the features' variance")
    with torch.no_grad():
        codes = [vae.project(features.to(device, torch.float32)).bfloat16().cpu() for features in kept]
    return vae, images, torch.cat(codes)


class Reconstruction:
    """How far reconstructions lie from the images: the losses of the first stage's training and validation."""

    def __init__(
        self,
        vae: FirstStageModel,
        images: np.ndarray,
        validation: np.ndarray,
        params: FirstStage,
        device: torch.device,
        codes: torch.Tensor | None = None,
    ):
        self.codes = codes
        self.vae, self.images, self.validation, self.params, self.device = vae, images, validation, params, device
        self.normalization = Normalization(params.image_mean, params.image_std)
        self.features = Backbone.load(params.perceptual, device) if params.perceptual else None
        self.discriminator = None
        if params.discriminator:
            networks = PatchDiscriminator(params.discriminator.channels, params.discriminator.layers)
            self.discriminator = networks.to(device)

    def problem(self) -> Problem:
        return Problem(
            "first_stage",
            self.vae,
            self.loss,
            lambda share: self.distance(self.validation, share),
            adversary=self.discriminator,
            keep_from=self.params.discriminator.start + 1 if self.params.discriminator else 0,
        )

    def loss(self, step: int, part: slice) -> torch.Tensor:
        """Return the mean training loss of the rows `part` of the step's batch."""
        params = self.params
        rows = batch_indices(len(self.images), params.batch_size, step, params.seed)[part]
        x = self._read(self.images[rows])
        if self.codes is not None:
            posterior = DiagonalGaussianDistribution(certain(self.codes[torch.from_numpy(rows)].to(x)))
        else:
            posterior = self._encode(x)
        shape = (params.batch_size, *posterior.mean.shape[1:])
        noise = torch.randn(shape, generator=step_generator(params.seed, step))[part].to(self.device)
        z = posterior.mean + posterior.std * noise
        y = self.vae.decode(z).sample.float()
        reconstruction = F.l1_loss(y, x) + F.mse_loss(y, x) + self._perceptual(y, x)
        total = reconstruction + params.kl_weight * posterior.kl().mean() / z[0].numel()
        if self.discriminator and params.discriminator and step >= params.discriminator.start:
            total = total + adversarial_loss(
                self.discriminator,
                params.discriminator,
                photographs=x,
                reconstructions=y,
                reconstruction_loss=reconstruction,
                last_weight=self.vae.decoder.conv_out.weight,
                mean_over_processes=lambda gradient: accelerate.utils.reduce(gradient, "mean"),
            )
        return total

    def distance(self, images: np.ndarray, share: slice) -> float:
        """Return this share's part of the mean distance of all `images` from their reconstructions."""
        total = 0.0
        for first in range(0, len(images), self.params.batch_size):
            batch = images[first : first + self.params.batch_size][share]
            if len(batch):
                x = self._read(batch)
                y = self.vae.decode(self._encode(x).mode()).sample.float()
                total += float(F.l1_loss(y, x) + self._perceptual(y, x)) * len(batch)
        return total / len(images)

    @torch.no_grad()
    def latents(self, images: np.ndarray) -> torch.Tensor:
        """Return the latents (N, C, h, w) of the images, not scaled."""
        size = self.params.batch_size
        batches = (images[first : first + size] for first in range(0, len(images), size))
        return torch.cat([self._encode(self._read(batch)).mode() for batch in batches])

    def _read(self, images: np.ndarray) -> torch.Tensor:
        return self.normalization(from_uint8(images, self.device))

    def _encode(self, x: torch.Tensor) -> DiagonalGaussianDistribution:
        # A backbone's features stay as exact as later stages see them; on a CPU they cannot be resized in bf16.
        exact = isinstance(self.vae, FeatureSpace)
        with torch.autocast(self.device.type, enabled=False) if exact else contextlib.nullcontext():
            posterior = self.vae.encode(x).latent_dist
        return DiagonalGaussianDistribution(posterior.parameters.float())

    def _perceptual(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor | float:
        if self.features is None or self.params.perceptual is None:
            return 0.0
        a, b = self.normalization.inverse(y), self.normalization.inverse(x)
        return self.params.perceptual.weight * perceptual_distance(self.features, a, b)


def start(params: FirstStage) -> FirstStageModel:
    """Return the model as it is before training.

    Raises InputError if there is no such pretrained model, or it cannot take images of `params.image_size`.
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
    vae = load_autoencoder(params.pretrained)
    if params.discriminator and not isinstance(vae, AutoencoderKL):
        raise InputError(f"{params.pretrained.model} cannot be trained with first_stage.discriminator: set it to null")
    if params.image_size % (factor := downsampling(vae)):
        raise InputError(
            f"first_stage.image_size must be a multiple of {factor}, the downsampling of {params.pretrained.model}"
        )
    vae.register_to_config(sample_size=params.image_size)
    _check(vae, params)
    return vae


@torch.no_grad()
def _check(vae: AutoencoderKL | TinyAutoencoder, params: FirstStage) -> None:
    """Raise InputError if the autoencoder does not take and return colour images, or has latents of another size."""
    assert params.pretrained
    image = torch.zeros(1, 3, params.image_size, params.image_size)
    side = params.image_size // downsampling(vae)
    try:
        latents = vae.encode(image).latent_dist.mode()
        fits = latents.shape[2:] == (side, side) and vae.decode(latents).sample.shape == image.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise InputError(
            f"{params.pretrained.model} does not turn colour images into latents of {side} x {side} and back: give "
            "another first_stage.pretrained"
        )


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


def _measure(reconstruction: Reconstruction, sample: np.ndarray, validation: np.ndarray) -> History:
    with torch.no_grad():
        seen, held_out = (reconstruction.distance(images, slice(None)) for images in (sample, validation))
    say(f"first_stage: as it is, loss {seen:.4f}, validation {held_out:.4f}")
    return [{"step": 0, "loss": seen, "validation_loss": held_out, "learning_rate": 0.0}]
