"""One pass of the head over a layout, chunk by chunk: logits, what pairs get, gradients of logits.

The plans differ only in when they ask for which step; the steps are here, once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from rollfuse.kernels import gemm
from rollfuse.kernels.gradient import Targets, row_coefficients, row_gradient
from rollfuse.kernels.head import Head
from rollfuse.kernels.layout import Chunk, Layout
from rollfuse.kernels.rows import RowStatistics, Transform, compute_dtype
from rollfuse.kernels.statistics import (
    row_entropy,
    row_statistics,
    target_logp,
    target_shift,
)


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a pass reads; tensors are detached."""

    hidden: Tensor  # (R, D)
    head: Head
    operand: torch.dtype
    layout: Layout
    targets: Tensor  # (A,) int64 token ids of the layout's pairs
    temperature: Tensor  # (S,)


@dataclass(frozen=True, slots=True)
class Scored:
    """A chunk's statistics and what its pairs get from them."""

    transform: Transform
    stats: RowStatistics
    targets: Targets
    entropy: Tensor  # (a,) nats, of each pair's row


@dataclass(slots=True)
class HeadPass:
    """Computes chunks of one `Inputs` in one workspace of `chunk_rows` rows of logits."""

    inputs: Inputs
    chunk_rows: int
    workspace: Tensor = field(init=False)

    def __post_init__(self) -> None:
        hidden, vocabulary = self.inputs.hidden, self.inputs.head.vocabulary
        stride = gemm.row_stride(vocabulary, hidden.device)
        dtype = compute_dtype(self.inputs.operand)
        self.workspace = hidden.new_empty((self.chunk_rows, stride), dtype=dtype)[:, :vocabulary]

    def hidden_rows(self, chunk: Chunk) -> Tensor:
        """(c, D) hidden rows of the chunk."""
        rows = self.inputs.layout.rows
        if rows is None:
            return self.inputs.hidden[chunk.start : chunk.stop]
        return self.inputs.hidden[rows[chunk.start : chunk.stop]]

    def project(self, chunk: Chunk, x: Tensor) -> Tensor:
        """(c, V) products h W' of the chunk, in the workspace."""
        logits = self.workspace[: chunk.stop - chunk.start]
        gemm.project(x, self.inputs.head.weight, self.inputs.operand, logits)
        return logits

    def score(self, chunk: Chunk, logits: Tensor, stats: RowStatistics | None = None) -> Scored:
        """Statistics (unless they are known) and log-probs and entropies of the chunk's pairs."""
        inputs = self.inputs
        transform = inputs.head.transform(
            inputs.temperature[chunk.start : chunk.stop], logits.dtype
        )
        if stats is None:
            stats = row_statistics(logits, transform)
        slot = inputs.layout.slot[chunk.first : chunk.last] - chunk.start
        column = inputs.targets[chunk.first : chunk.last]
        pre, shifted = target_shift(logits, stats, transform, (slot, slot, column))
        logp = target_logp(stats, shifted, slot, column)
        targets = Targets(slot, column, pre, logp, inputs.layout.one_per_slot)
        return Scored(transform, stats, targets, row_entropy(stats)[slot])

    def gradient(
        self, logits: Tensor, scored: Scored, dlogp: Tensor, dentropy: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """(c, V) gradient of the products, in the workspace, and its scale (None: 1).

        A float16 gradient is stored times a power of two that brings its largest entry near 2^10,
        because values below 6e-8 would vanish.
        """
        coefficients = row_coefficients(
            scored.stats, scored.transform, scored.targets, dlogp, dentropy
        )
        dtype = gemm.gradient_dtype(logits.device, self.inputs.operand)
        scale = None
        if dtype == torch.float16:
            largest = torch.maximum(coefficients.alpha.abs().max(), coefficients.value.abs().max())
            scale = torch.exp2(10.0 - torch.log2(largest.clamp_min(2.0**-40)).ceil())
            coefficients = coefficients.times(scale)
        out = logits
        if dtype != logits.dtype:
            # Each row's gradient takes the first bytes of the row's own logits.
            out = logits.view(dtype)[:, : logits.shape[1]]
        return row_gradient(logits, scored.transform, scored.stats, coefficients, out), scale

    def project_gradient(self, dz: Tensor, scale: Tensor | None, out: Tensor) -> None:
        """out (c, D) = dz W / scale, in the wide dtype."""
        gemm.project_gradient(dz, self.inputs.head.weight, self.inputs.operand, out)
        if scale is not None:
            out /= scale


class GradientSink:
    """Collects dX, dW and dbias over the chunks of a pass, wide until they are handed over."""

    def __init__(self, run: HeadPass, needs: tuple[bool, bool, bool]) -> None:
        self.run, self.inputs = run, run.inputs
        inputs = run.inputs
        wide = compute_dtype(inputs.operand)
        hidden, weight, layout = inputs.hidden, inputs.head.weight, inputs.layout
        self.dhidden: Tensor | None = None
        self.dweight: Tensor | None = None
        self.dbias: Tensor | None = None
        self._scale: Tensor | None = None
        self._first = True
        if needs[0]:
            # float16 would lose small rows before the upstream factor (a loss scale) comes in,
            # and rows with several slots are summed: both wait in the wide dtype.
            narrow = layout.unique_rows and hidden.dtype != torch.float16
            whole = layout.rows is None
            new = torch.empty_like if whole and layout.n_slots else torch.zeros_like
            self.dhidden = new(hidden, dtype=hidden.dtype if narrow else wide)
        if needs[1]:
            new = torch.empty_like if layout.n_slots else torch.zeros_like
            self.dweight = new(weight, dtype=wide, memory_format=torch.contiguous_format)
        if needs[2] and inputs.head.bias is not None:
            self.dbias = torch.zeros_like(inputs.head.bias, dtype=wide)

    def add(self, chunk: Chunk, dz: Tensor, x: Tensor, scale: Tensor | None = None) -> None:
        """Add a chunk: dz (c, V), times `scale`, and its hidden rows x (c, D)."""
        operand, wide = self.inputs.operand, compute_dtype(self.inputs.operand)
        if self.dhidden is not None:
            self._add_hidden(chunk, dz, scale)
        if self.dweight is not None:
            if scale is not None and self._scale is not None:
                self.dweight.mul_(scale / self._scale)  # powers of two: exact
            gemm.accumulate_weight_gradient(dz, x, operand, self.dweight, first=self._first)
        if self.dbias is not None:
            total = dz.sum(0, dtype=wide)
            self.dbias += total if scale is None else total / scale
        self._scale, self._first = scale, False

    def _add_hidden(self, chunk: Chunk, dz: Tensor, scale: Tensor | None) -> None:
        assert self.dhidden is not None
        rows, wide = self.inputs.layout.rows, compute_dtype(self.inputs.operand)
        place = self.dhidden[chunk.start : chunk.stop] if rows is None else None
        direct = place is not None and place.dtype == wide and scale is None
        part = place if direct else dz.new_empty((dz.shape[0], self.dhidden.shape[1]), dtype=wide)
        assert part is not None
        self.run.project_gradient(dz, scale, part)
        if place is not None:
            if not direct:
                place.copy_(part)
            return
        assert rows is not None
        index = rows[chunk.start : chunk.stop]
        self.dhidden.index_add_(0, index, part.to(self.dhidden.dtype))

    def collected(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(dX, dW, dbias), without the scale of half-precision chunks."""
        if self._scale is not None and self.dweight is not None:
            self.dweight /= self._scale
        return self.dhidden, self.dweight, self.dbias


def hand_over(buffer: Tensor | None, upstream: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A collected gradient times the upstream factor (None: 1), in its parameter's dtype."""
    if buffer is None:
        return None
    if upstream is None:
        return buffer.to(dtype)
    if upstream.device.type == "cpu" and upstream.item() == 1.0:
        # A kept graph may be walked again, and what was handed out belongs to the caller.
        return buffer.to(dtype, copy=_graph_is_kept())
    if buffer.dtype == dtype and not _graph_is_kept():
        return buffer.mul_(upstream)
    out = torch.empty_like(buffer, dtype=dtype)
    return torch.mul(buffer, upstream, out=out)


def _graph_is_kept() -> bool:
    """Whether the running backward keeps its graph, so that saved tensors must stay as they are."""
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return asked is None or bool(asked())
