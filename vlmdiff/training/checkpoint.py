"""Training state on disk: numbered checkpoints of safetensors and JSON, and a pointer to the newest."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file

import vlmdiff
from vlmdiff.core.console import say
from vlmdiff.core.device import process_group, resolve_precision
from vlmdiff.core.errors import InputError
from vlmdiff.core.files import atomic_folder, seal, sha256, sync, verify, write_json
from vlmdiff.core.params import Training

STATE, FACTS = "state.safetensors", "facts.json"
# The file with the name of the newest checkpoint, written after it.
NEWEST = "newest.json"
DIGITS, KEPT = 9, 2


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


def save(folder: Path, step: int, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
    """Write the checkpoint of `step` into a new folder in `folder`, then the pointer to it. Keep the one before it.

    A kill, or a loss of power, at any moment leaves a whole checkpoint: the new one, or the one before.
    """
    present = _numbered(folder)
    name = f"{step:0{DIGITS}}"
    with atomic_folder(folder / name) as temporary:
        save_file(
            # To the CPU first: copies of weights and moments would not fit beside them on a GPU.
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            temporary / STATE,
        )
        # The lowest loss is infinite before the first validation.
        (temporary / FACTS).write_text(json.dumps(facts), encoding="utf-8")
        seal(temporary)
        sync(temporary)
    sync(folder)
    write_json(folder / NEWEST, {"checkpoint": name})
    sync(folder)
    for old in [each for each in present if each.name != name][KEPT - 1 :]:
        shutil.rmtree(old)


def load(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """Return the newest whole checkpoint in `folder`, on the CPU, or None if there is none.

    A damaged one is passed over with a warning that names it.
    """
    present = _numbered(folder)
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        named = json.loads((folder / NEWEST).read_text(encoding="utf-8"))["checkpoint"]
        # One above the pointer was whole before a kill: training it again gives the same.
        present.sort(key=lambda each: each.name == named, reverse=True)
    for each in present:
        try:
            if not verify(each, "Training goes on from the one before"):
                raise ValueError("it has no hashes")
            return load_file(each / STATE), json.loads((each / FACTS).read_text(encoding="utf-8"))
        except (InputError, OSError, ValueError, KeyError, TypeError) as error:
            say(f"warning: the checkpoint {each} is damaged and passed over: {error}")
    return None


def _numbered(folder: Path) -> list[Path]:
    """Return the folders of checkpoints, the newest first."""
    return sorted((each for each in folder.glob("[0-9]" * DIGITS) if each.is_dir()), reverse=True)


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
