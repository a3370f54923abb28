"""A small CLIP text model trained here: the tokenizer learns the captions, the model learns to match their images."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from vlmdiff.core.console import say, track
from vlmdiff.core.params import TextEncoder
from vlmdiff.training.loop import batch_indices, warmup_cosine

THUMBNAIL = 8
END_OF_WORD = "</w>"


def train_tokenizer(captions: Sequence[str], params: TextEncoder) -> CLIPTokenizer:
    """Return CLIP's byte-level BPE with merges learned from `captions`; the empty caption is two tokens.

    The most frequent pair is merged first; of equally frequent pairs, the first by its letters (Sennrich et al., 2016).
    The library's own trainer breaks such ties at random, so that each run has another vocabulary.
    """
    blank = CLIPTokenizer()
    split, normalize = blank.backend_tokenizer.pre_tokenizer, blank.backend_tokenizer.normalizer
    words = Counter(
        (*word[:-1], word[-1] + END_OF_WORD)
        for caption in captions
        for word, _ in split.pre_tokenize_str(normalize.normalize_str(caption))
    )
    symbols = [*sorted(ByteLevel.alphabet()), *sorted({word[-1] for word in words})]
    merges: list[tuple[str, str]] = []
    special = [blank.bos_token, blank.eos_token]
    while len(special) + len(symbols) < params.vocabulary:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        if "".join(best) not in symbols:
            symbols.append("".join(best))
        words = Counter({_merged(word, best): count for word, count in words.items()})
    vocabulary = {symbol: index for index, symbol in enumerate([*special, *symbols])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=params.max_tokens)  # pyrefly: ignore[bad-argument-type]


def _merged(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """Return the word with every occurrence of the pair as one symbol."""
    merged: list[str] = []
    i = 0
    while i < len(word):
        found = word[i : i + 2] == pair
        merged.append("".join(pair) if found else word[i])
        i += 2 if found else 1
    return tuple(merged)


def train_text_encoder(
    tokenizer: CLIPTokenizer,
    tokens: torch.Tensor,
    thumbnails: torch.Tensor,
    params: TextEncoder,
    seed: int,
    device: torch.device,
) -> CLIPTextModel:
    """Fit a `CLIPTextModel` by CLIP's symmetric contrastive loss (Radford et al., 2021).

    tokens: (N, K, L), the windows of each image's caption; a caption's embedding is the mean over its windows.
    thumbnails: (N, 3, 8, 8) in [0, 1], the images that a linear image tower reads.
    """
    torch.manual_seed(seed)
    model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=params.hidden_size,
            intermediate_size=4 * params.hidden_size,
            num_hidden_layers=params.layers,
            num_attention_heads=params.heads,
            max_position_embeddings=params.max_tokens,
            projection_dim=params.hidden_size,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).to(device)
    image_tower = nn.Linear(3 * THUMBNAIL**2, params.hidden_size).to(device)
    log_scale = nn.Parameter(torch.tensor(np.log(1 / 0.07), dtype=torch.float32, device=device))
    pixels = thumbnails.flatten(1)
    pixels = (pixels - pixels.mean(0)) / pixels.std()
    optimizer = torch.optim.AdamW(
        [*model.parameters(), *image_tower.parameters(), log_scale], lr=params.learning_rate, fused=True
    )
    losses = []
    batch_size = min(params.batch_size, len(tokens))
    for step in track(range(params.steps), "text encoder", total=params.steps):
        for group in optimizer.param_groups:
            group["lr"] = params.learning_rate * warmup_cosine(step, params.steps // 10, params.steps)
        chosen = torch.from_numpy(batch_indices(len(tokens), batch_size, step, seed))
        windows = tokens[chosen].to(device)
        text = model(windows.flatten(0, 1)).pooler_output.unflatten(0, windows.shape[:2]).mean(dim=1)
        text = F.normalize(text, dim=1)
        image = F.normalize(image_tower(pixels[chosen].to(device)), dim=1)
        logits = log_scale.exp() * text @ image.T
        # Images that share a caption are positives of each other as well.
        same = (windows[:, None] == windows).flatten(2).all(dim=2).float()
        loss = (
            F.cross_entropy(logits, same / same.sum(1, keepdim=True))
            + F.cross_entropy(logits.T, same / same.sum(1, keepdim=True))
        ) / 2
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    tenth = max(1, params.steps // 10)
    say(
        f"text encoder: contrastive loss {np.mean(losses[:tenth]):.3f} at first, {np.mean(losses[-tenth:]):.3f} at last"
    )
    return model.eval().requires_grad_(False)
