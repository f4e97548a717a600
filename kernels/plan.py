"""Plans: how an op spends FLOPs and bytes, chosen from what is declared and from a byte budget.

    plan       legal for                                      FLOPs        held until backward
    fused      token-local objectives                         6TDV (4TDV)  the gradients themselves
    unit       any objective, head without gradient           4TDV *       (T, D) unit gradients
    hold       any objective                                  6TDV (4TDV)  what logits come from
    recompute  any objective                                  8TDV (6TDV)  statistics

T rows with an active pair, D width, V vocabulary; in brackets: head without gradient; * 8TDV where
an entropy has a gradient, which unit gradients do not serve. `hold` keeps the logits of whole
chunks as long as there is room, or under half operands their exponentials in bfloat16 (which loses
2^-9 of them, where rounded logits would be off by that many nats), and recomputes the others. The
two-phase plans leave rows whose derivatives are all 0 out of the gradients. One chunk of
`chunk_rows` rows of logits exists at a time. Peak bytes above inputs and returned gradients:

    chunk_rows * (V' + 2 D) * w + max(blocks, slab) + accumulators + held + 64 (P + T)

with w = 4 bytes (8 in float64) and V' = V, on a CPU rounded up to an odd multiple of 16. blocks:
two buffers of at most 2 MiB or one row each (three under a bias or softcap), PyTorch path; slab: at
most 32 MiB of a weight that must be widened, or the whole weight rounded to a half operand type;
accumulators: w minus the size of the weight's dtype, times V D; held: T D w in plan `unit`, and in
`hold` V' w bytes (half operands: 2 V and the block maxima) a row held. Narrow weight gradients are
made when the chunk is gone, so V D w is the least.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from rollfuse.kernels import checks
from rollfuse.kernels.gemm import gradient_dtype, row_stride, slab_bytes
from rollfuse.kernels.held import holds_logits, n_held_blocks
from rollfuse.kernels.layout import chunk_borders
from rollfuse.kernels.rows import compute_dtype
from rollfuse.kernels.statistics import Scratch

Kind = Literal["fused", "unit", "hold", "recompute"]
Dropped = Literal["skip", "score"]

# Rows of a chunk where no budget is given. Products of fewer rows run below the BLAS's rate and
# re-read the weight's gradient more often (measured on two cores: 256 rows cost 14 % more than
# 512, 1024 cost 1 to 2 % less); more rows cost memory for nothing.
_CHUNK_ROWS = {"cpu": 1024, "cuda": 4096}
# Bytes that may be held where no budget is given.
_HELD_BYTES = {"cpu": 1 << 30, "cuda": 4 << 30}
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
    """

    kind: Kind | None = None
    budget_bytes: int | None = None
    dropped: Dropped = "skip"

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
class Problem:
    """The sizes and needs a plan is chosen for."""

    n_slots: int
    n_pairs: int
    n_active: int
    width: int
    vocabulary: int
    operand: torch.dtype
    hidden_dtype: torch.dtype
    weight_dtype: torch.dtype
    device: torch.device
    needs_hidden: bool
    needs_weight: bool
    token_local: bool
    bias: bool
    softcap: bool

    @property
    def item(self) -> int:
        return compute_dtype(self.operand).itemsize


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


def choose(problem: Problem, plan: Plan) -> PlanReport:
    """The plan for a problem.

    Raises:
        ValueError: the requested kind is not legal here, or the budget is too small.
    """
    kind, reason = _choose_kind(problem, plan.kind)
    handing_over = _handing_over_bytes(problem)

    def needed(rows: int) -> int:
        return _fixed_bytes(problem, kind) + _chunk_bytes(problem, rows)

    rows = _even_rows(problem.n_slots, _CHUNK_ROWS.get(problem.device.type, 512))
    if plan.budget_bytes is not None:
        few = min(_LEAST_ROWS, rows)
        least = max(needed(few), handing_over)
        checks.need(
            plan.budget_bytes >= least,
            "budget_bytes",
            f"at least {least} bytes for the {kind} plan in chunks of {few} rows",
            plan.budget_bytes,
        )
        most = bisect_right(range(rows + 1), plan.budget_bytes, key=needed) - 1
        rows = _even_rows(problem.n_slots, most)
    n_chunks = -(-problem.n_slots // rows)
    peak, held = needed(rows), 0
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
        n_chunks,
        problem.n_pairs,
        problem.n_active,
        problem.n_slots,
        held,
        max(peak, handing_over),
        _flops(problem, kind, held),
    )


def _even_rows(n_slots: int, most: int) -> int:
    """Rows of a chunk, at most `most`, if chunks are as few and as even as can be; at least 1."""
    n_chunks = max(1, -(-n_slots // most))
    return max(1, -(-n_slots // n_chunks))


def _holdable(problem: Problem, plan: Plan, chunk_rows: int, *, room: int) -> int:
    """Slots of the chunks that can be held, whole, beside the `room` bytes the rest takes."""
    if not (problem.needs_hidden or problem.needs_weight):
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


def held_row_bytes(problem: Problem) -> int:
    """Bytes of a held row: its logits, or (half operands) bfloat16 exponentials and maxima."""
    if holds_logits(problem.operand):
        return problem.item * row_stride(problem.vocabulary, problem.device)
    return 2 * problem.vocabulary + 4 * n_held_blocks(problem.vocabulary, problem.device)


def _choose_kind(problem: Problem, requested: Kind | None) -> tuple[Kind, str]:
    if requested == "fused" and not problem.token_local:
        raise ValueError(
            "plan: 'fused' needs a token-local objective (see token_local), got a coupled one, "
            "whose derivatives exist only after all rows; use 'recompute'"
        )
    if requested == "unit" and problem.needs_weight:
        raise ValueError(
            "plan: 'unit' needs a head without gradient, got one that requires grad; "
            "use 'recompute' or 'fused'"
        )
    half_softcap = problem.softcap and not holds_logits(problem.operand)
    if requested == "hold" and half_softcap:
        raise ValueError(
            "plan: 'hold' needs logits whose derivative follows from their exponentials, got half "
            "operands under a softcap; use 'recompute'"
        )
    if requested is not None:
        return requested, "requested"
    if problem.token_local:
        return "fused", "the objective is token-local: gradients are made in the forward"
    if not problem.needs_weight and problem.needs_hidden:
        return "unit", "coupled derivatives and a head without gradient: unit gradients are held"
    if not problem.needs_weight:
        return "recompute", "no gradient is needed: logits are made once"
    if half_softcap:
        return "recompute", "a softcap under half operands: logits are made twice"
    return "hold", "derivatives are known only after all rows: what logits come from is held"


def _chunk_bytes(problem: Problem, rows: int) -> int:
    """Bytes of a chunk: its logits, its hidden rows, their gradient, and a block or slab."""
    rows_of_hidden = 1 + int(problem.needs_hidden)
    stride = row_stride(problem.vocabulary, problem.device)
    own = problem.item * rows * (stride + rows_of_hidden * problem.width)
    if gradient_dtype(problem.device, problem.operand) != compute_dtype(problem.operand):
        # Products at the half type's own rate: the whole weight is rounded once, if it must be.
        same = problem.weight_dtype == problem.operand
        weights = problem.vocabulary * problem.width
        return own + (0 if same else weights * problem.operand.itemsize)
    # Blocks serve the passes over logits, slabs the products: never both at once.
    has_third = problem.bias or problem.softcap
    blocks = Scratch.n_bytes(rows, problem.vocabulary, problem.item, has_third=has_third)
    slab = slab_bytes(problem.vocabulary, problem.width, problem.weight_dtype, problem.operand)
    return own + max(blocks, slab)


def _fixed_bytes(problem: Problem, kind: Kind) -> int:
    """Bytes that do not depend on chunks: accumulators above what is returned, vectors."""
    item = problem.item
    weights = problem.vocabulary * problem.width
    total = 0
    if problem.needs_weight:
        # The narrow gradient is made last, when the chunk is gone.
        total += weights * (item - min(item, problem.weight_dtype.itemsize))
    if problem.needs_hidden and problem.hidden_dtype == torch.float16:
        total += problem.n_slots * problem.width * (item - problem.hidden_dtype.itemsize)
    if kind == "unit":
        total += problem.n_slots * problem.width * item
    return total + 64 * (problem.n_pairs + problem.n_slots)


def _handing_over_bytes(problem: Problem) -> int:
    """Bytes alive when the weight's gradient is narrowed: its accumulator."""
    if not problem.needs_weight or problem.weight_dtype == compute_dtype(problem.operand):
        return 0
    return problem.vocabulary * problem.width * problem.item


def _flops(problem: Problem, kind: Kind, held: int) -> int:
    product = 2 * problem.width * problem.vocabulary
    gradients = int(problem.needs_hidden) + int(problem.needs_weight)
    total = product * problem.n_slots * (1 + gradients)
    if gradients and kind in ("hold", "recompute"):
        total += product * (problem.n_slots - held)
    return total
