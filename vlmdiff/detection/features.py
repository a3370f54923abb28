"""The features in which image and reconstruction are compared: pixels, latents, encoder or backbone features."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from vlmdiff.core.errors import InputError
from vlmdiff.core.params import AutoencoderFeatures, BackboneFeatures, Features, Latents, Pixels
from vlmdiff.model.backbone import Backbone
from vlmdiff.model.pipeline import VLMDiffPipeline

# Maps images (B, 3, S, S) in [0, 1] and their scaled latents (B, C, h, w) to one map (B, C, h, w) per layer.
Extractor = Callable[[torch.Tensor, torch.Tensor], list[torch.Tensor]]
# Maps two (B, C, h, w) to (B, h, w), 0 where they are equal.
Distance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def cosine_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return 1 - cosine similarity over the channels, in [0, 2]; 0 where both vectors are zero, as after a ReLU."""
    # |a - b|^2 / 2 of unit vectors is the same and also defined for zero vectors.
    return (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(dim=1) / 2


def rms_difference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the root mean squared difference over the channels."""
    return (a - b).square().mean(dim=1).sqrt()


def spaces(features: Sequence[Features], pipeline: VLMDiffPipeline) -> list[tuple[Extractor, Distance]]:
    """Return the extractor of each of `features` and the distance to use with it. Load each backbone once.

    Raises InputError if a layer or a backbone does not exist.
    """
    layers: dict[BackboneFeatures, list] = {}
    for entry in features:
        if isinstance(entry, BackboneFeatures):
            layers.setdefault(_apart_from_layers(entry), []).extend(entry.layers)
    backbones = {
        key: Backbone.load(key.model_copy(update={"layers": tuple(wanted)}), pipeline.device)
        for key, wanted in layers.items()
    }

    def space(entry: Features) -> tuple[Extractor, Distance]:
        match entry:
            case Pixels():
                return local_means(entry.window), rms_difference
            case Latents():
                return lambda images, latents: [latents], rms_difference
            case AutoencoderFeatures():
                return autoencoder_features(pipeline, entry.layers), cosine_distance
            case BackboneFeatures():
                key = _apart_from_layers(entry)
                places = [layers[key].index(layer) for layer in entry.layers]
                return backbone_features(backbones[key], places), cosine_distance

    return [space(entry) for entry in features]


def local_means(window: int) -> Extractor:
    """Average colours over `window` x `window` pixels, at the border over those inside the image."""
    return lambda images, latents: [F.avg_pool2d(images, window, 1, window // 2, count_include_pad=False)]


def _apart_from_layers(entry: BackboneFeatures) -> BackboneFeatures:
    return entry.model_copy(update={"layers": (), "weight": 1.0})


def backbone_features(backbone: Backbone, places: Sequence[int]) -> Extractor:
    """Extract the backbone's layers at the indices `places`."""

    def extract(images: torch.Tensor, latents: torch.Tensor) -> list[torch.Tensor]:
        maps = backbone(images)
        return [maps[place] for place in places]

    return extract


def autoencoder_features(pipeline: VLMDiffPipeline, layers: tuple[int, ...]) -> Extractor:
    """Extract activations of the autoencoder's encoder at the resolutions `layers`; 0 is the finest."""
    if not isinstance(pipeline.vae, AutoencoderKL):
        raise InputError("features of kind: autoencoder need an AutoencoderKL as first stage: choose another kind")
    encoder = pipeline.vae.encoder
    blocks = encoder.down_blocks
    if bad := [layer for layer in layers if layer >= len(blocks)]:
        raise InputError(f"the first stage's encoder has layers 0 to {len(blocks) - 1}, not {bad}. Fix `layers`.")

    def extract(images: torch.Tensor, latents: torch.Tensor) -> list[torch.Tensor]:
        maps, x = [], encoder.conv_in(pipeline.normalize(images))
        for index in range(max(layers) + 1):
            # Take a block's output before its downsampler, at the block's own resolution.
            for resnet in blocks[index].resnets:
                x = resnet(x, temb=None)
            if index in layers:
                maps.append(x)
            for downsampler in blocks[index].downsamplers or ():
                x = downsampler(x)
        return maps

    return extract
