"""What a training step at the paper's scale needs of memory: weights, moments, average, gradients, activations.

It is counted, not measured, and needs no GPU: tensors have shapes and lifetimes but no values, so that this is what
PyTorch would allocate, without its allocator's rounding, the libraries' workspaces and the GPU's context (about 1 GiB).
"""

import weakref
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from rich.console import Console
from rich.table import Table
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlmdiff.model.sgn import SemanticGuidedNetwork
from vlmdiff.params import Train
from vlmdiff.training.diffusion import choose_trainable

GIB = 2**30
CARD = 24


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


class Networks:
    """UNet and SGN of Stable Diffusion 1.5's size."""

    def __init__(self):
        self.unet = UNet2DConditionModel(cross_attention_dim=768)
        self.sgn = SemanticGuidedNetwork()


def step_memory(params: Train, rows: int) -> Count:
    """Memory of a step of the denoiser's training of which `rows` images of 256 pixels are computed at once."""
    with FakeTensorMode():
        networks = Networks()
        denoiser = choose_trainable(networks, params).train()
        if params.gradient_checkpointing:
            networks.unet.enable_gradient_checkpointing()
            networks.sgn.enable_gradient_checkpointing()
        weights = list(denoiser.parameters())
        latents, levels = torch.empty(rows, 4, 32, 32), torch.empty(rows, dtype=torch.long)
        text, hint = torch.empty(rows, 77, 768), torch.empty(rows, 3, 256, 256)
        precision = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[params.precision]

        def backward() -> None:
            with torch.autocast("cpu", precision, enabled=params.precision != "fp32", cache_enabled=False):
                down, middle = networks.sgn(latents, levels, text, hint)
                output = networks.unet(
                    latents,
                    levels,
                    encoder_hidden_states=text,
                    down_block_additional_residuals=down,
                    mid_block_additional_residual=middle,
                ).sample
                loss = F.mse_loss(output.float(), latents)
            loss.backward()

        with Peak(weights) as peak:
            # Where a batch has parts, the later ones start with the gradients of those before.
            for _ in range(min(params.accumulate, 2)):
                backward()
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


def main() -> None:
    table = Table(
        "precision",
        "checkpointing",
        "parts",
        title="GiB of a training step, 4 images of 256 pixels at once, counted, not measured",
        caption=(
            "step: gradients and activations at their worst moment. Not counted: the GPU's context and workspaces, "
            "about 1 GiB, which has to fit beside the total."
        ),
    )
    for title in ("weights", "moments", "average", "step", "total", f"{CARD} GiB enough?"):
        table.add_column(title, justify="right")
    for precision, checkpointing, parts in (
        ("fp32", False, 12),
        ("bf16", False, 1),
        ("bf16", False, 12),
        ("bf16", True, 12),
    ):
        params = Train(
            pretrained={"model": "stable-diffusion-v1-5"},
            trainable="paper",
            hint_channels=(16, 32, 96, 256),
            precision=precision,
            gradient_checkpointing=checkpointing,
            batch_size=4 * parts,
            accumulate=parts,
        )
        count = step_memory(params, 4)
        sizes = (count.weights, count.moments, count.average, count.step, count.total)
        table.add_row(
            precision,
            "yes" if checkpointing else "no",
            str(parts),
            *(f"{size / GIB:.2f}" for size in sizes),
            "yes" if count.total + GIB < CARD * GIB else "no",
        )
    console = Console()
    console.print(table)
    console.print(f"{count.trained / 1e6:.1f} million parameters are trained, {count.frozen / 1e6:.1f} are frozen.")


if __name__ == "__main__":
    main()
