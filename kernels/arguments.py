"""From the arguments of a head's op to what a pass reads, checked."""

from __future__ import annotations

import torch
from torch import Tensor

from rollfuse.kernels import checks
from rollfuse.kernels.head import Head, operand_dtype
from rollfuse.kernels.head_pass import Inputs
from rollfuse.kernels.layout import Layout
from rollfuse.kernels.plan import Problem
from rollfuse.kernels.rows import compute_dtype


def needed_gradients(hidden: Tensor, head: Head) -> tuple[bool, bool, bool]:
    """Whether hidden, weight and bias need gradients here and now."""
    if not torch.is_grad_enabled():
        return False, False, False
    bias = head.bias is not None and head.bias.requires_grad
    return hidden.requires_grad, head.weight.requires_grad, bias


def make_inputs(  # noqa: PLR0913
    hidden: Tensor,
    head: Head,
    layout: Layout,
    targets: Tensor,
    temperature: Tensor | float,
    operand: torch.dtype | None = None,
) -> Inputs:
    """Detached inputs of a pass; targets and temperature (P,) in the batch's order.

    operand: what the products' operands are rounded to (None: what holds here and now).
    """
    operand = operand or operand_dtype(hidden, head)
    wide = compute_dtype(operand)
    if isinstance(temperature, Tensor):
        of_slots = layout.of_slots(layout.pick(temperature.to(wide)))
    else:
        of_slots = hidden.new_full((layout.n_slots,), float(temperature), dtype=wide)
    detached = Head(
        head.weight.detach(),
        None if head.bias is None else head.bias.detach(),
        head.scale,
        head.softcap,
    )
    picked = safe_targets(layout.pick(targets.long()), head.vocabulary)
    return Inputs(hidden.detach(), detached, operand, layout, picked, of_slots)


def describe(  # noqa: PLR0913
    hidden: Tensor,
    head: Head,
    layout: Layout,
    n_pairs: int,
    operand: torch.dtype | None = None,
    *,
    token_local: bool = False,
) -> Problem:
    """The sizes and needs a plan is chosen for."""
    needs = needed_gradients(hidden, head)
    return Problem(
        n_slots=layout.n_slots,
        n_pairs=n_pairs,
        n_active=layout.n_pairs,
        width=head.width,
        vocabulary=head.vocabulary,
        operand=operand or operand_dtype(hidden, head),
        hidden_dtype=hidden.dtype,
        weight_dtype=head.weight.dtype,
        device=hidden.device,
        needs_hidden=needs[0],
        needs_weight=needs[1] or needs[2],
        token_local=token_local,
        bias=head.bias is not None,
        softcap=head.softcap is not None,
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
