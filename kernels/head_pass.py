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
from rollfuse.kernels.head import BareHead, Lora, lora_operand_dtype
from rollfuse.kernels.layout import Chunk, Layout
from rollfuse.kernels.rows import RowStatistics, Transform, compute_dtype
from rollfuse.kernels.statistics import (
    Exponentials,
    row_entropy,
    row_statistics,
    target_logp,
    target_pre,
    target_shift,
    with_target,
)


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a pass reads; tensors are detached."""

    hidden: Tensor  # (R, D), of all ranks
    head: BareHead
    operand: torch.dtype
    layout: Layout
    targets: Tensor  # (A,) int64 token ids of the layout's pairs
    temperature: Tensor  # (S,)
    support: Tensor | None = None  # (S,) nats; one pair a slot where there is one
    adapter: Lora | None = None  # the head's, in an invariant pass of a rank that is filled up
    invariant: bool = False


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
    # A split vocabulary needs a column more: there go the gradients of other ranks' targets.
    room = vocabulary if inputs.head.shard is None else vocabulary + 16
    stride = gemm.row_stride(room, hidden.device)
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
        head, operand = self.inputs.head, self.inputs.operand
        logits = self.workspace[: len(x)] if into is None else into
        gemm.project(x, head.weight, operand, logits)
        adapted = self.adapted(x)
        if adapted is not None:
            assert self.inputs.adapter is not None
            gemm.add_projection(adapted, self.inputs.adapter.b, self._adapter_operand(), logits)
        return logits

    def adapted(self, x: Tensor) -> Tensor | None:
        """(c, r) scale * x A' of hidden rows x (c, D), wide; None without an adapter."""
        lora = self.inputs.adapter
        if lora is None:
            return None
        out = x.new_empty((len(x), lora.rank), dtype=self.workspace.dtype)
        gemm.project(x, lora.a, self._adapter_operand(), out)
        return out.mul_(lora.scale)

    def transform(self, chunk: Chunk) -> Transform:
        """From the chunk's products to the z of its softmaxes."""
        inputs, slots = self.inputs, slice(chunk.start, chunk.stop)
        support = None if inputs.support is None else inputs.support[slots]
        dtype = self.workspace.dtype
        temperature = inputs.temperature[slots]
        return inputs.head.transform(temperature, dtype, support, invariant=inputs.invariant)

    def score(self, chunk: Chunk, logits: Tensor, keep: Exponentials | None = None) -> Scored:
        """Statistics of the chunk, and log-probs and entropies of its pairs."""
        inputs, transform = self.inputs, self.transform(chunk)
        stats = row_statistics(logits, transform, keep=keep)
        slot, column = self._places(chunk)
        shard = inputs.head.shard
        if shard is None:
            pre = target_pre(logits, transform, slot, column)
        else:
            mine, here = shard.owned(column, inputs.head.vocabulary)
            pre = torch.where(mine, target_pre(logits, transform, slot, here), -torch.inf)
            stats, pre = shard.merge(stats, transform.factor, pre)
        shifted = target_shift(pre, stats, transform, slot)
        stats = with_target(stats, pre, shifted, transform)
        logp = target_logp(stats, shifted, slot, column)
        targets = self._targets(slot, column, pre, logp)
        return Scored(transform, stats, targets, row_entropy(stats)[slot])

    def scored_before(
        self, chunk: Chunk, stats: RowStatistics, pre: Tensor, logp: Tensor
    ) -> Scored:
        """What `score` found in an earlier pass: the layout's statistics (S,) and values (A,)."""
        slot, column = self._places(chunk)
        pairs = slice(chunk.first, chunk.last)
        stats = stats.rows(chunk.start, chunk.stop)
        targets = self._targets(slot, column, pre[pairs], logp[pairs])
        return Scored(self.transform(chunk), stats, targets, row_entropy(stats)[slot])

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

    def adapter_gradient(self, dz: Tensor, scale: Tensor | None) -> Tensor | None:
        """(c, r) gradient of x A' from dz (c, V) times `scale`, wide; None without an adapter."""
        lora = self.inputs.adapter
        if lora is None:
            return None
        out = dz.new_empty((len(dz), lora.rank), dtype=self.workspace.dtype)
        gemm.project_gradient(dz, lora.b, self.gradient_operand(dz), out)
        return out.mul_(lora.scale if scale is None else lora.scale / scale)

    def project_gradient(
        self, dz: Tensor, scale: Tensor | None, dadapted: Tensor | None, out: Tensor
    ) -> None:
        """out (c, D), wide, from dz (c, V) times `scale` and `adapter_gradient` of it."""
        gemm.project_gradient(dz, self.inputs.head.weight, self.inputs.operand, out)
        if scale is not None:
            out /= scale
        if dadapted is not None:
            assert self.inputs.adapter is not None
            out.addmm_(dadapted, self.inputs.adapter.a.to(self._adapter_operand()).to(out.dtype))

    def gradient_operand(self, dz: Tensor) -> torch.dtype:
        """What B and the adapted rows are rounded to beside dz: its own dtype where it is half."""
        return dz.dtype if dz.dtype != self.workspace.dtype else self._adapter_operand()

    def _adapter_operand(self) -> torch.dtype:
        lora = self.inputs.adapter
        assert lora is not None
        return lora_operand_dtype(lora, self.inputs.operand)

    def _targets(self, slot: Tensor, column: Tensor, pre: Tensor, logp: Tensor) -> Targets:
        shard, n_columns = self.inputs.head.shard, self.inputs.head.vocabulary
        one_per_slot = self.inputs.layout.one_per_slot
        if shard is None:
            return Targets(slot, column, pre, logp, one_per_slot)
        mine, here = shard.owned(column, n_columns)
        return Targets(slot, torch.where(mine, here, n_columns), pre, logp, one_per_slot, True)

    def _places(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """(slot in the chunk (a,), target (a,)) of the chunk's pairs."""
        pairs = slice(chunk.first, chunk.last)
        return self.inputs.layout.slot[pairs] - chunk.start, self.inputs.targets[pairs]
