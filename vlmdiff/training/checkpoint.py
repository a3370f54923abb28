"""Training state on disk: safetensors and JSON in a folder that is written as a whole."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file

import vlmdiff
from vlmdiff.core.device import process_group, resolve_precision
from vlmdiff.core.errors import InputError
from vlmdiff.core.files import atomic_folder, sha256
from vlmdiff.core.params import Training


def state_folder(root: Path, params: Training, *inputs: Path) -> Path:
    """Return the folder below `root` for the state of the training with these parameters, these inputs and this code.

    Raises InputError if an input does not exist.
    """
    here = process_group()
    # A training that resumes on another machine must not change its precision.
    params = params.model_copy(update={"precision": resolve_precision(params, here.device)})
    # Only the main process hashes: the inputs may be a whole dataset.
    found = [_digest(params, *inputs) if here.is_main_process else None]
    folder = root / f"{type(params).__name__.lower()}-{broadcast_object_list(found)[0][:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _digest(params: Training, *inputs: Path) -> str:
    digest = hashlib.sha256(f"{vlmdiff.__version__} {params.model_dump_json()}".encode())
    package = Path(vlmdiff.__file__).parent
    code = [file for room in ("data", "model", "training") for file in (package / room).glob("*.py")]
    for file in [*sorted(code), *(file for path in inputs for file in _files_under(path))]:
        digest.update(sha256(file).encode())
    return digest.hexdigest()


def _files_under(path: Path) -> Iterator[Path]:
    if not path.exists():
        raise InputError(f"{path} does not exist. Run the earlier stages first: `dvc repro` runs them in order")
    yield from sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


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
