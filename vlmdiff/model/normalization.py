"""Scale images for the networks: the first stage, the hints and the pipeline share one normalization."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from vlmdiff.core.errors import explained

FILE = "preprocessor_config.json"


@dataclass(frozen=True)
class Normalization:
    """Compute (image - mean) / std per channel of images in [0, 1]. The file uses the names of transformers."""

    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Normalise images (B, 3, H, W) in [0, 1]."""
        return (images - images.new_tensor(self.image_mean).view(3, 1, 1)) / self._std(images)

    def inverse(self, images: torch.Tensor) -> torch.Tensor:
        """Return normalised images (B, 3, H, W) to [0, 1], without clamping."""
        return images * self._std(images) + images.new_tensor(self.image_mean).view(3, 1, 1)

    def _std(self, images: torch.Tensor) -> torch.Tensor:
        return images.new_tensor(self.image_std).view(3, 1, 1)

    def save(self, folder: Path) -> None:
        """Write the file into `folder`, beside the weights of the first stage."""
        (folder / FILE).write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "Normalization":
        """Read what `save` wrote."""
        with explained(folder / FILE, "Run vlmdiff first_stage again, or restore it by `dvc checkout`"):
            facts = json.loads((folder / FILE).read_text(encoding="utf-8"))
            return cls(**{key: tuple(values) for key, values in facts.items()})


def from_uint8(images: np.ndarray, device: torch.device) -> torch.Tensor:
    """Convert uint8 (B, H, W, 3) to float (B, 3, H, W) in [0, 1]."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 255
