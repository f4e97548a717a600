"""Plans: how an op spends FLOPs and bytes, chosen from what is declared and from a byte budget.

    plan       legal for                                      FLOPs        held until backward
    fused      token-local objectives                         6TDV (4TDV)  the gradients themselves
    unit       any objective, head without gradient           4TDV *       (T, D) unit gradients
    hold       any objective                                  6TDV (4TDV)  what logits come from
    recompute  any objective                                  8TDV (6TDV)  statistics

T rows with an active pair, D width, V vocabulary (the rank's); in brackets: head without gradient;
* 8TDV where an entropy has a gradient, which unit gradients do not serve. `hold` keeps the logits
of whole chunks as long as there is room, or under half operands their exponentials in bfloat16
(which loses 2^-9 of them, where rounded logits would be off by that many nats), and recomputes the
others. The two-phase plans leave rows whose derivatives are all 0 out of the gradients. `costs` has
the formula of the bytes.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from rollfuse.kernels import checks
from rollfuse.kernels.costs import (
    Problem,
    chunk_bytes,
    fixed_bytes,
    handing_over_bytes,
    held_row_bytes,
    product_flops,
)
from rollfuse.kernels.gemm import INVARIANT_MULTIPLE, gradient_dtype
from rollfuse.kernels.held import holds_logits
from rollfuse.kernels.layout import Layout, chunk_borders

Kind = Literal["fused", "unit", "hold", "recompute"]
Dropped = Literal["skip", "score"]

# Rows of a chunk where no budget is given. Products of fewer rows run below the BLAS's rate and
# re-read the weight's gradient more often (measured on two cores: 256 rows cost 14 % more than
# 512, 1024 cost 1 to 2 % less); more rows cost memory for nothing.
_CHUNK_ROWS = {"cpu": 1024, "cuda": 4096}
# Bytes that may be held where no budget is given.
_HELD_BYTES = {"cpu": 1 << 30, "cuda": 4 << 30}
# A chunk of logits that is scored and turned into its gradient in one go stays in the last cache of
# a CPU. A GPU takes them all at once: a hundred launches cost more than the second read.
_CACHE_BYTES = {"cpu": 1 << 24}
# Rows of every chunk of an invariant plan, where a row alone costs as much as a chunk.
_INVARIANT_ROWS = {"cpu": 128, "cuda": 512}
# A budget that leaves fewer rows than this a chunk is refused (or all rows, if there are fewer).
_LEAST_ROWS = 16


@dataclass(frozen=True, slots=True)
class Plan:
    """A request: None leaves the choice to the op.

    Args:
        kind: see the table in this module.
        budget_bytes: bound on the bytes above inputs and returned gradients.
        dropped: what pairs without gradient get: "skip" leaves their logp NaN and computes nothing,
            "score" computes their logp and entropy (2TDV each).
        invariant: the logp and entropy of a pair, and for the same derivatives its part of the
            gradient of `hidden`, have the same bits whatever else is in the batch and however it
            is cut: chunks have one size, the last is filled up. A row alone costs a whole chunk
            (128 rows on a CPU, 512 elsewhere), several pairs of a row cost a row each, and rows
            that turn out to have no derivative are not left out. The width must be a multiple of
            16; an adapter's rank is filled up to one, in a copy. On one machine, with one number
            of threads, and as far as its BLAS treats the rows of a product alike: the tests look
            at MKL, `bench gpu` at a GPU, where three or more pairs of one row are added in no fixed
            order. What an objective makes of its vectors is its own.

    Inside `torch.utils.checkpoint` an op is correct and runs twice (with use_reentrant=True the
    first time without gradients). Plans `fused` and `recompute` keep no logits, so there is little
    to gain: leave the op outside, and ask for `recompute` where `hold` keeps too much.
    """

    kind: Kind | None = None
    budget_bytes: int | None = None
    dropped: Dropped = "skip"
    invariant: bool = False

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in get_args(Kind):
            raise ValueError(f"plan: need one of {', '.join(get_args(Kind))}, got {self.kind!r}")
        if self.dropped not in get_args(Dropped):
            raise ValueError(
                f"dropped: need one of {', '.join(get_args(Dropped))}, got {self.dropped!r}"
            )
        if self.budget_bytes is not None:
            if not isinstance(self.budget_bytes, int):
                got = type(self.budget_bytes).__name__
                raise TypeError(f"budget_bytes: need an int or None, got {got}")
            checks.need(self.budget_bytes > 0, "budget_bytes", "a value > 0", self.budget_bytes)


@dataclass(frozen=True, slots=True)
class PlanReport:
    """What an op will do, or did.

    kind and reason; rows in a chunk and number of chunks; pairs, and those with a gradient; slots
    (rows at one temperature) computed, and those held until the backward; bytes above inputs and
    returned gradients; FLOPs of the products, if every row has a derivative, and none to the
    entropy in plan `unit` or from a flat row in `hold`.
    """

    kind: Kind
    reason: str
    chunk_rows: int
    n_chunks: int
    pairs: int
    active_pairs: int
    slots: int
    held_slots: int
    peak_bytes: int
    flops: int
    invariant: bool = False
    slabwise: bool = False  # the weight's gradient is made in its own dtype, slab by slab

    @property
    def slot_multiple(self) -> int:
        """The layout is filled up to a multiple of so many slots."""
        return self.chunk_rows if self.invariant else 1


def need_plan(plan: object) -> None:
    if not isinstance(plan, Plan):
        raise TypeError(f"plan: need a Plan, such as Plan('fused'), got {plan!r}")


def choose(problem: Problem, plan: Plan) -> PlanReport:
    """The plan for a problem.

    Raises:
        ValueError: the requested kind is not legal here, or the budget is too small.
    """
    kind, reason = _choose_kind(problem, plan)
    if plan.invariant:
        chunk = _INVARIANT_ROWS.get(problem.device.type, 512)
        n_slots = -(-problem.n_slots // chunk) * chunk
        filled = -(-problem.rank // INVARIANT_MULTIPLE) * INVARIANT_MULTIPLE
        problem = replace(problem, n_slots=n_slots, wide_hidden=True, filled_rank=filled)
        return _report(problem, plan, kind, reason, _within_budget(problem, plan, kind, chunk))
    rows = _even_rows(problem.n_slots, _CHUNK_ROWS.get(problem.device.type, 512))
    one_chunk = _slabwise_peak(problem, kind)
    if one_chunk is not None:
        most = plan.budget_bytes
        if most is None:
            most = max(_needed(problem, kind, rows), handing_over_bytes(problem))
        if one_chunk <= most:
            reason += "; all rows in one chunk: the weight's gradient needs no accumulator"
            report = _report(problem, plan, kind, reason, problem.n_slots)
            return replace(report, peak_bytes=one_chunk, slabwise=True)
    return _report(problem, plan, kind, reason, _within_budget(problem, plan, kind, rows))


def _needed(problem: Problem, kind: Kind, rows: int) -> int:
    """Bytes while chunks of `rows` rows are computed."""
    return fixed_bytes(problem, kind) + chunk_bytes(problem, rows)


def _within_budget(problem: Problem, plan: Plan, kind: Kind, rows: int) -> int:
    """Rows of a chunk, at most `rows`; just those in an invariant plan."""
    if plan.budget_bytes is None:
        return rows
    few = rows if plan.invariant else min(_LEAST_ROWS, rows)
    least = max(_needed(problem, kind, few), handing_over_bytes(problem))
    checks.need(
        plan.budget_bytes >= least,
        "budget_bytes",
        f"at least {least} bytes for the {kind} plan in chunks of {few} rows",
        plan.budget_bytes,
    )
    if plan.invariant:
        return rows
    candidates = range(rows + 1)
    most = bisect_right(candidates, plan.budget_bytes, key=lambda n: _needed(problem, kind, n)) - 1
    return _even_rows(problem.n_slots, most)


def _report(problem: Problem, plan: Plan, kind: Kind, reason: str, rows: int) -> PlanReport:
    """What chunks of `rows` rows mean, and what can be held beside them."""
    peak, held = _needed(problem, kind, rows), 0
    handing_over = handing_over_bytes(problem)
    if kind == "hold":
        held = _holdable(problem, plan, rows, room=peak)
        peak += held * held_row_bytes(problem)
        handing_over += held * held_row_bytes(problem)  # until the backward returns
        if not held and plan.kind is None:
            kind, reason = "recompute", "no room to hold a row: logits are made twice"
        elif held < problem.n_slots:
            reason += f"; room for {held} of {problem.n_slots} rows, the others are made twice"
    return PlanReport(
        kind,
        reason,
        rows,
        -(-problem.n_slots // rows),
        problem.n_pairs,
        problem.n_active,
        problem.n_slots,
        held,
        max(peak, handing_over),
        product_flops(problem, kind, held),
        plan.invariant,
    )


def _slabwise_peak(problem: Problem, kind: Kind) -> int | None:
    """Bytes if all rows are one chunk and the weight's narrow gradient is made directly.

    None where that cannot be: float16 has to wait for the upstream factor in a wider dtype.
    """
    narrow = problem.needs_weight and problem.weight_dtype == torch.bfloat16
    if kind != "fused" or not narrow or problem.main_grad or problem.n_slots == 0:
        return None
    if problem.operand == torch.float16:
        return None
    fixed = fixed_bytes(problem, kind, slabwise=True)
    peak = fixed + chunk_bytes(problem, problem.n_slots)
    return max(peak, handing_over_bytes(problem, slabwise=True))


def report_on_logits(
    logits: Tensor, layout: Layout, n_pairs: int, *, fused: bool, overwrite: bool
) -> PlanReport:
    """What a loss over logits (R, V) does: no products, and no choice."""
    rows = layout.n_slots
    if fused:
        row_bytes = max(1, logits.shape[1] * logits.element_size())
        most = _CACHE_BYTES.get(logits.device.type, 1 << 62) // row_bytes
        rows = _even_rows(rows, max(1, most))
    return PlanReport(
        kind="fused" if fused else "recompute",
        reason="the logits exist",
        chunk_rows=max(1, rows),
        n_chunks=-(-layout.n_slots // max(1, rows)),
        pairs=n_pairs,
        active_pairs=layout.n_pairs,
        slots=layout.n_slots,
        held_slots=0 if fused else layout.n_slots,
        peak_bytes=0 if overwrite else logits.nbytes,
        flops=0,
    )


def _even_rows(n_slots: int, most: int) -> int:
    """Rows of a chunk, at most `most`, if chunks are as few and as even as can be; at least 1."""
    n_chunks = max(1, -(-n_slots // most))
    return max(1, -(-n_slots // n_chunks))


def _holdable(problem: Problem, plan: Plan, chunk_rows: int, *, room: int) -> int:
    """Slots of the chunks that can be held, whole, beside the `room` bytes the rest takes."""
    if not (problem.needs_hidden or problem.needs_head):
        return 0
    if plan.budget_bytes is not None:
        bound = plan.budget_bytes - room
    elif plan.kind == "hold":
        return problem.n_slots
    else:
        bound = _HELD_BYTES.get(problem.device.type, 1 << 30)
    most = bound // held_row_bytes(problem)
    stops = (stop for _, stop in chunk_borders(problem.n_slots, chunk_rows))
    return max((stop for stop in stops if stop <= most), default=0)


def _choose_kind(problem: Problem, plan: Plan) -> tuple[Kind, str]:
    requested = plan.kind
    if requested == "fused" and not problem.token_local:
        raise ValueError(
            "plan: 'fused' needs a token-local objective (see token_local), got a coupled one, "
            "whose derivatives exist only after all rows; use 'recompute'"
        )
    if requested == "unit" and problem.needs_head:
        raise ValueError(
            "plan: 'unit' needs a head without gradient, got one that requires grad; "
            "use 'recompute' or 'fused'"
        )
    half = not holds_logits(problem.operand)
    half_softcap = problem.softcap and half
    if requested == "hold" and half_softcap:
        raise ValueError(
            "plan: 'hold' needs logits whose derivative follows from their exponentials, got half "
            "operands under a softcap; use 'recompute'"
        )
    half_invariant = plan.invariant and half
    half_support = problem.support and half
    if requested == "hold" and half_support:
        raise ValueError(
            "plan: 'hold' needs rows whose support can be found again, got half operands and "
            "batch.support; use 'recompute'"
        )
    if requested == "hold" and half_invariant:
        raise ValueError(
            "plan: 'hold' needs chunks of any size under half operands, because flat rows are made "
            "again, got invariant=True; use 'recompute'"
        )
    if plan.invariant and gradient_dtype(problem.device, problem.operand) == torch.float16:
        raise ValueError(
            "invariant: need operands whose gradients keep their scale, got float16, which is "
            "scaled by the largest entry of a chunk; use bfloat16"
        )
    if plan.invariant and problem.width % INVARIANT_MULTIPLE:
        raise ValueError(
            f"invariant: need hidden states whose width is a multiple of {INVARIANT_MULTIPLE}, got "
            f"{problem.width}: a BLAS treats the rows of other products unlike"
        )
    if requested is not None:
        return requested, "requested"
    if problem.token_local:
        return "fused", "the objective is token-local: gradients are made in the forward"
    if not problem.needs_head and problem.needs_hidden:
        return "unit", "coupled derivatives and a head without gradient: unit gradients are held"
    if not problem.needs_head:
        return "recompute", "no gradient is needed: logits are made once"
    if half_softcap:
        return "recompute", "a softcap under half operands: logits are made twice"
    if half_support:
        return "recompute", "a support under half operands: logits are made twice"
    if half_invariant:
        return "recompute", "invariant under half operands: logits are made twice"
    return "hold", "derivatives are known only after all rows: what logits come from is held"
