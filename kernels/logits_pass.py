"""Logits that exist: their statistics, and the gradient they get.

Bytes a logit of s bytes: scoring reads s, the gradient reads s and writes s. Where both follow each
other on a chunk that fits into a cache, memory sees one read and one write.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rollfuse.kernels.arguments import OfPairs, safe_targets
from rollfuse.kernels.gradient import Targets, row_coefficients, row_gradient
from rollfuse.kernels.layout import Chunk, Layout
from rollfuse.kernels.rows import RowStatistics, Transform, compute_dtype
from rollfuse.kernels.statistics import (
    row_entropy,
    row_statistics,
    target_logp,
    target_pre,
    target_shift,
    with_target,
)


class LogitsView(NamedTuple):
    """Logits and what is asked of them."""

    logits: Tensor  # (R, V)
    transform: Transform
    rows: Tensor | None  # (S,) row of each slot; None: slot s is row s
    slot: Tensor  # (A,)
    column: Tensor  # (A,)
    one_per_slot: bool


class ScoredLogits(NamedTuple):
    """What `score_logits` found."""

    logp: Tensor  # (A,)
    entropy: Tensor  # (A,)
    pre: Tensor  # (A,)
    stats: RowStatistics


def view_of_logits(logits: Tensor, layout: Layout, pairs: OfPairs) -> LogitsView:
    """The view of a layout no row of which has two slots."""
    assert layout.unique_rows
    targets, temperature, _ = pairs
    dtype = compute_dtype(logits.dtype)
    if isinstance(temperature, Tensor):
        factor = 1.0 / layout.of_slots(layout.pick(temperature.to(dtype)))
    else:
        factor = torch.full((layout.n_slots,), 1.0 / temperature, dtype=dtype, device=logits.device)
    support = pairs.support_of_slots(layout, dtype)
    return LogitsView(
        logits,
        Transform(factor, reach=None if support is None else support / factor),
        layout.rows,
        layout.slot,
        safe_targets(layout.pick(targets.long()), logits.shape[1]),
        layout.one_per_slot,
    )


def score_logits(view: LogitsView) -> ScoredLogits:
    """One read of the logits."""
    row = view.slot if view.rows is None else view.rows[view.slot]
    with torch.autocast(view.logits.device.type, enabled=False):
        stats = row_statistics(view.logits, view.transform, view.rows)
        pre = target_pre(view.logits, view.transform, row, view.column)
        shifted = target_shift(pre, stats, view.transform, view.slot)
        stats = with_target(stats, pre, shifted, view.transform)
        logp = target_logp(stats, shifted, view.slot, view.column)
    return ScoredLogits(logp, row_entropy(stats)[view.slot], pre, stats)


def gradient_of_logits(
    view: LogitsView,
    scored: ScoredLogits,
    dlogp: Tensor,
    dentropy: Tensor | None,
    *,
    overwrite: bool,
) -> Tensor:
    """(R, V) d loss / d logits; with `overwrite` over the logits. One read and one write."""
    out = new_gradient(view, overwrite=overwrite)
    return write_gradient(view, scored, dlogp, dentropy, out)


def new_gradient(view: LogitsView, *, overwrite: bool) -> Tensor:
    """(R, V) room for the gradient, 0 in the rows of no slot; with `overwrite` the logits' own."""
    logits = view.logits
    n_slots = view.transform.factor.shape[0]
    every_row = view.rows is None and n_slots == logits.shape[0]
    # The kernels write rows of neighbouring columns.
    if not (overwrite and logits.stride(1) == 1):
        new = torch.empty_like if every_row else torch.zeros_like
        return new(logits, memory_format=torch.contiguous_format)
    if not every_row:
        logits[_rows_without_slot(view.rows, n_slots, logits)] = 0
    return logits


def write_gradient(
    view: LogitsView, scored: ScoredLogits, dlogp: Tensor, dentropy: Tensor | None, out: Tensor
) -> Tensor:
    """Write d loss / d logits of the view's slots into their rows of `out`, which is returned."""
    targets = Targets(view.slot, view.column, scored.pre, scored.logp, view.one_per_slot)
    coefficients = row_coefficients(scored.stats, view.transform, targets, dlogp, dentropy)
    return row_gradient(view.logits, view.transform, scored.stats, coefficients, out, view.rows)


def part_of_view(view: LogitsView, chunk: Chunk) -> LogitsView:
    """The view of a chunk's slots and pairs."""
    slots, pairs = slice(chunk.start, chunk.stop), slice(chunk.first, chunk.last)
    return LogitsView(
        view.logits[slots] if view.rows is None else view.logits,
        view.transform.rows(chunk.start, chunk.stop),
        None if view.rows is None else view.rows[slots],
        view.slot[pairs] - chunk.start,
        view.column[pairs],
        view.one_per_slot,
    )


def _rows_without_slot(rows: Tensor | None, n_slots: int, logits: Tensor) -> Tensor:
    without = torch.ones(logits.shape[0], dtype=torch.bool, device=logits.device)
    without[:n_slots] = rows is not None
    if rows is not None:
        without[rows] = False
    return without
