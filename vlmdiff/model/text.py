"""From captions to what the denoiser attends to.

A caption is read whole: in windows of as many tokens as the text encoder has positions (77 of CLIP's, 75 of them the
caption's), each encoded by itself, their embeddings one after another. The number of windows is filled up to a power of
two with the empty caption's, and what is shorter than the longest of a batch is repeated: attention over keys that are
all repeated equally often is the same attention, so beside longer captions a caption means what it means alone.
"""

from collections.abc import Sequence

import torch
from transformers import CLIPTextModel, CLIPTokenizer

from vlmdiff.core.console import say


def token_windows(
    tokenizer: CLIPTokenizer, captions: Sequence[str], length: int, max_windows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (W, length) of all windows, and for each caption the rows (B, K) that it is made of, in order.

    K is the largest number of windows of a caption, a power of two. Where captions need more than `max_windows`, the
    rest of them is left out and a warning says of how many.
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
            f"warning: {cut} of {len(captions)} captions are longer than {max_windows} x {room} tokens, and only that "
            "much of them is read (encode.max_windows)"
        )
    most = max(map(len, rows))
    return torch.tensor(windows), torch.tensor([row * (most // len(row)) for row in rows])


def max_windows(text_encoder: CLIPTextModel) -> int:
    """What its configuration says, one where it does not: CLIP's own cut."""
    return getattr(text_encoder.config, "max_windows", 1)


def embed(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, captions: Sequence[str]) -> torch.Tensor:
    """Text embeddings (B, K L, D) of captions, L the text encoder's positions, K the windows of the longest."""
    length = text_encoder.config.max_position_embeddings
    windows, rows = token_windows(tokenizer, captions, length, max_windows(text_encoder))
    states = text_encoder(windows.to(text_encoder.device)).last_hidden_state
    return states[rows.to(states.device)].flatten(1, 2)
