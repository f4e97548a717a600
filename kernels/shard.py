"""A vocabulary split over the ranks of a process group: what they exchange.

Per chunk of rows one packed gather of statistics and of the targets' logits, which every rank
merges in the order of the ranks: all get the same bits, run after run. Per call one sum of the
gradient of the hidden states. Nothing else crosses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from rollfuse.kernels import checks
from rollfuse.kernels.collectives import need_member
from rollfuse.kernels.rows import FLOOR, RowStatistics


@dataclass(frozen=True, slots=True)
class Shard:
    """This rank's columns [start, start + V of the rank) of `total`."""

    group: dist.ProcessGroup
    start: int
    total: int
    n_ranks: int
    largest: int  # V of the largest shard: what decides a plan must be equal on all ranks

    def owned(self, column: Tensor, n_local: int) -> tuple[Tensor, Tensor]:
        """(whether this rank has each column of the whole vocabulary, its place here)."""
        local = column - self.start
        mine = (local >= 0) & (local < n_local)
        return mine, torch.where(mine, local, 0)

    def merge(
        self, stats: RowStatistics, factor: Tensor, pre: Tensor
    ) -> tuple[RowStatistics, Tensor]:
        """Statistics (c,) of whole rows, and pre(g) (a,) of the targets, from all ranks' parts.

        `pre` is -inf where the target is another rank's.
        """
        column = (stats.top_column + self.start).to(stats.top.dtype)  # exact up to 2^24 columns
        packed = torch.cat([stats.top, column, stats.rest, stats.spread, pre])
        parts = list(self._gather(packed))
        n_slots = stats.top.shape[0]
        whole: RowStatistics | None = None
        for part in parts:
            top, column, rest, spread = part[: 4 * n_slots].view(4, n_slots)
            other = RowStatistics(top, column.long(), rest, spread)
            whole = other if whole is None else joined(whole, other, factor)
        assert whole is not None
        return whole, torch.stack([part[4 * n_slots :] for part in parts]).amax(0)

    def winners(self, scores: Tensor, ids: Tensor) -> Tensor:
        """(c,) int64 ids of the best of all ranks' scores (c,), the lowest ones of ties.

        ids: (c,), of the whole vocabulary, what each score is of.
        """
        packed = torch.stack([scores.double(), ids.double()])  # exact up to 2^53
        scores_of_ranks, ids_of_ranks = self._gather(packed).unbind(1)
        best = scores_of_ranks.max(0, keepdim=True).values
        behind = scores_of_ranks != best  # all of them beside a NaN, which the statistics know of
        return ids_of_ranks.masked_fill(behind, self.total - 1).amin(0).long()

    def gather_rows(self, rows: Tensor) -> Tensor:
        """(ranks * n, D) from each rank's (n, D).

        Raises:
            ValueError: on the CPU, if ranks have different numbers of rows.
        """
        if rows.device.type == "cpu":
            counts = self._gather(torch.tensor([len(rows)])).flatten().tolist()
            checks.need(len(set(counts)) == 1, "hidden", "as many rows on every rank", counts)
        if not rows.numel():
            return rows
        return self._gather(rows.contiguous()).flatten(0, 1)

    def scatter_rows(self, parts: Tensor) -> Tensor:
        """This rank's (n, D) of the sum of all ranks' `parts` (ranks * n, D)."""
        if not parts.numel():
            return parts
        out = parts.new_empty((parts.shape[0] // self.n_ranks, *parts.shape[1:]))
        dist.reduce_scatter(out, list(parts.contiguous().chunk(self.n_ranks)), group=self.group)
        return out

    def sum_over_ranks(self, part: Tensor) -> Tensor:
        """The sum of all ranks' `part`, in its place."""
        dist.all_reduce(part, group=self.group)
        return part

    def _gather(self, part: Tensor) -> Tensor:
        return _gathered(part, self.group)


def joined(low: RowStatistics, high: RowStatistics, factor: Tensor) -> RowStatistics:
    """Statistics (S,) of rows from those of two disjoint sets of their columns; ties go to `low`.

    factor: (S,) from distances of pre(g) to nats.
    """
    take_high = high.top > low.top  # a NaN of either set gets into the sums
    best, other = (
        RowStatistics(*(torch.where(take_high, a, b) for a, b in zip(*pair, strict=True)))
        for pair in ((high, low), (low, high))
    )
    # A set that is all -inf has no mass, whether or not the other one is, too.
    gap = (other.top - torch.where(best.top == -torch.inf, 0.0, best.top)) * factor
    gap = torch.where(gap <= FLOOR, FLOOR, gap)
    mass = gap.exp()
    others = mass * (1.0 + other.rest)
    spread = mass * (other.spread - gap * (1.0 + other.rest))
    return RowStatistics(best.top, best.top_column, best.rest + others, best.spread + spread)


def join_shards(
    group: dist.ProcessGroup, n_local: int, traits: dict[str, float], device: torch.device
) -> Shard:
    """This rank's shard, after all ranks have said how many columns they have.

    Raises:
        ValueError: this process is not in the group, or ranks differ in a trait.
    """
    need_member(group)
    n_ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    mine = torch.tensor([n_local, *traits.values()], dtype=torch.float64, device=device)
    counts, *columns = _gathered(mine, group).cpu().t().tolist()
    for name, values in zip(traits, columns, strict=True):
        if len(set(values)) > 1:
            raise ValueError(f"group: need heads of one {name} on all ranks, got {values}")
    starts = [0, *torch.tensor(counts).long().cumsum(0).tolist()]
    return Shard(group, starts[rank], starts[-1], n_ranks, int(max(counts)))


def _gathered(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(ranks, ...) all ranks' `part`."""
    out = part.new_empty((dist.get_world_size(group), *part.shape))
    dist.all_gather(list(out.unbind(0)), part, group=group)
    return out
