"""Where the networks run."""

from datetime import timedelta

import torch
from accelerate import PartialState


def pick_device(name: str = "auto") -> torch.device:
    """The device of that name; "auto" is the GPU where there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def processes() -> PartialState:
    """The processes that train together, as `accelerate launch` or `torchrun` started them; else this one alone.

    Each has its own `device`. They share the workspace's folder, and what one writes is written by the main process.
    """
    # The others wait while the main process reads a whole dataset or writes a checkpoint.
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=12))
