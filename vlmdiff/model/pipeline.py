"""`VLMDiffPipeline`: reconstruct a photograph as if it were normal."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.utils import BaseOutput, logging
from transformers import CLIPTextModel, CLIPTokenizer

from vlmdiff.errors import InputError
from vlmdiff.model.sgn import SemanticGuidedNetwork
from vlmdiff.model.text import embed


def load_pipeline(folder: Path | str, device: torch.device) -> "VLMDiffPipeline":
    """A pipeline's folder as a working pipeline on `device`; without progress bars, it takes a second."""
    logging.disable_progress_bar()
    pipeline = VLMDiffPipeline.from_pretrained(folder).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@dataclass
class Reconstruction(BaseOutput):
    """images: (B, 3, S, S) in [0, 1]; latents: (B, C, h, w), scaled as the denoiser sees them."""

    images: torch.Tensor
    latents: torch.Tensor


class VLMDiffPipeline(DiffusionPipeline):
    """A caption-conditioned latent diffusion model with a semantic-guided network (arXiv 2511.08173).

    Photographs are tensors (B, 3, S, S) in [0, 1], S the configured `image_size`. The first stage and the SGN see
    them normalised by `image_mean` and `image_std`.
    """

    model_cpu_offload_seq = "text_encoder->sgn->unet->vae"

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        sgn: SemanticGuidedNetwork,
        scheduler: DDIMScheduler,
        image_size: int = 256,
        image_mean: list[float] = (0.5, 0.5, 0.5),
        image_std: list[float] = (0.5, 0.5, 0.5),
    ):
        super().__init__()
        self.register_modules(
            vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, sgn=sgn, scheduler=scheduler
        )
        self.register_to_config(image_size=image_size, image_mean=tuple(image_mean), image_std=tuple(image_std))

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """From [0, 1] to what the networks see; (B, 3, S, S) in and out."""
        return (images - self._channel(self.config.image_mean)) / self._channel(self.config.image_std)

    def _channel(self, values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, device=self.device, dtype=self.vae.dtype).view(1, 3, 1, 1)

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Latents of photographs, the posterior's mean, scaled: (B, 3, S, S) in [0, 1] to (B, C, h, w)."""
        return self.vae.encode(self.normalize(images)).latent_dist.mode() * self.vae.config.scaling_factor

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Photographs of latents: (B, C, h, w), scaled, to (B, 3, S, S) in [0, 1]."""
        images = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        return (images * self._channel(self.config.image_std) + self._channel(self.config.image_mean)).clamp(0, 1)

    def encode_captions(self, captions: Sequence[str]) -> torch.Tensor:
        """Text embeddings (B, L, D) of captions; L is the text encoder's length, times the windows of the longest."""
        return embed(self.tokenizer, self.text_encoder, captions)

    def denoise(
        self, latents: torch.Tensor, timestep: torch.Tensor, prompt_embeds: torch.Tensor, image: torch.Tensor
    ) -> torch.Tensor:
        """The network's own output (B, C, h, w), of the kind `scheduler.config.prediction_type` names.

        latents: (B, C, h, w), noised to `timestep` (a scalar or (B,)); prompt_embeds: (B, L, D); image: (B, 3, S, S),
        normalised.
        """
        down, middle = self.sgn(latents, timestep, prompt_embeds, image)
        return self.unet(
            latents,
            timestep,
            encoder_hidden_states=prompt_embeds,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
        ).sample

    def predict_noise(
        self, latents: torch.Tensor, timestep: torch.Tensor, prompt_embeds: torch.Tensor, image: torch.Tensor
    ) -> torch.Tensor:
        """The noise (B, C, h, w) in `latents`; arguments as for `denoise`."""
        output = self.denoise(latents, timestep, prompt_embeds, image)
        alpha = self.scheduler.alphas_cumprod.to(latents.device)[timestep].view(-1, 1, 1, 1)
        return self._split(latents, output, alpha)[1]

    def _split(
        self, latents: torch.Tensor, output: torch.Tensor, alpha: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Clean latents and noise of `latents` = sqrt(alpha) clean + sqrt(1 - alpha) noise, given the network's output.

        v = sqrt(alpha) noise - sqrt(1 - alpha) clean (Salimans and Ho, 2022).
        """
        signal, noise = alpha.sqrt(), (1 - alpha).sqrt()
        if self.scheduler.config.prediction_type == "v_prediction":
            return signal * latents - noise * output, signal * output + noise * latents
        return (latents - noise * output) / signal, output

    @torch.no_grad()
    def __call__(
        self,
        images: torch.Tensor,
        captions: Sequence[str] | None = None,
        noise_level: int = 500,
        steps: int = 5,
        seed: int = 0,
    ) -> Reconstruction:
        """Noise the photographs' latents to `noise_level` and take them back by DDIM (eta 0) in `steps` equal steps.

        images: (B, 3, S, S) in [0, 1]; captions: one an image, or None for the empty prompt; noise_level: 0..999.
        One draw of noise serves the whole batch, so that a result does not depend on which images share a batch.
        """
        size = self.config.image_size
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, size, size):
            raise InputError(f"images must be (B, 3, {size}, {size}), not {tuple(images.shape)}")
        if captions is not None and len(captions) != len(images):
            raise InputError(f"{len(captions)} captions for {len(images)} images: give one an image, or none")
        images = images.to(self.device, self.vae.dtype)
        clean = self.encode_images(images)
        if captions is None:
            prompt_embeds = self.encode_captions([""]).expand(len(images), -1, -1)
        else:
            prompt_embeds = self.encode_captions(captions)
        hint = self.normalize(images)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(clean[:1].shape, generator=generator).to(clean)

        alphas = self.scheduler.alphas_cumprod.to(clean)
        levels = torch.linspace(noise_level, 0, steps + 1).round().long()
        latents = alphas[levels[0]].sqrt() * clean + (1 - alphas[levels[0]]).sqrt() * noise
        for i in range(steps):
            output = self.denoise(latents, levels[i].to(latents.device), prompt_embeds, hint)
            clean, eps = self._split(latents, output, alphas[levels[i]])
            if i + 1 < steps:
                latents = alphas[levels[i + 1]].sqrt() * clean + (1 - alphas[levels[i + 1]]).sqrt() * eps
        return Reconstruction(images=self.decode_latents(clean), latents=clean)
