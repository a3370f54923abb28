"""How photographs are scaled for the networks: the same for the first stage, the hints and the pipeline."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

FILE = "preprocessor_config.json"


@dataclass(frozen=True)
class Normalization:
    """(image - mean) / std for each channel of images in [0, 1]; its file has the names that transformers uses."""

    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """From [0, 1] to what the networks see; (B, 3, H, W) in and out."""
        return (images - images.new_tensor(self.image_mean).view(3, 1, 1)) / self._std(images)

    def inverse(self, images: torch.Tensor) -> torch.Tensor:
        """From what the networks see to [0, 1], not clamped; (B, 3, H, W) in and out."""
        return images * self._std(images) + images.new_tensor(self.image_mean).view(3, 1, 1)

    def _std(self, images: torch.Tensor) -> torch.Tensor:
        return images.new_tensor(self.image_std).view(3, 1, 1)

    def save(self, folder: Path) -> None:
        """Write it beside the weights of the first stage that was trained with it."""
        (folder / FILE).write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, folder: Path) -> "Normalization":
        """What `save` wrote."""
        return cls(**{key: tuple(values) for key, values in json.loads((folder / FILE).read_text()).items()})


def from_uint8(images: np.ndarray, device: torch.device) -> torch.Tensor:
    """uint8 (B, H, W, 3) to float (B, 3, H, W) in [0, 1]."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 255
