"""Attention for a frozen transformer on a CPU in bfloat16, in less than half the time of PyTorch's own."""

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

# As a transformers' model names it.
NAME = "vlmdiff"
# Queries whose weights are computed at once: those of six heads and 1,600 tokens fit into a core's cache.
AT_ONCE = 128
# Options that change the weights.
OPTIONS = "position_bias", "cache", "softcap"


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Return softmax(query key^T scaling) value (B, N, heads, D), as an attention function of `transformers`.

    query, key, value: (B, heads, N, D). On another device, in another precision, with a mask, an option or gradients,
    this is PyTorch's own attention.
    """
    causal = options.pop("is_causal", getattr(module, "is_causal", True))
    plain = query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.shape == key.shape == value.shape
    asked = causal or dropout or attention_mask is not None or any(options.get(name) is not None for name in OPTIONS)
    if not plain or asked or (torch.is_grad_enabled() and (query.requires_grad or value.requires_grad)):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=causal, **options
        )
    # What all keys share changes no weight. Without it the products are small, and bfloat16 rounds them less.
    others = (key - key.float().mean(dim=2, keepdim=True)).to(key.dtype).transpose(2, 3).contiguous()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    queries, values = (query * scale).contiguous(), value.contiguous()
    found = [(some @ others).softmax(dim=-1) @ values for some in queries.split(AT_ONCE, dim=2)]
    return torch.cat(found, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
