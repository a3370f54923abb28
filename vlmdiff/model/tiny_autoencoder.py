"""`TinyAutoencoder`: diffusers' AutoencoderTiny, such as TAESD, with the interface of AutoencoderKL."""

import torch
from diffusers import AutoencoderTiny
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput

from vlmdiff.model.feature_space import certain


class TinyAutoencoder(AutoencoderTiny):
    """An autoencoder of few small convolutions: normalised images (B, 3, S, S) become latents (B, C, h, w).

    It has no distribution of latents: that of an image has a deviation of almost zero. The weights are those of
    AutoencoderTiny. Its configuration also has `sample_size`, S, which AutoencoderTiny does not know.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 256,
        in_channels: int = 3,
        out_channels: int = 3,
        encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64),
        decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64),
        act_fn: str = "relu",
        upsample_fn: str = "nearest",
        latent_channels: int = 4,
        upsampling_scaling_factor: int = 2,
        num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3),
        num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1),
        latent_magnitude: int = 3,
        latent_shift: float = 0.5,
        force_upcast: bool = False,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        # AutoencoderTiny writes it, but does not take it.
        block_out_channels: tuple[int, ...] | None = None,
    ):
        super().__init__(
            in_channels,
            out_channels,
            encoder_block_out_channels,
            decoder_block_out_channels,
            act_fn,
            upsample_fn,
            latent_channels,
            upsampling_scaling_factor,
            num_encoder_blocks,
            num_decoder_blocks,
            latent_magnitude,
            latent_shift,
            force_upcast,
            scaling_factor,
            shift_factor,
        )

    # diffusers' method returns latents.
    # pyrefly: ignore[bad-override]
    def encode(self, x: torch.Tensor) -> AutoencoderKLOutput:
        """Return the latents as an autoencoder's posterior."""
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(certain(self.encoder(x))))
