"""logp_entropy: log-probs and entropies from logits that exist already."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from rollfuse.kernels import checks, traced
from rollfuse.kernels.arguments import OfPairs, check_pair_vectors, need_targets_below
from rollfuse.kernels.layout import Layout, Request, build_layout
from rollfuse.kernels.logits_pass import (
    LogitsView,
    ScoredLogits,
    gradient_of_logits,
    score_logits,
    view_of_logits,
)
from rollfuse.kernels.rows import LogpEntropy, RowStatistics


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
    if torch.compiler.is_compiling():
        return LogpEntropy(*traced.logit_scores(flat, targets, rows, temperature))
    need_targets_below(targets, flat.shape[1])
    check_pair_vectors(rows, temperature, targets.shape[0], flat)
    request = Request(targets.shape[0], flat.shape[0], rows, temperature, name="logits")
    layout = build_layout(request, flat.device)
    pairs = OfPairs(targets, temperature)
    found = logp_entropy_over_layout(flat, layout, pairs, overwrite=False)
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
    pairs: OfPairs,
    *,
    overwrite: bool,
) -> LogpEntropy:
    """(A,) values of a layout's pairs, in its order, from (R, V) logits.

    With `overwrite` the backward's result takes the logits' place in memory.
    """
    if not layout.unique_rows:
        # A row at several temperatures would be written by several slots: give each a copy.
        assert layout.rows is not None
        logits, layout = logits[layout.rows], layout.with_a_row_each()
    view = view_of_logits(logits.detach(), layout, pairs)
    apply = cast(Callable[..., tuple[Tensor, Tensor]], _LogpEntropy.apply)
    return LogpEntropy(*apply(logits, view, overwrite))


class _LogpEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, view: LogitsView, overwrite: bool
    ) -> tuple[Tensor, Tensor]:
        found = score_logits(view)
        # The graph's own store notices in-place changes of the logits.
        ctx.view, ctx.overwrite = view._replace(logits=logits.new_empty(0)), overwrite
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, found.logp, found.entropy, found.pre, *found.stats)
        return found.logp, found.entropy

    @staticmethod
    def backward(ctx: Any, dlogp: Tensor | None, dentropy: Tensor | None) -> Any:
        checks.refuse_second_derivative()
        logits, logp, entropy, pre, *stats = ctx.saved_tensors
        scored = ScoredLogits(logp, entropy, pre, RowStatistics(*stats))
        if dlogp is None:
            dlogp = torch.zeros_like(logp)
        view = ctx.view._replace(logits=logits.detach())
        out = gradient_of_logits(view, scored, dlogp, dentropy, overwrite=ctx.overwrite)
        return out, None, None
