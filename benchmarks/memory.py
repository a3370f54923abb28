"""Compute the memory of a training step at the paper's scale: weights, moments, average, gradients, activations.

Nothing is measured and no GPU is needed: tensors have shapes and lifetimes but no values (`vlmdiff/training/cost.py`).
"""

from types import SimpleNamespace

from diffusers import UNet2DConditionModel
from rich.console import Console
from rich.table import Table
from torch._subclasses import FakeTensorMode

from vlmdiff.core.params import Train
from vlmdiff.model.sgn import SemanticGuidedNetwork
from vlmdiff.training.cost import GIB, Count, count, denoiser_step
from vlmdiff.training.diffusion import choose_trainable

CARD = 24


def step_memory(params: Train, rows: int) -> Count:
    """Return the memory of a training step of the denoiser, at the size of Stable Diffusion 1.5.

    rows: images of 256 pixels per forward pass.
    """
    with FakeTensorMode():
        networks = SimpleNamespace(unet=UNet2DConditionModel(cross_attention_dim=768), sgn=SemanticGuidedNetwork())
        denoiser = choose_trainable(networks, params).train()
        if params.gradient_checkpointing:
            networks.unet.enable_gradient_checkpointing()
            networks.sgn.enable_gradient_checkpointing()
        step = denoiser_step(denoiser, params, rows, latents=(4, 32, 32), text=(77, 768), size=256)
        return count(denoiser, step, params.accumulate)


def main() -> None:
    table = Table(
        "precision",
        "checkpointing",
        "parts",
        title="GiB per training step, computed for 4 images of 256 pixels at once",
        caption=(
            "step: peak of gradients and activations. The total does not include the GPU's context and workspaces, "
            "about 1 GiB."
        ),
    )
    for title in ("weights", "moments", "average", "step", "total", f"fits {CARD} GiB"):
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
        needed = step_memory(params, 4)
        sizes = (needed.weights, needed.moments, needed.average, needed.step, needed.total)
        table.add_row(
            precision,
            "yes" if checkpointing else "no",
            str(parts),
            *(f"{size / GIB:.2f}" for size in sizes),
            "yes" if needed.total + GIB < CARD * GIB else "no",
        )
    console = Console()
    console.print(table)
    console.print(f"{needed.trained / 1e6:.1f} million trained parameters, {needed.frozen / 1e6:.1f} million frozen")


if __name__ == "__main__":
    main()
