"""logp_entropy: log-probs and entropies from logits that exist already.

Bytes a logit of s bytes: the forward reads s, the backward reads s and writes s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from rollfuse.kernels import checks
from rollfuse.kernels.gradient import Targets, row_coefficients, row_gradient
from rollfuse.kernels.layout import Layout, Request, build_layout
from rollfuse.kernels.linear import LogpEntropy, check_pair_vectors, need_targets_below
from rollfuse.kernels.rows import RowStatistics, Transform, compute_dtype
from rollfuse.kernels.statistics import (
    row_entropy,
    row_statistics,
    target_logp,
    target_shift,
)


def logp_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    rows: Tensor | None = None,
    temperature: Tensor | float = 1.0,
) -> LogpEntropy:
    """Log-probs of `targets` and entropies of their rows.

    logp = log_softmax(logits[rows] / temperature)[p, targets[p]]; entropy in nats, likewise

    Args:
        logits: (R, V) or (B, L, V), any of float32, bfloat16, float16, float64.
        targets: (P,) int64, in [0, V).
        rows: (P,) int64, the row of each pair; None: pair p has row p, and P is R.
        temperature: > 0; one float, or (P,).

    Returns:
        (logp, entropy), (P,) each, float32 (float64 for float64 logits), differentiable in logits.

    Raises:
        TypeError, ValueError: wrong shapes, dtypes, devices or values.
    """
    flat = flatten_logits(logits)
    checks.need_int(targets, "targets")
    checks.need(targets.dim() == 1, "targets", "shape (P,)", tuple(targets.shape))
    checks.need_same_device(targets, flat, "targets", "logits")
    need_targets_below(targets, flat.shape[1])
    check_pair_vectors(rows, temperature, targets.shape[0], flat)
    request = Request(targets.shape[0], flat.shape[0], rows, temperature, name="logits")
    layout = build_layout(request, flat.device)
    found = logp_entropy_over_layout(flat, layout, targets, temperature, overwrite=False)
    return LogpEntropy(*(layout.spread(values, targets.shape[0], 0.0) for values in found))


def flatten_logits(logits: Tensor) -> Tensor:
    """`logits` as (R, V), checked."""
    checks.need_float(logits, "logits")
    good = logits.dim() >= 2 and logits.shape[-1] > 0
    checks.need(good, "logits", "shape (R, V) or (B, L, V), V >= 1", tuple(logits.shape))
    return logits.flatten(0, -2)


def logp_entropy_over_layout(
    logits: Tensor,
    layout: Layout,
    targets: Tensor,
    temperature: Tensor | float,
    *,
    overwrite: bool,
) -> LogpEntropy:
    """(A,) values of a layout's pairs, in its order, from (R, V) logits.

    With `overwrite` the backward's result takes the logits' place in memory.
    """
    rows = layout.rows
    if not layout.unique_rows:
        # A row at several temperatures would be written by several slots: give each a copy.
        assert rows is not None
        logits, rows = logits[rows], None
    dtype = compute_dtype(logits.dtype)
    if isinstance(temperature, Tensor):
        factor = 1.0 / layout.of_slots(layout.pick(temperature.to(dtype)))
    else:
        factor = torch.full((layout.n_slots,), 1.0 / temperature, dtype=dtype, device=logits.device)
    call = _Call(
        Transform(factor),
        rows,
        layout.slot,
        layout.pick(targets.long()),
        layout.one_per_slot,
        overwrite,
    )
    apply = cast(Callable[..., tuple[Tensor, Tensor]], _LogpEntropy.apply)
    return LogpEntropy(*apply(logits, call))


@dataclass(frozen=True, slots=True)
class _Call:
    transform: Transform
    rows: Tensor | None  # (S,)
    slot: Tensor  # (A,)
    column: Tensor  # (A,)
    one_per_slot: bool
    overwrite: bool


class _LogpEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, call: _Call) -> tuple[Tensor, Tensor]:
        row = call.slot if call.rows is None else call.rows[call.slot]
        pairs = (row, call.slot, call.column)
        with torch.autocast(logits.device.type, enabled=False):
            stats = row_statistics(logits, call.transform, call.rows)
            pre, shifted = target_shift(logits, stats, call.transform, pairs)
            logp = target_logp(stats, shifted, call.slot, call.column)
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, pre, logp, *stats)
        return logp, row_entropy(stats)[call.slot]

    @staticmethod
    def backward(ctx: Any, dlogp: Tensor | None, dentropy: Tensor | None) -> tuple[Tensor, None]:
        checks.refuse_second_derivative()
        logits, pre, logp, *saved = ctx.saved_tensors
        call: _Call = ctx.call
        if dlogp is None:
            dlogp = torch.zeros_like(logp)
        stats = RowStatistics(*saved)
        targets = Targets(call.slot, call.column, pre, logp, call.one_per_slot)
        coefficients = row_coefficients(stats, call.transform, targets, dlogp, dentropy)
        n_slots, n_rows = stats.top.shape[0], logits.shape[0]
        every_row = call.rows is None and n_slots == n_rows
        # The kernels write rows of neighbouring columns.
        if call.overwrite and logits.stride(1) == 1:
            out = logits.detach()
            if not every_row:
                out[_rows_without_slot(call.rows, n_slots, logits)] = 0
        else:
            new = torch.empty_like if every_row else torch.zeros_like
            out = new(logits, memory_format=torch.contiguous_format)
        return row_gradient(logits, call.transform, stats, coefficients, out, call.rows), None


def _rows_without_slot(rows: Tensor | None, n_slots: int, logits: Tensor) -> Tensor:
    without = torch.ones(logits.shape[0], dtype=torch.bool, device=logits.device)
    without[:n_slots] = rows is not None
    if rows is not None:
        without[rows] = False
    return without
