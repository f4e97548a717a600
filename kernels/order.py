"""Order statistics of the scores that a mask selects: a quantile, the k largest, a bounded mean.

Nothing is sorted and nothing waits for a device. With `group`, all its ranks call together, with
the same keywords; a rank may have no scores. What is found is the same to the bit on all of them,
however the scores are spread, and no score leaves its rank.

A selected NaN is refused on the CPU, on all ranks. On a device each op says what it does.
"""

from __future__ import annotations

import numbers
import operator

import torch
import torch.distributed as dist
from torch import Tensor

from rollfuse.kernels import checks
from rollfuse.kernels.collectives import least_over
from rollfuse.kernels.ranking import (
    Ranking,
    largest,
    place_of,
    place_of_bound,
    rank_scores,
    value_of,
)


def masked_quantile(
    scores: Tensor, mask: Tensor, q: Tensor | float, *, group: dist.ProcessGroup | None = None
) -> Tensor:
    """The q-quantile of the scores that `mask` selects, interpolated as numpy.quantile does.

    It lies at q (n - 1) in ascending order, counted from 0, linearly between the two next to it.
    Unlike numpy's it is infinite between a finite score and an infinity, and between equal ones.

    Args:
        scores: (N,) float, infinities allowed.
        mask: (N,) bool.
        q: in [0, 1], number or 0-d float tensor on the device of `scores`.
        group: the ranks whose scores count together; None is this process alone.

    Returns:
        () in the dtype of `scores`, a constant. NaN where nothing is selected, between -inf and
        +inf, and (on a device) where a NaN is selected or q is outside [0, 1].

    Raises:
        TypeError, ValueError: a shape, dtype, device or (on the CPU) value is wrong.
    """
    share = _number(q, "q", torch.float64, scores)
    known = _known(q)
    checks.need(known is None or 0.0 <= known <= 1.0, "q", "a value in [0, 1]", known)
    ranked = _ranking(scores, mask, group)
    position = share * (ranked.n_selected - 1)
    lower = position.floor()
    place = place_of(ranked, lower.long())
    low = value_of(place.key, ranked.form)
    following = value_of(_key_after(ranked, place.key), ranked.form)
    high = torch.where(lower + 1 < place.below + place.equal, low, following)
    weight = position - lower
    # Not low + weight * (high - low), which is NaN from -inf on.
    between = ((1.0 - weight) * low + weight * high).clamp(low, high)
    found = torch.where(weight > 0.0, between, low)
    good = (ranked.n_selected > 0) & (ranked.n_nan == 0) & (share >= 0.0) & (share <= 1.0)
    return torch.where(good, found, torch.nan).to(scores.dtype)


def top_k_mask(
    scores: Tensor, mask: Tensor, k: Tensor | int, *, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Which of the scores that `mask` selects are the k largest: exactly k, or all if fewer.

    Of equal scores the first are taken, those of a lower rank before those of a higher.

    Args:
        scores: (N,) float, infinities allowed. On a device a NaN counts as larger than all.
        mask: (N,) bool.
        k: from 0 to 2^63 - 1, of all ranks together; integer (numpy's, too) or 0-d integer tensor
            on the device of `scores`.
        group: the ranks whose scores count together; None is this process alone.

    Returns:
        (N,) bool.

    Raises:
        TypeError, ValueError: a shape, dtype, device or (on the CPU) value is wrong.
    """
    wanted = _number(_whole(k), "k", torch.int64, scores)
    known = _known(wanted)
    checks.need(known is None or known >= 0, "k", "a value >= 0", known)
    ranked = _ranking(scores, mask, group)
    place = place_of(ranked, ranked.n_selected - wanted)
    above = ranked.n_selected - place.below - place.equal
    return largest(ranked, ranked.selected, place.key, wanted - above)


def mean_bounded_mask(
    scores: Tensor,
    mask: Tensor,
    bound: Tensor | float,
    *,
    removable: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Which scores stay when the fewest largest are removed for a mean of the rest <= bound.

    Only scores above the bound are ever removed. Of equal ones the first are, those of a lower
    rank before those of a higher. Where nothing stays, the bound is met.

    Args:
        scores: (N,) float, infinities allowed; the finite ones must add up within float64 (1.8e308)
            in any order. On a device a NaN counts as +inf.
        mask: (N,) bool, the scores that the mean is of.
        bound: finite, number or 0-d float tensor on the device of `scores`.
        removable: (N,) bool, the scores that may be removed; None: all. Where that does not
            suffice, all of them above the bound are.
        group: the ranks whose scores count together; None is this process alone.

    Returns:
        (N,) bool, `mask` without the removed. A mean within float64's rounding of the bound may
        count as either side of it.

    Raises:
        TypeError, ValueError: a shape, dtype, device or (on the CPU) value is wrong.

    Source: Zheng et al., Prosperity before collapse (M2PO), arXiv 2510.01161. There the score is
    the squared log-ratio, the bound 0.04, and removable where A > 0 and ratio > 1 or A < 0 and
    ratio < 1. The authors' code finds a cap instead; AReaL's removes whatever the quadrant, until
    the mean is < bound, and always leaves one.
    """
    limit = _number(bound, "bound", torch.float64, scores)
    known = _known(bound)
    checks.need(known is None or abs(known) < torch.inf, "bound", "a finite value", known)
    ranked = _ranking(scores, mask, group)
    # Not `>`, which a NaN would not pass. In float64: 0-d tensors take the dtype of the others.
    loose = mask & ~(scores.detach().double() <= limit)
    if removable is not None:
        _check_mask(removable, "removable", scores)
        loose = loose & removable
    key, n_equal = place_of_bound(ranked, loose, limit)
    return mask & ~largest(ranked, loose, key, n_equal)


def _key_after(ranked: Ranking, key: Tensor) -> Tensor:
    """() int64, the least selected key above `key` on all ranks; that of a NaN where none is."""
    last = torch.iinfo(ranked.form.integer).max
    keys = torch.where(ranked.selected & (ranked.key > key), ranked.key, last)
    return least_over(torch.cat([keys, keys.new_full((1,), last)]).amin(), ranked.group)


def _ranking(scores: Tensor, mask: Tensor, group: dist.ProcessGroup | None) -> Ranking:
    _check_mask(mask, "mask", scores)
    ranked = rank_scores(scores, mask, group)
    if checks.may_read(scores):
        n_nan = int(ranked.n_nan)
        checks.need(n_nan == 0, "scores", "no NaN where the mask is set", f"{n_nan} of them")
    return ranked


def _number(value: Tensor | float, name: str, dtype: torch.dtype, scores: Tensor) -> Tensor:
    """() of that dtype on the device of the scores, which are checked first."""
    checks.need_float(scores, "scores")
    checks.need(scores.dim() == 1, "scores", "shape (N,)", tuple(scores.shape))
    if isinstance(value, Tensor):
        if dtype.is_floating_point:
            checks.need_float(value, name)
        else:
            checks.need_int(value, name)
        checks.need_shape(value, (), name, "a 0-d tensor")
        checks.need_same_device(value, scores, name, "scores")
        return value.detach().to(dtype)
    kind: tuple[type, ...] = (int, float) if dtype.is_floating_point else (int,)
    if isinstance(value, bool) or not isinstance(value, kind):
        needed = "a number" if dtype.is_floating_point else "an integer"
        raise TypeError(f"{name}: need {needed} or a 0-d tensor, got {type(value).__name__}")
    return torch.full((), value, dtype=dtype, device=scores.device)


def _whole(k: Tensor | int) -> Tensor | int:
    """`k` as Python's integer where it is one, of whichever kind; those of int64 alone."""
    if isinstance(k, bool) or not isinstance(k, numbers.Integral):
        return k
    whole = operator.index(k)
    checks.need(whole >= 0, "k", "a value >= 0", whole)
    checks.need(whole <= torch.iinfo(torch.int64).max, "k", "a value < 2^63", whole)
    return whole


def _known(value: Tensor | float) -> float | None:
    """The value where it may be looked at."""
    if not isinstance(value, Tensor):
        return value
    return value.item() if checks.may_read(value) else None


def _check_mask(mask: Tensor, name: str, scores: Tensor) -> None:
    checks.need_bool(mask, name)
    checks.need_shape(mask, tuple(scores.shape), name, "one a score")
    checks.need_same_device(mask, scores, name, "scores")
