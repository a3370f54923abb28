"""Train the denoiser: UNet and SGN together, on latents, hints and text embeddings that `encode` has computed."""

from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from vlmdiff.core.errors import InputError
from vlmdiff.core.params import Pretrained, Train
from vlmdiff.model import pretrained
from vlmdiff.model.first_stage import FirstStageModel, downsampling
from vlmdiff.model.normalization import Normalization, from_uint8
from vlmdiff.model.pipeline import VLMDiffPipeline
from vlmdiff.model.sgn import SemanticGuidedNetwork
from vlmdiff.training.encoded import Encoded
from vlmdiff.training.loop import History, Problem, batch_indices, fit, step_generator


def build(
    vae: FirstStageModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    params: Train,
    normalization: Normalization = Normalization(),
) -> VLMDiffPipeline:
    """Return a pipeline with an untrained or pretrained denoiser around a first stage and a text encoder.

    Raises InputError if a pretrained UNet or the hint's encoder does not fit them.
    """
    torch.manual_seed(params.seed)
    if mistake := params.hint_mistake(downsampling(vae)):
        raise InputError(mistake)
    if params.pretrained is None:
        unet, sgn, scheduler = _untrained(vae, text_encoder, params)
    else:
        unet, sgn, scheduler = _pretrained(vae, text_encoder, params, params.pretrained)
    return VLMDiffPipeline(
        vae,
        text_encoder,
        tokenizer,
        unet,
        sgn,
        scheduler,
        image_size=vae.config.sample_size,
        image_mean=normalization.image_mean,
        image_std=normalization.image_std,
    )


# The prediction of the error must not change the prediction of the image (cf. Nichol and Dhariwal, 2021).
VARIANCE_WEIGHT = 0.1

Denoiser = tuple[UNet2DConditionModel, SemanticGuidedNetwork | None, DDIMScheduler]


def _untrained(vae: FirstStageModel, text_encoder: CLIPTextModel, params: Train) -> Denoiser:
    levels = len(params.block_channels)
    shape = dict(
        in_channels=vae.config.latent_channels,
        block_out_channels=params.block_channels,
        # The UNet attends to captions at the coarsest resolution. A finer one costs more and adds nothing: it says
        # where grain lies, not what the object is.
        down_block_types=(*("DownBlock2D",) * (levels - 1), "CrossAttnDownBlock2D"),
        layers_per_block=params.layers_per_block,
        cross_attention_dim=text_encoder.config.hidden_size,
        attention_head_dim=tuple(max(1, channels // params.head_size) for channels in params.block_channels),
    )
    unet = UNet2DConditionModel(
        sample_size=vae.config.sample_size // downsampling(vae),
        out_channels=vae.config.latent_channels + params.learn_variance,
        up_block_types=("CrossAttnUpBlock2D", *("UpBlock2D",) * (levels - 1)),
        **shape,
    )
    sgn = None
    if params.sgn:
        sgn = SemanticGuidedNetwork(
            hint_channels=params.hint_channels, only_mid_control=params.only_mid_control, fuse=params.fuse, **shape
        )
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
    return unet, sgn, scheduler


def _pretrained(vae: FirstStageModel, text_encoder: CLIPTextModel, params: Train, source: Pretrained) -> Denoiser:
    scheduler = pretrained.load(DDIMScheduler, source, "scheduler")
    unet = pretrained.load_network(UNet2DConditionModel, source, "unet")
    name, predicts = source.model, scheduler.config.prediction_type
    if predicts != params.prediction:
        raise InputError(f"{name} was trained to predict {predicts}. Set train.prediction to {predicts}.")
    if params.noise_levels[1] >= (count := scheduler.config.num_train_timesteps):
        raise InputError(f"{name} has noise levels 0 to {count - 1}. Set train.noise_levels within them.")
    for what, has, needs in (
        ("latents of {} channels", unet.config.in_channels, vae.config.latent_channels),
        ("text embeddings of {} numbers", unet.config.cross_attention_dim, text_encoder.config.hidden_size),
    ):
        if has != needs:
            raise InputError(
                f"the UNet of {name} takes {what.format(has)}, but gets {needs}. Use the first stage and the text "
                "encoder of the same model (first_stage.pretrained, encode.text_encoder)."
            )
    if params.learn_variance:
        _add_output(unet)
    scheduler = DDIMScheduler.from_config(scheduler.config, clip_sample=False, timestep_spacing="trailing")
    sgn = None
    if params.sgn:
        sgn = SemanticGuidedNetwork.from_unet(unet, params.hint_channels, params.only_mid_control, params.fuse)
    return unet, sgn, scheduler


def _add_output(unet: UNet2DConditionModel) -> None:
    """Add an output channel, zero at first; the others stay as they are."""
    old = unet.conv_out
    new = nn.Conv2d(old.in_channels, old.out_channels + 1, old.kernel_size, padding=old.padding)
    with torch.no_grad():
        for name, theirs in old.named_parameters():
            new.get_parameter(name).zero_()[: len(theirs)] = theirs
    unet.conv_out = new
    unet.register_to_config(out_channels=new.out_channels)


def choose_trainable(pipeline: VLMDiffPipeline, params: Train) -> nn.ModuleDict:
    """Return UNet and SGN, if there is one; exactly what `params.trainable` names requires a gradient.

    "paper" is the SGN, the UNet's up blocks and its output (normalisation and convolution). Outputs of the SGN that
    reach nothing, as all but the two coarsest resolutions' do with `only_mid_control`, are never trained.
    """
    unet, sgn = pipeline.unet, pipeline.sgn
    unet.requires_grad_(params.trainable == "all")
    for part in (unet.up_blocks, unet.conv_norm_out, unet.conv_out):
        part.requires_grad_(True)
    if sgn is None:
        return nn.ModuleDict({"unet": unet})
    sgn.requires_grad_(True)
    sgn.unused_outputs().requires_grad_(False)
    return nn.ModuleDict({"unet": unet, "sgn": sgn})


def train_denoiser(pipeline: VLMDiffPipeline, data: Encoded, params: Train, state: Path) -> History:
    """Train the pipeline's denoiser in place; what is frozen is not touched."""
    params = params.limited(int((data.index["split"] == "train").sum()))
    return fit(problem(pipeline, data, params), params, state)


def problem(pipeline: VLMDiffPipeline, data: Encoded, params: Train) -> Problem:
    """Return the training of the pipeline's denoiser on encoded images."""
    device = pipeline.unet.device
    scheduler = pipeline.scheduler
    denoiser = choose_trainable(pipeline, params).to(memory_format=torch.channels_last)  # pyrefly: ignore[no-matching-overload]
    if params.gradient_checkpointing:
        for network in denoiser.values():
            network.enable_gradient_checkpointing()
    training = np.flatnonzero(data.index["split"] == "train")
    held_out = np.flatnonzero(data.index["split"] == "validation")
    captions = data.index["caption"].to_numpy()
    lowest, highest = params.noise_levels

    def prediction_loss(
        rows: np.ndarray, latents: torch.Tensor, noise: torch.Tensor, levels: torch.Tensor, text_rows: np.ndarray
    ) -> torch.Tensor:
        latents, noise, levels = latents.to(device), noise.to(device), levels.to(device)
        noisy = scheduler.add_noise(latents, noise, levels)
        hint = pipeline.normalize(from_uint8(data.hints[rows], device))
        output, log_variance = pipeline.denoise(noisy, levels, data.prompt_embeds(text_rows).to(device), hint)
        target = noise
        if scheduler.config.prediction_type == "v_prediction":
            target = scheduler.get_velocity(latents, noise, levels)
        squared = (output.float() - target).square().mean(dim=1)
        if log_variance is None:
            return squared.mean()
        log_variance = log_variance.float()
        # Twice the negative log-likelihood of normal errors, up to a constant.
        surprise = log_variance + squared.detach() * torch.exp(-log_variance)
        return squared.mean() + VARIANCE_WEIGHT * surprise.mean()

    def loss(step: int, part: slice) -> torch.Tensor:
        # Drawn for the whole batch: its parts add up to the same, however many there are.
        rows = training[batch_indices(len(training), params.batch_size, step, params.seed)]
        shape = (len(rows), *data.mean.shape[1:])
        generator = step_generator(params.seed, step)
        posterior = torch.randn(shape, generator=generator)[part]
        noise = torch.randn(shape, generator=generator)[part]
        levels = torch.randint(lowest, highest + 1, (len(rows),), generator=generator)[part]
        dropped = (torch.rand(len(rows), generator=generator) < params.caption_dropout)[part].numpy()
        rows = rows[part]
        latents = torch.from_numpy(data.mean[rows])
        if data.std is not None:
            latents = latents + torch.from_numpy(data.std[rows]) * posterior
        return prediction_loss(rows, latents, noise, levels, np.where(dropped, 0, captions[rows]))

    def validation_loss(share: slice) -> float:
        # The same levels and noise each time: if the curve falls, the model is better.
        generator = step_generator(params.seed, 2**32)
        total = 0.0
        for start in range(0, len(held_out), params.batch_size):
            rows = held_out[start : start + params.batch_size]
            noise = torch.randn((len(rows), *data.mean.shape[1:]), generator=generator)[share]
            levels = torch.randint(lowest, highest + 1, (len(rows),), generator=generator)[share]
            rows = rows[share]
            if len(rows):
                latents = torch.from_numpy(data.mean[rows])
                total += prediction_loss(rows, latents, noise, levels, captions[rows]).item() * len(rows)
        return total / len(held_out)

    return Problem("train", denoiser, loss, validation_loss)
