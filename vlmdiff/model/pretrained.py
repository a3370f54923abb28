"""Load pretrained networks by name or path."""

from pathlib import Path
from typing import Any

from vlmdiff.core.errors import InputError
from vlmdiff.core.params import Pretrained


def check_pinned(source: Pretrained) -> None:
    """Raise InputError if `source` is a name on the hub without a revision."""
    if source.revision is None and not Path(source.model).is_dir():
        raise InputError(f"{source.model} is not a local folder. For a model on the hub, set `revision` to a commit.")


def load(cls: type, source: Pretrained, subfolder: str = "", **options: Any) -> Any:
    """Load a tokenizer, scheduler or processor of diffusers or transformers from `source`.

    Raises InputError if a name on the hub has no revision, or if loading fails.
    """
    check_pinned(source)
    try:
        return cls.from_pretrained(source.model, revision=source.revision, subfolder=subfolder, **options)
    except (OSError, ValueError) as error:
        where = f"{subfolder} of {source.model}" if subfolder else source.model
        raise InputError(f"cannot load {where} as {cls.__name__} ({error}).") from error


def load_network(cls: type, source: Pretrained, subfolder: str = "", optional: tuple[str, ...] = ()) -> Any:
    """Load a network from safetensors, in float32 and evaluation mode.

    Raises InputError as `load` does, and if weights are missing whose names do not start with one of `optional`.
    """
    network, info = load(cls, source, subfolder, use_safetensors=True, output_loading_info=True)
    if missing := sorted(key for key in info["missing_keys"] if not key.startswith(optional)):
        raise InputError(
            f"{source.model} lacks {len(missing)} tensors of a {type(network).__name__}: {missing[0]}, … "
            "Check that it is the right model."
        )
    return network.float().eval()
