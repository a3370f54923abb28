"""Training state on disk: safetensors and JSON in a folder that is written as a whole."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from vlmdiff.core.files import atomic_folder


def save(folder: Path, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
    """Replace the checkpoint in `folder`; a crash leaves the old one or the new one."""
    with atomic_folder(folder) as temporary:
        save_file(
            # To the CPU first: copies of weights and moments would not fit beside them on a GPU.
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            temporary / "state.safetensors",
        )
        (temporary / "facts.json").write_text(json.dumps(facts))


def load(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """Return the checkpoint in `folder`, on the CPU, or None if there is none."""
    if not folder.is_dir():
        return None
    return load_file(folder / "state.safetensors"), json.loads((folder / "facts.json").read_text())


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return the optimizer's state as named tensors, `<parameter index>.<entry>`."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{entry}": value for index, entries in state.items() for entry, value in entries.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Load into an optimizer the state that `optimizer_tensors` returned."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        index, entry = name.split(".")
        parameter = parameters[int(index)]
        # The fused AdamW needs moments with the strides of their weights (channels last), and a file has no strides.
        same = value.shape == parameter.shape
        state.setdefault(int(index), {})[entry] = torch.empty_like(parameter).copy_(value) if same else value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
