"""The latent space that a pipeline works in: of an image autoencoder, or of a vision backbone's features."""

import json
from pathlib import Path

from diffusers import AutoencoderKL

from vlmdiff.core.errors import InputError
from vlmdiff.model.feature_space import FeatureSpace

FirstStageModel = AutoencoderKL | FeatureSpace


def load_first_stage(folder: Path) -> FirstStageModel:
    """What the first stage has saved, by the class that its configuration names.

    Raises InputError where nothing is saved.
    """
    if not (config := folder / "config.json").is_file():
        raise InputError(f"{folder} holds no first stage: run the first_stage stage first")
    name = json.loads(config.read_text())["_class_name"]
    kinds = {kind.__name__: kind for kind in (AutoencoderKL, FeatureSpace)}
    return kinds[name].from_pretrained(folder)


def downsampling(first_stage: FirstStageModel) -> int:
    """Pixels of a photograph along a side of its latents' one."""
    config = first_stage.config
    if isinstance(first_stage, FeatureSpace):
        return config.sample_size // config.grid
    return 2 ** (len(config.block_out_channels) - 1)
