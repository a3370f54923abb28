"""Networks that others trained, by name or path."""

from pathlib import Path
from typing import Any

from vlmdiff.core.errors import InputError
from vlmdiff.core.params import Pretrained


def check_pinned(source: Pretrained) -> None:
    """Raises InputError where `source` is no folder, hence a name on the hub, and has no revision."""
    if source.revision is None and not Path(source.model).is_dir():
        raise InputError(
            f"{source.model} is no folder here; for a model of the hub give its `revision`, a commit, beside `model`"
        )


def load(cls: type, source: Pretrained, subfolder: str = "", **options: Any) -> Any:
    """A tokenizer, scheduler or processor of diffusers or transformers from `source`.

    Raises InputError where a name on the hub has no revision, or where there is nothing of the kind.
    """
    check_pinned(source)
    try:
        return cls.from_pretrained(source.model, revision=source.revision, subfolder=subfolder, **options)
    except (OSError, ValueError) as error:
        where = f"{subfolder} of {source.model}" if subfolder else source.model
        raise InputError(f"cannot load {where} as {cls.__name__}: {error}") from error


def load_network(cls: type, source: Pretrained, subfolder: str = "", optional: tuple[str, ...] = ()) -> Any:
    """A network in float32, for evaluation, from safetensors.

    Raises InputError as `load` does, and where the file lacks weights, other than those whose names start as one of
    `optional`: they would be random without a word.
    """
    network, info = load(cls, source, subfolder, use_safetensors=True, output_loading_info=True)
    if missing := sorted(key for key in info["missing_keys"] if not key.startswith(optional)):
        raise InputError(
            f"{source.model} lacks {len(missing)} tensors of a {type(network).__name__}, the first {missing[0]}: "
            "is it the right model?"
        )
    return network.float().eval()
