"""The latent space of a pipeline: an image autoencoder, or the features of a vision backbone."""

from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL

from vlmdiff.core.errors import InputError
from vlmdiff.core.files import read_json
from vlmdiff.core.params import Part, Pretrained
from vlmdiff.model.feature_space import FeatureSpace
from vlmdiff.model.pretrained import load_network, network_class
from vlmdiff.model.tiny_autoencoder import TinyAutoencoder

FirstStageModel = AutoencoderKL | TinyAutoencoder | FeatureSpace


def load_first_stage(folder: Path) -> FirstStageModel:
    """Load a saved first stage. Raises InputError if the folder holds none, or one of an unknown class."""
    if not (config := folder / "config.json").is_file():
        raise InputError(f"{folder} has no first stage. Run vlmdiff first_stage first.")
    name = read_json(config, dict[str, Any]).get("_class_name")
    kinds = {kind.__name__: kind for kind in (AutoencoderKL, TinyAutoencoder, FeatureSpace)}
    if name not in kinds:
        raise InputError(f"{config} names the class {name!r}, not one of {', '.join(kinds)}. Restore the folder.")
    return load_network(kinds[name], Pretrained(model=str(folder)))


def load_autoencoder(source: Part) -> AutoencoderKL | TinyAutoencoder:
    """Load a pretrained image autoencoder of diffusers. Raises InputError as `load_network`, and for another class."""
    kinds = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": TinyAutoencoder, "TinyAutoencoder": TinyAutoencoder}
    name = network_class(AutoencoderKL, source, source.subfolder)
    if name not in kinds:
        raise InputError(f"{source.model} has a {name}, not an AutoencoderKL or an AutoencoderTiny")
    return load_network(kinds[name], source, source.subfolder)


def downsampling(first_stage: FirstStageModel) -> int:
    """Return how many times smaller than the image the latents are, per side."""
    config = first_stage.config
    if isinstance(first_stage, FeatureSpace):
        return config.sample_size // config.grid
    return 2 ** (len(config.block_out_channels) - 1)
