"""`VLMDiffPipeline`: reconstruct a photograph as if it were normal."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.utils import BaseOutput, logging
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationInfo, field_validator
from transformers import CLIPTextModel, CLIPTokenizer

from vlmdiff.core.console import say
from vlmdiff.core.errors import InputError, explained
from vlmdiff.core.files import HASHES, check_regular, read_json, seal, verify
from vlmdiff.core.params import PositiveFloat, Pretrained, Solver, Spacing
from vlmdiff.model.feature_space import FeatureSpace
from vlmdiff.model.first_stage import FirstStageModel
from vlmdiff.model.normalization import Normalization
from vlmdiff.model.pretrained import load, load_network
from vlmdiff.model.reference import IMAGENET_MEAN, IMAGENET_STD, read_modules
from vlmdiff.model.sampling import reconstruct
from vlmdiff.model.sgn import SemanticGuidedNetwork
from vlmdiff.model.text import embed
from vlmdiff.model.tiny_autoencoder import TinyAutoencoder

# By component and its name in model_index.json: the classes that load. A folder cannot name any other.
CLASSES = {
    "vae": {
        ("diffusers", "AutoencoderKL"): AutoencoderKL,
        ("vlmdiff.model.tiny_autoencoder", "TinyAutoencoder"): TinyAutoencoder,
        ("vlmdiff.model.feature_space", "FeatureSpace"): FeatureSpace,
    },
    "text_encoder": {("transformers", "CLIPTextModel"): CLIPTextModel, (None, None): None},
    "tokenizer": {("transformers", "CLIPTokenizer"): CLIPTokenizer, (None, None): None},
    "unet": {("diffusers", "UNet2DConditionModel"): UNet2DConditionModel},
    "sgn": {("vlmdiff.model.sgn", "SemanticGuidedNetwork"): SemanticGuidedNetwork, (None, None): None},
    "scheduler": {("diffusers", "DDIMScheduler"): DDIMScheduler},
}
Component = tuple[str | None, str | None]
# The logarithm of the variance that the network expects lies within these bounds, as that of diffusers' autoencoders:
# neither it nor its inverse overflows.
LOG_VARIANCE = -30.0, 20.0


class Index(BaseModel):
    """The content of model_index.json."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Annotated[Literal["VLMDiffPipeline"], Field(alias="_class_name")]
    version: Annotated[str, Field(alias="_diffusers_version")] = ""
    origin: Annotated[str | None, Field(alias="_name_or_path")] = None
    vae: Component
    text_encoder: Component = (None, None)
    tokenizer: Component = (None, None)
    unet: Component
    sgn: Component = (None, None)
    scheduler: Component
    image_size: Annotated[int, Field(gt=0, le=8192)]
    image_mean: tuple[FiniteFloat, FiniteFloat, FiniteFloat]
    image_std: tuple[PositiveFloat, PositiveFloat, PositiveFloat]

    @field_validator(*CLASSES)
    @classmethod
    def _is_known(cls, names: Component, info: ValidationInfo) -> Component:
        known = CLASSES[str(info.field_name)]
        if names not in known:
            allowed = ", ".join(".".join(map(str, each)) for each in known if each[0])
            raise ValueError(f"{names[0]}.{names[1]} does not load, only {allowed}")
        return names


def load_pipeline(folder: Path | str, device: torch.device) -> "VLMDiffPipeline":
    """Load a pipeline as `from_pretrained` does, to `device`, without progress bars."""
    logging.disable_progress_bar()
    with explained(folder, "Run the stage that writes it again, or restore it by `dvc checkout`"):
        pipeline = VLMDiffPipeline.from_pretrained(folder)
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def verify_model(folder: Path) -> None:
    """Raise InputError if a file of a model has changed since it was written. A model without hashes is announced."""
    remedy = (
        "Run the stage that writes the folder again, or restore it by `dvc checkout`. A copy in .cache/registry is "
        "downloaded again after you remove it"
    )
    if not verify(folder, remedy):
        _announce(folder)


@cache
def _announce(folder: Path) -> None:
    """Say once that a model cannot be verified."""
    say(f"warning: {folder} has no {HASHES}, as an earlier release wrote it: a file that has changed is not noticed")


@dataclass
class Reconstruction(BaseOutput):
    """images: (B, 3, S, S) in [0, 1]; latents: (B, C, h, w), scaled as the denoiser sees them.

    deviation: (B, h, w), the error that the network expects of its first prediction of the latents, as root mean square
    over channels; None if it has not learned the variance.
    """

    images: torch.Tensor
    latents: torch.Tensor
    deviation: torch.Tensor | None


class VLMDiffPipeline(DiffusionPipeline):
    """Reconstruct images as if they were normal, with a caption-conditioned latent diffusion model (arXiv 2511.08173).

    The semantic-guided network (SGN) is optional. Images are tensors (B, 3, S, S) in [0, 1], where S is the configured
    `image_size`. The first stage and the SGN see them normalised by `image_mean` and `image_std`.
    """

    model_cpu_offload_seq = "text_encoder->sgn->unet->vae"
    _optional_components = ["text_encoder", "tokenizer", "sgn"]  # noqa: RUF012

    def __init__(
        self,
        vae: FirstStageModel,
        text_encoder: CLIPTextModel | None,
        tokenizer: CLIPTokenizer | None,
        unet: UNet2DConditionModel,
        sgn: SemanticGuidedNetwork | None,
        scheduler: DDIMScheduler,
        image_size: int = 256,
        image_mean: list[float] | tuple[float, ...] = (0.5, 0.5, 0.5),
        image_std: list[float] | tuple[float, ...] = (0.5, 0.5, 0.5),
    ):
        super().__init__()
        # Where the pipeline was loaded from, for messages.
        self.folder: Path | None = None
        self.register_modules(
            vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, sgn=sgn, scheduler=scheduler
        )
        self.register_to_config(image_size=image_size, image_mean=tuple(image_mean), image_std=tuple(image_std))

    @classmethod
    def from_pretrained(cls, folder: Path | str, **given: Any) -> "VLMDiffPipeline":
        """Load what `save_pretrained` wrote: weights from safetensors, in float32.

        given: components, by the constructor's names, that replace those of the folder. Nothing in the folder runs: its
        model_index.json is checked before anything loads, and only the classes in CLASSES load. Raises InputError if
        the folder has no pipeline, or one that is damaged, or a file in it has changed since it was written.
        """
        folder = Path(folder)
        if not (folder / "model_index.json").exists():
            raise InputError(f"{folder} has no pipeline. Run `vlmdiff train` first")
        verify_model(folder)
        for file in check_regular(folder):
            # The libraries take text in place of an object for a name on the hub.
            if file.suffix == ".json":
                read_json(file, dict[str, Any])
        index, source, components = read_json(folder / "model_index.json", Index), Pretrained(model=str(folder)), {}
        for name, known in CLASSES.items():
            kind = known[getattr(index, name)]
            read = load_network if kind and issubclass(kind, torch.nn.Module) else load
            components[name] = given[name] if name in given else kind and read(kind, source, name)
        loaded = cls(**components, image_size=index.image_size, image_mean=index.image_mean, image_std=index.image_std)
        loaded.folder = folder
        return loaded

    def save_pretrained(self, save_directory: Path | str, **options: Any) -> None:
        """Write the pipeline into a folder as diffusers does, and the hashes of all files there."""
        super().save_pretrained(save_directory, **options)
        seal(Path(save_directory))

    @classmethod
    def from_reference(
        cls,
        checkpoint: Path | str | Mapping[str, torch.Tensor],
        only_mid_control: bool = True,
        text_encoder: CLIPTextModel | None = None,
        tokenizer: CLIPTokenizer | None = None,
    ) -> "VLMDiffPipeline":
        """Build a pipeline from a checkpoint of the reference implementation; it shares the checkpoint's tensors.

        checkpoint: a .safetensors file, a torch.save file (.ckpt, .pt), or a state dict, which may be nested under the
        key `state_dict`. tokenizer: the tokenizer of CLIP ViT-L/14 (openai/clip-vit-large-patch14); no checkpoint has
        one. text_encoder: that model's text encoder, for a checkpoint without one. Without tokenizer and text encoder
        the pipeline takes text embeddings, not captions.

        A file is mapped into memory: it must exist as long as the pipeline is used. Raises InputError if reading the
        file would run code, or if a tensor is missing, unexpected or has another shape.
        """
        components = {"text_encoder": text_encoder, **read_modules(checkpoint, only_mid_control)}
        if text_encoder is not None and components["text_encoder"] is not text_encoder:
            raise InputError("The checkpoint has a text encoder: leave out the argument `text_encoder`")
        return cls(**components, tokenizer=tokenizer, image_size=256, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD)

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """Normalise images (B, 3, S, S) in [0, 1] for the networks."""
        return self._normalization(images)

    @property
    def _normalization(self) -> Normalization:
        return Normalization(self.config.image_mean, self.config.image_std)

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Encode images (B, 3, S, S) in [0, 1] as scaled latents (B, C, h, w), the mean of the posterior."""
        return self.vae.encode(self.normalize(images)).latent_dist.mode() * self.vae.config.scaling_factor

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode scaled latents (B, C, h, w) to images (B, 3, S, S) in [0, 1]."""
        images = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        images = self._normalization.inverse(images)
        # Clamped, infinity would look like white or black.
        return images.masked_fill(images.isinf(), torch.nan).clamp(0, 1)

    def encode_captions(self, captions: Sequence[str]) -> torch.Tensor:
        """Return text embeddings (B, L, D); L is the text encoder's length times the windows of the longest caption."""
        if self.text_encoder is None or self.tokenizer is None:
            raise InputError("this pipeline has no text encoder or no tokenizer. Pass both to `from_reference`")
        return embed(self.tokenizer, self.text_encoder, captions)

    def denoise(
        self, latents: torch.Tensor, timestep: torch.Tensor, prompt_embeds: torch.Tensor, image: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the network's output (B, C, h, w), of the kind that `scheduler.config.prediction_type` names.

        The second value is the logarithm of the squared error that the network expects, a mean over the channels
        (B, h, w), or None if the network has not learned the variance. latents: (B, C, h, w), noised to `timestep`, a
        scalar or (B,); prompt_embeds: (B, L, D); image: (B, 3, S, S), normalised.
        """
        down, middle = self.sgn(latents, timestep, prompt_embeds, image) if self.sgn else (None, None)
        output = self.unet(
            latents,
            timestep,
            encoder_hidden_states=prompt_embeds,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
        ).sample
        channels = latents.shape[1]
        log_variance = output[:, channels].clamp(*LOG_VARIANCE) if output.shape[1] > channels else None
        return output[:, :channels], log_variance

    def predict_noise(
        self, latents: torch.Tensor, timestep: torch.Tensor, prompt_embeds: torch.Tensor, image: torch.Tensor
    ) -> torch.Tensor:
        """Return the noise (B, C, h, w) in `latents`; arguments as for `denoise`."""
        output, _ = self.denoise(latents, timestep, prompt_embeds, image)
        if self.scheduler.config.prediction_type == "epsilon":
            return output
        # v = sqrt(alpha) noise - sqrt(1 - alpha) clean (Salimans and Ho, 2022).
        alpha = self.scheduler.alphas_cumprod.to(latents.device)[timestep].view(-1, 1, 1, 1)
        return alpha.sqrt() * output + (1 - alpha).sqrt() * latents

    @torch.no_grad()
    def __call__(
        self,
        images: torch.Tensor,
        captions: Sequence[str] | None = None,
        noise_level: int = 500,
        steps: int = 5,
        seed: int = 0,
        guidance: float = 1.0,
        spacing: Spacing = "trailing",
        solver: Solver = "ddim",
    ) -> Reconstruction:
        """Reconstruct images (B, 3, S, S) in [0, 1] as if they were normal; arguments as for `reconstruct`."""
        size = self.config.image_size
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, size, size):
            raise InputError(f"images must be (B, 3, {size}, {size}), not {tuple(images.shape)}")
        images = images.to(self.device, self.vae.dtype)
        latents, deviation = self.reconstruct(
            self.encode_images(images), images, captions, noise_level, steps, seed, guidance, spacing, solver
        )
        return Reconstruction(images=self.decode_latents(latents), latents=latents, deviation=deviation)

    @torch.no_grad()
    def reconstruct(
        self,
        latents: torch.Tensor,
        images: torch.Tensor,
        captions: Sequence[str] | None = None,
        noise_level: int = 500,
        steps: int = 5,
        seed: int = 0,
        guidance: float = 1.0,
        spacing: Spacing = "trailing",
        solver: Solver = "ddim",
        opposite: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Noise the latents (B, C, h, w) of images to `noise_level`, then denoise them in `steps` steps.

        Returns the latents and their deviation, as in `Reconstruction`. images: (B, 3, S, S) in [0, 1]; captions: one
        per image, or None for the empty prompt; noise_level: 0 to 999; guidance: the weight of the caption's prediction
        over that of the empty prompt, 1 for the caption alone (classifier-free guidance, Ho and Salimans, 2022);
        spacing, solver: see `vlmdiff.model.sampling`; opposite: the noise of this seed gets the opposite sign. All
        images of a batch get the same noise, so that a result does not depend on the batch. Raises InputError if an
        argument does not fit.
        """
        if captions is not None and len(captions) != len(latents):
            raise InputError(f"{len(captions)} captions for {len(latents)} images. Pass one caption per image, or None")
        empty = self.encode_captions([""])
        prompt_embeds = empty.expand(len(latents), -1, -1) if captions is None else self.encode_captions(captions)
        # Guidance does not change an image whose caption is the empty prompt.
        guided = [i for i, caption in enumerate(captions or ()) if caption and guidance != 1]
        hint = self.normalize(images)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(latents[:1].shape, generator=generator).to(latents)
        noise = -noise if opposite else noise

        expected: list[torch.Tensor | None] = []

        def denoise(noisy: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            output, log_variance = self.denoise(noisy, timestep, prompt_embeds, hint)
            if not expected:
                expected.append(None if log_variance is None else self._deviation(log_variance, timestep))
            if guided:
                without, _ = self.denoise(noisy[guided], timestep, empty.expand(len(guided), -1, -1), hint[guided])
                output[guided] = torch.lerp(without, output[guided], guidance)
            return output

        found = reconstruct(denoise, latents, noise, self.scheduler, noise_level, steps, spacing, solver)
        return found, expected[0]

    def _deviation(self, log_variance: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Convert the expected error of the network's output to that of the clean latents it predicts."""
        alpha = self.scheduler.alphas_cumprod.to(log_variance.device)[timestep]
        share = 1 - alpha if self.scheduler.config.prediction_type == "v_prediction" else (1 - alpha) / alpha
        return (share * log_variance.exp()).sqrt()
