"""Sums and means over the sequences of a batch, for what a sequence's tokens share."""

from __future__ import annotations

from torch import Tensor


def sequence_sums(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(B,) sum of each sequence's values (P,), differentiable; 0 for a sequence without any.

    `cu_seqlens` (B + 1,) int64 says where sequences start and end, from 0 to P. In float64 inside:
    a mean of thousands of small log-ratios decides about a band of 3e-4.
    """
    n_sequences = cu_seqlens.shape[0] - 1
    owner = _owner(cu_seqlens, values.shape[0])
    total = values.double().new_zeros(n_sequences).index_add(0, owner, values.double())
    return total.to(values.dtype)


def sequence_means(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(B,) mean of each sequence's values (P,), as `sequence_sums`."""
    lengths = cu_seqlens.diff().clamp(min=1)
    return sequence_sums(values, cu_seqlens) / lengths


def _owner(cu_seqlens: Tensor, n_values: int) -> Tensor:
    """(P,) int64, the sequence of each value; no host sync."""
    numbers = cu_seqlens.new_ones(cu_seqlens.shape[0] - 1).cumsum(0) - 1
    return numbers.repeat_interleave(cu_seqlens.diff(), output_size=n_values)
