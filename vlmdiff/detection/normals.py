"""The normal training images that a detector remembers: where they are, and by what they are compared."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vlmdiff.captions.describe import describe
from vlmdiff.core.errors import InputError
from vlmdiff.detection.explain import difference

# Images are compared by latents on a grid of this side.
GRID = 4


@dataclass(frozen=True)
class Normal:
    """A normal image of the dataset. path: relative to the dataset's folder; caption: None where it has none."""

    image_id: str
    path: str
    class_name: str
    caption: str | None = None


class Normals:
    """Normal images, and a row of features of each.

    features: (N, F), from `pooled`; described: whether the captions are those of `describe`.
    """

    def __init__(self, images: Sequence[Normal], features: torch.Tensor, described: bool):
        self.images, self.described = list(images), described
        self.features = features.half()

    def nearest(self, features: torch.Tensor) -> list[Normal]:
        """Return the most similar normal image of each row of features (B, F), from `pooled`."""
        return [
            self.images[i] for i in torch.cdist(features.cpu().float(), self.features.float()).argmin(dim=1).tolist()
        ]

    def words(self, photograph: Image.Image, class_name: str) -> str | None:
        """Return how a photograph in RGB differs in words from the normal images of a class, None if it does not."""
        if not self.described:
            return None
        captions = [one.caption for one in self.images if one.class_name == class_name and one.caption is not None]
        return difference(describe(photograph), captions)

    def save(self, file: Path) -> None:
        """Write the images and their features in safetensors."""
        facts = {"images": json.dumps([asdict(one) for one in self.images]), "described": json.dumps(self.described)}
        save_file({"features": self.features.contiguous()}, file, metadata=facts)

    @classmethod
    def load(cls, file: Path) -> "Normals":
        """Read what `save` wrote. Raises InputError if it is damaged."""
        try:
            with safe_open(file, "pt") as content:
                facts, features = content.metadata() or {}, content.get_tensor("features")
            images = TypeAdapter(list[Normal]).validate_json(facts["images"])
            if features.ndim != 2 or len(features) != len(images) or not images or not features.isfinite().all():
                raise ValueError("its features do not fit its images, or are not finite")
            return cls(images, features, json.loads(facts["described"]) is True)
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            raise InputError(f"{file} does not list normal images ({error}). Run `vlmdiff evaluate` again.") from error


def pooled(latents: torch.Tensor) -> torch.Tensor:
    """Return rows (B, F) by which images are compared: latents (B, C, h, w) on a coarse grid."""
    return F.adaptive_avg_pool2d(latents.float(), GRID).flatten(1).cpu()
