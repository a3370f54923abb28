"""Compare our attention in bfloat16 with PyTorch's: a backbone's time for an image, and its features with float32's.

Run it anywhere. Where models/backbone is a transformer, it takes that, otherwise a ViT-S/14 of random weights:

    python benchmarks/attention.py [--size PIXELS ...] [--pairs N]

One thread, CPU time, images of random blocks. Both run on each image, each first in every second pair. The similarity
is the cosine similarity to the features in float32: the lowest of 99 % of the tokens, and of all.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from transformers import Dinov2Config, Dinov2Model

from vlmdiff.core.device import fast_bf16
from vlmdiff.core.params import VisionBackbone
from vlmdiff.model import attention
from vlmdiff.model.backbone import Backbone

FOLDER, LAYERS = Path("models/backbone"), (5, 7)
OURS, THEIRS = attention.NAME, "sdpa"


def image(size: int, seed: int) -> torch.Tensor:
    """Return an image (1, 3, S, S) of random colours in blocks."""
    blocks = torch.rand(1, 3, size // 28, size // 28, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(blocks, size=size, mode="bicubic").clamp(0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", type=int, nargs="+", default=[448, 560], help="pixels of the images")
    parser.add_argument("--pairs", type=int, default=10, help="how often both run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not fast_bf16(torch.device("cpu")):
        print("skipped: this processor has no instructions for bfloat16")
        return
    table = Table("pixels", "PyTorch's", "ours", "ratio", "similarity, PyTorch's", "ours", title="Seconds for an image")
    with tempfile.TemporaryDirectory() as folder:
        source = FOLDER
        if not FOLDER.is_dir():
            source = Path(folder)
            torch.manual_seed(0)
            shape = Dinov2Config(hidden_size=384, num_attention_heads=6, num_hidden_layers=12, patch_size=14)
            Dinov2Model(shape).save_pretrained(source)
        for size in options.size:
            backbone = Backbone.load(VisionBackbone(model=str(source), layers=LAYERS, image_size=size))
            if backbone.network.config._attn_implementation != OURS:
                print(f"skipped: {source} is not a transformer whose attention can be chosen")
                return
            times: dict[str, list[float]] = {THEIRS: [], OURS: []}
            alike: dict[str, list[list[float]]] = {THEIRS: [], OURS: []}
            with torch.no_grad():
                for pair in range(options.pairs + 1):
                    x = image(size, pair)
                    exact = backbone(x)
                    for name in (THEIRS, OURS)[:: 1 if pair % 2 else -1]:
                        backbone.network.set_attn_implementation(name)
                        began = time.process_time()
                        with torch.autocast("cpu", torch.bfloat16):
                            found = backbone(x)
                        times[name].append(time.process_time() - began)
                        cosines = [F.cosine_similarity(a, b, dim=1) for a, b in zip(found, exact, strict=True)]
                        tokens = torch.stack(cosines).flatten()
                        alike[name].append([float(tokens.quantile(0.01)), float(tokens.min())])
            # The first pair warms up.
            ours, theirs = np.array(times[OURS][1:]), np.array(times[THEIRS][1:])
            ratios = ours / theirs
            seconds = [f"{np.median(values):.3f}" for values in (theirs, ours)]
            ratio = f"{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})"
            lowest = ["{:.5f}, {:.5f}".format(*np.min(alike[name], axis=0)) for name in (THEIRS, OURS)]
            table.add_row(str(size), *seconds, ratio, *lowest)
    Console().print(table)


if __name__ == "__main__":
    main()
