"""`Cells`: finds the nearest of many patches in cells of similar ones (Jegou et al., doi 10.1109/TPAMI.2010.57)."""

from collections.abc import Sequence

import torch

# About how many patches a cell has, and how many cells are searched for the patches nearest to one.
CELL, SEARCHED = 512, 8
# Rounds of k-means, and how many patches each cell is learned from.
ROUNDS, SAMPLE = 6, 64
# Numbers that are computed at once, so that memory does not grow with the patches that are compared.
AT_ONCE = 2**22
# Below every similarity.
NONE = -2.0
# The attributes of `Cells` that a file keeps.
TENSORS = "patches", "centres", "sizes"


class Cells:
    """Patches of length one, sorted into cells of similar ones. With few cells, all are searched.

    patches: (M, K), in the order of the cells; centres: (C, K), about the means of the cells; sizes: (C,), how many
    patches each has.
    """

    def __init__(self, patches: torch.Tensor, centres: torch.Tensor, sizes: torch.Tensor):
        self.patches, self.centres, self.sizes = patches, centres, sizes
        self.ends = [0, *sizes.cumsum(0).tolist()]

    @classmethod
    def of(
        cls, patches: torch.Tensor, counts: Sequence[int], generator: torch.Generator
    ) -> tuple["Cells", torch.Tensor]:
        """Sort patches (M, K) into cells. Return the cells, and the order (M,) in which the patches are now.

        counts: how many patches each part has; parts stay in order, and no cell has patches of two.
        """
        parts, orders, first = [], [], 0
        for some in patches.split(list(counts)):
            part, order = cls._of_part(some, generator)
            parts.append(part)
            orders.append(order + first)
            first += len(some)
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in TENSORS)), torch.cat(orders)

    @classmethod
    def _of_part(cls, patches: torch.Tensor, generator: torch.Generator) -> tuple["Cells", torch.Tensor]:
        count = max(1, len(patches) // CELL)
        chosen = torch.randperm(len(patches), generator=generator)[: SAMPLE * count]
        sample = patches[chosen.to(patches.device)].float()
        centres = sample[:count].clone()
        for _ in range(ROUNDS):
            cell = _nearest_cells(sample, centres, 1)[:, 0]
            sums = torch.zeros_like(centres).index_add(0, cell, sample)
            members = cell.bincount(minlength=count)[:, None]
            # An empty cell stays where it is.
            centres = torch.where(members > 0, sums / members.clamp_min(1), centres)
        cell = _nearest_cells(patches, centres, 1)[:, 0]
        order, sizes = cell.argsort(stable=True), cell.bincount(minlength=count)
        return cls(patches[order], centres[sizes > 0], sizes[sizes > 0]), order

    def nearest(
        self,
        queries: torch.Tensor,
        count: int,
        within: tuple[int, int] | None = None,
        groups: tuple[torch.Tensor, torch.Tensor] | None = None,
        searched: int = SEARCHED,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the similarities (Q, k) of queries (Q, K) to the nearest patches, and the patches' indices.

        k is `count`, or the number of patches if that is less. within: the first cell that counts, and the one after
        the last. groups: of each query (Q,) and of each patch (M,); a query is compared with patches of other groups.
        searched: how many cells are searched for each query, or all where these have fewer than k patches of other
        groups. Where all have fewer, similarities are NONE.
        """
        start, stop = within or (0, len(self.sizes))
        count = min(count, len(self.patches))
        near = _nearest_cells(queries, self.centres[start:stop], min(searched, stop - start))
        pairs, width = near.flatten(), near.shape[1]
        # All queries of a cell are compared at once.
        order, ends = pairs.argsort(), [0, *pairs.bincount(minlength=stop - start).cumsum(0).tolist()]
        similarity = queries.new_full((len(pairs), count), NONE)
        index = torch.zeros_like(similarity, dtype=torch.long)
        for cell in range(start, stop):
            first, last = self.ends[cell], self.ends[cell + 1]
            asked = order[ends[cell - start] : ends[cell - start + 1]]
            if not len(asked):
                continue
            patches = self.patches[first:last].to(queries).T
            for some in asked.split(max(1, AT_ONCE // (last - first))):
                found = queries[some // width] @ patches
                if groups is not None:
                    found.masked_fill_(groups[0][some // width, None] == groups[1][first:last], NONE)
                best = found.topk(min(count, last - first))
                similarity[some, : best.values.shape[1]] = best.values
                index[some, : best.values.shape[1]] = best.indices + first
        best = similarity.view(len(queries), -1).topk(count)
        similarity, index = best.values, index.view(len(queries), -1).gather(1, best.indices)
        if width < stop - start:
            # All that is near may be of the query's own group.
            lost = (similarity[:, -1] == NONE).nonzero()[:, 0]
            for some in lost.split(max(1, AT_ONCE // (count * (stop - start)))) if len(lost) else ():
                others = None if groups is None else (groups[0][some], groups[1])
                similarity[some], index[some] = self.nearest(queries[some], count, within, others, stop - start)
        return similarity, index


def _nearest_cells(rows: torch.Tensor, centres: torch.Tensor, count: int) -> torch.Tensor:
    """Return the numbers (Q, count) of the centres (C, K) nearest to rows (Q, K)."""
    half = centres.square().sum(dim=1) / 2
    parts = rows.split(AT_ONCE // len(centres) + 1)
    return torch.cat([(some.to(centres) @ centres.T).sub_(half).topk(count, dim=1).indices for some in parts])
