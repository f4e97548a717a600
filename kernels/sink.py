"""GradientSink: collects a pass's gradients over its chunks, wide until they are handed over."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rollfuse.kernels import gemm
from rollfuse.kernels.head import lora_operand_dtype
from rollfuse.kernels.head_pass import HeadPass, Inputs
from rollfuse.kernels.layout import Chunk
from rollfuse.kernels.rows import compute_dtype


class Needs(NamedTuple):
    """Which gradients are needed."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False
    lora_a: bool = False
    lora_b: bool = False

    @property
    def lora(self) -> bool:
        return self.lora_a or self.lora_b


class Gradients(NamedTuple):
    """Gradients in the order of `Needs`; None where not needed."""

    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None


class GradientSink:
    """`whole`: the chunks will cover every row of the hidden states exactly once.

    `final`: what is added needs no further factor, so the weight's gradient may go straight into
    the head's `main_grad`. `slabwise`: there is one chunk, see `PlanReport`.
    """

    def __init__(
        self,
        inputs: Inputs,
        needs: Needs,
        *,
        whole: bool,
        final: bool,
        slabwise: bool = False,
    ) -> None:
        head, hidden = inputs.head, inputs.hidden
        self.inputs, self.needs, self.wide = inputs, needs, compute_dtype(inputs.operand)
        self.dhidden, self.dbias, self.dlora_a = None, None, None
        self.dweight: _Accumulator | _Slabs | None = None
        self.dlora_b: _Accumulator | None = None
        if needs.hidden:
            # float16 would lose small rows before the upstream factor (a loss scale) comes in;
            # rows with several slots, and shards of the vocabulary, are summed: all wait wide.
            narrow = inputs.layout.unique_rows and hidden.dtype != torch.float16 and not head.shard
            new = torch.empty_like if whole else torch.zeros_like
            dtype = hidden.dtype if narrow else self.wide
            self.dhidden = new(hidden, dtype=dtype, memory_format=torch.contiguous_format)
        if needs.weight and slabwise:
            self.dweight = _Slabs(self._padded(head.width, dtype=head.weight.dtype))
        elif needs.weight:
            into = head.main_grad if final else None
            self.dweight = _Accumulator(self._padded(head.width) if into is None else into, into)
        if needs.bias:
            self.dbias = self._padded().zero_()
        if head.lora is not None and needs.lora_a:
            self.dlora_a = torch.zeros_like(head.lora.a, dtype=self.wide)
        if head.lora is not None and needs.lora_b:
            self.dlora_b = _Accumulator(self._padded(head.lora.rank))

    def add(self, run: HeadPass, chunk: Chunk, dz: Tensor, scale: Tensor | None = None) -> None:
        """Add a chunk of `run`: the gradient dz (c, V), times `scale`, of its products."""
        wants_it = self.needs.hidden or self.needs.lora_a
        dadapted = run.adapter_gradient(dz, scale) if wants_it else None
        if self.dhidden is not None:
            self._add_hidden(run, chunk, dz, scale, dadapted)
        if self.dweight is not None or self.needs.lora:
            self._add_weights(run, chunk, dz, scale, dadapted)
        if self.dbias is not None:
            total = dz.sum(0, dtype=self.wide)
            self.dbias[: len(total)] += total if scale is None else total / scale

    def collected(self) -> Gradients:
        """The gradients for an upstream of 1, summed over a split vocabulary."""
        head, dhidden = self.inputs.head, self.dhidden
        if dhidden is not None:
            dhidden = head.sum_of_rows(dhidden)
        if self.dlora_a is not None and head.shard is not None:
            head.shard.sum_over_ranks(self.dlora_a)
        dweight = None if self.dweight is None else self.dweight.finished()
        dlora_b = None if self.dlora_b is None else self.dlora_b.finished()
        in_place = dweight is not None and dweight is head.main_grad
        return Gradients(dhidden, None if in_place else dweight, self.dbias, self.dlora_a, dlora_b)

    def _padded(self, *width: int, dtype: torch.dtype | None = None) -> Tensor:
        """(V + padding, ...) room, 0 in the padding."""
        head = self.inputs.head
        shape = (head.vocabulary + head.padding, *width)
        out = head.weight.new_empty(shape, dtype=dtype or self.wide)
        out[head.vocabulary :] = 0
        return out

    def _add_hidden(
        self,
        run: HeadPass,
        chunk: Chunk,
        dz: Tensor,
        scale: Tensor | None,
        dadapted: Tensor | None,
    ) -> None:
        assert self.dhidden is not None
        rows = run.inputs.layout.rows
        place = self.dhidden[chunk.start : chunk.stop] if rows is None else None
        direct = place is not None and place.dtype == self.wide and scale is None
        shape = (dz.shape[0], self.dhidden.shape[1])
        part = place if direct else dz.new_empty(shape, dtype=self.wide)
        assert part is not None
        run.project_gradient(dz, scale, dadapted, part)
        if place is not None:
            if not direct:
                place.copy_(part)
            return
        assert rows is not None
        index = rows[chunk.start : chunk.stop]
        self.dhidden.index_add_(0, index, part.to(self.dhidden.dtype))

    def _add_weights(
        self,
        run: HeadPass,
        chunk: Chunk,
        dz: Tensor,
        scale: Tensor | None,
        dadapted: Tensor | None,
    ) -> None:
        x, n = run.hidden_rows(chunk), dz.shape[1]
        operand = self.inputs.operand
        if self.dweight is not None:
            self.dweight.add(dz, x, operand, scale, n)
        lora = self.inputs.head.lora
        if lora is None:
            return
        adapter_operand = lora_operand_dtype(lora, operand)
        if self.dlora_b is not None:
            adapted = run.adapted(x)
            assert adapted is not None
            self.dlora_b.add(dz, adapted[:, : lora.rank], run.gradient_operand(dz), scale, n)
        if self.dlora_a is not None:
            assert dadapted is not None
            self.dlora_a.addmm_(dadapted[:, : lora.rank].t(), x.to(adapter_operand).to(self.wide))


class _Accumulator:
    """The sum over chunks of dz' x, in the first rows of `value`."""

    def __init__(self, value: Tensor, into: Tensor | None = None) -> None:
        self.value = value
        self._is_empty = into is None  # else there is something to add to
        self._scale: Tensor | None = None  # powers of two: exact

    def add(
        self, dz: Tensor, x: Tensor, operand: torch.dtype, scale: Tensor | None, n_rows: int
    ) -> None:
        if scale is not None:
            if not self._is_empty:
                self.value.mul_(scale if self._scale is None else scale / self._scale)
            self._scale = scale
        gemm.accumulate_weight_gradient(dz, x, operand, self.value[:n_rows], first=self._is_empty)
        self._is_empty = False

    def finished(self) -> Tensor:
        if self._is_empty:
            self.value.zero_()  # no chunk came
        if self._scale is not None:
            self.value /= self._scale
        return self.value


class _Slabs:
    """dz' x of the only chunk, in the narrow dtype of `value`."""

    def __init__(self, value: Tensor) -> None:
        self.value = value
        self._is_empty = True

    def add(
        self, dz: Tensor, x: Tensor, operand: torch.dtype, scale: Tensor | None, n_rows: int
    ) -> None:
        assert self._is_empty
        assert scale is None  # float16 is not made this way
        gemm.write_weight_gradient(dz, x, operand, self.value[:n_rows])
        self._is_empty = False

    def finished(self) -> Tensor:
        return self.value.zero_() if self._is_empty else self.value


def hand_over(
    gradients: Gradients, upstream: Tensor | None, dtypes: tuple[torch.dtype, ...]
) -> Gradients:
    """Collected gradients times the upstream factor (None: 1), in their parameters' dtypes."""
    return Gradients(
        *(hand_over_one(g, upstream, dtype) for g, dtype in zip(gradients, dtypes, strict=True))
    )


def hand_over_one(
    buffer: Tensor | None, upstream: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """The same for one of them."""
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
