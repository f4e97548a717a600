"""linear_logp_entropy: hidden states and the head in, log-probs and entropies out, any gradient.

The (T, V) logits never exist: a chunk of rows is projected, reduced to statistics and forgotten. In
the backward the chunk is projected again (plan `recompute`), or, under a head without gradient, the
unit gradients d logp / d hidden made on the way are scaled (plan `unit`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from rollfuse.kernels import checks
from rollfuse.kernels.head import Head, as_head, flatten_hidden, operand_dtype
from rollfuse.kernels.head_pass import GradientSink, HeadPass, Inputs, hand_over
from rollfuse.kernels.layout import Layout, Request, build_layout
from rollfuse.kernels.plan import Plan, PlanReport, Problem, choose
from rollfuse.kernels.rows import RowStatistics, compute_dtype


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
        plan: `unit`, `recompute` or None; a byte budget.

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
    call = _Call(inputs, report, needed_gradients(hidden, head))
    apply = cast(Callable[..., tuple[Tensor, Tensor]], _LinearLogpEntropy.apply)
    return LogpEntropy(*apply(hidden, head.weight, head.bias, call))


@dataclass(frozen=True, slots=True)
class _Call:
    inputs: Inputs
    report: PlanReport
    needs: tuple[bool, bool, bool]


class _LinearLogpEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: _Call
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(hidden.device.type, enabled=False):
            logp, entropy, stats, unit = _forward(call)
        # The inputs go through the graph's own store, which notices in-place changes and lets
        # go of them after the backward.
        ctx.save_for_backward(hidden, weight, bias, unit, *stats)
        ctx.call = replace(call, inputs=replace(call.inputs, hidden=hidden.new_empty(0)))
        ctx.set_materialize_grads(False)
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, dlogp: Tensor | None, dentropy: Tensor | None) -> Any:
        checks.refuse_second_derivative()
        hidden, _, bias, unit, *stats = ctx.saved_tensors
        call: _Call = replace(ctx.call, inputs=replace(ctx.call.inputs, hidden=hidden.detach()))
        if dlogp is None:
            dlogp = torch.zeros_like(stats[0]) if dentropy is None else torch.zeros_like(dentropy)
        weight_dtype = call.inputs.head.weight.dtype
        bias_dtype = weight_dtype if bias is None else bias.dtype
        with torch.autocast(hidden.device.type, enabled=False):
            if unit is not None and dentropy is None:
                return _scale_unit(call, unit, dlogp), None, None, None
            dx, dw, db = _recompute(call, RowStatistics(*stats), dlogp, dentropy)
        return (
            hand_over(dx, None, hidden.dtype),
            hand_over(dw, None, weight_dtype),
            hand_over(db, None, bias_dtype),
            None,
        )


def _forward(call: _Call) -> tuple[Tensor, Tensor, RowStatistics, Tensor | None]:
    """(logp (A,), entropy (A,), statistics, unit gradients (S, D) or None), in layout order."""
    inputs = call.inputs
    run = HeadPass(inputs, call.report.chunk_rows)
    logps, entropies, stats = [], [], []
    unit = None
    if call.report.kind == "unit" and call.needs[0]:
        unit = run.workspace.new_empty((inputs.layout.n_slots, inputs.head.width))
    for chunk in inputs.layout.chunks(call.report.chunk_rows):
        x = run.hidden_rows(chunk)
        logits = run.project(chunk, x)
        scored = run.score(chunk, logits)
        logps.append(scored.targets.logp)
        entropies.append(scored.entropy)
        stats.append(scored.stats)
        if unit is not None:
            dz, scale = run.gradient(logits, scored, torch.ones_like(scored.entropy), None)
            run.project_gradient(dz, scale, unit[chunk.start : chunk.stop])
    empty = run.workspace.new_empty(0)
    if not stats:
        return empty, empty.clone(), RowStatistics(empty, empty.long(), empty, empty), unit
    joined = RowStatistics(*(torch.cat(parts) for parts in zip(*stats, strict=True)))
    return torch.cat(logps), torch.cat(entropies), joined, unit


def _recompute(
    call: _Call, stats: RowStatistics, dlogp: Tensor, dentropy: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dX, dW, dbias) by projecting every chunk again."""
    inputs = call.inputs
    run = HeadPass(inputs, call.report.chunk_rows)
    sink = GradientSink(run, call.needs)
    for chunk in inputs.layout.chunks(call.report.chunk_rows):
        x = run.hidden_rows(chunk)
        logits = run.project(chunk, x)
        scored = run.score(chunk, logits, stats.rows(chunk.start, chunk.stop))
        pairs = slice(chunk.first, chunk.last)
        of_entropy = None if dentropy is None else dentropy[pairs]
        dz, scale = run.gradient(logits, scored, dlogp[pairs], of_entropy)
        sink.add(chunk, dz, x, scale)
    return sink.collected()


def _scale_unit(call: _Call, unit: Tensor, dlogp: Tensor) -> Tensor | None:
    """dX (R, D) from unit gradients (S, D), one pair a slot."""
    if not call.needs[0]:
        return None
    layout, hidden = call.inputs.layout, call.inputs.hidden
    scaled = unit * dlogp.unsqueeze(1)
    if layout.rows is None:
        return scaled.to(hidden.dtype)
    out = torch.zeros_like(hidden, dtype=scaled.dtype)
    return out.index_add_(0, layout.rows, scaled).to(hidden.dtype)


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
        transforms=head.bias is not None or head.softcap is not None,
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
