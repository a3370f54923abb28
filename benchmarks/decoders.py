"""Train two decoders of features, as in Dinomaly and INP-Former, on this workspace's images, and judge its test images.

Run it in a workspace where `dvc repro` has run with presets/photographs.yaml:

    python benchmarks/decoders.py [--steps N] [--size PIXELS] [--layers FIRST LAST]

Each baseline is one model for all classes. It learns from the training and the held-out images, and does not know the
class of a test image. The encoder is the workspace's backbone, a frozen transformer. Eight layers from a quarter to
five sixths of its depth are used: blocks 3 to 10 of twelve. A network with fewer blocks uses some of them twice. The
targets are the means of the first four and of the last four, and the input is the mean of all. A decoder of eight
blocks reconstructs the deep target in its first half and the shallow one in its second.

- Dinomaly-like (Guo et al., CVPR 2025, arXiv 2405.14325): dropout in the bottleneck, linear attention in the decoder.
  The best reconstructed places get a tenth of the gradient. Their share rises to 90 % over the first steps.
- INP-Former-like (Luo et al., CVPR 2025, arXiv 2503.02424): the decoder attends only to six prototypes, which an
  extractor draws from the image's own features. A place's gradient is multiplied by (distance / mean distance) ** 3.

The anomaly map is the mean of 1 - cosine similarity over both targets. A Gaussian of sigma 4 at 256 pixels smooths it,
as in benchmarks/photographs.py; the papers cut theirs to 5 x 5. The image's score is the mean of the map's highest 1 %.

The papers train ViT-B/14 with registers on 392 pixels, cropped from 448, for 10,000 steps (Dinomaly) or 200 epochs
(INP-Former) of 16 images, by StableAdamW. A CPU cannot do that in minutes: the defaults are 280 pixels (20 x 20 tokens)
and 400 steps, by AdamW. The learning rate rises over 100 steps, as in the papers. Dinomaly's share rises over 100 too;
in the paper over 1,000. With fewer than 400 steps, both rise over a quarter of them. The decoder does not see the class
token.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from dataset import Dataset

from vlmdiff.core.console import say, track
from vlmdiff.core.device import fast_bf16, pick_device
from vlmdiff.core.params import VisionBackbone
from vlmdiff.detection.anomaly_map import enlarge, image_scores, smooth
from vlmdiff.evaluation.metrics import evaluate_classes
from vlmdiff.model.backbone import Backbone
from vlmdiff.model.normalization import from_uint8
from vlmdiff.training.loop import batch_indices, warmup_cosine

STEPS, SIZE, BATCH, LAYERS, GROUPS, BLOCKS, PROTOTYPES = 400, 280, 16, 8, 2, 8, 6
# Steps. With a faster rise, the last blocks of INP-Former, which have no residual, give all places the same features.
RISE = 100


class Encoder:
    """Map images to the targets. `layers`: the first and the last hidden state; state k is the output of block k."""

    def __init__(self, params: VisionBackbone, size: int, layers: Sequence[int] | None, device: torch.device):
        # The depth is known once the network is loaded, with all blocks ("last").
        whole = Backbone.load(params.model_copy(update={"layers": ("last",), "image_size": size}), device)
        if not whole.tokens:
            raise SystemExit(f"{params.model} is not a transformer of tokens, which these baselines need.")
        depth, self.heads = whole.network.config.num_hidden_layers, whole.network.config.num_attention_heads
        first, last = layers or (depth / 4, depth * 5 / 6)
        chosen = tuple(int(layer) for layer in np.linspace(first, last, LAYERS).round())
        wanted = params.model_copy(update={"layers": chosen, "image_size": size})
        self.backbone = Backbone(whole.network, wanted, whole.normalization.image_mean, whole.normalization.image_std)
        self.device, self.layers = device, chosen

    @torch.no_grad()
    def __call__(self, images: np.ndarray, title: str) -> torch.Tensor:
        """Return the targets, float16 (N, 2, places, C), of images, uint8 (N, S, S, 3)."""
        kept = []
        for i in track(range(0, len(images), BATCH), title, -(-len(images) // BATCH)):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=fast_bf16(self.device)):
                maps = self.backbone(from_uint8(images[i : i + BATCH], self.device))
            groups = torch.stack([one.float() for one in maps], dim=1).unflatten(1, (GROUPS, -1)).mean(dim=2)
            kept.append(groups.flatten(3).transpose(2, 3).half().cpu())
        return torch.cat(kept)


def linear(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Attend with the similarity of elu + 1 (Katharopoulos et al., ICML 2020), which spreads over many places."""
    queries, keys = F.elu(queries) + 1, F.elu(keys) + 1
    return queries @ (keys.transpose(2, 3) @ values) / (queries @ keys.sum(dim=2)[..., None])


def rectified(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Attend with the positive part of the cosine similarity. The values take up its learned scale."""
    return F.relu(F.normalize(queries, dim=-1) @ F.normalize(keys, dim=-1).transpose(2, 3)) @ values


class Block(nn.Module):
    """A transformer block. residual: attention's result is added to its input, otherwise it replaces it.

    `mix` returns (B, heads, N, D) from queries (B, heads, N, D), keys and values (B, heads, M, D).
    """

    def __init__(self, width: int, heads: int, mix: Callable[..., torch.Tensor], residual: bool = True):
        super().__init__()
        self.heads, self.mix, self.residual = heads, mix, residual
        self.before, self.between, self.mlp = nn.LayerNorm(width), nn.LayerNorm(width), mlp(width)
        self.queries, self.both, self.out = (nn.Linear(width, n * width) for n in (1, 2, 1))

    def forward(self, x: torch.Tensor, others: torch.Tensor | None = None) -> torch.Tensor:
        """Return x (B, N, C) after attention to `others` (B, M, C), by default to itself."""
        normed = self.before(x)
        parts = self.queries(normed), *self.both(normed if others is None else self.before(others)).chunk(2, dim=-1)
        mixed = self.mix(*(part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts))
        # Sums stay in float32.
        attended = self.out(mixed.transpose(1, 2).flatten(2)).float()
        x = x + attended if self.residual else attended
        return x + self.mlp(self.between(x))


def mlp(width: int, dropout: float = 0.0) -> nn.Sequential:
    """Return two linear layers, with dropout before, between and after them."""
    drop = nn.Dropout(dropout)
    return nn.Sequential(drop, nn.Linear(width, 4 * width), nn.GELU(), drop, nn.Linear(4 * width, width), drop)


class Decoder(nn.Module):
    """What both baselines share. Targets are float32 (B, 2, places, C)."""

    def __init__(self, bottleneck: nn.Module, blocks: Sequence[Block]):
        super().__init__()
        self.bottleneck, self.blocks = bottleneck, nn.ModuleList(blocks)

    def others(self, features: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | float]:
        """Return what the blocks attend to (None: their own input), and a term of the loss."""
        return None, 0.0

    def weights(self, distances: torch.Tensor, risen: float) -> torch.Tensor:
        """Return the weights of the places' gradients (B, 2, places) for their distances (B, 2, places)."""
        raise NotImplementedError

    def forward(self, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | float]:
        """Return the targets' reconstruction, and a term of the loss."""
        with torch.autocast(targets.device.type, torch.bfloat16, enabled=fast_bf16(targets.device)):
            features = targets.mean(dim=1)
            others, term = self.others(features)
            x, states = self.bottleneck(features).float(), []
            for block in self.blocks:
                x = block(x, others)
                states.append(x)
        # Backwards: the last blocks reconstruct the first layers.
        return torch.stack(states[::-1], dim=1).unflatten(1, (GROUPS, -1)).mean(dim=2), term

    def loss(self, targets: torch.Tensor, risen: float) -> torch.Tensor:
        """Return the cosine distance of whole maps, with weighted gradients. `risen` goes from 0 to 1 in RISE steps."""
        found, term = self(targets)
        weights = self.weights(distance(found.detach(), targets), risen)[..., None]
        # Keeps the value, and multiplies the gradient by the weight.
        found = torch.lerp(found.detach(), found, weights)
        return distance(found.flatten(2), targets.flatten(2)).mean() + term


class Dinomaly(Decoder):
    title, rate = "Dinomaly-like", 2e-3

    def __init__(self, width: int, heads: int):
        super().__init__(mlp(width, 0.2), [Block(width, heads, linear) for _ in range(BLOCKS)])

    def weights(self, distances: torch.Tensor, risen: float) -> torch.Tensor:
        limits = distances.transpose(0, 1).flatten(1).quantile(0.9 * risen, dim=1)
        return torch.where(distances < limits[:, None], 0.1, 1.0)


class INPFormer(Decoder):
    title, rate = "INP-Former-like", 1e-3

    def __init__(self, width: int, heads: int):
        super().__init__(mlp(width), [Block(width, heads, rectified, residual=False) for _ in range(BLOCKS)])
        self.tokens = nn.Parameter(torch.randn(PROTOTYPES, width))
        self.extractor = Block(width, heads, F.scaled_dot_product_attention)

    def others(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        prototypes = self.extractor(self.tokens.expand(len(features), -1, -1), features)
        # Coherence: each place is close to one of the prototypes.
        return prototypes, 0.2 * distance(features[:, :, None], prototypes[:, None]).amin(dim=2).mean()

    def weights(self, distances: torch.Tensor, risen: float) -> torch.Tensor:
        return (distances / distances.mean(dim=(0, 2), keepdim=True)) ** 3


def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return 1 - F.cosine_similarity(a, b, dim=-1)


def train(
    kind: type[Dinomaly] | type[INPFormer], targets: torch.Tensor, heads: int, steps: int, device: torch.device
) -> Decoder:
    """Return a decoder trained on targets, float16 (N, 2, places, C)."""
    torch.manual_seed(0)
    model = kind(targets.shape[-1], heads)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.01, a=-0.03, b=0.03)
            nn.init.zeros_(module.bias)
    model.to(device).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), kind.rate, betas=(0.9, 0.999), eps=1e-10, weight_decay=1e-4, amsgrad=True, fused=True
    )
    rising, losses, began = max(1, min(RISE, steps // 4)), [], time.monotonic()
    for step in track(range(steps), kind.title, steps):
        share = warmup_cosine(step, rising, steps)
        # The cosine ends at a tenth of the rate.
        optimizer.param_groups[0]["lr"] = kind.rate * (share if step < rising else 0.1 + 0.9 * share)
        batch = targets[batch_indices(len(targets), BATCH, step, 0)].to(device).float()
        optimizer.zero_grad()
        loss = model.loss(batch, min(step / rising, 1))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 50 == 0 or step + 1 == steps:
            pace = (time.monotonic() - began) / (step + 1)
            say(f"{kind.title}: step {step + 1}/{steps}, loss {np.mean(losses):.4f}, {pace:.2f} s a step")
            losses = []
    return model.eval()


@torch.no_grad()
def anomaly_maps(model: Decoder, targets: torch.Tensor, size: int, device: torch.device) -> np.ndarray:
    """Return anomaly maps, float32 (N, size, size), of images with these targets, float16 (N, 2, places, C)."""
    maps = []
    for batch in targets.split(BATCH):
        x = batch.to(device).float()
        distances = distance(model(x)[0], x).mean(dim=1)
        side = round(distances.shape[1] ** 0.5)
        maps.append(enlarge(distances.unflatten(1, (side, side)), size).cpu().numpy())
    return smooth(np.concatenate(maps), 4 * size / 256)


def judge(
    normal: np.ndarray,
    test: np.ndarray,
    params: VisionBackbone,
    size: int = SIZE,
    steps: int = STEPS,
    layers: Sequence[int] | None = None,
) -> dict[str, tuple[np.ndarray, float]]:
    """Train both decoders on normal images. Return their maps (N, S, S) of test images, and the minutes of training.

    All images are uint8 (N, S, S, 3). `params` name the backbone; `size` and `layers` (first, last) replace its own.
    """
    device, began = pick_device(), time.monotonic()
    encoder = Encoder(params, size, layers, device)
    targets, tested = encoder(normal, "normal images"), encoder(test, "test images")
    images, minutes = len(targets) + len(tested), (time.monotonic() - began) / 60
    say(f"{images} images encoded in {minutes:.1f} minutes, layers {', '.join(map(str, encoder.layers))}")
    results = {}
    for kind in (Dinomaly, INPFormer):
        began = time.monotonic()
        model = train(kind, targets, encoder.heads, steps, device)
        minutes = (time.monotonic() - began) / 60
        results[kind.title] = anomaly_maps(model, tested, test.shape[1], device), minutes
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps of each decoder")
    parser.add_argument("--size", type=int, default=SIZE, help="pixels of the encoder's images")
    parser.add_argument("--layers", type=int, nargs=2, metavar=("FIRST", "LAST"), help="the outermost hidden states")
    options = parser.parse_args()
    if options.steps < 1:
        parser.error("--steps must be at least 1")
    dataset = Dataset()
    params, classes, test = dataset.params, dataset.classes, dataset.images(dataset.test)
    backbone = params.first_stage.backbone
    found = judge(dataset.images(dataset.normal), test, backbone, options.size, options.steps, options.layers)

    names = sorted(set(classes))
    table = Table("", *names, "mean", "minutes", title=f"AU-PRO and image AUROC, {len(test)} test images")
    for title, (maps, minutes) in found.items():
        scores = image_scores(maps, "top_percent").tolist()
        result = evaluate_classes(
            classes, list(maps), dataset.masks, scores, params.evaluate.max_fpr, None, dataset.truths
        )
        rows = [*(result.classes[name] for name in names), result.mean]
        cells = (f"{values['au_pro']:.3f}\n{values['image_auroc']:.3f}" for values in rows)
        table.add_row(title, *cells, f"{minutes:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
