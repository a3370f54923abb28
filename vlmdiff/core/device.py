"""Where the networks run, with which other processes, and in which precision."""

from datetime import timedelta

import torch
from accelerate import PartialState


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


def resolve_precision(precision: str, device: torch.device) -> str:
    """Return "fp32", "bf16" or "fp16": what "auto" means on the device, and any other precision as it is."""
    if precision != "auto":
        return precision
    return "bf16" if fast_bf16(device) else "fp32"
