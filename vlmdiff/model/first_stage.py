"""The latent space of a pipeline: an image autoencoder, or the features of a vision backbone."""

import json
from pathlib import Path

from diffusers import AutoencoderKL

from vlmdiff.core.errors import InputError, explained
from vlmdiff.model.feature_space import FeatureSpace

FirstStageModel = AutoencoderKL | FeatureSpace


def load_first_stage(folder: Path) -> FirstStageModel:
    """Load a saved first stage. Raises InputError if the folder holds none."""
    if not (config := folder / "config.json").is_file():
        raise InputError(f"{folder} has no first stage. Run vlmdiff first_stage first.")
    kinds = {kind.__name__: kind for kind in (AutoencoderKL, FeatureSpace)}
    with explained(folder, "Run vlmdiff first_stage again, or restore it by `dvc checkout`"):
        return kinds[json.loads(config.read_text())["_class_name"]].from_pretrained(folder)


def downsampling(first_stage: FirstStageModel) -> int:
    """Return how many times smaller than the image the latents are, per side."""
    config = first_stage.config
    if isinstance(first_stage, FeatureSpace):
        return config.sample_size // config.grid
    return 2 ** (len(config.block_out_channels) - 1)
