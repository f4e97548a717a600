"""Sums, means, spreads and scans over segments: groups of values of any sizes.

A segment is named by its number: `numbers` (N,) says which of `n_segments` each value belongs to.
`segment_numbers` makes them from offsets (cu_seqlens), `number_groups` from any integers. Segments
may be empty, and those of the statistics may lie in any order.

All is in float64 inside, comes back in the dtype of the values, can be differentiated twice where
it depends on the values, and is deterministic on the CPU. With `group`, segments extend over the
ranks of a process group: all of them call together and mean the same by a number, so not the ones
that `number_groups` gave on each. The gradient is then that of the sum of all ranks' losses, and
either all of them run the backward or none. Scans stay within a rank. Numbers outside [0,
n_segments) are refused on the CPU, by the rank that has them; on a device that is up to the caller.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from rollfuse.kernels import checks
from rollfuse.kernels.collectives import least_over, sum_over
from rollfuse.kernels.recurrence import recurrence


def segment_numbers(offsets: Tensor, n_values: int) -> Tensor:
    """(N,) int64, the segment of each of n_values = N values that lie side by side.

    Args:
        offsets: (G + 1,) int64 or int32, where segments start and end, from 0 to N.
        n_values: N; the offsets know it, but only on their device.

    Raises:
        TypeError, ValueError: a shape, dtype or (on the CPU) value is wrong.
    """
    checks.need_int(offsets, "offsets")
    good = offsets.dim() == 1 and offsets.shape[0] >= 1
    checks.need(good, "offsets", "shape (G + 1,)", tuple(offsets.shape))
    lengths = offsets.diff()
    if checks.may_read(offsets):
        good = int(offsets[0]) == 0 and int(offsets[-1]) == n_values and bool((lengths >= 0).all())
        checks.need(good, "offsets", f"non-decreasing from 0 to N = {n_values}", offsets)
    numbers = torch.arange(offsets.shape[0] - 1, device=offsets.device)
    # output_size spares the sync that would find the length of the result.
    return numbers.repeat_interleave(lengths, output_size=n_values)


def number_groups(ids: Tensor) -> Tensor:
    """(N,) int64 in [0, N): ids (N,) of any values numbered from 0 in ascending order.

    There are at most N groups; the numbers left over are empty segments. torch.unique, which would
    tell how many there are, has to wait for the device.

    Raises:
        TypeError, ValueError: `ids` are not int64 or int32, or not of shape (N,).
    """
    checks.need_int(ids, "ids")
    checks.need(ids.dim() == 1, "ids", "shape (N,)", tuple(ids.shape))
    ordered, order = ids.sort()
    is_new = torch.ones_like(order)
    is_new[1:] = ordered.diff() != 0
    return torch.zeros_like(order).scatter(0, order, is_new.cumsum(0) - 1)


def segment_counts(
    numbers: Tensor, n_segments: int, *, group: dist.ProcessGroup | None = None
) -> Tensor:
    """(G,) int64, how many values each segment has: numbers (N,) in [0, n_segments).

    Raises:
        TypeError, ValueError: a shape, dtype or (on the CPU) value is wrong.
    """
    _check_numbers(numbers, n_segments)
    return _counts(numbers, n_segments, group)


def segment_sums(
    values: Tensor, numbers: Tensor, n_segments: int, *, group: dist.ProcessGroup | None = None
) -> Tensor:
    """(G,) the sum of each segment's values, 0 for an empty one.

    Args:
        values: (N,) float.
        numbers: (N,) int64 or int32, the segment of each.
        n_segments: G.
        group: the ranks over which segments extend; None is this process alone.

    Raises:
        TypeError, ValueError: a shape, dtype, device or (on the CPU) number is wrong.
    """
    _check(values, numbers, n_segments)
    return sum_over(_sums(values.double(), numbers, n_segments), group).to(values.dtype)


def segment_means(
    values: Tensor, numbers: Tensor, n_segments: int, *, group: dist.ProcessGroup | None = None
) -> Tensor:
    """(G,) the mean of each segment's values, 0 for an empty one. As `segment_sums`."""
    _check(values, numbers, n_segments)
    total = sum_over(_sums(values.double(), numbers, n_segments), group)
    count = _counts(numbers, n_segments, group)
    return (total / count.clamp(min=1)).to(values.dtype)


def segment_std(
    values: Tensor,
    numbers: Tensor,
    n_segments: int,
    *,
    ddof: int = 1,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """(G,) sqrt(sum (value - mean)^2 / (n - ddof)) of each segment, 0 where n <= ddof.

    Exactly 0 where all values of a segment are equal; the gradient is 0 there.

    Args:
        values: (N,) float, finite.
        numbers, n_segments, group: as for `segment_sums`.
        ddof: 1 for the sample's standard deviation, 0 for the population's.

    Raises:
        TypeError, ValueError: a shape, dtype, device, keyword or (on the CPU) number is wrong.
    """
    checks.need(ddof in (0, 1), "ddof", "0 or 1", ddof)
    centred, count = _centred(values, numbers, n_segments, group)
    squares = sum_over(_sums(centred.square(), numbers, n_segments), group)
    variance = squares / (count - ddof).clamp(min=1)
    has_spread = variance != 0
    # The root is not taken of 0, where its derivative is infinite.
    root = torch.where(has_spread, variance, 1.0).sqrt()
    return torch.where(has_spread, root, 0.0).to(values.dtype)


def segment_deviations(
    values: Tensor, numbers: Tensor, n_segments: int, *, group: dist.ProcessGroup | None = None
) -> Tensor:
    """(N,) each value minus the mean of its segment; exactly 0 where all of it are equal.

    Args, errors: as for `segment_sums`, values finite.
    """
    return _centred(values, numbers, n_segments, group)[0].to(values.dtype)


def leave_one_out_deviations(
    values: Tensor, numbers: Tensor, n_segments: int, *, group: dist.ProcessGroup | None = None
) -> Tensor:
    """(N,) each value minus the mean of its segment's others; 0 where there are none.

    Exactly 0 where all values of a segment are equal.

    Args, errors: as for `segment_sums`, values finite.
    """
    return _left_out(values, numbers, n_segments, group).to(values.dtype)


def leave_one_out_means(
    values: Tensor, numbers: Tensor, n_segments: int, *, group: dist.ProcessGroup | None = None
) -> Tensor:
    """(N,) for each value the mean of its segment's others; the value itself where there are none.

    Args, errors: as for `segment_sums`, values finite.
    """
    deviations = _left_out(values, numbers, n_segments, group)
    return (values.double() - deviations).to(values.dtype)


def segment_scan(values: Tensor, numbers: Tensor, *, exclusive: bool = False) -> Tensor:
    """(N,) the running sum of each segment's values, up to each one.

    Log-depth, so deterministic and of small error at any length; nothing passes from one segment
    to the next, infinities and NaN neither.

    Args:
        values: (N,) float.
        numbers: (N,) int64 or int32, the segment of each value, non-decreasing.
        exclusive: leave each value itself out of its sum.

    Raises:
        TypeError, ValueError: a shape, dtype, device or (on the CPU) number is wrong.
    """
    _check_run(values, numbers)
    linked = _linked(numbers)
    sums = recurrence(values.double(), linked.double())
    if exclusive:
        sums = torch.where(linked, sums.roll(1), 0.0)
    return sums.to(values.dtype)


def discounted_sums(values: Tensor, numbers: Tensor, discount: Tensor | float) -> Tensor:
    """(N,) y_t = x_t + discount * y_{t+1} within each segment, from its end: returns, or GAE.

    Args:
        values: (N,) float, x: rewards, or for GAE the residuals with gamma * lambda to discount.
        numbers: (N,) int64 or int32, the segment of each value, non-decreasing.
        discount: finite number or 0-d tensor, or one a value (N,), which then discounts what
            follows it; a constant. 0 lets nothing pass. Products of discounts above 1 may overflow
            in a long segment, which does not reach the others.

    Returns:
        (N,) as `values`. Log-depth, as `segment_scan`.

    Raises:
        TypeError, ValueError: a shape, dtype, device or (on the CPU) number is wrong.
    """
    _check_run(values, numbers)
    if not isinstance(discount, Tensor):
        checks.need(math.isfinite(discount), "discount", "a finite value", discount)
    else:
        checks.need_float(discount, "discount")
        checks.need_same_device(discount, values, "discount", "values")
        good = discount.shape in ((), values.shape)
        checks.need(good, "discount", "a number, 0-d or one a value", tuple(discount.shape))
        discount = discount.detach().double()
        if checks.may_read(discount):
            finite = bool(discount.isfinite().all())
            checks.need(finite, "discount", "finite values", "one that is not")
    backwards = _linked(numbers.flip(0))
    factors = torch.where(backwards, (discount * torch.ones_like(values).double()).flip(0), 0.0)
    return recurrence(values.double().flip(0), factors).flip(0).to(values.dtype)


def _sums(values: Tensor, numbers: Tensor, n_segments: int) -> Tensor:
    return values.new_zeros(n_segments).index_add(0, numbers, values)


def _counts(numbers: Tensor, n_segments: int, group: dist.ProcessGroup | None) -> Tensor:
    return sum_over(_sums(torch.ones_like(numbers, dtype=torch.int64), numbers, n_segments), group)


def _centred(
    values: Tensor, numbers: Tensor, n_segments: int, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """(N,) float64 value - mean, and (G,) int64 counts.

    Counted from the least of the segment, so that 0.1 three times has no spread.
    """
    _check(values, numbers, n_segments)
    exact = values.double()
    count = _counts(numbers, n_segments, group)
    ceiling = exact.new_full((n_segments,), torch.inf)
    found = ceiling.scatter_reduce(0, numbers.long(), exact.detach(), "amin")
    above = exact - least_over(found, group)[numbers]
    mean = sum_over(_sums(above, numbers, n_segments), group) / count.clamp(min=1)
    return above - mean[numbers], count


def _left_out(
    values: Tensor, numbers: Tensor, n_segments: int, group: dist.ProcessGroup | None
) -> Tensor:
    """(N,) float64, n / (n - 1) (value - mean)."""
    centred, count = _centred(values, numbers, n_segments, group)
    size = count[numbers].double()
    return size / (size - 1.0).clamp(min=1.0) * centred


def _linked(numbers: Tensor) -> Tensor:
    """(N,) bool: the value before it is of the same segment."""
    return torch.nn.functional.pad(numbers[1:] == numbers[:-1], (1, 0))[: len(numbers)]


def _check_numbers(numbers: Tensor, n_segments: int) -> None:
    checks.need_int(numbers, "numbers")
    checks.need(numbers.dim() == 1, "numbers", "shape (N,)", tuple(numbers.shape))
    checks.need(n_segments >= 0, "n_segments", "a value >= 0", n_segments)
    if checks.may_read(numbers) and len(numbers):
        low, high = int(numbers.min()), int(numbers.max())
        good = 0 <= low and high < n_segments
        checks.need(good, "numbers", f"values in [0, {n_segments})", f"{low} to {high}")


def _check_values(values: Tensor, numbers: Tensor) -> None:
    checks.need_float(values, "values")
    checks.need_shape(values, tuple(numbers.shape), "values", "one a number")
    checks.need_same_device(values, numbers, "values", "numbers")


def _check(values: Tensor, numbers: Tensor, n_segments: int) -> None:
    _check_numbers(numbers, n_segments)
    _check_values(values, numbers)


def _check_run(values: Tensor, numbers: Tensor) -> None:
    checks.need_int(numbers, "numbers")
    checks.need(numbers.dim() == 1, "numbers", "shape (N,)", tuple(numbers.shape))
    _check_values(values, numbers)
    if checks.may_read(numbers):
        falls = int((numbers[1:] < numbers[:-1]).sum())
        checks.need(falls == 0, "numbers", "non-decreasing values", f"{falls} that fall")
