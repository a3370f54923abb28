"""`TinyAutoencoder`: diffusers' AutoencoderTiny, such as TAESD, with the interface of AutoencoderKL."""

import torch
from diffusers import AutoencoderTiny
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput

from vlmdiff.model.feature_space import certain


class TinyAutoencoder(AutoencoderTiny):
    """An autoencoder of few small convolutions: normalised images (B, 3, S, S) become latents (B, C, S / 8, S / 8).

    It has no distribution of latents: that of an image has a deviation of almost zero. Weights and configuration are
    those of AutoencoderTiny.
    """

    # diffusers' method returns latents.
    # pyrefly: ignore[bad-override]
    def encode(self, x: torch.Tensor) -> AutoencoderKLOutput:
        """Return the latents as an autoencoder's posterior."""
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(certain(self.encoder(x))))
