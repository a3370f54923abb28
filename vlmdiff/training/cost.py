"""What a training step costs: memory, counted on tensors without values; seconds, measured on real ones.

A count is what PyTorch would allocate, without its allocator's rounding, the libraries' workspaces and the GPU's
context (about 1 GiB).
"""

import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlmdiff.core.params import FirstStage, Train, Training
from vlmdiff.model.feature_space import FeatureSpace
from vlmdiff.training.adversarial import Features, PatchDiscriminator, adversarial_loss, perceptual_distance

GIB = 2**30
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Forward and backward of one part of a batch.
Step = Callable[[], None]


class Peak(TorchDispatchMode):
    """The most bytes that were alive at once among tensors made since it was entered; `known` were there before."""

    def __init__(self, known: list[torch.Tensor]):
        super().__init__()
        self.alive = self.peak = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.known:
            return
        size = storage.nbytes()
        self.known.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.alive -= size


@dataclass(frozen=True)
class Count:
    """Bytes; `step` is the most that a step adds to what stays between steps, its gradients among it."""

    trained: int
    frozen: int
    weights: int
    moments: int
    average: int
    step: int

    @property
    def total(self) -> int:
        return self.weights + self.moments + self.average + self.step


def count(networks: nn.Module, step: Step, parts: int) -> Count:
    """Memory of a training step; call it, and make the networks and the step, in a FakeTensorMode."""
    weights = list(networks.parameters())
    with Peak(weights) as peak:
        # Where a batch has parts, the later ones start with the gradients of those before.
        for _ in range(min(parts, 2)):
            step()
    trained = sum(weight.numel() for weight in weights if weight.requires_grad)
    everything = sum(weight.numel() for weight in weights)
    return Count(
        trained=trained,
        frozen=everything - trained,
        weights=4 * everything,
        moments=8 * trained,
        average=4 * trained,
        step=peak.peak,
    )


def measure(step_of: Callable[[int], Step], rows: int, parts: int) -> float:
    """Seconds of a training step of `parts` parts of `rows` images each; `step_of` makes the step of a part.

    Where a part takes more than some seconds, one image is measured, and the part taken for as many.
    """
    alone = _seconds(step_of(1))
    return parts * (rows * alone if rows * alone > 5 else _seconds(step_of(rows)))


def _seconds(step: Step) -> float:
    """The faster of two calls: the first also pays for what is set up once."""
    taken = []
    for _ in range(2):
        began = time.monotonic()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.monotonic() - began)
    return min(taken)


def denoiser_step(
    networks: nn.ModuleDict, params: Train, rows: int, latents: tuple[int, int, int], text: tuple[int, int], size: int
) -> Step:
    """A step of the denoiser's training, on `networks` (`unet` and, where there is one, `sgn`).

    latents: (C, h, w) of an image's; text: (L, D) of a caption's embeddings; size: pixels of the hint.
    """
    unet = networks["unet"]
    device = next(unet.parameters()).device
    noisy = torch.rand(rows, *latents, device=device)
    embeds, hint = torch.rand(rows, *text, device=device), torch.rand(rows, 3, size, size, device=device)
    levels = torch.full((rows,), params.noise_levels[1], device=device)

    def step() -> None:
        with _autocast(params, device):
            down, middle = networks["sgn"](noisy, levels, embeds, hint) if params.sgn else (None, None)
            output = unet(
                noisy,
                levels,
                encoder_hidden_states=embeds,
                down_block_additional_residuals=down,
                mid_block_additional_residual=middle,
            ).sample
            loss = F.mse_loss(output.float()[:, : noisy.shape[1]], noisy)
        loss.backward()

    return step


def first_stage_step(networks: nn.ModuleDict, params: FirstStage, rows: int, features: Features | None = None) -> Step:
    """A step of the first stage's training, on `networks` (`vae` and, where there is one, `discriminator`)."""
    vae = networks["vae"]
    device = next(vae.parameters()).device
    x = torch.rand(rows, 3, params.image_size, params.image_size, device=device)
    codes = torch.rand(rows, params.latent_channels, params.backbone.grid, params.backbone.grid, device=device)

    def step() -> None:
        with _autocast(params, device):
            if isinstance(vae, FeatureSpace):
                # Of its training the decoder's part: the backbone's is without gradients, and little beside it.
                posterior = None
                y = vae.decode(codes).sample.float()
            else:
                posterior = vae.encode(x).latent_dist
                y = vae.decode(posterior.mean + posterior.std).sample.float()
            loss = F.l1_loss(y, x) + F.mse_loss(y, x)
            if features is not None:
                loss = loss + perceptual_distance(features, y, x)
            total = loss if posterior is None else loss + posterior.kl().mean()
            if params.discriminator:
                judge: PatchDiscriminator = networks["discriminator"]
                last = vae.decoder.conv_out.weight
                total = total + adversarial_loss(
                    judge, params.discriminator, x, y, loss, last, lambda gradient: gradient
                )
        total.backward()

    return step


def _autocast(params: Training, device: torch.device) -> torch.autocast:
    """As training computes; it keeps no weight's cast, since each is used once in a pass."""
    return torch.autocast(
        device.type, DTYPES[params.precision], enabled=params.precision != "fp32", cache_enabled=False
    )
