"""Where a photograph and its reconstruction are compared: pixels, the first stage's features, any vision backbone's."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from vlmdiff.errors import InputError
from vlmdiff.model.pipeline import VLMDiffPipeline
from vlmdiff.params import AutoencoderFeatures, BackboneFeatures, Features, Pixels

# Images (B, 3, S, S) in [0, 1] to one map (B, C, h, w) a layer.
Extractor = Callable[[torch.Tensor], list[torch.Tensor]]
# Two maps (B, C, h, w) to (B, h, w): 0 where they agree.
Distance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def cosine_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """1 - cosine similarity over the channels, in [0, 2]; 0 where both are zero, as after a ReLU."""
    # By the chord, |a - b|^2 / 2 of unit vectors, which is defined there.
    return (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(dim=1) / 2


def absolute_difference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference over the channels."""
    return (a - b).abs().mean(dim=1)


def space(params: Features, pipeline: VLMDiffPipeline) -> tuple[Extractor, Distance]:
    """What `params` name, and the distance that suits it.

    Raises InputError where a layer or the backbone does not exist.
    """
    match params:
        case Pixels():
            return lambda images: [images], absolute_difference
        case AutoencoderFeatures():
            return autoencoder_features(pipeline, params.layers), cosine_distance
        case BackboneFeatures():
            return backbone_features(params, pipeline.device), cosine_distance


def autoencoder_features(pipeline: VLMDiffPipeline, layers: tuple[int, ...]) -> Extractor:
    """Activations of the first stage's encoder at its resolutions, 0 the finest."""
    encoder = pipeline.vae.encoder
    blocks = encoder.down_blocks
    if bad := [layer for layer in layers if layer >= len(blocks)]:
        raise InputError(f"the first stage's encoder has layers 0 to {len(blocks) - 1}, not {bad}: mend `layers`")

    def extract(images: torch.Tensor) -> list[torch.Tensor]:
        maps, x = [], encoder.conv_in(pipeline.normalize(images))
        for index in range(max(layers) + 1):
            # Before its downsampler a block's output has the block's own resolution.
            for resnet in blocks[index].resnets:
                x = resnet(x, temb=None)
            if index in layers:
                maps.append(x)
            for downsampler in blocks[index].downsamplers or ():
                x = downsampler(x)
        return maps

    return extract


def backbone_features(params: BackboneFeatures, device: torch.device) -> Extractor:
    """Hidden states of a vision model of `transformers`; those of a transformer are folded back onto its patch grid."""
    from transformers import AutoImageProcessor, AutoModel

    try:
        model = AutoModel.from_pretrained(params.model, revision=params.revision, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot load the feature extractor {params.model!r}: {error}") from error
    model = model.to(device).eval().requires_grad_(False)
    mean, std = torch.full((1, 3, 1, 1), 0.5, device=device), torch.full((1, 3, 1, 1), 0.5, device=device)
    try:
        processor = AutoImageProcessor.from_pretrained(params.model, revision=params.revision)
        mean = torch.tensor(processor.image_mean, device=device).view(1, 3, 1, 1)
        std = torch.tensor(processor.image_std, device=device).view(1, 3, 1, 1)
    except OSError:
        # A checkpoint without a processor's file, such as one of our own: its inputs are in [-1, 1].
        processor = None

    def extract(images: torch.Tensor) -> list[torch.Tensor]:
        size = (params.image_size, params.image_size)
        x = F.interpolate(images, size=size, mode="bilinear", antialias=True, align_corners=False)
        states = model(pixel_values=(x - mean) / std, output_hidden_states=True).hidden_states
        return [_grid(states[layer], model.config, params.image_size) for layer in params.layers]

    return extract


def _grid(state: torch.Tensor, config, image_size: int) -> torch.Tensor:
    if state.ndim == 4:
        return state
    side = image_size // config.patch_size
    patches = state[:, state.shape[1] - side * side :]  # the class and register tokens come first
    return patches.transpose(1, 2).unflatten(2, (side, side))
