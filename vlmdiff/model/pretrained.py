"""Load pretrained networks by name or path."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from vlmdiff.core.errors import InputError, machine_fault
from vlmdiff.core.params import Pretrained


def check_pinned(source: Pretrained) -> None:
    """Raise InputError if `source` is a name on the hub without a revision."""
    if source.revision is None and not Path(source.model).is_dir():
        raise InputError(f"{source.model} is not a local folder. For a model on the hub, set `revision` to a commit.")


def load(cls: type, source: Pretrained, subfolder: str = "", **options: Any) -> Any:
    """Load a tokenizer, scheduler or processor of diffusers or transformers from `source`.

    Raises InputError if a name on the hub has no revision, if loading fails, or if a tokenizer has no vocabulary.
    """
    check_pinned(source)
    where = _place(source, subfolder)
    try:
        loaded = cls.from_pretrained(
            source.model,
            revision=source.revision,
            subfolder=subfolder,
            local_files_only=Path(source.model).is_dir(),
            **options,
        )
    # A damaged folder makes the libraries raise anything.
    except Exception as error:
        if machine_fault(error):
            raise
        raise InputError(f"cannot load {where} as {cls.__name__} ({error}).") from error
    # Without its files, transformers makes a tokenizer of special tokens alone.
    if isinstance(loaded, PreTrainedTokenizerBase) and len(loaded) <= len(loaded.all_special_ids):
        raise InputError(f"cannot load {where} as {cls.__name__}: it has no vocabulary.")
    return loaded


def network_class(cls: type, source: Pretrained, subfolder: str = "") -> str:
    """Return the name of the class that the network in `source` was saved as. cls: any network class of diffusers.

    Raises InputError as `load` does.
    """
    check_pinned(source)
    try:
        options = {"revision": source.revision, "subfolder": subfolder}
        config = cls.load_config(source.model, local_files_only=Path(source.model).is_dir(), **options)
        return str(config.get("_class_name", cls.__name__))
    except Exception as error:
        if machine_fault(error):
            raise
        words = (
            f"cannot read the configuration of {_place(source, subfolder)} ({error}). Check the name and `subfolder`."
        )
        raise InputError(words) from error


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


def _place(source: Pretrained, subfolder: str) -> str:
    return f"{subfolder} of {source.model}" if subfolder else source.model
