"""policy_loss and linear_policy_loss: an objective of logp and entropy, and its gradient.

Token-local objectives go through the head once (plan `fused`): logits of a chunk, statistics,
objective and its derivatives on the chunk's vectors, gradient of the logits in place, dX and dW.
Others take `linear_logp_entropy` and ordinary autograd, and so do all under torch.compile.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from rollfuse.kernels import checks, traced
from rollfuse.kernels.arguments import (
    describe,
    make_inputs,
    need_targets_below,
    needed_gradients,
    of_pairs,
)
from rollfuse.kernels.batch import TokenBatch
from rollfuse.kernels.from_logits import flatten_logits, logp_entropy_over_layout
from rollfuse.kernels.fused import (
    FusedHead,
    FusedLogits,
    Task,
    fused_from_hidden,
    fused_from_logits,
)
from rollfuse.kernels.head import Head, as_head, flatten_hidden
from rollfuse.kernels.layout import Layout, Request, build_layout
from rollfuse.kernels.linear import linear_over_layout
from rollfuse.kernels.objective import (
    Objective,
    TokenLocal,
    active_pairs,
    weighted_loss,
)
from rollfuse.kernels.plan import Plan, PlanReport, choose, need_plan, report_on_logits
from rollfuse.kernels.registered import PLACEHOLDER_ENTROPY, PLACEHOLDER_LOGP
from rollfuse.kernels.rows import LogpEntropy


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """What a policy loss returns.

    loss: () sum of weights * objective, differentiable. logp, entropy: (P,) nats, detached, NaN
    where not computed. computed: (P,) bool. diagnostics: the plan that ran, None under
    torch.compile. bad: () bool, True if a value of the batch was wrong.
    """

    loss: Tensor
    logp: Tensor
    entropy: Tensor
    computed: Tensor
    diagnostics: PlanReport | None
    bad: Tensor

    def check(self) -> None:
        """Raise ValueError if a value of the batch was wrong. Waits for the device.

        Batches on the CPU are checked when they are built; on a device, and under torch.compile,
        the test runs along with the op. Elsewhere than under torch.compile the ops call this
        themselves if ROLLFUSE_CHECK=1.
        """
        if bool(self.bad):
            raise ValueError(
                "batch: need targets in [0, V), finite weights and advantages, log-probs that are "
                "not NaN, temperatures > 0 and rows >= 0 (and under torch.compile no weight of 0 "
                "for a coupled objective); got a value that is not"
            )


def linear_policy_loss(
    hidden: Tensor,
    head: Head | Tensor,
    batch: TokenBatch,
    objective: Objective,
    *,
    plan: Plan = Plan(),
) -> PolicyLoss:
    """sum(batch.weights * objective(logp, entropy, batch)), straight from hidden states and head.

    Equal to `linear_logp_entropy` followed by the objective and the weighted sum, but pairs that
    cannot have a gradient are never computed and token-local objectives pass the head once.

    Args:
        hidden: (R, D) or (B, L, D); row batch.rows[p] predicts batch.targets[p].
        head: the LM head, or its (V, D) weight.
        batch: P pairs; see TokenBatch.
        objective: `grpo()`, ..., or any function (logp (P,), entropy (P,), batch) -> (P,).
        plan: see Plan; `explain` tells what would run.

    Returns:
        PolicyLoss; an empty batch, or one without active pairs, has loss 0 and zero gradients.

    Raises:
        TypeError, ValueError: wrong shapes, dtypes, devices, values, plan, or too small a budget.
    """
    _check_types(batch, objective, plan)
    head = as_head(head)
    hidden = flatten_hidden(hidden, head)
    if torch.compiler.is_compiling():
        scores = traced.linear_batch_scores(hidden, head, batch, objective, plan)
        return _traced_result(scores, batch, objective, head.vocabulary)
    planned = _plan(hidden, head, batch, objective, plan)
    layout, report = planned.layout, planned.report
    # First, while nothing is held yet: the budget is for either pass, not for both at once.
    dropped = _score_dropped(hidden, head, batch, planned)
    if report.kind == "fused":
        multiple = report.slot_multiple
        inputs = make_inputs(hidden, head, layout, of_pairs(batch), slot_multiple=multiple)
        task = Task(batch, objective, layout.n_pairs)
        needs = needed_gradients(hidden, head)
        loss, found = fused_from_hidden(hidden, head, FusedHead(inputs, report, needs, task))
        result = _result(loss, found, batch, layout, report, head.vocabulary)
    else:
        found = linear_over_layout(hidden, head, layout, of_pairs(batch), report)
        result = _loss_of_selected(found, batch, objective, layout, report, head.vocabulary)
    if dropped is not None:
        result = _with_dropped(result, *dropped)
    return _checked(replace(result, diagnostics=planned.summary))


def explain(
    hidden: Tensor,
    head: Head | Tensor,
    batch: TokenBatch,
    objective: Objective,
    plan: Plan = Plan(),
) -> PlanReport:
    """What `linear_policy_loss` would do with these arguments, without running it."""
    _check_types(batch, objective, plan)
    head = as_head(head)
    return _plan(flatten_hidden(hidden, head), head, batch, objective, plan).summary


def policy_loss(
    logits: Tensor,
    batch: TokenBatch,
    objective: Objective,
    *,
    overwrite_logits: bool = False,
) -> PolicyLoss:
    """sum(batch.weights * objective(logp, entropy, batch)) from logits that exist already.

    Args:
        logits: (R, V) or (B, L, V); row batch.rows[p] predicts batch.targets[p].
        batch, objective: as in `linear_policy_loss`.
        overwrite_logits: the gradient is written over the logits, whose values are lost (in the
            forward already if the objective is token-local); it saves their size in memory. The
            logits must not be a leaf or used elsewhere, must lie in memory as (R, V) rows, and each
            row must have one temperature and support. A graph that is kept can be walked again only
            where the forward made the gradient (token-local, on the CPU, not float16); elsewhere
            the logits are gone, and torch says that a tensor was modified by an inplace operation.

    Returns:
        PolicyLoss, differentiable in logits.
    """
    _check_types(batch, objective, Plan())
    flat = flatten_logits(logits)
    if torch.compiler.is_compiling():
        checks.need(not overwrite_logits, "overwrite_logits", "False under torch.compile", True)
        scores = traced.logit_batch_scores(flat, batch, objective)
        return _traced_result(scores, batch, objective, flat.shape[1])
    if overwrite_logits and logits.requires_grad:
        base = logits if logits._base is None else logits._base
        good = not base.is_leaf
        checks.need(good, "overwrite_logits", "logits computed from parameters", "a leaf")
        in_place = flat.data_ptr() == logits.data_ptr() and flat.stride(1) == 1
        needed, got = "logits that are (R, V) rows in memory", "ones that had to be copied"
        checks.need(in_place, "overwrite_logits", needed, got)
        apart = flat.shape[0] < 2 or flat.stride(0) >= flat.shape[1]
        needed, got = "rows of their own in memory", "rows that overlap (expand?)"
        checks.need(apart, "overwrite_logits", needed, got)
    vocabulary = flat.shape[1]
    layout = _layout(_RowsOf("logits", flat.shape[0], flat, vocabulary), batch, objective)
    # A device would read the gradient once more to multiply it by the upstream factor, which
    # float16 needs before it is rounded.
    if overwrite_logits:
        needed, got = "one temperature and support a row", "several"
        checks.need(layout.unique_rows, "overwrite_logits", needed, got)
    is_fused = (
        isinstance(objective, TokenLocal)
        and layout.unique_rows
        and flat.device.type == "cpu"
        and flat.dtype != torch.float16
        and logits.requires_grad
        and torch.is_grad_enabled()
    )
    report = report_on_logits(flat, layout, len(batch), fused=is_fused, overwrite=overwrite_logits)
    if is_fused:
        task = Task(batch, objective, layout.n_pairs)
        call = FusedLogits(layout, report.chunk_rows, overwrite_logits, task)
        loss, found = fused_from_logits(flat, call)
        return _checked(_result(loss, found, batch, layout, report, vocabulary))
    found = logp_entropy_over_layout(flat, layout, of_pairs(batch), overwrite=overwrite_logits)
    return _checked(_loss_of_selected(found, batch, objective, layout, report, vocabulary))


def _check_types(batch: TokenBatch, objective: Objective, plan: Plan) -> None:
    if not isinstance(batch, TokenBatch):
        raise TypeError(f"batch: need a TokenBatch, got {type(batch).__name__}")
    if not callable(objective):
        raise TypeError(
            "objective: need a function (logp, entropy, batch) -> (P,), such as grpo(), got "
            f"{objective!r}"
        )
    need_plan(plan)


class _Planned(NamedTuple):
    """Layout and plan of the active pairs, and of the others where they are to be scored."""

    layout: Layout
    report: PlanReport
    dropped: tuple[Layout, PlanReport] | None

    @property
    def summary(self) -> PlanReport:
        """What both passes do."""
        if self.dropped is None:
            return self.report
        scoring = self.dropped[1]
        return replace(
            self.report,
            peak_bytes=max(self.report.peak_bytes, scoring.peak_bytes),
            flops=self.report.flops + scoring.flops,
        )


def _plan(
    hidden: Tensor, head: Head, batch: TokenBatch, objective: Objective, plan: Plan
) -> _Planned:
    n = len(batch)
    local, cut = isinstance(objective, TokenLocal), batch.support is not None
    rows = _RowsOf("hidden", head.n_rows(hidden), hidden, head.vocabulary)
    own_slots = plan.invariant or plan.kind == "unit"
    if batch.support is not None:
        checks.need(head.group is None, "batch.support", "a head without group", "one with a group")
    layout = _layout(rows, batch, objective, slot_per_pair=own_slots)
    report = choose(describe(hidden, head, layout, n, token_local=local, support=cut), plan)
    if report.kind == "unit" and not layout.one_per_slot:
        # A unit gradient belongs to one pair: give each its own slot.
        layout = _layout(rows, batch, objective, slot_per_pair=True)
        report = choose(describe(hidden, head, layout, n, token_local=local, support=cut), plan)
    if plan.dropped == "skip" or layout.n_pairs == n:
        return _Planned(layout, report, None)
    others = _layout(rows, batch, objective, slot_per_pair=plan.invariant, inactive=True)
    with torch.no_grad():
        request = Plan("recompute", plan.budget_bytes, invariant=plan.invariant)
        scoring = choose(describe(hidden, head, others, n), request)
    return _Planned(layout, report, (others, scoring))


class _RowsOf(NamedTuple):
    """What the rows of a layout are rows of."""

    name: str
    n_rows: int
    tensor: Tensor
    vocabulary: int


def _layout(
    rows_of: _RowsOf,
    batch: TokenBatch,
    objective: Objective,
    *,
    slot_per_pair: bool = False,
    inactive: bool = False,
) -> Layout:
    """The layout of the active (or inactive) pairs over rows of hidden states or logits."""
    checks.need_same_device(batch.targets, rows_of.tensor, "batch", rows_of.name)
    source = batch.host or batch
    need_targets_below(source.targets, rows_of.vocabulary)
    active = active_pairs(objective, source)
    request = Request(
        len(batch),
        rows_of.n_rows,
        source.rows,
        source.temperature,
        ~active if inactive else active,
        slot_per_pair or batch.support is not None,  # a pair's own target is in its support
        rows_of.name,
    )
    return build_layout(request, rows_of.tensor.device)


def _loss_of_selected(  # noqa: PLR0913
    found: LogpEntropy,
    batch: TokenBatch,
    objective: Objective,
    layout: Layout,
    report: PlanReport,
    vocabulary: int,
) -> PolicyLoss:
    """The loss of (A,) values in layout order: the objective sees them in the batch's order."""
    logp, entropy = (layout.spread(values, len(batch), torch.nan) for values in found)
    if layout.n_pairs == len(batch):
        loss = weighted_loss(objective, logp, entropy, batch)
    else:
        assert layout.pairs is not None
        keep = layout.pairs.sort().values
        loss = weighted_loss(objective, logp[keep], entropy[keep], batch.keep(keep))
    return _result(loss, found, batch, layout, report, vocabulary)


def _result(  # noqa: PLR0913
    loss: Tensor,
    found: LogpEntropy,
    batch: TokenBatch,
    layout: Layout,
    report: PlanReport,
    vocabulary: int,
) -> PolicyLoss:
    logp, entropy = (layout.spread(v.detach(), len(batch), torch.nan) for v in found)
    ones = torch.ones(layout.n_pairs, device=batch.device)
    computed = layout.spread(ones, len(batch), 0.0) != 0
    bad = batch.any_bad_value() | (batch.targets >= vocabulary).any()
    return PolicyLoss(loss, logp, entropy, computed, report, bad)


def _traced_result(
    scores: traced.TracedScores, batch: TokenBatch, objective: Objective, vocabulary: int
) -> PolicyLoss:
    """The objective over all pairs, as torch.compile traces it."""
    counts = batch.weights != 0
    # Behind a `where` what an objective makes of a pair that does not count cannot spread.
    loss = weighted_loss(
        objective,
        torch.where(counts, scores.logp, PLACEHOLDER_LOGP),
        torch.where(counts, scores.entropy, PLACEHOLDER_ENTROPY),
        batch,
    )
    logp, entropy = (
        torch.where(scores.computed, values.detach(), torch.nan)
        for values in (scores.logp, scores.entropy)
    )
    bad = batch.any_bad_value() | (batch.targets >= vocabulary).any()
    if not isinstance(objective, TokenLocal):
        # It would see them: leaving pairs out makes their number depend on the data.
        extra = ~counts.all()
        bad = bad | extra
        loss = torch.where(extra, torch.nan, loss)
    return PolicyLoss(loss, logp, entropy, scores.computed, None, bad)


def _score_dropped(
    hidden: Tensor, head: Head, batch: TokenBatch, planned: _Planned
) -> tuple[Layout, LogpEntropy] | None:
    """logp and entropy of the pairs without gradient, where they are asked for."""
    if planned.dropped is None:
        return None
    layout, report = planned.dropped
    with torch.no_grad():
        return layout, linear_over_layout(hidden, head, layout, of_pairs(batch), report)


def _with_dropped(result: PolicyLoss, layout: Layout, found: LogpEntropy) -> PolicyLoss:
    """`result` with logp and entropy of the pairs that were not computed."""
    everything = torch.ones_like(result.computed)
    if layout.pairs is None:  # no pair was left to compute
        return replace(result, logp=found.logp, entropy=found.entropy, computed=everything)
    return replace(
        result,
        logp=result.logp.index_copy(0, layout.pairs, found.logp),
        entropy=result.entropy.index_copy(0, layout.pairs, found.entropy),
        computed=everything,
    )


def _checked(result: PolicyLoss) -> PolicyLoss:
    if os.environ.get("ROLLFUSE_CHECK") == "1":
        result.check()
    return result
