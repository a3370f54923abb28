"""The normal training images that a detector remembers: where they are, and by what they are compared."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vlmdiff.captions.describe import describe
from vlmdiff.core.errors import InputError
from vlmdiff.detection.explain import difference
from vlmdiff.detection.products import Products


@dataclass(frozen=True)
class Normal:
    """A normal image of the dataset. path: relative to the dataset's folder; caption: None where it has none."""

    image_id: str
    path: str
    class_name: str
    caption: str | None = None


class Normals:
    """Normal images, a row of features of each, and the products that they show.

    features: (N, F), from `appearance`; described: whether the captions are those of `describe`; products: learned from
    the images unless they are given.
    """

    def __init__(
        self, images: Sequence[Normal], features: torch.Tensor, described: bool, products: Products | None = None
    ):
        self.images, self.described = list(images), described
        self.features = features.half()
        classes = [image.class_name for image in self.images]
        self.products = products or Products.fit(self.features.float().numpy(), classes)

    def nearest(self, features: torch.Tensor, products: Sequence[str | None]) -> list[Normal]:
        """Return the most similar normal image of each row of features (B, F), from `appearance`.

        It is one of the row's product, or of any where that is None.
        """
        distances = torch.cdist(features.cpu().float(), self.features.float())
        classes = np.array([image.class_name for image in self.images])
        for row, product in zip(distances, products, strict=True):
            if product is not None:
                row[torch.from_numpy(classes != product)] = torch.inf
        return [self.images[i] for i in distances.argmin(dim=1).tolist()]

    def words(self, photograph: Image.Image, class_name: str) -> str | None:
        """Return how a photograph in RGB differs in words from the normal images of a class, None if it does not."""
        if not self.described:
            return None
        captions = [one.caption for one in self.images if one.class_name == class_name and one.caption is not None]
        return difference(describe(photograph), captions)

    def save(self, file: Path) -> None:
        """Write the images and their features in safetensors."""
        facts = {"images": json.dumps([asdict(one) for one in self.images]), "described": json.dumps(self.described)}
        facts["products"] = json.dumps({"names": self.products.names, "limit": self.products.limit})
        tensors = {"whitening": self.products.whitening, "centres": self.products.centres}
        tensors = {name: torch.from_numpy(values).contiguous() for name, values in tensors.items()}
        save_file(tensors | {"features": self.features.contiguous()}, file, metadata=facts)

    @classmethod
    def load(cls, file: Path) -> "Normals":
        """Read what `save` wrote. Raises InputError if it is damaged."""
        try:
            with safe_open(file, "pt") as content:
                facts = content.metadata() or {}
                features, whitening, centres = map(content.get_tensor, ("features", "whitening", "centres"))
            images = TypeAdapter(list[Normal]).validate_json(facts["images"])
            if features.ndim != 2 or len(features) != len(images) or not images or not features.isfinite().all():
                raise ValueError("its features do not fit its images, or are not finite")
            products, width = json.loads(facts["products"]), features.shape[1]
            names, limit = products["names"], float(products["limit"])
            if whitening.shape != (width, width) or centres.shape != (len(names), width) or not limit > 0:
                raise ValueError("its products do not fit its features")
            if set(names) != {image.class_name for image in images}:
                raise ValueError("its products are not those of its images")
            if not (whitening.isfinite().all() and centres.isfinite().all()):
                raise ValueError("its products are not finite numbers")
            known = Products(names, whitening.double().numpy(), centres.double().numpy(), limit)
            return cls(images, features, json.loads(facts["described"]) is True, known)
        except (OSError, KeyError, ValueError, TypeError, SafetensorError) as error:
            raise InputError(f"{file} does not list normal images ({error}). Run `vlmdiff evaluate` again.") from error
