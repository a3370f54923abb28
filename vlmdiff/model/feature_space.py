"""`FeatureSpace`: the feature maps of a vision backbone as the latent space, in the place of an image autoencoder."""

import json
from collections.abc import Iterable

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import Decoder, DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig

from vlmdiff.errors import InputError
from vlmdiff.model.backbone import Backbone, concatenate
from vlmdiff.model.normalization import Normalization
from vlmdiff.params import Layer, VisionBackbone

# A code without spread, as a Gaussian: the logarithm of the smallest variance that the class allows.
CERTAIN = -30.0


class FeatureSpace(ModelMixin, ConfigMixin):
    """Layers of a frozen backbone on one grid, centred and projected; a decoder shows what they look like.

    It is used as `AutoencoderKL` is, and its configuration has the same names: images (B, 3, S, S), normalised, to
    codes (B, C, h, w), S / h = 2 ** (len(block_out_channels) - 1). `backbone` is the backbone's configuration,
    `feature_channels` are the channels of each of its layers; `image_mean` and `image_std` are what it subtracts and
    divides by, of images as they are given.
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
        latent_channels: int = 64,
        block_out_channels: tuple[int, ...] = (32, 64, 64, 64),
        scaling_factor: float = 1.0,
    ):
        super().__init__()
        self.network = AutoModel.from_config(AutoConfig.for_model(**backbone)).eval().requires_grad_(False)
        total = sum(feature_channels)
        self.register_buffer("mean", torch.zeros(total))
        self.register_buffer("projection", torch.eye(total, latent_channels))
        self.decoder = Decoder(
            in_channels=latent_channels,
            out_channels=3,
            up_block_types=("UpDecoderBlock2D",) * len(block_out_channels),
            block_out_channels=block_out_channels,
            layers_per_block=1,
            norm_num_groups=min(32, min(block_out_channels) // 4),
            mid_block_add_attention=False,
        )
        self._extractor: Backbone | None = None

    @classmethod
    def around(cls, backbone: Backbone, normalization: Normalization, **config) -> "FeatureSpace":
        """A space of the backbone's layers, to be fitted, for images that are given to it in this normalization.

        config: the rest of the constructor's arguments.
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
        """As of any module, but the backbone stays as it was trained."""
        super().train(mode)
        self.network.eval()
        return self

    @property
    def grid(self) -> int:
        """Side of the codes."""
        return self.config.sample_size // 2 ** (len(self.config.block_out_channels) - 1)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """The layers on one grid, as they are: (B, 3, S, S), normalised, to (B, sum of channels, h, w)."""
        if self._extractor is None:
            # When it is built it looks at what the network gives, and so it waits for the network's weights.
            wanted = VisionBackbone(
                model=self.network.config.model_type, image_size=self.config.backbone_size, layers=self.config.layers
            )
            self._extractor = Backbone(self.network, wanted, self.config.image_mean, self.config.image_std)
        return concatenate(self._extractor(x), self.grid)

    def encode(self, x: torch.Tensor) -> AutoencoderKLOutput:
        """The codes, certain, as an autoencoder's posterior: its mode is the code, its deviation next to nothing."""
        codes = torch.einsum("bfhw,fc->bchw", self.features(x) - self.mean[:, None, None], self.projection)
        spread = torch.full_like(codes, CERTAIN)
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(torch.cat([codes, spread], dim=1)))

    def decode(self, codes: torch.Tensor) -> DecoderOutput:
        """What has such features: (B, C, h, w) to (B, 3, S, S), normalised."""
        return DecoderOutput(sample=self.decoder(codes))

    @torch.no_grad()
    def fit(self, batches: Iterable[torch.Tensor], whitening: float) -> float:
        """Centre and project by the features of these images, batches (B, 3, S, S), normalised.

        Layers count the same, whatever their scale: each is divided by the root of its mean squared distance from its
        mean. Of all layers' principal components the first `latent_channels` are kept, the k-th of variance v_k scaled
        by v_k ** (-whitening / 2): 0 leaves their variances, 1 makes all of them one; then all are scaled alike, to a
        mean variance of one. Returns the kept share of the variance. Raises InputError where the features do not vary
        in as many directions.
        """
        channels = self.config.feature_channels
        total = torch.zeros(sum(channels), dtype=torch.float64, device=self.mean.device)
        squares = torch.zeros(len(total), len(total), dtype=torch.float64, device=self.mean.device)
        count = 0
        for batch in batches:
            rows = self.features(batch).permute(0, 2, 3, 1).flatten(0, 2)
            # Centred by the first batch, float32 products lose nothing.
            if count == 0:
                shift = rows.mean(dim=0)
            rows = rows - shift
            total += rows.sum(dim=0, dtype=torch.float64)
            squares += (rows.T @ rows).double()
            count += len(rows)
        mean = total / count
        covariance = squares / count - mean.outer(mean)
        layers = covariance.diagonal().split(channels)
        scale = torch.cat([variances.sum().clamp_min(1e-12).rsqrt().expand_as(variances) for variances in layers])
        variances, components = torch.linalg.eigh(scale[:, None] * covariance * scale)
        kept = self.config.latent_channels
        rank = int((variances > 1e-9 * variances[-1]).sum())
        if rank < kept:
            raise InputError(f"the backbone's features vary in {rank} directions: set first_stage.latent_channels to that")
        variances, components = variances.flip(0)[:kept], components.flip(1)[:, :kept]
        self.mean.copy_(mean + shift)
        unit = (variances ** (1 - whitening)).mean().rsqrt()
        self.projection.copy_(scale[:, None] * components * variances ** (-whitening / 2) * unit)
        return float(variances.sum() / len(channels))


def _shape(config: PreTrainedConfig) -> dict:
    """What makes the network; without where it came from, and the names of the classes that it once told apart."""
    facts = json.loads(config.to_json_string())
    return {key: value for key, value in facts.items() if key not in ("_name_or_path", "id2label", "label2id")}
