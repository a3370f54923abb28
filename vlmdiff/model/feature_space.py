"""`FeatureSpace`: the feature maps of a vision backbone as latent space, in place of an image autoencoder."""

import json
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig

from vlmdiff.core.device import fast_bf16
from vlmdiff.core.errors import InputError
from vlmdiff.core.params import Layer, VisionBackbone
from vlmdiff.model.backbone import Backbone, concatenate
from vlmdiff.model.normalization import Normalization

# Log variance of a deterministic code: the smallest that DiagonalGaussianDistribution allows.
CERTAIN = -30.0


class PatchDecoder(nn.Module):
    """Decode codes (B, C, h, w) to images (B, 3, h side, w side) by sub-pixel convolution (Shi et al., 2016).

    All layers work on the grid of the codes, so the decoder is cheap beside the denoiser.
    """

    def __init__(self, codes: int, channels: int, side: int):
        super().__init__()
        self.conv_in = nn.Conv2d(codes, channels, 3, padding=1)
        self.conv_middle = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_out = nn.Conv2d(channels, 3 * side**2, 3, padding=1)
        self.side = side

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        x = F.silu(self.conv_in(codes))
        x = x + F.silu(self.conv_middle(x))
        return F.pixel_shuffle(self.conv_out(x), self.side)


class FeatureSpace(ModelMixin, ConfigMixin):
    """Encode images as layers of a frozen backbone on one grid, centred and projected. A decoder visualises the codes.

    The interface and the names in the configuration are those of `AutoencoderKL`: normalised images (B, 3, S, S) become
    codes (B, C, grid, grid). `backbone` is the backbone's configuration, `feature_channels` are the channels of each
    layer. `image_mean` and `image_std` convert the given images to the backbone's normalization.
    """

    @register_to_config
    def __init__(
        self,
        backbone: dict,
        backbone_size: int,
        layers: tuple[Layer, ...],
        feature_channels: tuple[int, ...],
        image_mean: tuple[float, ...],
        image_std: tuple[float, ...],
        sample_size: int = 256,
        grid: int = 32,
        latent_channels: int = 64,
        decoder_channels: int = 128,
        scaling_factor: float = 1.0,
    ):
        super().__init__()
        network = AutoModel.from_config(AutoConfig.for_model(**backbone), trust_remote_code=False)
        self.network = network.eval().requires_grad_(False)
        total = sum(feature_channels)
        self.register_buffer("mean", torch.zeros(total))
        self.register_buffer("projection", torch.eye(total, latent_channels))
        self.decoder = PatchDecoder(latent_channels, decoder_channels, sample_size // grid)
        self._extractors: dict[int, Backbone] = {}

    @classmethod
    def around(cls, backbone: Backbone, normalization: Normalization, **config) -> "FeatureSpace":
        """Return an unfitted space of the backbone's layers, for images in `normalization`.

        `config` holds the remaining arguments of the constructor.
        """
        theirs, ours = backbone.normalization, normalization
        channels = list(zip(theirs.image_mean, theirs.image_std, ours.image_mean, ours.image_std, strict=True))
        space = cls(
            backbone=_shape(backbone.network.config),
            backbone_size=backbone.size[0],
            layers=backbone.layers,
            feature_channels=tuple(backbone.channels),
            image_mean=tuple((m - mean) / std for m, _, mean, std in channels),
            image_std=tuple(s / std for _, s, _, std in channels),
            **config,
        )
        space.network = backbone.network
        return space

    def train(self, mode: bool = True) -> "FeatureSpace":
        """Set the training mode; the backbone stays in evaluation mode."""
        super().train(mode)
        self.network.eval()
        return self

    def features(self, x: torch.Tensor, size: int | None = None) -> torch.Tensor:
        """Return the unprojected layers (B, sum of channels, h, w) of normalised images (B, 3, S, S).

        size: at how many pixels the backbone sees them, in place of `backbone_size`; h and w are then those of its
        finest layer. Raises InputError for a size that it rejects.
        """
        wanted = self.config.backbone_size if size is None else size
        if wanted not in self._extractors:
            # Backbone runs the network when it is built, so it must wait until the weights are loaded.
            params = VisionBackbone(model=self.network.config.model_type, image_size=wanted, layers=self.config.layers)
            extractor = Backbone(self.network, params, self.config.image_mean, self.config.image_std)
            self._extractors[wanted] = extractor
        extractor = self._extractors[wanted]
        # A transformer takes half the time in bfloat16; its features are as float32's to a cosine similarity of 0.9999.
        half = extractor.tokens and fast_bf16(x.device)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
            maps = extractor(x)
        grid = self.config.grid if size is None else max((one.shape[-2], one.shape[-1]) for one in maps)
        return concatenate([one.float() for one in maps], grid)

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """Return the codes (B, C, grid, grid) of `features` (B, sum of channels, grid, grid)."""
        return torch.einsum("bfhw,fc->bchw", features - self.mean[:, None, None], self.projection)

    def encode(self, x: torch.Tensor) -> AutoencoderKLOutput:
        """Return the codes as an autoencoder's posterior, with a deviation of almost zero."""
        codes = certain(self.project(self.features(x)))
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(codes))

    def decode(self, codes: torch.Tensor) -> DecoderOutput:
        """Return normalised images (B, 3, S, S) for codes (B, C, h, w)."""
        return DecoderOutput(sample=self.decoder(codes))

    @torch.no_grad()
    def fit(self, batches: Iterable[torch.Tensor], whitening: float) -> float:
        """Fit centre and projection to `features` (B, sum of channels, h, w). Return the kept share of variance.

        Each layer is divided by the root of its mean squared distance from its mean, so that all layers count the same.
        The first `latent_channels` principal components are kept. Component k, of variance v_k, is scaled by
        v_k ** (-whitening / 2): 0 keeps the variances, 1 makes them equal. A common factor then makes the mean variance
        one. Raises InputError if the features have a lower rank than `latent_channels`.
        """
        channels = self.config.feature_channels
        total = torch.zeros(sum(channels), dtype=torch.float64, device=self.mean.device)
        squares = torch.zeros(len(total), len(total), dtype=torch.float64, device=self.mean.device)
        count, shift = 0, self.mean
        for batch in batches:
            rows = batch.permute(0, 2, 3, 1).flatten(0, 2)
            # Centring by the first batch keeps the float32 products accurate.
            if count == 0:
                shift = rows.mean(dim=0)
            rows = rows - shift
            total += rows.sum(dim=0, dtype=torch.float64)
            squares += (rows.T @ rows).double()
            count += len(rows)
        mean = total / count
        covariance = squares / count - mean.outer(mean)
        layers = covariance.diagonal().split(channels)
        scale = torch.cat([variances.sum().clamp_min(1e-30).rsqrt().expand_as(variances) for variances in layers])
        variances, components = torch.linalg.eigh(scale[:, None] * covariance * scale)
        kept = self.config.latent_channels
        rank = int((variances > 1e-9 * variances[-1]).sum())
        if rank < kept:
            raise InputError(
                f"the backbone's features have rank {rank}. Set first_stage.latent_channels to at most {rank}."
            )
        variances, components = variances.flip(0)[:kept], components.flip(1)[:, :kept]
        self.mean.copy_(mean + shift)
        unit = (variances ** (1 - whitening)).mean().rsqrt()
        self.projection.copy_(scale[:, None] * components * variances ** (-whitening / 2) * unit)
        return float(variances.sum() / len(channels))


def certain(codes: torch.Tensor) -> torch.Tensor:
    """Return the parameters (B, 2 C, h, w) of a posterior that is almost certain of its codes (B, C, h, w)."""
    return torch.cat([codes, torch.full_like(codes, CERTAIN)], dim=1)


# The origin, the class labels, and names of blocks that may be dropped.
NOT_SHAPE = "_name_or_path", "id2label", "label2id", "out_features", "out_indices", "stage_names"


def _shape(config: PreTrainedConfig) -> dict:
    """Return the part of the configuration that shapes the network."""
    facts = json.loads(config.to_json_string())
    return {key: value for key, value in facts.items() if key not in NOT_SHAPE}
