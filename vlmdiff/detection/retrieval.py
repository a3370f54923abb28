"""`PatchBank`: how far the patches of an image are from the nearest normal patches (cf. arXiv 2106.08265)."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vlmdiff.core.console import track
from vlmdiff.core.device import fast_bf16
from vlmdiff.core.errors import InputError
from vlmdiff.core.params import Retrieval

# How many of the nearest patches say how far apart normal patches usually are at such a place.
NEIGHBOURS = 10
# Numbers that describe a patch: as good as the 768 of two layers of ViT-S, at a third of the time and the memory.
COMPONENTS = 256
# Of these, how many find candidates, and how many candidates: of DINOv2's patches, 0.2 % then miss the nearest.
ROUGH, CANDIDATES = 96, 32
# Patches compared with the bank at once, so that memory stays the same for any number of images.
AT_ONCE = 512
# Values in a block. `largest` compares the maxima of blocks before it compares single values.
BLOCK = 16


class PatchBank:
    """Patches of normal images, and how far normal patches usually are from the nearest patch of another image.

    A patch's evidence is its distance to the nearest patch of the bank, 1 - cosine similarity, less `params.expected`
    times the usual distance there: the mean of that of its nearest patches. A place that differs from image to image,
    such as grain or a label, is thus judged less strictly than one that always looks the same. Then the image's level,
    the median of its evidence, is subtracted, `params.level` times: light or focus that is a little different makes
    every patch of an image more unusual, although none is a defect. A defect of more than half of an image loses part
    of its evidence too.

    basis: (D, K), the principal directions of the patches; patches: (M, K), projected to them, of length one, in
    bfloat16; usual: (M,); image: (M,), the number of each patch's image, which is not saved.
    """

    def __init__(
        self,
        basis: torch.Tensor,
        patches: torch.Tensor,
        usual: torch.Tensor,
        params: Retrieval,
        image: torch.Tensor | None = None,
    ):
        self.basis, self.patches, self.usual, self.params, self.image = basis, patches, usual, params, image

    @classmethod
    def fit(cls, features: Iterable[torch.Tensor], images: int, params: Retrieval, seed: int) -> "PatchBank":
        """Keep about `params.patches` random patches, as many of each of `images` images.

        features: batches (B, D, h, w) of normal images, from `unit_length`. Raises InputError for fewer than two.
        """
        if images < 2:
            raise InputError("a bank of normal patches needs at least two normal training images")
        generator = torch.Generator().manual_seed(seed)
        each, kept = params.of_each(images), []
        for batch in features:
            for patches in batch.flatten(2).transpose(1, 2):
                kept.append(patches[torch.randperm(len(patches), generator=generator)[:each].to(patches.device)])
        counts, every = torch.tensor([len(patches) for patches in kept]), torch.cat(kept)
        del kept
        # The directions of the largest second moments, so that products of patches change least.
        doubles = (part.double() for part in every.split(AT_ONCE))
        _, directions = torch.linalg.eigh(sum(part.T @ part for part in doubles))
        basis = directions[:, -COMPONENTS:].to(every)
        patches = F.normalize(every @ basis, dim=1).bfloat16()
        del every
        image = torch.arange(len(counts)).repeat_interleave(counts).to(patches.device)
        nearest, usual = _Nearest(patches), []
        parts = zip(patches.split(AT_ONCE), image.split(AT_ONCE), strict=True)
        for part, own in track(parts, "compare normal patches", -(-len(patches) // AT_ONCE)):
            # Patches of one image are alike, so only other images say what is usual.
            similarity, _ = nearest(part, own[:, None] == image)
            usual.append(1 - similarity.amax(dim=1))
        return cls(basis, patches, torch.cat(usual), params, image)

    @torch.no_grad()
    def __call__(self, features: torch.Tensor, without: Sequence[int] | None = None) -> torch.Tensor:
        """Return the evidence (B, h, w) of features (B, D, h, w) from `unit_length`; higher is more unusual.

        without: for each of the B images, the number of an image of the bank whose patches do not count.
        """
        nearest, found = _Nearest(self.patches), []
        for i, patches in enumerate(features.flatten(2).transpose(1, 2)):
            own = None if without is None or self.image is None else (self.image == without[i])[None]
            for part in F.normalize(patches @ self.basis, dim=1).split(AT_ONCE):
                similarity, index = nearest(part, own)
                found.append(1 - similarity.amax(dim=1) - self.params.expected * self.usual[index].mean(dim=1))
        evidence = torch.cat(found).unflatten(0, (len(features), *features.shape[2:]))
        return evidence - self.params.level * evidence.flatten(1).median(dim=1).values[:, None, None]

    def to(self, device: torch.device) -> "PatchBank":
        """Return the bank on a device."""
        image = None if self.image is None else self.image.to(device)
        basis, patches, usual = (tensor.to(device) for tensor in (self.basis, self.patches, self.usual))
        return PatchBank(basis, patches, usual, self.params, image)

    def save(self, file: Path) -> None:
        """Write the bank in safetensors."""
        tensors = {"basis": self.basis, "patches": self.patches, "usual": self.usual}
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, file)

    @classmethod
    def load(cls, file: Path, params: Retrieval, size: int) -> "PatchBank":
        """Read what `save` wrote, for features of `size` numbers. Raises InputError if it is missing or not a bank."""
        try:
            tensors = load_file(file)
            basis, patches, usual = (tensors[name] for name in ("basis", "patches", "usual"))
            count = max(len(patches), 1)
            if (basis.ndim, *patches.shape, *usual.shape) != (2, count, basis.shape[-1], count) or len(basis) != size:
                raise ValueError("its tensors do not fit the features")
            if not all(tensor.is_floating_point() and tensor.isfinite().all() for tensor in (basis, patches, usual)):
                raise ValueError("its tensors are not finite numbers")
            return cls(basis, patches, usual, params)
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            raise InputError(f"{file} is not a bank of patches ({error}). Run `vlmdiff evaluate` again.") from error


class _Nearest:
    """Finds the nearest of patches (M, K): candidates by their largest components, then the nearest by all of them."""

    def __init__(self, patches: torch.Tensor):
        # bfloat16 is several times as fast as float32 where the device has it, but rounds to three digits.
        kind = torch.bfloat16 if fast_bf16(patches.device) else torch.float32
        self.patches, self.rough = patches, patches[:, -ROUGH:].to(kind).contiguous()
        # One buffer for all products: getting so much memory anew takes as long as the product.
        self.products = self.rough.new_empty(AT_ONCE, len(patches))

    def __call__(
        self, queries: torch.Tensor, left_out: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the cosine similarities (Q, k) of queries (Q, K) to the nearest patches, and their indices.

        left_out: the patches that do not count, bool (Q, M) or (1, M). Q is at most AT_ONCE.
        """
        parts, products = queries[:, -ROUGH:].to(self.rough), self.products[: len(queries)]
        torch.mm(parts, self.rough.T, out=products)
        if left_out is not None:
            products.masked_fill_(left_out, -2)
        index = largest(products, min(CANDIDATES, len(self.patches)))
        exact = torch.einsum("qd,qkd->qk", queries.float(), self.patches[index].float())
        if left_out is not None:
            exact = exact.masked_fill(left_out.expand(len(queries), -1).gather(1, index), -1)
        similarity, best = exact.topk(min(NEIGHBOURS, exact.shape[1]), dim=1)
        return similarity, index.gather(1, best)


def largest(values: torch.Tensor, count: int) -> torch.Tensor:
    """Return the indices (Q, count) of the largest of values (Q, M) in each row, as `torch.topk`, but faster.

    The `count` largest lie in the `count` blocks with the largest maxima, so only these blocks are sorted.
    """
    blocks = values.shape[1] // BLOCK
    if blocks <= count:
        return values.topk(count, dim=1).indices
    # A block is every `blocks`-th column, because maxima of whole rows of memory are fast. Some columns are in none.
    even, rest = blocks * BLOCK, torch.arange(blocks * BLOCK, values.shape[1], device=values.device)
    maxima = values[:, :even].unflatten(1, (BLOCK, blocks)).amax(dim=1)
    starts = maxima.topk(count, dim=1).indices
    columns = (starts[:, :, None] + blocks * torch.arange(BLOCK, device=values.device)).flatten(1)
    columns = torch.cat([columns, rest.expand(len(values), -1)], dim=1)
    return columns.gather(1, values.gather(1, columns).topk(count, dim=1).indices)


def unit_length(features: torch.Tensor, channels: Iterable[int]) -> torch.Tensor:
    """Scale each layer's part of features (B, sum of channels, h, w) so that the whole has length one everywhere."""
    layers = features.split(list(channels), dim=1)
    return torch.cat([F.normalize(layer, dim=1) for layer in layers], dim=1) / len(layers) ** 0.5
