"""Gradients made in the forward: plan `fused` from hidden states, and from logits that exist.

A token-local objective gives the derivatives of a chunk as soon as its log-probs and entropies are
there, while its logits are still at hand. The backward only multiplies by the upstream factor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from rollfuse.kernels import checks
from rollfuse.kernels.arguments import of_pairs
from rollfuse.kernels.batch import TokenBatch
from rollfuse.kernels.head import Head
from rollfuse.kernels.head_pass import HeadPass, Inputs, new_workspace
from rollfuse.kernels.layout import Chunk, Layout
from rollfuse.kernels.logits_pass import (
    new_gradient,
    part_of_view,
    score_logits,
    view_of_logits,
    write_gradient,
)
from rollfuse.kernels.objective import Evaluation, Objective, evaluate
from rollfuse.kernels.plan import PlanReport
from rollfuse.kernels.rows import LogpEntropy, compute_dtype
from rollfuse.kernels.sink import Gradients, GradientSink, Needs, hand_over, hand_over_one


@dataclass(frozen=True, slots=True)
class Task:
    """Which pairs of a batch the objective is asked about."""

    batch: TokenBatch
    objective: Objective
    n_pairs: int  # of the layout; one that is filled up has more

    def of_chunk(self, layout: Layout, chunk: Chunk, found: LogpEntropy) -> Evaluation:
        """The objective on a chunk's pairs, whose values are `found` (a,)."""
        pairs = slice(chunk.first, chunk.last)
        # Without a selection pairs and slots are both in the batch's order.
        index = layout.slot if layout.pairs is None else layout.pairs
        part = self.batch.select(index[pairs])
        if chunk.last > self.n_pairs:
            counts = layout.slot[pairs] < self.n_pairs
            part = replace(part, weights=torch.where(counts, part.weights, 0.0))
        return evaluate(self.objective, found.logp, found.entropy, part)


@dataclass(frozen=True, slots=True)
class FusedHead:
    """A pass over a head, as it is planned."""

    inputs: Inputs
    report: PlanReport
    needs: Needs
    task: Task


def fused_from_hidden(hidden: Tensor, head: Head, call: FusedHead) -> tuple[Tensor, LogpEntropy]:
    """(loss (), (A,) values in layout order), the loss differentiable in hidden and head."""
    apply = cast(Callable[..., tuple[Tensor, Tensor, Tensor]], _FromHidden.apply)
    loss, logp, entropy = apply(hidden, *head.parameters, call)
    n_pairs = call.task.n_pairs
    return loss, LogpEntropy(logp[:n_pairs], entropy[:n_pairs])


class _FromHidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        *parameters, call = rest
        with torch.autocast(hidden.device.type, enabled=False):
            loss, found, gradients = _over_chunks(call)
        ctx.dtypes = tuple(hidden.dtype if t is None else t.dtype for t in (hidden, *parameters))
        ctx.main_grad = call.inputs.head.main_grad
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(*found)
        return loss, *found

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> Any:
        checks.refuse_second_derivative()
        gradients = Gradients(*ctx.saved_tensors)
        if ctx.main_grad is not None and gradients.weight is not None:
            ctx.main_grad.addcmul_(gradients.weight[: len(ctx.main_grad)], upstream)
            gradients = gradients._replace(weight=None)
        return (*hand_over(gradients, upstream, ctx.dtypes), None)


def _over_chunks(call: FusedHead) -> tuple[Tensor, LogpEntropy, Gradients]:
    """(loss (), (A,) values in layout order, gradients for an upstream of 1)."""
    layout = call.inputs.layout
    run = HeadPass(call.inputs, new_workspace(call.inputs, call.report.chunk_rows))
    whole = layout.rows is None and layout.n_slots > 0
    slabwise = call.report.slabwise
    sink = GradientSink(call.inputs, call.needs, whole=whole, final=False, slabwise=slabwise)
    loss = run.workspace.new_zeros((), dtype=torch.float64)
    logp = run.workspace.new_empty(layout.n_pairs)
    entropy = torch.empty_like(logp)
    for chunk in layout.chunks(call.report.chunk_rows):
        logits = run.project(run.hidden_rows(chunk))
        scored = run.score(chunk, logits)
        pairs = slice(chunk.first, chunk.last)
        logp[pairs], entropy[pairs] = scored.targets.logp, scored.entropy
        found = LogpEntropy(scored.targets.logp, scored.entropy)
        value = call.task.of_chunk(layout, chunk, found)
        loss += value.loss
        if any(call.needs):
            dz, scale = run.gradient(logits, scored, value.dlogp, value.dentropy)
            sink.add(run, chunk, dz, scale)
    return loss.to(logp.dtype), LogpEntropy(logp, entropy), sink.collected()


@dataclass(frozen=True, slots=True)
class FusedLogits:
    """A pass over logits, as it is planned."""

    layout: Layout  # no row has two slots
    chunk_rows: int
    overwrite: bool
    task: Task


def fused_from_logits(logits: Tensor, call: FusedLogits) -> tuple[Tensor, LogpEntropy]:
    """(loss (), (A,) values in layout order), the loss differentiable in logits (R, V)."""
    apply = cast(Callable[..., tuple[Tensor, Tensor, Tensor]], _FromLogits.apply)
    loss, logp, entropy = apply(logits, call)
    return loss, LogpEntropy(logp, entropy)


class _FromLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, call: FusedLogits) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(logits.device.type, enabled=False):
            loss, found, gradient = _over_rows(logits.detach(), call)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(*found)
        return loss, *found

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> Any:
        checks.refuse_second_derivative()
        (gradient,) = ctx.saved_tensors
        return hand_over_one(gradient, upstream, gradient.dtype), None


def _over_rows(logits: Tensor, call: FusedLogits) -> tuple[Tensor, LogpEntropy, Tensor]:
    """(loss (), (A,) values, (R, V) gradient for an upstream of 1).

    A chunk is scored and turned into its gradient while a cache still holds it.
    """
    layout = call.layout
    view = view_of_logits(logits, layout, of_pairs(call.task.batch))
    out = new_gradient(view, overwrite=call.overwrite)
    dtype = compute_dtype(logits.dtype)
    loss = logits.new_zeros((), dtype=torch.float64)
    logp = logits.new_empty(layout.n_pairs, dtype=dtype)
    entropy = torch.empty_like(logp)
    for chunk in layout.chunks(call.chunk_rows):
        part = part_of_view(view, chunk)
        scored = score_logits(part)
        pairs = slice(chunk.first, chunk.last)
        logp[pairs], entropy[pairs] = scored.logp, scored.entropy
        value = call.task.of_chunk(layout, chunk, LogpEntropy(scored.logp, scored.entropy))
        loss += value.loss
        into = out[chunk.start : chunk.stop] if view.rows is None else out
        write_gradient(part, scored, value.dlogp, value.dentropy, into)
    return loss.to(dtype), LogpEntropy(logp, entropy), out
