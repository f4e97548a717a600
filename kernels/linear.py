"""linear_logp_entropy: hidden states and the head in, log-probs and entropies out, any gradient.

The (T, V) logits need not exist: a chunk of rows is projected and reduced to statistics. For the
backward the rows are held as far as there is room (plan `hold`), or projected again (`recompute`),
or, under a head without gradient, the unit gradients d logp / d hidden are scaled (`unit`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rollfuse.kernels import checks
from rollfuse.kernels.head import Head, as_head, flatten_hidden, operand_dtype
from rollfuse.kernels.head_pass import Inputs
from rollfuse.kernels.layout import Layout, Request, build_layout
from rollfuse.kernels.plan import Plan, PlanReport, Problem, choose
from rollfuse.kernels.rows import compute_dtype
from rollfuse.kernels.two_phase import TwoPhase, logp_and_entropy


class LogpEntropy(NamedTuple):
    """Both (P,), float32 (float64 for float64 inputs), in nats."""

    logp: Tensor
    entropy: Tensor


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
    head = as_head(head)
    hidden = flatten_hidden(hidden, head)
    checks.need_int(targets, "targets")
    checks.need(targets.dim() == 1, "targets", "shape (P,)", tuple(targets.shape))
    checks.need_same_device(targets, hidden, "targets", "hidden")
    need_targets_below(targets, head.vocabulary)
    n_pairs = targets.shape[0]
    check_pair_vectors(rows, temperature, n_pairs, hidden)
    if plan.kind == "fused":
        raise ValueError("plan: 'fused' needs an objective; use linear_policy_loss, or 'recompute'")
    request = Request(n_pairs, hidden.shape[0], rows, temperature)
    layout = build_layout(request, hidden.device)
    report = choose(describe(hidden, head, layout, n_pairs), plan)
    if report.kind == "unit" and not layout.one_per_slot:
        # A unit gradient belongs to one pair: give each its own slot.
        request = Request(n_pairs, hidden.shape[0], rows, temperature, slot_per_pair=True)
        layout = build_layout(request, hidden.device)
        report = choose(describe(hidden, head, layout, n_pairs), plan)
    inputs = make_inputs(hidden, head, layout, targets, temperature)
    found = linear_over_layout(hidden, head, inputs, report)
    return LogpEntropy(*(layout.spread(values, n_pairs, 0.0) for values in found))


def linear_over_layout(
    hidden: Tensor, head: Head, inputs: Inputs, report: PlanReport
) -> LogpEntropy:
    """(A,) values of a layout's pairs, in its order; two-phase plans only."""
    call = TwoPhase(inputs, report, needed_gradients(hidden, head))
    return LogpEntropy(*logp_and_entropy(hidden, head, call))


def needed_gradients(hidden: Tensor, head: Head) -> tuple[bool, bool, bool]:
    """Whether hidden, weight and bias need gradients here and now."""
    if not torch.is_grad_enabled():
        return False, False, False
    bias = head.bias is not None and head.bias.requires_grad
    return hidden.requires_grad, head.weight.requires_grad, bias


def make_inputs(
    hidden: Tensor, head: Head, layout: Layout, targets: Tensor, temperature: Tensor | float
) -> Inputs:
    """Detached inputs of a pass; targets and temperature (P,) in the batch's order."""
    operand = operand_dtype(hidden, head)
    wide = compute_dtype(operand)
    if isinstance(temperature, Tensor):
        of_slots = layout.of_slots(layout.pick(temperature.to(wide)))
    else:
        of_slots = hidden.new_full((layout.n_slots,), float(temperature), dtype=wide)
    detached = Head(
        head.weight.detach(),
        None if head.bias is None else head.bias.detach(),
        head.scale,
        head.softcap,
    )
    return Inputs(hidden.detach(), detached, operand, layout, layout.pick(targets.long()), of_slots)


def describe(
    hidden: Tensor, head: Head, layout: Layout, n_pairs: int, *, token_local: bool = False
) -> Problem:
    """The sizes and needs a plan is chosen for."""
    needs = needed_gradients(hidden, head)
    return Problem(
        n_slots=layout.n_slots,
        n_pairs=n_pairs,
        n_active=layout.n_pairs,
        width=head.width,
        vocabulary=head.vocabulary,
        operand=operand_dtype(hidden, head),
        hidden_dtype=hidden.dtype,
        weight_dtype=head.weight.dtype,
        device=hidden.device,
        needs_hidden=needs[0],
        needs_weight=needs[1] or needs[2],
        token_local=token_local,
        bias=head.bias is not None,
        softcap=head.softcap is not None,
    )


def need_targets_below(targets: Tensor, vocabulary: int) -> None:
    """Raise for a CPU target outside the vocabulary; device targets are flagged, see PolicyLoss."""
    if targets.device.type == "cpu" and targets.numel():
        low, high = int(targets.min()), int(targets.max())
        good = low >= 0 and high < vocabulary
        checks.need(good, "targets", f"token ids in [0, {vocabulary})", f"{low} to {high}")


def check_pair_vectors(
    rows: Tensor | None, temperature: Tensor | float, n_pairs: int, hidden: Tensor
) -> None:
    if rows is not None:
        checks.need_int(rows, "rows")
        checks.need_shape(rows, (n_pairs,), "rows", "one row a target")
        checks.need_same_device(rows, hidden, "rows", "hidden")
    if isinstance(temperature, Tensor):
        checks.need_float(temperature, "temperature")
        checks.need_shape(temperature, (n_pairs,), "temperature", "one a target")
        checks.need_same_device(temperature, hidden, "temperature", "hidden")
        if temperature.device.type == "cpu":
            good = bool((temperature.isfinite() & (temperature > 0)).all())
            checks.need(
                good,
                "temperature",
                "finite values > 0",
                temperature.min().item() if n_pairs else "none",
            )
    else:
        checks.need(
            0.0 < temperature < float("inf"), "temperature", "a finite value > 0", temperature
        )
