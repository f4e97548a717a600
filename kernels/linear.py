"""linear_logp_entropy: hidden states and the head in, log-probs and entropies out, any gradient.

The (T, V) logits need not exist: a chunk of rows is projected and reduced to statistics. For the
backward the rows are held as far as there is room (plan `hold`), or projected again (`recompute`),
or, under a head without gradient, the unit gradients d logp / d hidden are scaled (`unit`).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rollfuse.kernels import checks, traced
from rollfuse.kernels.arguments import (
    OfPairs,
    check_pair_vectors,
    describe,
    make_inputs,
    need_targets_below,
    needed_gradients,
)
from rollfuse.kernels.head import Head, as_head, flatten_hidden
from rollfuse.kernels.layout import Layout, Request, build_layout
from rollfuse.kernels.plan import Plan, PlanReport, choose, need_plan
from rollfuse.kernels.rows import LogpEntropy
from rollfuse.kernels.two_phase import TwoPhase, logp_and_entropy


def linear_logp_entropy(  # noqa: PLR0913  (the signature is the published API)
    hidden: Tensor,
    head: Head | Tensor,
    targets: Tensor,
    *,
    rows: Tensor | None = None,
    temperature: Tensor | float = 1.0,
    plan: Plan = Plan(),
) -> LogpEntropy:
    """Log-probs of `targets` and entropies of their rows, without the logits in memory.

    logits = softcap(scale * (hidden[rows] @ W.T + b)) / temperature
    logp = log_softmax(logits)[p, targets[p]]; entropy = -sum(softmax * log_softmax)

    Args:
        hidden: (R, D) or (B, L, D), any of float32, bfloat16, float16, float64.
        head: the LM head, or its (V, D) weight.
        targets: (P,) int64, in [0, V).
        rows: (P,) int64, the row of each pair; None: pair p has row p, and P is R.
        temperature: > 0; one float, or (P,).
        plan: `unit`, `hold`, `recompute` or None; a byte budget.

    Returns:
        (logp, entropy), (P,) each, differentiable in hidden, weight and bias. A row that is -inf
        everywhere gives logp -inf, entropy 0 and no gradient.

    Raises:
        TypeError, ValueError: wrong shapes, dtypes, devices, values, plan, or too small a budget.
    """
    need_plan(plan)
    head = as_head(head)
    hidden = flatten_hidden(hidden, head)
    checks.need_int(targets, "targets")
    checks.need(targets.dim() == 1, "targets", "shape (P,)", tuple(targets.shape))
    checks.need_same_device(targets, hidden, "targets", "hidden")
    if torch.compiler.is_compiling():
        found = traced.linear_scores(hidden, head, targets, rows, temperature, plan=plan)
        return LogpEntropy(*found)
    need_targets_below(targets, head.vocabulary)
    n_pairs = targets.shape[0]
    check_pair_vectors(rows, temperature, n_pairs, hidden)
    if plan.kind == "fused":
        raise ValueError("plan: 'fused' needs an objective; use linear_policy_loss, or 'recompute'")
    request = Request(n_pairs, head.n_rows(hidden), rows, temperature, slot_per_pair=plan.invariant)
    layout = build_layout(request, hidden.device)
    report = choose(describe(hidden, head, layout, n_pairs), plan)
    if report.kind == "unit" and not layout.one_per_slot:
        # A unit gradient belongs to one pair: give each its own slot.
        request = replace(request, slot_per_pair=True)
        layout = build_layout(request, hidden.device)
        report = choose(describe(hidden, head, layout, n_pairs), plan)
    pairs = OfPairs(targets, temperature)
    found = linear_over_layout(hidden, head, layout, pairs, report)
    return LogpEntropy(*(layout.spread(values, n_pairs, 0.0) for values in found))


def linear_over_layout(
    hidden: Tensor,
    head: Head,
    layout: Layout,
    pairs: OfPairs,
    report: PlanReport,
) -> LogpEntropy:
    """(A,) values of a layout's pairs, in its order; two-phase plans only."""
    inputs = make_inputs(hidden, head, layout, pairs, slot_multiple=report.slot_multiple)
    call = TwoPhase(inputs, report, needed_gradients(hidden, head))
    logp, entropy = logp_and_entropy(hidden, head, call)
    return LogpEntropy(logp[: layout.n_pairs], entropy[: layout.n_pairs])
