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
from vlmdiff.core.errors import InputError
from vlmdiff.core.params import Positive, Retrieval
from vlmdiff.detection.cells import NONE, TENSORS, Cells

# How many of the nearest patches say how far apart normal patches usually are at such a place.
NEIGHBOURS = 10
# Numbers that describe a patch: as good as the 768 of two layers of ViT-S, at a third of the time and the memory.
COMPONENTS = 256
# Images whose patches are compared at once while a bank is made.
TOGETHER = 8


class PatchBank:
    """Patches of normal images, and how far normal patches usually are from the nearest patch of another image.

    A patch's evidence is its distance to the nearest patch of its product, 1 - cosine similarity, less
    `params.expected` times the usual distance there: the mean of that of its nearest patches. A place that differs from
    image to image, such as grain or a label, is thus judged less strictly than one that always looks the same. Then the
    image's level, the median of its evidence, is subtracted, `params.level` times: light or focus that is a little
    different makes every patch of an image more unusual, although none is a defect. A defect of more than half of an
    image loses part of its evidence too.

    basis: (D, K), the principal directions of the patches; cells: the M patches, projected to them; usual: (M,);
    counts: how many patches are of each product, in order; no cell has patches of two products. Not saved are image:
    (M,), the number of each patch's image, and known: the evidence (h, w) of images, by number, that are in the bank
    with all their patches, each judged without its own.
    """

    def __init__(
        self,
        basis: torch.Tensor,
        cells: Cells,
        usual: torch.Tensor,
        params: Retrieval,
        counts: Mapping[str, int],
        image: torch.Tensor | None = None,
    ):
        self.basis, self.cells, self.usual, self.params = basis, cells, usual, params
        self.counts, self.image = dict(counts), image
        self.known: dict[int, torch.Tensor] = {}
        ends = [cells.ends.index(end) for end in (0, *accumulate(self.counts.values()))]
        self._within = {name: (ends[i], ends[i + 1]) for i, name in enumerate(self.counts)}

    @classmethod
    def fit(cls, collected: "NormalPatches") -> "PatchBank":
        """Make a bank of what was collected."""
        kept, products, params = collected.kept, collected.products, collected.params
        # The directions of the largest second moments change products of patches least.
        _, directions = torch.linalg.eigh(collected.moments.double())
        basis = directions[:, -COMPONENTS:].float()
        numbers = sorted(range(len(kept)), key=lambda i: products[i])
        patches = torch.cat([F.normalize(kept[i].float() @ basis, dim=1).bfloat16() for i in numbers])
        lengths = [len(kept[i]) for i in numbers]
        counts: Counter[str] = Counter()
        for i, length in zip(numbers, lengths, strict=True):
            counts[products[i]] += length
        cells, order = Cells.of(patches, list(counts.values()), collected.generator)
        # Where each image's patches are now.
        places = dict(zip(numbers, order.argsort().split(lengths), strict=True))
        image = torch.tensor(numbers).repeat_interleave(torch.tensor(lengths)).to(order.device)[order]
        del patches, order
        usual = torch.zeros(len(cells.patches), device=cells.patches.device)
        bank = cls(basis, cells, usual, params, counts, image)
        # Patches of one image are alike, so only other images say what is usual.
        found = {}
        for first in track(range(0, len(numbers), TOGETHER), "compare normal patches", -(-len(numbers) // TOGETHER)):
            some = numbers[first : first + TOGETHER]
            queries = [cells.patches[places[i]].float() for i in some]
            for i, one in zip(some, bank._nearest(queries, [products[i] for i in some], some), strict=True):
                usual[places[i]] = 1 - one[0][:, 0]
                if len(places[i]) == collected.grid.numel():
                    found[i] = one
        bank.known = {i: bank._evidence(*one).unflatten(0, collected.grid) for i, one in found.items()}
        return bank

    @torch.no_grad()
    def __call__(
        self, features: torch.Tensor, products: Sequence[str], without: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Return the evidence (B, h, w) of features (B, D, h, w) from `unit_length`; higher is more unusual.

        products: what each of the B images shows; an image of a product that the bank does not know is compared with
        those of all products. without: for each image, the number of an image of the bank whose patches do not count.
        """
        queries = F.normalize(features.flatten(2).transpose(1, 2) @ self.basis, dim=2)
        found = self._nearest(list(queries), products, without)
        return torch.stack([self._evidence(*one) for one in found]).unflatten(1, features.shape[2:])

    def _nearest(
        self, queries: Sequence[torch.Tensor], products: Sequence[str], without: Sequence[int] | None
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return of each image's projected patches (P, K) the similarities (P, k) to the nearest, and their indices.

        products, without: as in `__call__`. Images of one product are searched together.
        """
        if without is not None and self.image is None:
            raise InputError("a bank that was read from a file does not know which image a patch is from: call `learn`")
        groups: dict[tuple[int, int], list[int]] = {}
        for i, product in enumerate(products):
            every = (0, len(self.cells.sizes))
            first, last = self._within.get(product, every)
            if without is not None and self.image is not None:
                others = self.image[self.cells.ends[first] : self.cells.ends[last]] != without[i]
                # The product may have no other image.
                first, last = (first, last) if others.any() else every
            groups.setdefault((first, last), []).append(i)
        found = {}
        for within, images in groups.items():
            lengths = [len(queries[i]) for i in images]
            own = None
            if without is not None and self.image is not None:
                own = torch.tensor([without[i] for i in images]).repeat_interleave(torch.tensor(lengths))
                own = own.to(self.image.device), self.image
            near = self.cells.nearest(torch.cat([queries[i] for i in images]), NEIGHBOURS, within, own)
            found |= zip(images, zip(*(one.split(lengths) for one in near), strict=True), strict=True)
        return [found[i] for i in range(len(queries))]

    def _evidence(self, similarity: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Return the evidence (P,) of an image's patches, from `_nearest`."""
        there = similarity > NONE
        usual = (self.usual[index] * there).sum(dim=1) / there.sum(dim=1)
        evidence = 1 - similarity[:, 0] - self.params.expected * usual
        return evidence - self.params.level * evidence.median()

    def save(self, file: Path) -> None:
        """Write the bank in safetensors."""
        cells = self.cells
        tensors = {name: getattr(cells, name) for name in TENSORS} | {"basis": self.basis, "usual": self.usual}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        save_file(tensors, file, metadata={"counts": json.dumps(self.counts)})

    @classmethod
    def load(cls, file: Path, params: Retrieval, size: int, device: torch.device | str = "cpu") -> "PatchBank":
        """Read what `save` wrote, for features of `size` numbers. Raises InputError if it is missing or not a bank.

        A bank of an earlier release may not say which product a patch shows, and its patches are not sorted yet.
        """
        try:
            with safe_open(file, "pt", device=str(device)) as content:
                facts, names = content.metadata() or {}, set(content.keys())
                basis, patches, usual = map(content.get_tensor, ("basis", "patches", "usual"))
                cells = Cells(*map(content.get_tensor, TENSORS)) if names.issuperset(TENSORS) else None
            count, width = max(len(patches), 1), basis.shape[-1]
            if (basis.shape, patches.shape, usual.shape) != ((size, width), (count, width), (count,)):
                raise ValueError("its tensors do not fit the features")
            if not all(tensor.is_floating_point() and tensor.isfinite().all() for tensor in (basis, patches, usual)):
                raise ValueError("its tensors are not finite numbers")
            counts = TypeAdapter(dict[str, Positive]).validate_json(facts.get("counts", "{}"))
            if counts and sum(counts.values()) != count:
                raise ValueError("its products do not fit its patches")
            if cells is None:
                cells, order = Cells.of(patches, list(counts.values()) or [count], torch.Generator().manual_seed(0))
                usual = usual[order]
            elif not _fits(cells, counts):
                raise ValueError("its cells do not fit its patches")
            return cls(basis, cells, usual, params, counts)
        except (OSError, KeyError, ValueError, TypeError, IndexError, SafetensorError) as error:
            raise InputError(f"{file} is not a bank of patches ({error}). Run `vlmdiff evaluate` again.") from error


def _fits(cells: Cells, counts: Mapping[str, int]) -> bool:
    """Return whether a file's cells have all patches, and each product has whole cells."""
    sizes, centres, (count, width) = cells.sizes, cells.centres, cells.patches.shape
    return (
        sizes.dtype == torch.long
        and centres.shape == (len(sizes), width)
        and centres.is_floating_point()
        and bool(centres.isfinite().all() and (sizes > 0).all() and (sizes <= count).all())
        and cells.ends[-1] == count
        and set(accumulate(counts.values())) <= set(cells.ends)
    )


class NormalPatches:
    """Patches of normal images for a bank: about `params.patches` random ones of each product, or all that it has.

    Each image of a product gives as many. products: what each of the images shows; fewer than two images raise
    InputError. generator: chooses the patches; kept: (P, D) of each image that was added, in bfloat16; moments: (D, D),
    the sum of their outer products; grid: (h, w) of an image.
    """

    def __init__(self, products: Sequence[str], params: Retrieval, seed: int):
        if len(products) < 2:
            raise InputError("a bank of normal patches needs at least two normal training images")
        self.products, self.params = list(products), params
        self.kept: list[torch.Tensor] = []
        self.moments, self.grid = torch.zeros(()), torch.Size()
        self.generator, self._images = torch.Generator().manual_seed(seed), Counter(products)

    def add(self, features: torch.Tensor) -> "NormalPatches":
        """Add the features (B, D, h, w) of the next images, from `unit_length`."""
        self.grid = features.shape[2:]
        for patches in features.flatten(2).transpose(1, 2):
            each = self.params.of_each(self._images[self.products[len(self.kept)]])
            chosen = torch.randperm(len(patches), generator=self.generator)[:each].sort().values
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


def unit_length(features: torch.Tensor, channels: Iterable[int]) -> torch.Tensor:
    """Scale each layer's part of features (B, sum of channels, h, w) so that the whole has length one everywhere."""
    layers = features.split(list(channels), dim=1)
    return torch.cat([F.normalize(layer, dim=1) for layer in layers], dim=1) / len(layers) ** 0.5
