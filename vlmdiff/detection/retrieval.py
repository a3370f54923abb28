"""`PatchBank`: how far the patches of an image are from the nearest normal patches (cf. arXiv 2106.08265)."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vlmdiff.core.console import track
from vlmdiff.core.device import fast_bf16
from vlmdiff.core.errors import InputError
from vlmdiff.core.params import Positive, Retrieval

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

    A patch's evidence is its distance to the nearest patch of its product, 1 - cosine similarity, less
    `params.expected` times the usual distance there: the mean of that of its nearest patches. A place that differs from
    image to image, such as grain or a label, is thus judged less strictly than one that always looks the same. Then the
    image's level, the median of its evidence, is subtracted, `params.level` times: light or focus that is a little
    different makes every patch of an image more unusual, although none is a defect. A defect of more than half of an
    image loses part of its evidence too.

    basis: (D, K), the principal directions of the patches; patches: (M, K), projected to them, of length one, in
    bfloat16; usual: (M,); counts: how many patches are of each product, in order. Not saved are image: (M,), the number
    of each patch's image, and known: the evidence (h, w) of images, by number, that are in the bank with all their
    patches, each judged without its own.
    """

    def __init__(
        self,
        basis: torch.Tensor,
        patches: torch.Tensor,
        usual: torch.Tensor,
        params: Retrieval,
        counts: Mapping[str, int],
        image: torch.Tensor | None = None,
    ):
        self.basis, self.patches, self.usual, self.params = basis, patches, usual, params
        self.counts, self.image = dict(counts), image
        self.known: dict[int, torch.Tensor] = {}
        ends = [0, *accumulate(self.counts.values())]
        self._parts = {name: (ends[i], ends[i + 1]) for i, name in enumerate(self.counts)}

    @classmethod
    def fit(cls, collected: "NormalPatches") -> "PatchBank":
        """Make a bank of what was collected."""
        kept, products, params = collected.kept, collected.products, collected.params
        # The directions of the largest second moments change products of patches least.
        _, directions = torch.linalg.eigh(collected.moments.double())
        basis = directions[:, -COMPONENTS:].float()
        order = sorted(range(len(kept)), key=lambda i: products[i])
        counts = {name: sum(len(kept[i]) for i in order if products[i] == name) for name in sorted(set(products))}
        patches = torch.cat([F.normalize(kept[i].float() @ basis, dim=1).bfloat16() for i in order])
        image = torch.tensor(order).repeat_interleave(torch.tensor([len(kept[i]) for i in order])).to(patches.device)
        bank = cls(basis, patches, torch.zeros(len(patches), device=patches.device), params, counts, image)
        # Patches of one image are alike, so only other images say what is usual.
        ready: dict[tuple[int, int], _Nearest] = {}
        found = [
            bank._nearest(patches[image == i].float(), products[i], i, ready)
            for i in track(order, "compare normal patches", len(order))
        ]
        bank.usual = torch.cat([1 - similarity.amax(dim=1) for similarity, _ in found])
        for i, (similarity, index) in zip(order, found, strict=True):
            if len(index) == collected.grid.numel():
                bank.known[i] = bank._evidence(similarity, index).unflatten(0, collected.grid)
        return bank

    @torch.no_grad()
    def __call__(
        self, features: torch.Tensor, products: Sequence[str], without: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Return the evidence (B, h, w) of features (B, D, h, w) from `unit_length`; higher is more unusual.

        products: what each of the B images shows; an image of a product that the bank does not know is compared with
        all patches. without: for each image, the number of an image of the bank whose patches do not count.
        """
        found, numbers = [], [None] * len(products) if without is None or self.image is None else without
        ready: dict[tuple[int, int], _Nearest] = {}
        for patches, product, own in zip(features.flatten(2).transpose(1, 2), products, numbers, strict=True):
            projected = F.normalize(patches @ self.basis, dim=1)
            found.append(self._evidence(*self._nearest(projected, product, own, ready)))
        return torch.stack(found).unflatten(1, features.shape[2:])

    def _nearest(
        self, patches: torch.Tensor, product: str, own: int | None, ready: dict[tuple[int, int], "_Nearest"]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the similarities (P, k) of projected patches (P, K) to the nearest of a product, and their indices.

        own: the number of an image whose patches do not count; ready: what searched last, kept for the next image of
        the same product.
        """
        part, left_out = self._parts.get(product, (0, len(self.patches))), None
        if own is not None and self.image is not None:
            left_out = self.image[slice(*part)] == own
            if left_out.all():
                # The product has no other image.
                part, left_out = (0, len(self.patches)), self.image == own
        if part not in ready:
            ready.clear()
            ready[part] = _Nearest(self.patches[slice(*part)])
        found = [ready[part](some, left_out) for some in patches.split(AT_ONCE)]
        return torch.cat([one for one, _ in found]), torch.cat([index for _, index in found]) + part[0]

    def _evidence(self, similarity: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Return the evidence (P,) of an image's patches, from `_nearest`."""
        evidence = 1 - similarity.amax(dim=1) - self.params.expected * self.usual[index].mean(dim=1)
        return evidence - self.params.level * evidence.median()

    def save(self, file: Path) -> None:
        """Write the bank in safetensors."""
        tensors = {"basis": self.basis, "patches": self.patches, "usual": self.usual}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        save_file(tensors, file, metadata={"counts": json.dumps(self.counts)})

    @classmethod
    def load(cls, file: Path, params: Retrieval, size: int, device: torch.device | str = "cpu") -> "PatchBank":
        """Read what `save` wrote, for features of `size` numbers. Raises InputError if it is missing or not a bank.

        A bank of an earlier release does not say which product a patch shows. Then all patches are searched.
        """
        try:
            with safe_open(file, "pt", device=str(device)) as content:
                facts = content.metadata() or {}
                basis, patches, usual = map(content.get_tensor, ("basis", "patches", "usual"))
            count = max(len(patches), 1)
            if (basis.ndim, *patches.shape, *usual.shape) != (2, count, basis.shape[-1], count) or len(basis) != size:
                raise ValueError("its tensors do not fit the features")
            if not all(tensor.is_floating_point() and tensor.isfinite().all() for tensor in (basis, patches, usual)):
                raise ValueError("its tensors are not finite numbers")
            counts = TypeAdapter(dict[str, Positive]).validate_json(facts.get("counts", "{}"))
            if counts and sum(counts.values()) != count:
                raise ValueError("its products do not fit its patches")
            return cls(basis, patches, usual, params, counts)
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            raise InputError(f"{file} is not a bank of patches ({error}). Run `vlmdiff evaluate` again.") from error


class NormalPatches:
    """Patches of normal images for a bank: about `params.patches` random ones of each product, or all that it has.

    Each image of a product gives as many. products: what each of the images shows; fewer than two images raise
    InputError. kept: (P, D) of each image that was added, in bfloat16; moments: (D, D), the sum of their outer
    products; grid: (h, w) of an image.
    """

    def __init__(self, products: Sequence[str], params: Retrieval, seed: int):
        if len(products) < 2:
            raise InputError("a bank of normal patches needs at least two normal training images")
        self.products, self.params = list(products), params
        self.kept: list[torch.Tensor] = []
        self.moments, self.grid = torch.zeros(()), torch.Size()
        self._images, self._generator = Counter(products), torch.Generator().manual_seed(seed)

    def add(self, features: torch.Tensor) -> "NormalPatches":
        """Add the features (B, D, h, w) of the next images, from `unit_length`."""
        self.grid = features.shape[2:]
        for patches in features.flatten(2).transpose(1, 2):
            each = self.params.of_each(self._images[self.products[len(self.kept)]])
            chosen = torch.randperm(len(patches), generator=self._generator)[:each].sort().values
            patches = patches[chosen.to(patches.device)]
            self.moments = self.moments.to(patches) + patches.T @ patches
            self.kept.append(patches.bfloat16())
        return self


class PatchBanks:
    """A bank for each size at which the backbone sees an image, the first for its own; the evidence is their mean.

    known: as of a bank, for the images that all of them have whole.
    """

    def __init__(self, banks: Sequence[PatchBank]):
        self.banks = list(banks)
        numbers = set.intersection(*(set(bank.known) for bank in banks))
        self.known = {i: _mean([bank.known[i][None] for bank in banks])[0] for i in sorted(numbers)}

    def __call__(
        self, features: Sequence[torch.Tensor], products: Sequence[str], without: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Return the evidence (B, h, w) on the finest grid. features: those of each size; all else is as of a bank."""
        return _mean([bank(x, products, without) for bank, x in zip(self.banks, features, strict=True)])

    def save(self, folder: Path) -> None:
        """Write each bank in safetensors."""
        for bank, file in zip(self.banks, self._files(folder, len(self.banks)), strict=True):
            bank.save(file)

    @classmethod
    def load(cls, folder: Path, params: Retrieval, size: int, device: torch.device | str = "cpu") -> "PatchBanks":
        """Read what `save` wrote, for features of `size` numbers. Raises InputError if a bank is missing or damaged."""
        files = cls._files(folder, 1 + len(params.more_sizes))
        return cls([PatchBank.load(file, params, size, device) for file in files])

    @staticmethod
    def _files(folder: Path, count: int) -> list[Path]:
        return [folder / ("bank.safetensors" if i == 0 else f"bank_{i}.safetensors") for i in range(count)]


def _mean(maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the mean of maps (B, h, w) of several grids, on the finest."""
    size = max(one.shape[1:] for one in maps)
    return torch.stack([F.interpolate(one[:, None], size=size, mode="bilinear")[:, 0] for one in maps]).mean(dim=0)


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

        left_out: the patches that do not count, bool (M,). Q is at most AT_ONCE.
        """
        parts, products = queries[:, -ROUGH:].to(self.rough), self.products[: len(queries)]
        torch.mm(parts, self.rough.T, out=products)
        if left_out is not None:
            products.masked_fill_(left_out, -2)
        index = largest(products, min(CANDIDATES, len(self.patches)))
        exact = torch.einsum("qd,qkd->qk", queries.float(), self.patches[index].float())
        if left_out is not None:
            exact = exact.masked_fill(left_out[index], -1)
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
