"""Reductions: the weights w of loss = sum_p w_p * objective_p.

Each is a function (mask, cu_seqlens, denominator) -> weights, which TokenBatch's constructors call
once. The denominator is the whole step's, over all micro-batches and ranks: a micro-batch then
contributes its share of the step's loss, and accumulation equals one big batch by construction.
None stands for the natural count of the pairs given, which is right only where they are the step.

A pair counts as often as it occurs: a tree token with a pair per leaf counts once per leaf.
No function reads tensors on a device; a denominator of 0 (a step with nothing to learn from) gives
weights of 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rollfuse.kernels import checks


def token_mean(
    mask: Tensor, cu_seqlens: Tensor, denominator: Tensor | float | None = None
) -> Tensor:
    """Every token counts the same: w_p = mask_p / N, N the tokens of the step.

    Args:
        mask: (P,) bool, the pairs that count.
        cu_seqlens: (B + 1,) int64, where each sequence's pairs start and end, from 0 to P.
        denominator: N, number or 0-d tensor >= 0. None: the pairs that count in `mask`.

    Returns:
        (P,) float32.

    Raises:
        TypeError, ValueError: a shape, dtype or (where it is on the host) value is wrong.

    Source: Yu et al., DAPO, arXiv 2503.14476, equation 12.
    """
    _check(mask, cu_seqlens)
    return _spread(mask, mask.sum() if denominator is None else denominator)


def sequence_mean(
    mask: Tensor, cu_seqlens: Tensor, denominator: Tensor | float | None = None
) -> Tensor:
    """Every sequence counts the same: w_p = mask_p / (N * |sequence of p|), N sequences a step.

    |sequence| is the number of its pairs that count, so each sequence's weights sum to 1 / N.

    Args:
        mask: (P,) bool, the pairs that count.
        cu_seqlens: (B + 1,) int64, where each sequence's pairs start and end, from 0 to P.
        denominator: N, number or 0-d tensor >= 0. None: the sequences with a pair that counts.

    Returns:
        (P,) float32.

    Raises:
        TypeError, ValueError: a shape, dtype or (where it is on the host) value is wrong.

    Source: Shao et al., DeepSeekMath (GRPO), arXiv 2402.03300, equation 3.
    """
    _check(mask, cu_seqlens)
    lengths = _lengths(mask, cu_seqlens)
    inverse = _inverse((lengths > 0).sum() if denominator is None else denominator, mask.device)
    per_sequence = torch.where(lengths > 0, inverse / lengths.clamp(min=1), 0.0).float()
    # output_size spares the sync that would find the length of the result.
    spread = per_sequence.repeat_interleave(cu_seqlens.diff(), output_size=mask.shape[0])
    return torch.where(mask, spread, 0.0)


def sequence_sum(
    mask: Tensor, cu_seqlens: Tensor, denominator: Tensor | float | None = None
) -> Tensor:
    """Tokens are summed, sequences averaged: w_p = mask_p / N, N the sequences of the step.

    Args:
        mask: (P,) bool, the pairs that count.
        cu_seqlens: (B + 1,) int64, where each sequence's pairs start and end, from 0 to P.
        denominator: N, number or 0-d tensor >= 0. None: the sequences with a pair that counts.

    Returns:
        (P,) float32.

    Raises:
        TypeError, ValueError: a shape, dtype or (where it is on the host) value is wrong.

    Source: Williams, Simple statistical gradient-following algorithms, Machine Learning 8, 1992.
    """
    _check(mask, cu_seqlens)
    natural = (_lengths(mask, cu_seqlens) > 0).sum()
    return _spread(mask, natural if denominator is None else denominator)


def constant_length(mask: Tensor, cu_seqlens: Tensor, denominator: Tensor | float | None) -> Tensor:
    """Every token counts the same in every step: w_p = mask_p / (N * L_max).

    Unlike `token_mean`, a step of short responses does not weigh its tokens more.

    Args:
        mask: (P,) bool, the pairs that count.
        cu_seqlens: (B + 1,) int64, where each sequence's pairs start and end, from 0 to P.
        denominator: N * L_max, the step's sequences times a constant length such as the longest
            response allowed; number or 0-d tensor >= 0. Nothing in a batch tells it: needed.

    Returns:
        (P,) float32.

    Raises:
        TypeError, ValueError: a shape, dtype or (where it is on the host) value is wrong, or
            `denominator` is None.

    Source: Liu et al., Understanding R1-Zero-like training (Dr. GRPO), arXiv 2503.20783.
    """
    _check(mask, cu_seqlens)
    if denominator is None:
        raise ValueError("denominator: need n_sequences * max_length of the step, got None")
    return _spread(mask, denominator)


def _spread(mask: Tensor, denominator: Tensor | float) -> Tensor:
    return torch.where(mask, _inverse(denominator, mask.device).float(), 0.0)


def _inverse(denominator: Tensor | float, device: torch.device) -> Tensor:
    """1 / denominator, 0 for 0; 0-d float64 on `device`."""
    if isinstance(denominator, Tensor):
        checks.need_shape(denominator, (), "denominator", "a 0-d tensor")
        if checks.may_read(denominator):
            _check_denominator(denominator.item())
        count = denominator.detach().to(device=device, dtype=torch.float64)
    else:
        _check_denominator(denominator)
        count = torch.full((), denominator, dtype=torch.float64, device=device)
    return torch.where(count > 0, 1.0 / count, 0.0)


def _check_denominator(value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"denominator: need a number or a 0-d tensor, got {type(value).__name__}")
    checks.need(0 <= value < math.inf, "denominator", "a finite value >= 0", value)


def _lengths(mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(B,) int64: the pairs of each sequence that count."""
    before = torch.nn.functional.pad(mask.cumsum(0), (1, 0))
    return before[cu_seqlens].diff()


def _check(mask: Tensor, cu_seqlens: Tensor) -> None:
    checks.need_bool(mask, "mask")
    checks.need(mask.dim() == 1, "mask", "shape (P,)", tuple(mask.shape))
    checks.need_int(cu_seqlens, "cu_seqlens")
    good = cu_seqlens.dim() == 1 and cu_seqlens.shape[0] >= 1
    checks.need(good, "cu_seqlens", "shape (B + 1,)", tuple(cu_seqlens.shape))
    checks.need_same_device(cu_seqlens, mask, "cu_seqlens", "mask")
    if checks.may_read(cu_seqlens):
        borders = cu_seqlens.tolist()
        good = borders[0] == 0 and borders[-1] == mask.shape[0] and borders == sorted(borders)
        checks.need(good, "cu_seqlens", f"non-decreasing from 0 to P = {mask.shape[0]}", borders)
