"""Row statistics: all that a row of logits must tell for log-probs, entropy and their gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rollfuse.kernels.dispatch import backend, use_triton
from rollfuse.kernels.rows import FLOOR, RowStatistics, Transform, compute_dtype

if backend.name != "cpu":
    from rollfuse.kernels._triton.statistics import row_statistics as row_statistics_triton

# Rows are handled in blocks of about this many elements: 2 MiB of float32, shared among the cores,
# stay in their caches. Half of it costs a quarter more in calls, twice as much gains nothing.
_BLOCK_ELEMENTS = 1 << 19
# The PyTorch path measures distances from the maximum in bits, because torch.exp2 takes a third of
# torch.exp's time on a CPU; the factor that turns logits into nats turns them into bits as well.
_BITS_PER_NAT = 1.0 / math.log(2.0)
NATS_PER_BIT = math.log(2.0)
# Columns of a group in the search for a maximum.
_GROUP = 64


class Exponentials(NamedTuple):
    """Where the statistics pass leaves exponentials for a later gradient.

    Slot s is row rows[s] of them, or row s.
    """

    values: Tensor  # (S, V) bfloat16, exp(z - z of the block's maximum)
    tops: Tensor  # (S, blocks) float32, largest pre(g) of each block; the PyTorch path has one
    rows: Tensor | None = None  # int64


def row_statistics(
    logits: Tensor,
    transform: Transform,
    rows: Tensor | None = None,
    keep: Exponentials | None = None,
) -> RowStatistics:
    """Statistics of the slots of `logits` (R, V); slot s is row rows[s], or row s."""
    if use_triton(logits) and logits.dtype != torch.float64:
        return row_statistics_triton(logits, transform, rows, keep)
    return row_statistics_torch(logits, transform, rows, keep)


def row_statistics_torch(
    logits: Tensor,
    transform: Transform,
    rows: Tensor | None = None,
    keep: Exponentials | None = None,
) -> RowStatistics:
    n_slots, dtype = transform.factor.shape[0], compute_dtype(logits.dtype)
    stats = RowStatistics(
        logits.new_empty(n_slots, dtype=dtype),
        logits.new_empty(n_slots, dtype=torch.int64),
        logits.new_empty(n_slots, dtype=dtype),
        logits.new_empty(n_slots, dtype=dtype),
    )
    scratch = Scratch(logits, transform)
    for start, stop in scratch.blocks(n_slots):
        part = transform.rows(start, stop)
        pre = prepare(_take(logits, rows, start, stop), part, scratch)
        index = first_argmax(pre)
        top = pre.gather(1, index.unsqueeze(1)).squeeze(1)
        bits = bits_from_top(pre, top, part, scratch.first)
        exps = exponentials(bits, part, scratch.second[: stop - start])
        if keep is not None:
            keep.values[start:stop] = exps
            keep.tops[start:stop, 0] = top
        exps.scatter_(1, index.unsqueeze(1), 0.0)
        stats.top[start:stop] = top
        stats.top_column[start:stop] = index
        stats.rest[start:stop] = exps.sum(1)
        spread = exps.mul_(bits).sum(1)
        if bool(spread.isnan().any()):  # 0 * inf at -inf logits; true NaNs survive the clamp
            bits.clamp_(min=FLOOR)
            exps = exponentials(bits, part, exps).scatter_(1, index.unsqueeze(1), 0.0)
            spread = exps.mul_(bits).sum(1)
        stats.spread[start:stop] = spread.mul_(-NATS_PER_BIT)
    return stats


def first_argmax(scores: Tensor) -> Tensor:
    """(N,) int64: the lowest column of each row's maximum, or one of a row's NaNs.

    Maxima of groups are vectorised, torch's search for a column is not: a tenth of the time of
    searching whole rows at V = 152k.
    """
    n_rows, n_cols = scores.shape
    in_groups = n_cols // _GROUP * _GROUP
    if in_groups < 2 * _GROUP:
        return scores.argmax(dim=1)
    groups = scores[:, :in_groups].view(n_rows, -1, _GROUP)
    group = groups.amax(2).argmax(1)
    members = groups[torch.arange(n_rows, device=scores.device), group]  # (N, 64)
    best, member = members.max(1)
    column = group * _GROUP + member
    if in_groups == n_cols:
        return column
    last, tail_column = scores[:, in_groups:].max(1)
    in_tail = (last > best) | (last.isnan() & ~best.isnan())
    return torch.where(in_tail, tail_column + in_groups, column)


class Scratch:
    """Block-sized buffers, reused for every block of rows; the third under bias or softcap."""

    def __init__(
        self, logits: Tensor, transform: Transform, block_elements: int = _BLOCK_ELEMENTS
    ) -> None:
        n_slots = transform.factor.shape[0]
        width = logits.shape[1]
        self.block_rows = max(1, min(n_slots, block_elements // max(width, 1)))
        dtype = compute_dtype(logits.dtype)
        self.first = logits.new_empty((self.block_rows, width), dtype=dtype)
        self.second = torch.empty_like(self.first)
        has_third = transform.bias is not None or transform.pre_scale is not None
        self.third = torch.empty_like(self.first) if has_third else None

    def blocks(self, n_slots: int) -> Iterator[tuple[int, int]]:
        # As even as can be: a last block of one row would be summed in another order.
        n_blocks = -(-n_slots // self.block_rows)
        for i in range(n_blocks):
            yield n_slots * i // n_blocks, n_slots * (i + 1) // n_blocks

    @staticmethod
    def n_bytes(n_slots: int, width: int, itemsize: int, *, has_third: bool) -> int:
        """Bytes of the buffers for `n_slots` rows of `width` columns."""
        block_rows = max(1, min(n_slots, _BLOCK_ELEMENTS // max(width, 1)))
        return (2 + has_third) * block_rows * width * itemsize


def prepare(logits: Tensor, transform: Transform, scratch: Scratch) -> Tensor:
    """pre(g) of a block of rows; `logits` itself where there is nothing to do."""
    pre = logits.to(compute_dtype(logits.dtype))
    if scratch.third is None:
        return pre
    out = scratch.third[: pre.shape[0]]
    if transform.bias is not None:
        pre = torch.add(pre, transform.bias, out=out)
    if transform.pre_scale is not None:
        pre = torch.mul(pre, transform.pre_scale, out=out).tanh_()
    return pre


def bits_from_top(pre: Tensor, top: Tensor, transform: Transform, out: Tensor) -> Tensor:
    """(z - z_top) / ln 2 of a block of rows, into the first rows of `out`; FLOOR out of reach."""
    distance = torch.sub(pre, finite(top).unsqueeze(1), out=out[: pre.shape[0]])
    factor = (transform.factor * _BITS_PER_NAT).unsqueeze(1)
    if transform.reach is None:
        return distance.mul_(factor)
    is_out = distance < -transform.reach.unsqueeze(1)
    return distance.mul_(factor).masked_fill_(is_out, FLOOR)


def exponentials(bits: Tensor, transform: Transform, out: Tensor) -> Tensor:
    """2^bits, into `out`.

    torch.exp2 computes what is left over at the end of a buffer, or of a thread's share of it, with
    another function than the rest. torch.exp does not, and takes three times as long.
    """
    if not transform.invariant:
        return torch.exp2(bits, out=out)
    return torch.mul(bits, NATS_PER_BIT, out=out).exp_()


def with_target(
    stats: RowStatistics, pre: Tensor, shifted: Tensor, transform: Transform
) -> RowStatistics:
    """Statistics with the slots' own targets in them, where those are out of reach.

    One pair a slot, in order; pre: pre(g) (S,) of the targets, shifted: their z - z_top.
    """
    if transform.reach is None:
        return stats
    missing = (pre - finite(stats.top) < -transform.reach) & (shifted > FLOOR)
    mass = torch.where(missing, shifted.exp(), 0.0)
    spread = torch.where(missing, mass * -shifted, 0.0)
    return RowStatistics(stats.top, stats.top_column, stats.rest + mass, stats.spread + spread)


def target_pre(logits: Tensor, transform: Transform, row: Tensor, target: Tensor) -> Tensor:
    """pre(g) (P,) of each pair's target; row and target (P,)."""
    pre = logits[row, target].to(compute_dtype(logits.dtype))
    if transform.bias is not None:
        pre = pre + transform.bias[target]
    if transform.pre_scale is not None:
        pre = torch.tanh(pre * transform.pre_scale)
    return pre


def target_shift(pre: Tensor, stats: RowStatistics, transform: Transform, slot: Tensor) -> Tensor:
    """z - z_top (P,) of targets with `pre` = pre(g) (P,)."""
    return (pre - finite(stats.top)[slot]) * transform.factor[slot]


def target_logp(stats: RowStatistics, shifted: Tensor, slot: Tensor, target: Tensor) -> Tensor:
    """log p(target) (P,) in nats from `shifted` = z_target - z_top (P,).

    logp = -softplus(log(sum over the others of exp(z - z_top)) - shifted): the target is left out
    of the sum, so that 1 - p keeps its digits however confident the row is.
    """
    is_top = target == stats.top_column[slot]
    rest = stats.rest[slot]
    # The top column's own exponential is 1; subtracting another one from 1 + rest loses nothing.
    others = torch.where(is_top, rest, 1.0 + (rest - shifted.exp()).clamp_min(0.0))
    logp = -torch.logaddexp(others.log() - shifted, torch.zeros_like(shifted))
    # A NaN is always in the sums; the kernels' maxima, which are compared, may not see it.
    forbidden = ((shifted <= FLOOR) | (stats.top[slot] == -torch.inf)) & ~rest.isnan()
    return torch.where(forbidden, -torch.inf, logp)


def row_entropy(stats: RowStatistics) -> Tensor:
    """Entropy (S,) in nats, centred at the maximum: a sum of positive terms, without cancellation.

    0 where the whole row is -inf.
    """
    return torch.log1p(stats.rest) + stats.spread / (1.0 + stats.rest)


def _take(logits: Tensor, rows: Tensor | None, start: int, stop: int) -> Tensor:
    return logits[start:stop] if rows is None else logits[rows[start:stop]]


def finite(top: Tensor) -> Tensor:
    """`top` with 0 for -inf, so that a row of -inf shifts to -inf and not to NaN."""
    return torch.where(top == -torch.inf, 0.0, top)
