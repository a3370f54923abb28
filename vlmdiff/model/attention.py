"""Attention for a frozen transformer on a CPU in bfloat16, which takes about half the time of PyTorch's own."""

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

# As a transformers' model names it.
NAME = "vlmdiff"
# Queries whose weights are computed at once: those of six heads and 1,600 tokens fit into a core's cache. With fewer
# tokens, PyTorch's own is as fast.
AT_ONCE = 128
# Options of models that change no weight.
HARMLESS = {"output_hidden_states"}


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

    query, key, value: (B, heads, N, D). Where anything else is asked for (another device or precision, few tokens, a
    mask, an option, gradients), this is PyTorch's own attention, called as transformers calls it.
    """
    given = query, key, value
    if query.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        # As PyTorch does: rotary positions leave float32.
        query, key, value = (x.to(torch.get_autocast_dtype("cpu")) for x in given)
    causal = options.get("is_causal")
    changes = {name for name, each in options.items() if each is not None} - HARMLESS - {"is_causal"}
    plain = (
        query.device.type == "cpu"
        and query.dtype == key.dtype == value.dtype == torch.bfloat16
        and query.shape == key.shape == value.shape
        and query.shape[2] >= AT_ONCE
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in given))
    )
    asked = changes or dropout or attention_mask is not None
    if not plain or asked or (getattr(module, "is_causal", True) if causal is None else causal):
        return sdpa_attention_forward(module, *given, attention_mask, dropout, scaling, **options)
    # What all keys share changes no weight. Without it the products are smaller, and bfloat16 rounds them less.
    others = (key - key.float().mean(dim=2, keepdim=True)).to(key.dtype).transpose(2, 3).contiguous()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    queries, values = (query * scale).contiguous(), value.contiguous()
    found = [(some @ others).softmax(dim=-1) @ values for some in queries.split(AT_ONCE, dim=2)]
    return torch.cat(found, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
