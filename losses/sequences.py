"""Sums and means over the sequences of a batch, for what a sequence's tokens share."""

from __future__ import annotations

from torch import Tensor

from rollfuse.kernels.segments import segment_means, segment_numbers, segment_sums


def sequence_sums(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(B,) sum of each sequence's values (P,), differentiable; 0 for a sequence without any.

    `cu_seqlens` (B + 1,) int64 says where sequences start and end, from 0 to P. In float64 inside:
    a mean of thousands of small log-ratios decides about a band of 3e-4.
    """
    owner = segment_numbers(cu_seqlens, values.shape[0])
    return segment_sums(values, owner, cu_seqlens.shape[0] - 1)


def sequence_means(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(B,) mean of each sequence's values (P,), as `sequence_sums`."""
    owner = segment_numbers(cu_seqlens, values.shape[0])
    return segment_means(values, owner, cu_seqlens.shape[0] - 1)
