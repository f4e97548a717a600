"""What a plan costs: bytes above inputs and returned gradients, and FLOPs of the products.

One chunk of `chunk_rows` rows of logits exists at a time. The peak is

    chunk_rows * (V' + 2 D + 2 r) * w + max(blocks, slab) + accumulators + held + 64 (P + T)

T rows with an active pair, D width, V vocabulary of the rank, r rank of an adapter (0: none), w = 4
bytes (8 in float64) and V' = V, on a CPU rounded up to an odd multiple of 16.

blocks: two buffers of at most 2 MiB or one row each (three under a bias or softcap), PyTorch path.
slab: at most 32 MiB of a weight that must be widened, or the whole weight rounded to a half operand
type. accumulators: w minus the size of the weight's dtype, times V D, and likewise for an adapter's
r (V + D); beside a main_grad V D w in plan `fused`, nothing in the others. held: T D w in plan
`unit`, in `hold` V' w (half operands: 2 V and the block maxima) a row held. An invariant plan fills
r up to a multiple of 16, in a copy of the adapter's r (V + D).

Narrow weight gradients are made when the chunk is gone, so V D w is the least; but where one chunk
has all rows, plan `fused` makes a bfloat16 one directly, a slab of at most 32 MiB at a time. It
takes one chunk where that makes the peak no higher. The gradient of narrow hidden rows waits in w
bytes where it is summed (a row at several temperatures, invariant plans, split vocabularies) and
for float16. A vocabulary split over n ranks adds (16 + 10 n) w a row of the chunk for what they
exchange; hidden rows that were scattered are gathered.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rollfuse.kernels.gemm import SLAB_ELEMENTS, gradient_dtype, row_stride, slab_bytes
from rollfuse.kernels.held import holds_logits, n_held_blocks
from rollfuse.kernels.rows import compute_dtype
from rollfuse.kernels.statistics import Scratch


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
    rank: int = 0  # of a LoRA adapter; 0: there is none
    lora_dtype: torch.dtype = torch.float32
    needs_bias: bool = False
    needs_lora_a: bool = False
    needs_lora_b: bool = False
    main_grad: bool = False
    n_ranks: int = 1  # the vocabulary is split over
    n_rows: int = 0  # hidden rows, of all ranks
    scattered: bool = False  # each rank has 1 / n_ranks of them
    support: bool = False  # rows are cut off
    wide_hidden: bool = False  # the gradient of hidden waits in the wide dtype
    filled_rank: int = 0  # what an invariant plan fills the rank up to
    scratch_bytes: int = 0  # what an op that draws or ranks needs beside a chunk's logits

    @property
    def needs_head(self) -> bool:
        return self.needs_weight or self.needs_bias or self.needs_lora

    @property
    def needs_lora(self) -> bool:
        return self.needs_lora_a or self.needs_lora_b

    @property
    def item(self) -> int:
        return compute_dtype(self.operand).itemsize


def held_row_bytes(problem: Problem) -> int:
    """Bytes of a held row: its logits, or (half operands) bfloat16 exponentials and maxima."""
    if holds_logits(problem.operand):
        return problem.item * row_stride(problem.vocabulary, problem.device)
    return 2 * problem.vocabulary + 4 * n_held_blocks(problem.vocabulary, problem.device)


def chunk_bytes(problem: Problem, rows: int) -> int:
    """Bytes of a chunk: its logits, its hidden rows, their gradient, and a block or slab."""
    rows_of_hidden = 1 + int(problem.needs_hidden)
    stride = row_stride(problem.vocabulary, problem.device)
    rank = max(problem.rank, problem.filled_rank)
    own = problem.item * rows * (stride + rows_of_hidden * problem.width + 2 * rank)
    if problem.n_ranks > 1:
        own += problem.item * rows * (16 + 10 * problem.n_ranks)  # the exchange
    if gradient_dtype(problem.device, problem.operand) != compute_dtype(problem.operand):
        # Products at the half type's own rate: the whole weight is rounded once, if it must be.
        same = problem.weight_dtype == problem.operand
        weights = problem.vocabulary * problem.width
        rounded = 0 if same else weights * problem.operand.itemsize
        return own + max(rounded, problem.scratch_bytes)
    # Blocks serve the passes over logits, slabs the products: never both at once.
    has_third = problem.bias or problem.softcap
    blocks = Scratch.n_bytes(rows, problem.vocabulary, problem.item, has_third=has_third)
    slab = slab_bytes(problem.vocabulary, problem.width, problem.weight_dtype, problem.operand)
    if rank:
        of_lora = slab_bytes(problem.vocabulary, rank, problem.lora_dtype, problem.operand)
        slab = max(slab, of_lora)
    return own + max(blocks, slab, problem.scratch_bytes)


def fixed_bytes(problem: Problem, kind: str, *, slabwise: bool = False) -> int:
    """Bytes that do not depend on chunks: accumulators above what is returned, vectors."""
    item = problem.item
    weights = problem.vocabulary * problem.width
    total = _hidden_bytes(problem)
    if problem.needs_weight and slabwise:
        # Where the weight is widened in slabs there is room for one of its gradient.
        if gradient_dtype(problem.device, problem.operand) != compute_dtype(problem.operand):
            total += min(weights, SLAB_ELEMENTS) * item
    elif problem.needs_weight and not problem.main_grad:
        # The narrow gradient is made last, when the chunk is gone.
        total += weights * (item - min(item, problem.weight_dtype.itemsize))
    elif problem.needs_weight and kind == "fused":
        total += weights * item  # until the upstream factor is known
    if problem.needs_lora:
        total += _adapter_weights(problem) * (item - min(item, problem.lora_dtype.itemsize))
    if problem.filled_rank > problem.rank:
        copies = problem.filled_rank * (problem.vocabulary + problem.width)
        total += copies * problem.lora_dtype.itemsize
    if kind == "unit":
        total += problem.n_slots * problem.width * item
    return total + 64 * (problem.n_pairs + problem.n_slots)


def _hidden_bytes(problem: Problem) -> int:
    """Bytes of all ranks' hidden rows and of their gradient, above what is given and returned."""
    narrow = problem.hidden_dtype.itemsize
    size = problem.n_rows * problem.width
    total = size * narrow if problem.scattered else 0
    if problem.needs_hidden and problem.wide_hidden:
        returned = size // problem.n_ranks if problem.scattered else size
        total += size * problem.item - returned * narrow
    return total


def _adapter_weights(problem: Problem) -> int:
    return problem.rank * (problem.vocabulary + problem.width)


def handing_over_bytes(problem: Problem, *, slabwise: bool = False) -> int:
    """Bytes alive when the weights' gradients are narrowed: their accumulators."""
    wide = compute_dtype(problem.operand)
    weights = 0
    has_accumulator = problem.needs_weight and not problem.main_grad and not slabwise
    if has_accumulator and problem.weight_dtype != wide:
        weights += problem.vocabulary * problem.width
    if problem.needs_lora and problem.lora_dtype != wide:
        weights += _adapter_weights(problem)
    return weights * problem.item


def product_flops(problem: Problem, kind: str, held: int) -> int:
    forward = problem.width + problem.rank
    gradients = problem.width * (int(problem.needs_hidden) + int(problem.needs_weight))
    gradients += problem.rank * int(problem.needs_hidden or problem.needs_lora_a)
    gradients += problem.rank * int(problem.needs_lora_b)
    total = (forward + gradients) * problem.n_slots
    if kind in ("hold", "recompute") and (problem.needs_hidden or problem.needs_head):
        total += forward * (problem.n_slots - held)
    return 2 * problem.vocabulary * total
