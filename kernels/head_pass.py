"""One pass of the head over a layout, chunk by chunk: logits, what pairs get, gradients of logits.

The plans differ only in when they ask for which step; the steps are here, once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rollfuse.kernels import gemm
from rollfuse.kernels.gradient import (
    Targets,
    row_coefficients,
    row_gradient,
    row_gradient_from_exponentials,
)
from rollfuse.kernels.head import Head
from rollfuse.kernels.layout import Chunk, Layout
from rollfuse.kernels.rows import RowStatistics, Transform, compute_dtype
from rollfuse.kernels.statistics import (
    Exponentials,
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


def new_workspace(inputs: Inputs, chunk_rows: int) -> Tensor:
    """(chunk_rows, V) room for the logits of a chunk."""
    hidden, vocabulary = inputs.hidden, inputs.head.vocabulary
    stride = gemm.row_stride(vocabulary, hidden.device)
    dtype = compute_dtype(inputs.operand)
    return hidden.new_empty((chunk_rows, stride), dtype=dtype)[:, :vocabulary]


@dataclass(frozen=True, slots=True)
class HeadPass:
    """Computes chunks of one `Inputs` in a workspace, which holds logits, then their gradient."""

    inputs: Inputs
    workspace: Tensor  # (rows of the largest chunk, V)

    def hidden_rows(self, chunk: Chunk) -> Tensor:
        """(c, D) hidden rows of the chunk."""
        rows = self.inputs.layout.rows
        if rows is None:
            return self.inputs.hidden[chunk.start : chunk.stop]
        return self.inputs.hidden[rows[chunk.start : chunk.stop]]

    def project(self, x: Tensor, into: Tensor | None = None) -> Tensor:
        """(c, V) products h W' of hidden rows x (c, D), in the workspace or in `into`."""
        logits = self.workspace[: len(x)] if into is None else into
        gemm.project(x, self.inputs.head.weight, self.inputs.operand, logits)
        return logits

    def score(self, chunk: Chunk, logits: Tensor, keep: Exponentials | None = None) -> Scored:
        """Statistics of the chunk, and log-probs and entropies of its pairs."""
        inputs, transform = self.inputs, self._transform(chunk)
        stats = row_statistics(logits, transform, keep=keep)
        slot, column = self._places(chunk)
        pre, shifted = target_shift(logits, stats, transform, (slot, slot, column))
        logp = target_logp(stats, shifted, slot, column)
        targets = Targets(slot, column, pre, logp, inputs.layout.one_per_slot)
        return Scored(transform, stats, targets, row_entropy(stats)[slot])

    def scored_before(
        self, chunk: Chunk, stats: RowStatistics, pre: Tensor, logp: Tensor
    ) -> Scored:
        """What `score` found in an earlier pass: the layout's statistics (S,) and values (A,)."""
        slot, column = self._places(chunk)
        pairs = slice(chunk.first, chunk.last)
        stats = stats.rows(chunk.start, chunk.stop)
        one_per_slot = self.inputs.layout.one_per_slot
        targets = Targets(slot, column, pre[pairs], logp[pairs], one_per_slot)
        return Scored(self._transform(chunk), stats, targets, row_entropy(stats)[slot])

    def gradient(
        self,
        source: Tensor | Exponentials,
        scored: Scored,
        dlogp: Tensor,
        dentropy: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """(c, V) gradient of the products, in the workspace, and its scale (None: 1).

        `source` are the chunk's logits, in the workspace or elsewhere, or its exponentials. A
        float16 gradient is stored times a power of two that brings its largest entry near 2^10,
        because values below 6e-8 would vanish.
        """
        coefficients = row_coefficients(
            scored.stats, scored.transform, scored.targets, dlogp, dentropy
        )
        space = self.workspace[: len(scored.stats.top)]
        dtype = gemm.gradient_dtype(space.device, self.inputs.operand)
        scale = None
        if dtype == torch.float16:
            largest = coefficients.bound()
            scale = torch.exp2(10.0 - torch.log2(largest.clamp_min(2.0**-40)).ceil())
            coefficients = coefficients.times(scale)
        out = space
        if dtype != space.dtype:
            # Each row's gradient takes the first bytes of the row's own logits.
            out = space.view(dtype)[:, : space.shape[1]]
        if isinstance(source, Tensor):
            row_gradient(source, scored.transform, scored.stats, coefficients, out)
        else:
            row_gradient_from_exponentials(
                source, scored.transform, scored.stats, coefficients, out
            )
        return out, scale

    def project_gradient(self, dz: Tensor, scale: Tensor | None, out: Tensor) -> None:
        """out (c, D) = dz W / scale, in the wide dtype."""
        gemm.project_gradient(dz, self.inputs.head.weight, self.inputs.operand, out)
        if scale is not None:
            out /= scale

    def _transform(self, chunk: Chunk) -> Transform:
        temperature = self.inputs.temperature[chunk.start : chunk.stop]
        return self.inputs.head.transform(temperature, self.workspace.dtype)

    def _places(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """(slot in the chunk (a,), target (a,)) of the chunk's pairs."""
        pairs = slice(chunk.first, chunk.last)
        return self.inputs.layout.slot[pairs] - chunk.start, self.inputs.targets[pairs]


class GradientSink:
    """Collects dX, dW and dbias over the chunks of a pass, wide until they are handed over.

    `whole`: the chunks will cover every row of the hidden states exactly once.
    """

    def __init__(self, inputs: Inputs, needs: tuple[bool, bool, bool], *, whole: bool) -> None:
        self.operand, self.wide = inputs.operand, compute_dtype(inputs.operand)
        hidden, weight, bias = inputs.hidden, inputs.head.weight, inputs.head.bias
        self.dhidden: Tensor | None = None
        self.dweight: Tensor | None = None
        self.dbias: Tensor | None = None
        self._scale: Tensor | None = None
        self._first = True
        if needs[0]:
            # float16 would lose small rows before the upstream factor (a loss scale) comes in,
            # and rows with several slots are summed: both wait in the wide dtype.
            narrow = inputs.layout.unique_rows and hidden.dtype != torch.float16
            new = torch.empty_like if whole else torch.zeros_like
            self.dhidden = new(hidden, dtype=hidden.dtype if narrow else self.wide)
        if needs[1]:
            layout = torch.contiguous_format
            self.dweight = torch.empty_like(weight, dtype=self.wide, memory_format=layout)
        if needs[2] and bias is not None:
            self.dbias = torch.zeros_like(bias, dtype=self.wide)

    def add(self, run: HeadPass, chunk: Chunk, dz: Tensor, scale: Tensor | None = None) -> None:
        """Add a chunk of `run`: the gradient dz (c, V), times `scale`, of its products."""
        if self.dhidden is not None:
            self._add_hidden(run, chunk, dz, scale)
        if self.dweight is not None:
            if scale is not None and self._scale is not None:
                self.dweight.mul_(scale / self._scale)  # powers of two: exact
            x = run.hidden_rows(chunk)
            gemm.accumulate_weight_gradient(dz, x, self.operand, self.dweight, first=self._first)
        if self.dbias is not None:
            total = dz.sum(0, dtype=self.wide)
            self.dbias += total if scale is None else total / scale
        self._scale, self._first = scale, False

    def _add_hidden(self, run: HeadPass, chunk: Chunk, dz: Tensor, scale: Tensor | None) -> None:
        assert self.dhidden is not None
        rows = run.inputs.layout.rows
        place = self.dhidden[chunk.start : chunk.stop] if rows is None else None
        direct = place is not None and place.dtype == self.wide and scale is None
        shape = (dz.shape[0], self.dhidden.shape[1])
        part = place if direct else dz.new_empty(shape, dtype=self.wide)
        assert part is not None
        run.project_gradient(dz, scale, part)
        if place is not None:
            if not direct:
                place.copy_(part)
            return
        assert rows is not None
        index = rows[chunk.start : chunk.stop]
        self.dhidden.index_add_(0, index, part.to(self.dhidden.dtype))

    def collected(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(dX, dW, dbias), without the scale of half-precision chunks."""
        if self.dweight is not None:
            if self._first:
                self.dweight.zero_()  # no chunk came
            if self._scale is not None:
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
