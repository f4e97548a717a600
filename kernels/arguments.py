"""From the arguments of a head's op to what a pass reads, checked."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rollfuse.kernels import checks
from rollfuse.kernels.batch import TokenBatch
from rollfuse.kernels.costs import Problem
from rollfuse.kernels.gemm import INVARIANT_MULTIPLE
from rollfuse.kernels.head import Head, bare, operand_dtype
from rollfuse.kernels.head_pass import Inputs
from rollfuse.kernels.layout import Layout
from rollfuse.kernels.rows import compute_dtype, widened
from rollfuse.kernels.sink import Needs


class OfPairs(NamedTuple):
    """What an op is asked about each pair, (P,) in the batch's order; see TokenBatch."""

    targets: Tensor
    temperature: Tensor | float = 1.0
    support: Tensor | None = None

    def support_of_slots(self, layout: Layout, dtype: torch.dtype) -> Tensor | None:
        """(S,) for a layout with one pair a slot: each brings its own target. Widened."""
        if self.support is None:
            return None
        assert layout.one_per_slot
        return widened(layout.pick(self.support.to(dtype)))


def of_pairs(batch: TokenBatch) -> OfPairs:
    return OfPairs(batch.targets, batch.temperature, batch.support)


def needed_gradients(hidden: Tensor, head: Head) -> Needs:
    """What needs gradients here and now."""
    if not torch.is_grad_enabled():
        return Needs()
    return Needs(*(t is not None and t.requires_grad for t in (hidden, *head.parameters)))


def make_inputs(  # noqa: PLR0913
    hidden: Tensor,
    head: Head,
    layout: Layout,
    pairs: OfPairs,
    operand: torch.dtype | None = None,
    slot_multiple: int = 1,
) -> Inputs:
    """Detached inputs of a pass.

    operand: what the products' operands are rounded to (None: what holds here and now).
    slot_multiple: fills the layout up to a multiple; its first pairs are the given one's.
    """
    layout = layout.padded(slot_multiple)
    targets, temperature, _ = pairs
    operand = operand or operand_dtype(hidden, head)
    wide = compute_dtype(operand)
    if isinstance(temperature, Tensor):
        of_slots = layout.of_slots(layout.pick(temperature.to(wide)))
    else:
        of_slots = hidden.new_full((layout.n_slots,), float(temperature), dtype=wide)
    picked = safe_targets(layout.pick(targets.long()), head.vocabulary)
    found = bare(head)
    rows = found.all_rows(hidden.detach())
    support = pairs.support_of_slots(layout, wide)
    adapter, invariant = found.lora, slot_multiple > 1
    if invariant and adapter is not None:
        adapter = adapter.filled_up(INVARIANT_MULTIPLE)
    return Inputs(rows, found, operand, layout, picked, of_slots, support, adapter, invariant)


def describe(  # noqa: PLR0913
    hidden: Tensor,
    head: Head,
    layout: Layout,
    n_pairs: int,
    operand: torch.dtype | None = None,
    needs: Needs | None = None,
    *,
    token_local: bool = False,
    support: bool = False,
) -> Problem:
    """The sizes and needs a plan is chosen for."""
    needs = needs or needed_gradients(hidden, head)
    operand = operand or operand_dtype(hidden, head)
    if head.main_grad is not None:
        wide = compute_dtype(operand)
        checks.need(head.main_grad.dtype == wide, "main_grad", str(wide), head.main_grad.dtype)
    is_summed = not layout.unique_rows or head.shard is not None
    return Problem(
        n_slots=layout.n_slots,
        n_pairs=n_pairs,
        n_active=layout.n_pairs,
        width=head.width,
        vocabulary=head.local_vocabulary if head.shard is None else head.shard.largest,
        operand=operand,
        hidden_dtype=hidden.dtype,
        weight_dtype=head.weight.dtype,
        device=hidden.device,
        needs_hidden=needs.hidden,
        needs_weight=needs.weight,
        needs_bias=needs.bias,
        token_local=token_local,
        bias=head.bias is not None,
        softcap=head.softcap is not None,
        rank=0 if head.lora is None else head.lora.rank,
        lora_dtype=operand if head.lora is None else head.lora.b.dtype,
        needs_lora_a=needs.lora_a,
        needs_lora_b=needs.lora_b,
        main_grad=head.main_grad is not None,
        n_ranks=1 if head.shard is None else head.shard.n_ranks,
        n_rows=head.n_rows(hidden),
        scattered=head.sequence_parallel,
        support=support,
        wide_hidden=is_summed or hidden.dtype == torch.float16,
    )


def safe_targets(targets: Tensor, vocabulary: int) -> Tensor:
    """Device targets inside the vocabulary: one outside is flagged, and must not fault before."""
    return targets if targets.device.type == "cpu" else targets.clamp(0, vocabulary - 1)


def need_targets_below(targets: Tensor, vocabulary: int) -> None:
    """Raise for a CPU target outside the vocabulary; device targets are flagged, see PolicyLoss."""
    if targets.device.type == "cpu" and targets.numel():
        low, high = int(targets.min()), int(targets.max())
        good = low >= 0 and high < vocabulary
        checks.need(good, "targets", f"token ids in [0, {vocabulary})", f"{low} to {high}")


def check_pair_vectors(
    rows: Tensor | None, temperature: Tensor | float, n_pairs: int, hidden: Tensor
) -> None:
    if rows is not None:
        checks.need_int(rows, "rows")
        checks.need_shape(rows, (n_pairs,), "rows", "one row a target")
        checks.need_same_device(rows, hidden, "rows", "hidden")
    if isinstance(temperature, Tensor):
        checks.need_float(temperature, "temperature")
        checks.need_shape(temperature, (n_pairs,), "temperature", "one a target")
        checks.need_same_device(temperature, hidden, "temperature", "hidden")
        if temperature.device.type == "cpu":
            good = bool((temperature.isfinite() & (temperature > 0)).all())
            checks.need(
                good,
                "temperature",
                "finite values > 0",
                temperature.min().item() if n_pairs else "none",
            )
    else:
        checks.need(
            0.0 < temperature < float("inf"), "temperature", "a finite value > 0", temperature
        )
