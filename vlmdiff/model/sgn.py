"""The semantic-guided network (SGN): a ControlNet on the image, with spatial feature fusion (SFF)."""

import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, ModelMixin, UNet2DConditionModel  # diffusers loads us by ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import nn

from vlmdiff.core.errors import InputError

__all__ = ["ModelMixin", "SemanticGuidedNetwork", "SpatialFeatureFusion"]


class SpatialFeatureFusion(nn.Module):
    """Compute SiLU(o_j + sum_i D_ij(s_i)) for the coarsest control outputs o_j and the outputs s_i one level finer.

    D is a 3x3 convolution of stride 2 without bias, instance normalisation and SiLU (VLMDiff, arXiv 2511.08173).
    The convolutions keep PyTorch's initialisation, because the layers that feed them start at zero and two zero layers
    in a row would never receive a gradient. The sum still starts at zero, because its inputs do.
    """

    def __init__(self, source_channels: list[int], target_channels: list[int]):
        super().__init__()
        self.downsamplers = nn.ModuleList(
            nn.ModuleList(
                # Not InstanceNorm2d: PyTorch's has a wrong gradient for a batch of one in channels-last.
                nn.Sequential(
                    nn.Conv2d(s, t, 3, stride=2, padding=1, bias=False), nn.GroupNorm(t, t, affine=False), nn.SiLU()
                )
                for s in source_channels
            )
            for t in target_channels
        )

    def forward(self, sources: list[torch.Tensor], targets: list[torch.Tensor]) -> list[torch.Tensor]:
        return [
            F.silu(target + sum(down(source) for down, source in zip(row.children(), sources, strict=True)))
            for target, row in zip(targets, self.downsamplers, strict=True)
        ]


class SemanticGuidedNetwork(ModelMixin, ConfigMixin):
    """Control a `UNet2DConditionModel` of the same shape by the image.

    With `only_mid_control`, the image reaches the UNet only at the coarsest resolution (its skips and the middle
    block): enough to identify the object and its pose, too little to copy a defect. Without `fuse`, the coarsest
    control is the ControlNet's output.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        down_block_types: tuple[str, ...] = (
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "DownBlock2D",
        ),
        block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280),
        layers_per_block: int = 2,
        cross_attention_dim: int = 768,
        attention_head_dim: int | tuple[int, ...] = 8,
        hint_channels: tuple[int, ...] = (16, 32, 96, 256),
        only_mid_control: bool = True,
        fuse: bool = True,
    ):
        super().__init__()
        self.control = ControlNetModel(
            in_channels=in_channels,
            down_block_types=down_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            cross_attention_dim=cross_attention_dim,
            attention_head_dim=attention_head_dim,
            conditioning_embedding_out_channels=hint_channels,
        )
        # From fine to coarse, the control outputs are those of conv_in and of each block. A block's last output, its
        # downsampler's, has the next resolution, so that every resolution has layers_per_block + 1 outputs.
        self.outputs_per_level = layers_per_block + 1
        channels = [block.in_channels for block in self.control.controlnet_down_blocks]
        self.fusion = SpatialFeatureFusion(*self._two_coarsest(channels)) if fuse else None

    @classmethod
    def from_unet(
        cls, unet: UNet2DConditionModel, hint_channels: tuple[int, ...], only_mid_control: bool, fuse: bool = True
    ) -> "SemanticGuidedNetwork":
        """Return an SGN whose down and middle blocks copy the UNet's. The hint encoder and the outputs are new.

        Raises InputError if the design of the UNet is not that of Stable Diffusion 1.
        """
        shape = "in_channels", "down_block_types", "block_out_channels", "layers_per_block"
        attention = "cross_attention_dim", "attention_head_dim"
        sgn = cls(
            **{key: unet.config[key] for key in (*shape, *attention)},
            hint_channels=hint_channels,
            only_mid_control=only_mid_control,
            fuse=fuse,
        )
        # As JSON returns them: a tuple is a list.
        ours, theirs = (
            {k: list(v) if isinstance(v, tuple) else v for k, v in net.config.items() if k[0] != "_"}
            for net in (sgn.control, unet)
        )
        if differs := sorted(key for key in ours.keys() & theirs.keys() if ours[key] != theirs[key]):
            raise InputError(f"an SGN cannot start from this UNet: it differs in {', '.join(differs)}.")
        for part in ("conv_in", "time_embedding", "down_blocks", "mid_block"):
            getattr(sgn.control, part).load_state_dict(getattr(unet, part).state_dict())
        return sgn

    def unused_outputs(self) -> nn.ModuleList:
        """Return the output convolutions that reach neither the UNet nor the fusion."""
        used = self.outputs_per_level * (2 if self.config.fuse else 1)
        return self.control.controlnet_down_blocks[: -used if self.config.only_mid_control else 0]

    def _two_coarsest(self, outputs: list) -> tuple[list, list]:
        n = self.outputs_per_level
        return outputs[-2 * n : -n], outputs[-n:]

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor, image: torch.Tensor
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Return the control of the UNet's skips, finest first, and of its middle block.

        `sample` holds noisy latents (B, C, h, w), `timestep` is (B,) or a scalar, `encoder_hidden_states` holds text
        embeddings (B, L, D), `image` (B, 3, H, W) is normalised as for the first stage. A skip without control gets a
        scalar zero.
        """
        outputs, middle = self.control(sample, timestep, encoder_hidden_states, image, return_dict=False)
        sources, targets = self._two_coarsest(outputs)
        coarse = self.fusion(sources, targets) if self.fusion else targets
        fine = outputs[: -self.outputs_per_level]
        if self.config.only_mid_control:
            fine = [sample.new_zeros(())] * len(fine)
        return [*fine, *coarse], middle
