"""Read a checkpoint of the reference implementation (arXiv 2511.08173), and account for every tensor in it.

The reference has the modules of Stable Diffusion 1.5 under the names of the latent diffusion code base. The tables
translate the names of diffusers and of this package into those: first a block's name, then a layer's name in it.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from vlmdiff.core.errors import InputError
from vlmdiff.model.sgn import SemanticGuidedNetwork

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

PREFIXES = {
    "unet": "model.diffusion_model.",
    "sgn": "control_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.transformer.text_model.",
}
# A checkpoint also has the noise schedule, which follows from its parameters, and position numbers.
IGNORED = {
    *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
    *("log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"),
    *("posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"),
    *("lvlb_weights", "logvar", "scale_factor", "cond_stage_model.transformer.text_model.embeddings.position_ids"),
}

# The encoder that UNet and SGN share: four resolutions, each with two layers and a downsampler.
UNET_ENCODER = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    **{f"down_blocks.{i}.resnets.{j}": f"input_blocks.{1 + 3 * i + j}.0" for i in range(4) for j in range(2)},
    **{f"down_blocks.{i}.attentions.{j}": f"input_blocks.{1 + 3 * i + j}.1" for i in range(3) for j in range(2)},
    **{f"down_blocks.{i}.downsamplers.0.conv": f"input_blocks.{3 + 3 * i}.0.op" for i in range(3)},
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
UNET_BLOCKS = {
    **UNET_ENCODER,
    **{f"up_blocks.{i}.resnets.{j}": f"output_blocks.{3 * i + j}.0" for i in range(4) for j in range(3)},
    **{f"up_blocks.{i}.attentions.{j}": f"output_blocks.{3 * i + j}.1" for i in range(1, 4) for j in range(3)},
    # The coarsest level has no attention: its upsampler comes one place earlier.
    **{f"up_blocks.{i}.upsamplers.0.conv": f"output_blocks.{3 * i + 2}.{min(i, 1) + 1}.conv" for i in range(3)},
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
HINT = "control.controlnet_cond_embedding"
SGN_BLOCKS = {
    **{f"control.{ours}": theirs for ours, theirs in UNET_ENCODER.items()},
    f"{HINT}.conv_in": "input_hint_block.0",
    **{f"{HINT}.blocks.{i}": f"input_hint_block.{2 + 2 * i}" for i in range(6)},
    f"{HINT}.conv_out": "input_hint_block.14",
    **{f"control.controlnet_down_blocks.{i}": f"zero_convs.{i}.0" for i in range(12)},
    "control.controlnet_mid_block": "middle_block_out.0",
    # Here the output that is fused into comes first, then the finer one that is read; there it is the reverse.
    **{f"fusion.downsamplers.{j}.{i}.0": f"down{i + 1}{j + 1}.0" for j in range(3) for i in range(3)},
}
UNET_LAYERS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_BLOCKS = {
    **{f"encoder.down_blocks.{i}.resnets.{j}": f"encoder.down.{i}.block.{j}" for i in range(4) for j in range(2)},
    **{f"encoder.down_blocks.{i}.downsamplers.0": f"encoder.down.{i}.downsample" for i in range(3)},
    # The reference counts the decoder's resolutions from the finest, diffusers from the coarsest.
    **{f"decoder.up_blocks.{i}.resnets.{j}": f"decoder.up.{3 - i}.block.{j}" for i in range(4) for j in range(3)},
    **{f"decoder.up_blocks.{i}.upsamplers.0": f"decoder.up.{3 - i}.upsample" for i in range(3)},
    **{f"{half}.mid_block.resnets.{i}": f"{half}.mid.block_{i + 1}" for half in ("encoder", "decoder") for i in (0, 1)},
    **{f"{half}.mid_block.attentions.0": f"{half}.mid.attn_1" for half in ("encoder", "decoder")},
    **{f"{half}.conv_norm_out": f"{half}.norm_out" for half in ("encoder", "decoder")},
}
VAE_LAYERS = {
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
TABLES = {
    "unet": (UNET_BLOCKS, UNET_LAYERS),
    "sgn": (SGN_BLOCKS, UNET_LAYERS),
    "vae": (VAE_BLOCKS, VAE_LAYERS),
    "text_encoder": ({"text_model": ""}, {}),  # some versions of transformers have one level more
}


def read_modules(
    checkpoint: Path | str | Mapping[str, torch.Tensor], only_mid_control: bool
) -> dict[str, nn.Module | DDIMScheduler]:
    """Return a checkpoint's networks and its noise schedule, named as a `VLMDiffPipeline` names its components.

    The networks share the checkpoint's tensors. `text_encoder` is among them if the checkpoint has one. Raises
    InputError as `VLMDiffPipeline.from_reference` does.
    """
    state = read_checkpoint(checkpoint)
    modules = empty_modules(
        only_mid_control, any(name.startswith(PREFIXES["text_encoder"]) for name in state.keys() - IGNORED)
    )
    fill(modules, state)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return {**modules, "scheduler": scheduler}


def empty_modules(only_mid_control: bool, with_text: bool) -> dict[str, nn.Module]:
    """Return the reference's modules on the meta device, where they take no memory and no time to initialise."""
    with torch.device("meta"):
        modules: dict[str, nn.Module] = {
            "unet": UNet2DConditionModel(sample_size=32, cross_attention_dim=768, attention_head_dim=8),
            "sgn": SemanticGuidedNetwork(only_mid_control=only_mid_control),
            "vae": AutoencoderKL(
                sample_size=256,
                latent_channels=4,
                block_out_channels=(128, 256, 512, 512),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
                scaling_factor=0.18215,
            ),
        }
        if with_text:
            modules["text_encoder"] = CLIPTextModel(
                CLIPTextConfig(
                    vocab_size=49408,
                    max_position_embeddings=77,
                    hidden_size=768,
                    intermediate_size=3072,
                    num_hidden_layers=12,
                    num_attention_heads=12,
                    hidden_act="quick_gelu",
                )
            )
    return modules


def read_checkpoint(checkpoint: Path | str | Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """Return the state dict of a .safetensors or torch.save file, mapped into memory, or a given state dict itself.

    Raises InputError if the file is missing or has another format, or if reading it would run code.
    """
    if isinstance(checkpoint, Mapping):
        state, source = checkpoint, "the state dict"
    else:
        path = source = Path(checkpoint)
        if not path.is_file():
            raise InputError(f"{path} does not exist. Name a checkpoint file")
        try:
            if path.suffix == ".safetensors":
                state = load_file(path)
            else:
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            raise InputError(
                f"{path} contains more than tensors, and reading it can run code. If you trust it, save its state dict "
                f"as safetensors and use that file ({str(error).splitlines()[0]})"
            ) from error
        except (SafetensorError, RuntimeError, EOFError, ValueError) as error:
            raise InputError(f"{path} is not a checkpoint or is truncated: {error}") from error
    state = state.get("state_dict", state) if isinstance(state, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise InputError(f"{source} is not a state dict (names to tensors), and has no key `state_dict` with one")
    return state


class Place(NamedTuple):
    """The module and the name in it that a tensor of a checkpoint belongs to, and its shape in the checkpoint."""

    part: str
    name: str
    shape: tuple[int, ...]


def places(modules: Mapping[str, nn.Module]) -> dict[str, Place]:
    """Return the place of each tensor of a checkpoint, by its name there."""
    found = {}
    for part, module in modules.items():
        for name, parameter in module.state_dict().items():
            shape = tuple(parameter.shape)
            # The reference's autoencoder has 1x1 convolutions in its attention, diffusers has matrices.
            shape = (*shape, 1, 1) if part == "vae" and len(shape) == 2 else shape
            found[reference_name(part, name)] = Place(part, name, shape)
    return found


def fill(modules: Mapping[str, nn.Module], state: Mapping[str, torch.Tensor]) -> None:
    """Give modules on the meta device the tensors of `state`, which they then share, and set them to evaluation.

    Raises InputError that names the tensors that are missing, unexpected or have another shape.
    """
    expected = places(modules)
    wrong = [f"{name} is missing" for name in expected if name not in state]
    wrong += [f"{name} is unexpected" for name in state if name not in expected and name not in IGNORED]
    wrong += [
        f"{name} has shape {tuple(state[name].shape)} instead of {place.shape}"
        for name, place in expected.items()
        if name in state and tuple(state[name].shape) != place.shape
    ]
    if wrong:
        more = f", and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise InputError(f"this is not a checkpoint of the reference: {'; '.join(wrong[:8])}{more}")
    for part, module in modules.items():
        own = module.state_dict()
        mine = {place.name: state[name] for name, place in expected.items() if place.part == part}
        module.load_state_dict({name: mine[name].view(own[name].shape) for name in own}, assign=True)
        module.eval()
        for name, buffer in module.named_buffers():
            if buffer.is_meta:
                # CLIP's position numbers are the only buffer that no state dict has.
                owner, _, attribute = name.rpartition(".")
                setattr(module.get_submodule(owner), attribute, torch.arange(buffer.shape[-1]).expand(buffer.shape))


def reference_name(part: str, name: str) -> str:
    """Return the reference's name of a tensor of the module `part`."""
    blocks, layers = TABLES[part]
    block, layer = _translate(blocks, name)
    if layer:
        layer = ".".join(filter(None, _translate(layers, layer)))
    return PREFIXES[part] + ".".join(filter(None, (block, layer)))


def _translate(table: Mapping[str, str], name: str) -> tuple[str, str]:
    """Translate the longest prefix of a dotted name that is in the table; return it and the rest of the name."""
    words = name.split(".")
    for length in range(len(words), 0, -1):
        if (head := ".".join(words[:length])) in table:
            return table[head], ".".join(words[length:])
    return "", name
