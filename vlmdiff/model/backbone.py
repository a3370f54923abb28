"""`Backbone`: turns the hidden states of a frozen vision model of `transformers` into feature maps."""

import contextlib
import inspect
import json
import math
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, cached_file, logging

from vlmdiff.core.errors import InputError, machine_fault
from vlmdiff.core.params import VisionBackbone
from vlmdiff.model import attention
from vlmdiff.model.normalization import Normalization
from vlmdiff.model.pretrained import check_pinned

# Scales inputs to [-1, 1], as TensorFlow checkpoints and most checkpoints without a processor file expect.
DEFAULT_MEAN = DEFAULT_STD = (0.5, 0.5, 0.5)


class States(Protocol):
    """What a model of `transformers` returns."""

    last_hidden_state: torch.Tensor
    hidden_states: Sequence[torch.Tensor]


def concatenate(maps: Sequence[torch.Tensor], size: int | tuple[int, int]) -> torch.Tensor:
    """Resize maps (B, C_i, h_i, w_i) to one grid, bilinear with antialiasing, and return (B, sum of C_i, h, w)."""
    size = (size, size) if isinstance(size, int) else size
    return torch.cat([_resize(x, size) for x in maps], dim=1)


class Backbone:
    """Map images (B, 3, H, W) in [0, 1] to one float32 map (B, C, h, w) per layer, in the order of `params.layers`.

    `channels` lists C of each layer; `tokens` is whether the model is a transformer of tokens. The weights are frozen.
    The number of layers and the positions of the patch tokens are measured on test images, not inferred from the
    model's name.
    """

    def __init__(self, model: PreTrainedModel, params: VisionBackbone, mean: Sequence[float], std: Sequence[float]):
        """Raise InputError if the model lacks one of the layers or rejects images of `params.image_size`."""
        self.name = params.model
        self.size = (params.image_size, params.image_size)
        self.network = model.eval().requires_grad_(False)
        self.normalization = Normalization(tuple(mean), tuple(std))
        # Some models interpolate their positions only on request; the others always do or have none.
        told = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
        self._options = {"interpolate_pos_encoding": True} if told else {}

        output, patches = self._probe()
        count = len(output.hidden_states)
        if bad := [layer for layer in params.layers if layer != "last" and not -count <= layer < count]:
            raise InputError(
                f"{self.name} has layers 0 to {count - 1}, -{count} to -1 and last, not {bad}. Fix `layers`."
            )
        self.layers = tuple(layer if layer == "last" else layer % count for layer in params.layers)
        self._grid, self._first = patches
        maps = self._maps(output)
        self.channels = [x.shape[1] for x in maps]
        self.tokens = _states(output)[0].ndim == 3
        if not self.tokens:
            model.to(memory_format=torch.channels_last)
            return
        if model.config._attn_implementation == "sdpa":
            with _quiet():
                model.set_attn_implementation(attention.NAME)
        if "last" not in self.layers:
            _drop_blocks(model, count - 1, max(layer for layer in self.layers if isinstance(layer, int)))

    @classmethod
    def load(cls, params: VisionBackbone, device: torch.device | str = "cpu") -> "Backbone":
        """Load the checkpoint that `params` name onto `device`, in float32.

        Raises InputError if there is no such checkpoint, it is not a vision model, or it lacks weights.
        """
        check_pinned(params)
        try:
            model = _load(params, torch.float32)
            mean, std = _normalization(params)
        except InputError:
            raise
        # A damaged folder makes transformers raise anything.
        except Exception as error:
            if machine_fault(error):
                raise
            raise InputError(f"{params.model}: cannot load the vision model ({error}).") from error
        return cls(model.to(device), params, mean, std)

    @staticmethod
    def save(params: VisionBackbone, folder: Path) -> dict[str, object]:
        """Write the checkpoint that `params` name into `folder`. Return the other `params` that change with it."""
        _load(params, "auto").save_pretrained(folder)
        mean, std = _normalization(params)
        return {"revision": None, "image_mean": tuple(mean), "image_std": tuple(std)}

    def __call__(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Return the feature maps of images of any size, resized to `image_size`, bilinear with antialiasing.

        Gradients flow to the images.
        """
        # Activations of two images fit into a CPU's caches, those of a batch do not: halves MobileNetV2's time.
        device = self.network.device
        at_once = 2 if device.type == "cpu" else max(len(images), 1)
        parts = [self._maps(self._run(_resize(x.to(device, torch.float32), self.size))) for x in images.split(at_once)]
        return [torch.cat(maps) for maps in zip(*parts, strict=True)]

    def _run(self, images: torch.Tensor) -> States:
        pixels = self.normalization(images)
        return self.network(pixel_values=pixels, output_hidden_states=True, **self._options)

    def _maps(self, output: States) -> list[torch.Tensor]:
        states = _states(output)
        chosen = [states[layer] if isinstance(layer, int) else output.last_hidden_state for layer in self.layers]
        patches = slice(self._first, self._first + math.prod(self._grid))
        return [x if x.ndim == 4 else x[:, patches].transpose(1, 2).unflatten(2, self._grid) for x in chosen]

    @torch.no_grad()
    def _probe(self) -> tuple[States, tuple[tuple[int, int], int]]:
        """Return the model's output for test images, the grid (h, w) of the tokens, and the index of the first."""
        images = torch.zeros(3, 3, *self.size, device=self.network.device)
        size = getattr(self.network.config, "patch_size", None) or 1
        patch = (size, size) if isinstance(size, int) else tuple(size)
        images[1, :, : patch[0], : patch[1]] = 1
        images[2, :, -patch[0] :, -patch[1] :] = 1
        try:
            output = self._run(images)
        except (RuntimeError, ValueError, TypeError) as error:
            raise InputError(f"{self.name} rejects images of {self.size[0]} pixels ({error}).") from error
        if not getattr(output, "hidden_states", None):
            raise InputError(f"{self.name} is not supported: it returns no hidden states.")
        states, last = _states(output), output.last_hidden_state
        if states[0].ndim == 4:
            # All states are maps. The last alone may be tokens, which a token with their mean may precede.
            grid = states[-1].shape[2], states[-1].shape[-1]
            first = last.shape[1] - grid[0] * grid[1] if last.ndim == 3 else 0
            understood = all(x.ndim == 4 for x in states) and first in (0, 1)
        else:
            grid = self._patches(patch[0]), self._patches(patch[1])
            # Before the first block a token sees only its own patch: the corners mark the first and the last patch.
            first, end = (states[0][1:] - states[0][:1]).abs().sum(dim=2).argmax(dim=1).tolist()
            understood = end - first == grid[0] * grid[1] - 1 and len({x.shape for x in states}) == 1
        if not understood:
            shapes = ", ".join(str(tuple(x.shape[1:])) for x in states)
            raise InputError(f"{self.name} is not supported: its hidden states {shapes} are not maps of the image.")
        return output, (grid, first)

    def _patches(self, side: int) -> int:
        """Return how many patches of `side` pixels fit along the image."""
        count, rest = divmod(self.size[0], side)
        if rest:
            nearest = " and ".join(str(n * side) for n in (count, count + 1) if n)
            raise InputError(
                f"image_size = {self.size[0]} is not a multiple of {side}, the patch size of {self.name}. "
                f"The nearest sizes are {nearest}."
            )
        return count


def _resize(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    if tuple(x.shape[2:]) == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", antialias=True, align_corners=False)


def _states(output: States) -> Sequence[torch.Tensor]:
    """Return the hidden states, as maps if the model itself reshapes them, as Swin does."""
    return getattr(output, "reshaped_hidden_states", None) or output.hidden_states


def _drop_blocks(model: PreTrainedModel, count: int, needed: int) -> None:
    """Drop the transformer blocks after the last one that is needed. `count` is the number of blocks."""
    blocks = next((m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count), nn.ModuleList())
    if needed < len(blocks):
        del blocks[max(needed, 1) :]  # the first block records the state before it
        model.config.num_hidden_layers = len(blocks)


def _load(params: VisionBackbone, dtype: torch.dtype | str) -> PreTrainedModel:
    local = Path(params.model).is_dir()
    source = {"revision": params.revision, "trust_remote_code": False, "local_files_only": local}
    config = AutoConfig.from_pretrained(params.model, **source)
    # For a model of images and text, such as CLIP, take the vision part.
    config = getattr(config, "vision_config", config)
    with _quiet():
        model, report = AutoModel.from_pretrained(
            params.model, config=config, dtype=dtype, output_loading_info=True, **source
        )
    if model.main_input_name != "pixel_values":
        raise InputError(f"{params.model} is a {type(model).__name__}, not a vision model.")
    # Checkpoints often lack the pooler, which the features do not pass through.
    if missing := sorted(key for key in report["missing_keys"] if "pooler" not in key):
        raise InputError(f"{params.model} lacks weights of a {type(model).__name__}: {', '.join(missing[:3])}, ...")
    return model


def _normalization(params: VisionBackbone) -> tuple[Sequence[float], Sequence[float]]:
    """Return mean and standard deviation of the channels, for images in [0, 1]."""
    if params.image_mean and params.image_std:
        return params.image_mean, params.image_std
    # Read the file instead of loading the processor: some processors need torchvision.
    for name in (PROCESSOR_NAME, IMAGE_PROCESSOR_NAME):
        file = cached_file(params.model, name, revision=params.revision, _raise_exceptions_for_missing_entries=False)
        facts = json.loads(Path(file).read_text(encoding="utf-8")) if file else {}
        facts = facts.get("image_processor", facts)
        if odd := [key for key in ("do_flip_channel_order", "rescale_offset", "include_top") if facts.get(key)]:
            raise InputError(f"{params.model} uses unsupported preprocessing ({odd}). Set image_mean and image_std.")
        if facts.get("do_normalize") is False:
            return (0.0,) * 3, (1.0,) * 3
        if facts.get("image_mean"):
            return facts["image_mean"], facts["image_std"]
    return DEFAULT_MEAN, DEFAULT_STD


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Hide the progress bar and the warnings about unused weights of heads."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
