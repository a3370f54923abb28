"""What training reads, as memory-mapped arrays: everything frozen that it would otherwise compute in each epoch."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import CLIPTextModel, CLIPTokenizer

from vlmdiff.core.console import track
from vlmdiff.core.errors import InputError, explained
from vlmdiff.core.params import Encode, Prepare, PretrainedTextEncoder
from vlmdiff.data.images import load_rgb, resolve
from vlmdiff.model import pretrained
from vlmdiff.model.feature_space import FeatureSpace
from vlmdiff.model.first_stage import FirstStageModel, downsampling
from vlmdiff.model.normalization import Normalization, from_uint8
from vlmdiff.model.text import token_windows
from vlmdiff.training.text_encoder import THUMBNAIL, train_text_encoder, train_tokenizer


@dataclass(frozen=True)
class Encoded:
    """The encoded images of a dataset.

    index: a row per image: image_id, split, caption (a row of `windows`; row 0 is the empty caption). mean, std:
    (N, C, h, w), the latents' posteriors, scaled; std is None for a backbone's features, which have none. text:
    (W, L, D), windows of captions. windows: (M, K), the rows of `text` that make a caption. hints: uint8 (N, S, S, 3).
    """

    index: pd.DataFrame
    mean: np.ndarray
    std: np.ndarray | None
    text: np.ndarray
    windows: np.ndarray
    hints: np.ndarray

    @classmethod
    def open(cls, folder: Path) -> "Encoded":
        if not (folder / "index.parquet").is_file():
            raise InputError(f"{folder} has no encoded images. Run the encode stage first.")
        arrays: dict[str, Any] = {}
        for name in ("mean", "std", "text", "windows", "hints"):
            file = folder / f"{name}.npy"
            with explained(file, "Run the encode stage again, or restore it by `dvc checkout`"):
                # A projection has no deviations.
                arrays[name] = np.load(file, mmap_mode="r") if name != "std" or file.is_file() else None
        with explained(folder / "index.parquet", "Run the encode stage again, or restore it by `dvc checkout`"):
            return cls(index=pd.read_parquet(folder / "index.parquet"), **arrays)

    def prompt_embeds(self, captions: np.ndarray) -> torch.Tensor:
        """Return the text embeddings (B, K L, D) of captions, given by their rows."""
        return torch.from_numpy(self.text[self.windows[captions]]).flatten(1, 2)


def encode(
    frame: pd.DataFrame,
    images: np.ndarray,
    captions: dict[str, str],
    vae: FirstStageModel,
    normalization: Normalization,
    params: Encode,
    out: Path,
    device: torch.device,
) -> None:
    """Train or load the text encoder, then write latents and text embeddings into the folder `out`, beside the hints.

    frame: image_id and split of each image; images: uint8 (N, S, S, 3), the hints; captions: by image_id.
    """
    texts = [captions[image_id] for image_id in frame["image_id"]]
    known = ["", *sorted(set(texts))]
    rows = {text: row for row, text in enumerate(known)}

    training = np.flatnonzero(frame["split"] == "train")
    chosen = params.text_encoder
    if isinstance(chosen, PretrainedTextEncoder):
        text_encoder = pretrained.load_network(CLIPTextModel, chosen, chosen.subfolder).to(device)
        tokenizer = pretrained.load(CLIPTokenizer, chosen, chosen.tokenizer_subfolder)
        length = text_encoder.config.max_position_embeddings
        tokens, windows = token_windows(tokenizer, known, length, params.max_windows)
    else:
        tokenizer, length = train_tokenizer([texts[i] for i in training], chosen), chosen.max_tokens
        tokens, windows = token_windows(tokenizer, known, length, params.max_windows)
        seen = from_uint8(images[training], torch.device("cpu"))
        thumbnails = torch.nn.functional.adaptive_avg_pool2d(seen, THUMBNAIL)
        read = tokens[windows[[rows[texts[i]] for i in training]]]
        text_encoder = train_text_encoder(tokenizer, read, thumbnails, chosen, params.seed, device)
    text_encoder.requires_grad_(False)
    tokenizer.save_pretrained(out / "tokenizer")
    # Kept in the text encoder's own configuration, it is there wherever the text encoder is.
    text_encoder.config.max_windows = params.max_windows
    text_encoder.save_pretrained(out / "text_encoder")

    size = params.batch_size
    count, factor = len(images), vae.config.scaling_factor
    side = images.shape[1] // downsampling(vae)
    shape = (count, vae.config.latent_channels, side, side)
    mean = _array(out / "mean.npy", shape, np.float32)
    std = None if isinstance(vae, FeatureSpace) else _array(out / "std.npy", shape, np.float32)
    np.save(out / "windows.npy", windows.numpy())
    text = _array(out / "text.npy", (len(tokens), length, text_encoder.config.hidden_size), np.float32)
    with torch.no_grad():
        for start in track(range(0, count, size), "encode images", total=-(-count // size)):
            part = slice(start, start + size)
            posterior = vae.encode(normalization(from_uint8(images[part], device))).latent_dist
            mean[part] = (posterior.mean * factor).cpu()
            if std is not None:
                std[part] = (posterior.std * factor).cpu()
        for start in range(0, len(tokens), size):
            states = text_encoder(tokens[start : start + size].to(device)).last_hidden_state
            text[start : start + size] = states.cpu()
    for array in (mean, text) if std is None else (mean, std, text):
        array.flush()
    index = frame[["image_id", "split"]].assign(caption=[rows[text] for text in texts])
    index.to_parquet(out / "index.parquet", index=False)


def _array(path: Path, shape: tuple[int, ...], dtype: type) -> np.memmap:
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    # The file is sparse so far. On a full disk this raises OSError, and a write to the array ends the process.
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def mirrored(frame: pd.DataFrame, directions: Sequence[str]) -> pd.DataFrame:
    """Add the training images' mirror images, in each direction and in both; column `axes` has the axes to reverse."""
    frame = frame.assign(axes=[()] * len(frame))  # pyrefly: ignore[bad-argument-type]
    for axis, direction in enumerate(("vertical", "horizontal")):
        if direction in directions:
            training = frame[frame["split"] == "train"]
            # pyrefly: ignore[bad-argument-type]
            frame = pd.concat([frame, training.assign(axes=[(*axes, axis) for axes in training["axes"]])])
    return frame.reset_index(drop=True)


def image_array(frame: pd.DataFrame, data: Prepare, size: int, file: Path) -> np.ndarray:
    """Decode and resize the images of a manifest's rows into the memory-mapped `file`: uint8 (N, size, size, 3).

    If the rows have `axes`, as `mirrored` returns them, the images are mirrored along these.
    """
    array = _array(file, (len(frame), size, size, 3), np.uint8)
    every = [()] * len(frame) if "axes" not in frame else frame["axes"]
    for i, (path, axes) in enumerate(zip(track(frame["path"], "read images", total=len(frame)), every, strict=True)):
        array[i] = np.flip(load_rgb(resolve(data.image_root, path), size, data.max_pixels), axes)
    array.flush()
    return array
