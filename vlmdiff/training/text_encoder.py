"""A small CLIP text model of one's own: the tokenizer learns the captions, the model to tell their images apart."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from vlmdiff.console import say, track
from vlmdiff.model.text import tokenize
from vlmdiff.params import TextEncoder
from vlmdiff.training.loop import batch_indices, warmup_cosine

THUMBNAIL = 8


def train_tokenizer(captions: Sequence[str], params: TextEncoder) -> CLIPTokenizer:
    """CLIP's byte-level BPE with merges learned from `captions`; the empty caption is two tokens."""
    tokenizer = CLIPTokenizer().train_new_from_iterator([list(captions)], vocab_size=params.vocabulary)
    tokenizer.model_max_length = params.max_tokens
    return tokenizer


def train_text_encoder(
    tokenizer: CLIPTokenizer,
    captions: Sequence[str],
    thumbnails: torch.Tensor,
    params: TextEncoder,
    seed: int,
    device: torch.device,
) -> CLIPTextModel:
    """Fit a `CLIPTextModel` by CLIP's symmetric contrastive loss (Radford et al., 2021).

    captions: one an image; thumbnails: (N, 3, 8, 8) in [0, 1], the images that a linear image tower sees.
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
    tokens = tokenize(tokenizer, captions, params.max_tokens)
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
        text = F.normalize(model(tokens[chosen].to(device)).pooler_output, dim=1)
        image = F.normalize(image_tower(pixels[chosen].to(device)), dim=1)
        logits = log_scale.exp() * text @ image.T
        # Images that share a caption are each other's truth as well.
        same = (tokens[chosen][:, None] == tokens[chosen][None]).all(-1).float().to(device)
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
