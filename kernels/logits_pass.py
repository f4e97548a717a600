"""Logits that exist: their statistics, and the gradient they get.

Bytes a logit of s bytes: scoring reads s, the gradient reads s and writes s.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rollfuse.kernels.arguments import safe_targets
from rollfuse.kernels.gradient import Targets, row_coefficients, row_gradient
from rollfuse.kernels.layout import Layout
from rollfuse.kernels.rows import RowStatistics, Transform, compute_dtype
from rollfuse.kernels.statistics import (
    row_entropy,
    row_statistics,
    target_logp,
    target_shift,
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


def view_of_logits(
    logits: Tensor, layout: Layout, targets: Tensor, temperature: Tensor | float
) -> LogitsView:
    """The view of a layout no row of which has two slots; targets, temperature (P,)."""
    assert layout.unique_rows
    dtype = compute_dtype(logits.dtype)
    if isinstance(temperature, Tensor):
        factor = 1.0 / layout.of_slots(layout.pick(temperature.to(dtype)))
    else:
        factor = torch.full((layout.n_slots,), 1.0 / temperature, dtype=dtype, device=logits.device)
    return LogitsView(
        logits,
        Transform(factor),
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
        pairs = (row, view.slot, view.column)
        pre, shifted = target_shift(view.logits, stats, view.transform, pairs)
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
    logits, stats = view.logits, scored.stats
    targets = Targets(view.slot, view.column, scored.pre, scored.logp, view.one_per_slot)
    coefficients = row_coefficients(stats, view.transform, targets, dlogp, dentropy)
    n_slots, n_rows = stats.top.shape[0], logits.shape[0]
    every_row = view.rows is None and n_slots == n_rows
    # The kernels write rows of neighbouring columns.
    if overwrite and logits.stride(1) == 1:
        out = logits
        if not every_row:
            out[_rows_without_slot(view.rows, n_slots, logits)] = 0
    else:
        new = torch.empty_like if every_row else torch.zeros_like
        out = new(logits, memory_format=torch.contiguous_format)
    return row_gradient(logits, view.transform, stats, coefficients, out, view.rows)


def _rows_without_slot(rows: Tensor | None, n_slots: int, logits: Tensor) -> Tensor:
    without = torch.ones(logits.shape[0], dtype=torch.bool, device=logits.device)
    without[:n_slots] = rows is not None
    if rows is not None:
        without[rows] = False
    return without
