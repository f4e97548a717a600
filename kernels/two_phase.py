"""Values first, gradients when their derivatives are known: plans `unit`, `hold` and `recompute`.

The forward reduces every chunk of logits to statistics, log-probs and entropies. The backward is
given the derivatives of all pairs. It takes the logits from where the plan left them, leaves out
rows whose derivatives are all 0, and makes the gradients chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from rollfuse.kernels import checks
from rollfuse.kernels.head import Head
from rollfuse.kernels.head_pass import HeadPass, Inputs, new_workspace
from rollfuse.kernels.held import new_held, too_flat
from rollfuse.kernels.layout import Chunk, Layout
from rollfuse.kernels.plan import PlanReport
from rollfuse.kernels.rows import RowStatistics
from rollfuse.kernels.sink import Gradients, GradientSink, Needs, hand_over
from rollfuse.kernels.statistics import Exponentials

# Leaving rows out costs a copy of the others; below this share of all rows it is worth it.
_WORTH_LEAVING_OUT = 0.95


@dataclass(frozen=True, slots=True)
class TwoPhase:
    """A pass as it is planned."""

    inputs: Inputs
    report: PlanReport
    needs: Needs


def logp_and_entropy(hidden: Tensor, head: Head, call: TwoPhase) -> tuple[Tensor, Tensor]:
    """(logp (A,), entropy (A,)) of the layout's pairs, differentiable in hidden and head."""
    apply = cast(Callable[..., tuple[Tensor, Tensor]], _TwoPhaseFunction.apply)
    return apply(hidden, *head.parameters, call)


class _Kept(NamedTuple):
    """What the forward leaves for the backward."""

    unit: Tensor | None  # (S, D) d logp / d hidden
    held: Tensor | None  # (H, V), see `Held`
    held_tops: Tensor | None
    pre: Tensor  # (A,) pre(g) of the targets
    logp: Tensor  # (A,)
    top: Tensor  # (S,), as the three below: the row statistics
    top_column: Tensor
    rest: Tensor
    spread: Tensor

    @property
    def stats(self) -> RowStatistics:
        return RowStatistics(self.top, self.top_column, self.rest, self.spread)


class _TwoPhaseFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        *parameters, call = rest
        with torch.autocast(hidden.device.type, enabled=False):
            entropy, kept = _forward(call)
        # The inputs go through the graph's own store, which notices in-place changes and lets
        # go of them after the backward.
        ctx.save_for_backward(hidden, *parameters, *kept)
        ctx.call = replace(call, inputs=replace(call.inputs, hidden=hidden.new_empty(0)))
        ctx.set_materialize_grads(False)
        return kept.logp, entropy

    @staticmethod
    def backward(ctx: Any, dlogp: Tensor | None, dentropy: Tensor | None) -> Any:
        checks.refuse_second_derivative()
        saved = ctx.saved_tensors  # once: checkpointing recomputes what is asked for
        n_kept = len(_Kept._fields)
        hidden, *parameters = saved[:-n_kept]
        kept = _Kept(*saved[-n_kept:])
        rows = ctx.call.inputs.head.all_rows(hidden.detach())
        call: TwoPhase = replace(ctx.call, inputs=replace(ctx.call.inputs, hidden=rows))
        if dlogp is None:
            dlogp = torch.zeros_like(kept.logp)
        with torch.autocast(hidden.device.type, enabled=False):
            if kept.unit is not None and dentropy is None:
                gradients = Gradients(_scale_unit(call, kept.unit, dlogp))
            else:
                gradients = _gradients(call, kept, dlogp, dentropy)
        dtypes = tuple(hidden.dtype if t is None else t.dtype for t in (hidden, *parameters))
        return (*hand_over(gradients, None, dtypes), None)


def scores(call: TwoPhase) -> tuple[Tensor, Tensor]:
    """(logp (A,), entropy (A,)) in layout order; nothing is kept."""
    with torch.autocast(call.inputs.hidden.device.type, enabled=False):
        entropy, kept = _forward(call)
    return kept.logp, entropy


def gradients_anew(call: TwoPhase, dlogp: Tensor, dentropy: Tensor) -> Gradients:
    """Gradients of a layout's pairs (A,) by going through the logits again."""
    inputs, layout = call.inputs, call.inputs.layout
    with torch.autocast(dlogp.device.type, enabled=False):
        whole = layout.rows is None and layout.n_slots > 0
        sink = GradientSink(inputs, call.needs, whole=whole, final=True)
        run = HeadPass(inputs, new_workspace(inputs, call.report.chunk_rows))
        for chunk in layout.chunks(call.report.chunk_rows):
            pairs = slice(chunk.first, chunk.last)
            logits = run.project(run.hidden_rows(chunk))
            scored = run.score(chunk, logits)
            dz, scale = run.gradient(logits, scored, dlogp[pairs], dentropy[pairs])
            sink.add(run, chunk, dz, scale)
    return sink.collected()


def _forward(call: TwoPhase) -> tuple[Tensor, _Kept]:
    """(entropy (A,), what is kept), in layout order."""
    inputs, report = call.inputs, call.report
    layout, head = inputs.layout, inputs.head
    run = HeadPass(inputs, new_workspace(inputs, report.chunk_rows))
    unit, held = None, None
    if report.kind == "unit" and call.needs.hidden:
        unit = run.workspace.new_empty((layout.n_slots, head.width))
    n_held = report.held_slots
    if n_held:
        held = new_held(n_held, head.vocabulary, inputs.operand, run.workspace.device)
    empty = run.workspace.new_empty(0)
    # A first part without rows serves a layout without chunks.
    values, stats = [(empty, empty, empty)], [RowStatistics(empty, empty.long(), empty, empty)]
    for chunk in layout.chunks(report.chunk_rows):
        into, keep = None, None
        if held is not None and chunk.stop <= n_held:
            keep = held.exponentials(chunk.start, chunk.stop)
            into = held.values[chunk.start : chunk.stop] if keep is None else None
        logits = run.project(run.hidden_rows(chunk), into)
        scored = run.score(chunk, logits, keep)
        values.append((scored.targets.logp, scored.targets.pre, scored.entropy))
        stats.append(scored.stats)
        if unit is not None:
            dz, scale = run.gradient(logits, scored, torch.ones_like(scored.entropy), None)
            dadapted = run.adapter_gradient(dz, scale)
            run.project_gradient(dz, scale, dadapted, unit[chunk.start : chunk.stop])
    logp, pre, entropy = (torch.cat(parts) for parts in zip(*values, strict=True))
    joined = (torch.cat(parts) for parts in zip(*stats, strict=True))
    rows, tops = (None, None) if held is None else held
    return entropy, _Kept(unit, rows, tops, pre, logp, *joined)


@dataclass(frozen=True, slots=True)
class _Part:
    """Slots of a layout whose logits come from one source."""

    layout: Layout  # theirs alone
    slots: Tensor | slice  # where they stand in the whole layout
    pairs: Tensor | slice
    is_held: bool


def _gradients(call: TwoPhase, kept: _Kept, dlogp: Tensor, dentropy: Tensor | None) -> Gradients:
    """Gradients of all slots with a derivative."""
    inputs, chunk_rows = call.inputs, call.report.chunk_rows
    parts = list(_parts(call, kept, dlogp, dentropy))
    whole = inputs.layout.rows is None and [part.layout for part in parts] == [inputs.layout]
    sink = GradientSink(inputs, call.needs, whole=whole, final=True)
    workspace = new_workspace(inputs, chunk_rows)
    for part in parts:
        run = HeadPass(_inputs_of(part, inputs), workspace)
        stats = RowStatistics(*(values[part.slots] for values in kept.stats))
        pre, logp, of_logp = kept.pre[part.pairs], kept.logp[part.pairs], dlogp[part.pairs]
        of_entropy = None if dentropy is None else dentropy[part.pairs]
        for chunk in part.layout.chunks(chunk_rows):
            source = _held_source(kept, part, chunk, workspace) if part.is_held else None
            if source is None:
                source = run.project(run.hidden_rows(chunk))
            scored = run.scored_before(chunk, stats, pre, logp)
            pairs = slice(chunk.first, chunk.last)
            entropy_part = None if of_entropy is None else of_entropy[pairs]
            dz, scale = run.gradient(source, scored, of_logp[pairs], entropy_part)
            sink.add(run, chunk, dz, scale)
    return sink.collected()


def _parts(call: TwoPhase, kept: _Kept, dlogp: Tensor, dentropy: Tensor | None) -> Iterator[_Part]:
    """The slots with a derivative: those held, then those whose logits are made again."""
    layout = call.inputs.layout
    if call.report.invariant and kept.held is None and layout.n_slots:
        yield _Part(layout, slice(None), slice(None), is_held=False)
        return
    n_held = 0 if kept.held is None else len(kept.held)
    is_held = torch.arange(layout.n_slots, device=dlogp.device) < n_held
    if kept.held_tops is not None and dentropy is not None:
        is_held &= ~too_flat(kept.stats)
    checks.refuse_capture(dlogp.device, "the backward of log-probs")
    # The one transfer of a backward.
    wanted, held = torch.stack([_with_derivative(layout, dlogp, dentropy), is_held]).cpu().numpy()
    if call.report.invariant or wanted.sum() > _WORTH_LEAVING_OUT * len(wanted):
        wanted[:] = True
    for chosen, from_held in ((wanted & held, True), (wanted & ~held, False)):
        part = _part(layout, chosen, is_held=from_held)
        if part is not None:
            yield part


def _with_derivative(layout: Layout, dlogp: Tensor, dentropy: Tensor | None) -> Tensor:
    """(S,) bool: slots of which a pair has a derivative."""
    of_pairs = dlogp != 0 if dentropy is None else (dlogp != 0) | (dentropy != 0)
    of_slots = torch.zeros(layout.n_slots, dtype=torch.int32, device=dlogp.device)
    return of_slots.index_add_(0, layout.slot, of_pairs.int()) != 0


def _part(layout: Layout, chosen: np.ndarray, *, is_held: bool) -> _Part | None:
    """The chosen slots (S,) bool; None if there are none."""
    if not chosen.any():
        return None
    if chosen.all():
        return _Part(layout, slice(None), slice(None), is_held)
    part = layout.part(chosen)
    first, last = chosen.nonzero()[0][[0, -1]].tolist()
    in_a_row = last - first + 1 == part.layout.n_slots
    slots = slice(first, last + 1) if in_a_row else part.slots
    return _Part(part.layout, slots, part.pairs, is_held)


def _inputs_of(part: _Part, inputs: Inputs) -> Inputs:
    return replace(
        inputs,
        layout=part.layout,
        targets=inputs.targets[part.pairs],
        temperature=inputs.temperature[part.slots],
        support=None if inputs.support is None else inputs.support[part.slots],
    )


def _held_source(
    kept: _Kept, part: _Part, chunk: Chunk, workspace: Tensor
) -> Tensor | Exponentials:
    """What the gradient of a chunk of held slots is made from."""
    assert kept.held is not None
    if isinstance(part.slots, slice):
        first = part.slots.start or 0
        where = slice(first + chunk.start, first + chunk.stop)
        if kept.held_tops is None:
            return kept.held[where]
        return Exponentials(kept.held[where], kept.held_tops[where])
    rows = part.slots[chunk.start : chunk.stop]
    if kept.held_tops is not None:
        return Exponentials(kept.held, kept.held_tops, rows)
    return torch.index_select(kept.held, 0, rows, out=workspace[: len(rows)])


def _scale_unit(call: TwoPhase, unit: Tensor, dlogp: Tensor) -> Tensor | None:
    """dX from unit gradients (S, D), one pair a slot."""
    if not call.needs.hidden:
        return None
    layout, inputs = call.inputs.layout, call.inputs
    out = unit * dlogp.unsqueeze(1)
    if layout.rows is not None:
        whole = torch.zeros_like(inputs.hidden, dtype=out.dtype)
        out = whole.index_add_(0, layout.rows, out)
    return inputs.head.sum_of_rows(out)
