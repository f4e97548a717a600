"""The gradient of logits: from d loss / d (logp, entropy) of pairs to d loss / d logits of rows.

With C the sum of dlogp and E the sum of dentropy of a row's pairs, p the softmax and H the entropy:

    dz_j = -C p_j - E p_j (log p_j + H)                                   (a column nobody targets)
    dz_t = C_t (1 - p_t) - (C - C_t) p_t - E p_t (log p_t + H)            (C_t: pairs that target t)

The first line is exp(z_j - z_top) * (alpha + beta (z_j - z_top)), one pass over the row; the
second replaces the few target columns, with 1 - p_t from expm1 so that it keeps its digits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rollfuse.kernels.dispatch import backend, use_triton
from rollfuse.kernels.rows import FLOOR, RowCoefficients, RowStatistics, Transform
from rollfuse.kernels.statistics import (
    NATS_PER_BIT,
    Exponentials,
    Scratch,
    bits_from_top,
    exponentials,
    finite,
    prepare,
    row_entropy,
)

if backend.name != "cpu":
    from rollfuse.kernels._triton.gradient import (
        fill_from_exponentials as fill_from_exponentials_triton,
    )
    from rollfuse.kernels._triton.gradient import fill_gradient as fill_gradient_triton


class Targets(NamedTuple):
    """Each pair's target inside its slot; (P,) each."""

    slot: Tensor  # int64
    column: Tensor  # int64, in [0, V)
    pre: Tensor  # pre(g) of the target
    logp: Tensor  # log p(target)
    one_per_slot: bool  # no two pairs share a slot
    beyond: bool = False  # a column may be V, past the row, where nobody reads


def row_coefficients(
    stats: RowStatistics,
    transform: Transform,
    targets: Targets,
    dlogp: Tensor,
    dentropy: Tensor | None,
) -> RowCoefficients:
    """Sum the pairs' derivatives (P,) into what each row and each target column gets."""
    n_slots = stats.top.shape[0]
    slot, column, pre, logp, _, beyond = targets
    dead = stats.top == -torch.inf  # a row of -inf gets no gradient
    by_target, by_row = _sum_by_target(targets, torch.where(dead[slot], 0.0, dlogp), n_slots)
    total = 1.0 + stats.rest
    entropy = row_entropy(stats)
    p = logp.exp()
    value = by_target * -torch.expm1(logp) - (by_row[slot] - by_target) * p
    beta = None
    alpha = -by_row / total
    if dentropy is not None:
        row_dentropy = dentropy.new_zeros(n_slots).index_add_(0, slot, dentropy)
        row_dentropy = torch.where(dead, 0.0, row_dentropy)
        alpha = alpha - row_dentropy * (entropy - torch.log1p(stats.rest)) / total
        beta = -row_dentropy / total * transform.factor
        surprise = torch.where(p > 0, p * (logp + entropy[slot]), 0.0)
        value = value - row_dentropy[slot] * surprise
    alpha = alpha * transform.factor
    value = value * transform.factor[slot]
    if transform.pre_scale is not None:
        value = value * ((1.0 - pre * pre) * transform.pre_scale)
    return RowCoefficients(alpha, beta, slot, column, value, beyond)


def row_gradient(  # noqa: PLR0913  (one launch: inputs, vectors, output, map)
    logits: Tensor,
    transform: Transform,
    stats: RowStatistics,
    coefficients: RowCoefficients,
    out: Tensor,
    rows: Tensor | None = None,
) -> Tensor:
    """Write d loss / d logits of the slots into their rows of `out` (R, V), which is returned.

    `out` may be `logits`, or its storage seen in a narrower dtype (each row in place); rows of no
    slot are left alone. No row may hold two slots.
    """
    if use_triton(logits) and logits.dtype != torch.float64:
        fill_gradient_triton(logits, transform, stats, coefficients, out, rows)
    else:
        fill_gradient_torch(logits, transform, stats, coefficients, out, rows)
    _place_targets(coefficients, out, rows)
    return out


def row_gradient_from_exponentials(
    keep: Exponentials,
    transform: Transform,
    stats: RowStatistics,
    coefficients: RowCoefficients,
    out: Tensor,
) -> Tensor:
    """`row_gradient` of the rows whose exponentials were kept, into the rows of `out` (S, V).

    Without a softcap, whose derivative needs the logits themselves.
    """
    assert transform.pre_scale is None
    assert transform.reach is None
    fill = fill_from_exponentials_torch
    if use_triton(out):
        fill = fill_from_exponentials_triton
    fill(keep, transform, stats, coefficients, out)
    _place_targets(coefficients, out, None)
    return out


def _place_targets(coefficients: RowCoefficients, out: Tensor, rows: Tensor | None) -> None:
    """Replace the target columns; one of them may be the column past the row, if there is room."""
    row = coefficients.slot if rows is None else rows[coefficients.slot]
    if coefficients.beyond:
        assert out.stride(0) > out.shape[1]
        shape = (out.shape[0], out.shape[1] + 1)
        out = out.as_strided(shape, out.stride(), out.storage_offset())
    out[row, coefficients.column] = coefficients.value.to(out.dtype)


def fill_from_exponentials_torch(
    keep: Exponentials,
    transform: Transform,
    stats: RowStatistics,
    coefficients: RowCoefficients,
    out: Tensor,
) -> None:
    """The columns nobody targets, from exponentials relative to the columns' own maximum.

    The row's maximum may be higher, and elsewhere: its columns may be split over ranks.
    """
    scratch = Scratch(out, transform)
    for start, stop in scratch.blocks(stats.top.shape[0]):
        where = slice(start, stop) if keep.rows is None else keep.rows[start:stop]
        exps = scratch.second[: stop - start].copy_(keep.values[where])
        below = (keep.tops[where, 0] - finite(stats.top[start:stop])) * transform.factor[start:stop]
        exps.mul_(below.exp().unsqueeze(1))
        slope = coefficients.alpha[start:stop].unsqueeze(1)
        if coefficients.beta is not None:
            bits = torch.log2(exps, out=scratch.first[: stop - start]).clamp_(min=FLOOR)
            beta = coefficients.beta[start:stop] * NATS_PER_BIT
            slope = bits.mul_(beta.unsqueeze(1)).add_(slope)
        out[start:stop] = exps.mul_(slope).to(out.dtype)


def fill_gradient_torch(  # noqa: PLR0913
    logits: Tensor,
    transform: Transform,
    stats: RowStatistics,
    coefficients: RowCoefficients,
    out: Tensor,
    rows: Tensor | None,
) -> None:
    """The columns nobody targets; the target columns get a value that is replaced afterwards."""
    n_slots = stats.top.shape[0]
    scratch = Scratch(logits, transform)
    for start, stop in scratch.blocks(n_slots):
        part = transform.rows(start, stop)
        where = slice(start, stop) if rows is None else rows[start:stop]
        pre = prepare(logits[where], part, scratch)
        bits = bits_from_top(pre, stats.top[start:stop], part, scratch.first)
        exps = exponentials(bits, part, scratch.second[: stop - start])
        slope = coefficients.alpha[start:stop].unsqueeze(1)
        if coefficients.beta is not None:
            beta = coefficients.beta[start:stop] * NATS_PER_BIT
            slope = bits.clamp_(min=FLOOR).mul_(beta.unsqueeze(1)).add_(slope)
        if transform.pre_scale is not None:
            # d tanh(x) = 1 - tanh(x)^2; `pre` is the scratch's and no longer needed.
            exps.mul_(pre.square_().neg_().add_(1.0).mul_(transform.pre_scale))
        if rows is None and out.dtype == exps.dtype:
            torch.mul(exps, slope, out=out[where])
        else:
            out[where] = exps.mul_(slope).to(out.dtype)


def _sum_by_target(targets: Targets, dlogp: Tensor, n_slots: int) -> tuple[Tensor, Tensor]:
    """Sums of dlogp (P,): over the pairs that share slot and column, and (S,) over the slot.

    The slot's sum adds up the columns' sums, so that `row sum - own sum` is exactly 0 where all
    pairs of a row have one target, as in a plain sequence.
    """
    slot = targets.slot
    by_row = dlogp.new_zeros(n_slots)
    if targets.one_per_slot:
        return dlogp, by_row.index_copy_(0, slot, dlogp)
    # Sort by slot, then column: pairs of one target become neighbours (both sorts are stable).
    order = targets.column.argsort(stable=True)
    order = order[slot[order].argsort(stable=True)]
    sorted_slot, sorted_column = slot[order], targets.column[order]
    leads = torch.ones_like(slot, dtype=torch.bool)
    leads[1:] = (sorted_slot.diff() != 0) | (sorted_column.diff() != 0)
    group = leads.long().cumsum(0) - 1
    sums = torch.zeros_like(dlogp).index_add_(0, group, dlogp[order])[group]
    by_row.index_add_(0, sorted_slot, torch.where(leads, sums, 0.0))
    return torch.empty_like(sums).index_copy_(0, order, sums), by_row
