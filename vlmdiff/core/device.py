"""Where the networks run, with which other processes, and in which precision."""

from datetime import timedelta

import torch
from accelerate import PartialState

from vlmdiff.core.params import Training

# Channels. On a CPU with avx512_bf16, a UNet's step in bf16 takes 0.8 to 1.4 times as long as in fp32 if its widest
# layer has fewer, else 0.6 to 1.0 times.
WIDE = 128


def pick_device(name: str = "auto") -> torch.device:
    """Return the device of that name; "auto" is the GPU if there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def process_group() -> PartialState:
    """Return the processes that train together: those of `accelerate launch` or `torchrun`, or this one alone.

    Each has its own `device`. They share the workspace's folder. Only the main process writes what they share.
    """
    # The others wait while the main process reads a whole dataset or writes a checkpoint.
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=12))


def fast_bf16(device: torch.device) -> bool:
    """Return whether the device has instructions for bfloat16. Without them bf16 is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # PyTorch before 2.13 does not say: then fp32, which is always right.
    has = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def resolve_precision(params: Training, device: torch.device) -> str:
    """Return "fp32", "bf16" or "fp16": the precision of a training, with "auto" resolved for its device and width."""
    if params.precision != "auto":
        return params.precision
    wide = device.type != "cpu" or params.width is None or params.width >= WIDE
    return "bf16" if wide and fast_bf16(device) else "fp32"
