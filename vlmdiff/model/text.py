"""From captions to what the denoiser attends to."""

from collections.abc import Sequence

import torch
from transformers import CLIPTextModel, CLIPTokenizer


def tokenize(tokenizer: CLIPTokenizer, captions: Sequence[str], length: int) -> torch.Tensor:
    """Token ids (B, length), padded or cut."""
    return tokenizer(
        list(captions), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    ).input_ids


def embed(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, captions: Sequence[str]) -> torch.Tensor:
    """Text embeddings (B, L, D) of captions, L the text encoder's positions."""
    tokens = tokenize(tokenizer, captions, text_encoder.config.max_position_embeddings)
    return text_encoder(tokens.to(text_encoder.device)).last_hidden_state
