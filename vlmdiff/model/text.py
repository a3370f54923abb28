"""Embed captions for the denoiser's attention.

A long caption is split into windows of the text encoder's length (CLIP: 77 tokens, 75 without start and end). Each
window is encoded alone, and the embeddings are concatenated. Windows of the empty caption fill their number up to a
power of two, and shorter captions of a batch are repeated to the length of the longest. Repeating all keys equally
often does not change attention, so a caption's effect does not depend on the rest of the batch.
"""

from collections.abc import Sequence

import torch
from transformers import CLIPTextModel, CLIPTokenizer

from vlmdiff.core.console import say
from vlmdiff.core.text import counted


def token_windows(
    tokenizer: CLIPTokenizer, captions: Sequence[str], length: int, max_windows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the token ids (W, length) of all windows, and each caption's row indices (B, K) into them.

    K is the largest number of windows of a caption, a power of two. Captions longer than `max_windows` are cut, with a
    warning that counts them.
    """
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    room = length - 2
    windows: list[list[int]] = []
    rows: list[list[int]] = []
    cut = 0
    for content in tokenizer(list(captions), add_special_tokens=False, verbose=False).input_ids:
        parts = [content[start : start + room] for start in range(0, max(1, len(content)), room)]
        cut += len(parts) > max_windows
        parts = parts[:max_windows]
        parts += [[]] * ((1 << (len(parts) - 1).bit_length()) - len(parts))
        rows.append(list(range(len(windows), len(windows) + len(parts))))
        windows += [[bos, *part, eos] + [pad] * (room - len(part)) for part in parts]
    if cut:
        say(
            f"warning: {counted(cut, 'caption', 'are')} cut, of {len(captions)}: longer than {max_windows} x {room} "
            "tokens. Raise encode.max_windows to read more."
        )
    most = max(map(len, rows))
    return torch.tensor(windows), torch.tensor([row * (most // len(row)) for row in rows])


def max_windows(text_encoder: CLIPTextModel) -> int:
    """Return `max_windows` of the configuration. The default, 1, cuts captions as CLIP does."""
    return getattr(text_encoder.config, "max_windows", 1)


def embed(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, captions: Sequence[str]) -> torch.Tensor:
    """Return text embeddings (B, K L, D): L is the text encoder's length, K the windows of the longest caption."""
    length = text_encoder.config.max_position_embeddings
    windows, rows = token_windows(tokenizer, captions, length, max_windows(text_encoder))
    states = text_encoder(windows.to(text_encoder.device)).last_hidden_state
    return states[rows.to(states.device)].flatten(1, 2)
