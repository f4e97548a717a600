"""Places in the order of scores that may be spread over ranks, found without sorting.

The bits of a float, read as an integer, are in the order of the floats. A place in that order is
found digit by digit from the most significant on, each by a histogram that a process group may sum;
no score leaves its rank. Histograms hold integers, and what follows from them is done alike
everywhere: the result is the same on all ranks, however the scores are spread over them, and
without a group it is the case of one rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from rollfuse.kernels.collectives import sum_of_lower_ranks, sum_over


class Format(NamedTuple):
    """How a float is read as an integer, and in which digits that is searched.

    The first digit is sign and exponent: below it the scores of a bin share them, and their sum is
    one of integers.
    """

    real: torch.dtype
    integer: torch.dtype
    mantissa: int  # bits
    digits: tuple[tuple[int, int], ...]  # (shift, values), most significant first


_SINGLE = Format(torch.float32, torch.int32, 23, ((23, 1 << 9), (12, 1 << 11), (0, 1 << 12)))
_DOUBLE = Format(
    torch.float64, torch.int64, 52, ((52, 1 << 12), *((s, 1 << 13) for s in (39, 26, 13, 0)))
)
# Mantissas are summed in words of so many bits, so that 2^35 scores fit.
_WORD = 27


class Ranking(NamedTuple):
    """The scores as integers, and what all ranks know of them."""

    key: Tensor  # (N,) int64, in the order of the scores
    selected: Tensor  # (N,) bool
    n_selected: Tensor  # () int64, on all ranks
    n_nan: Tensor  # () int64, those of them that are NaN
    form: Format
    group: dist.ProcessGroup | None


class Place(NamedTuple):
    """A place in the ascending order of all ranks' selected scores, () int64 each."""

    key: Tensor
    below: Tensor  # scores less than it
    equal: Tensor


def rank_scores(scores: Tensor, mask: Tensor, group: dist.ProcessGroup | None) -> Ranking:
    """Scores (N,) of which `mask` (N,) selects. Zeros are equal; so are NaNs, above +inf."""
    form = _DOUBLE if scores.dtype == torch.float64 else _SINGLE
    values = scores.detach().to(form.real)
    is_nan = values.isnan()
    values = values.masked_fill(values == 0.0, 0.0).masked_fill(is_nan, torch.nan)
    bits = values.view(form.integer)
    key = torch.where(bits < 0, bits ^ torch.iinfo(form.integer).max, bits).long()
    found = torch.stack([mask.sum(), (mask & is_nan).sum()])
    count, n_nan = sum_over(found, group).unbind()
    return Ranking(key, mask, count, n_nan, form, group)


def value_of(key: Tensor, form: Format) -> Tensor:
    """Float64, the score of a key."""
    bits = torch.where(key < 0, key ^ torch.iinfo(form.integer).max, key)
    return bits.to(form.integer).view(form.real).double()


def place_of(ranked: Ranking, rank: Tensor) -> Place:
    """Where the score of that rank () int64 in ascending order lies, counted from 0.

    With a rank below 0 or beyond the last, below or above all, and no score is equal.
    """
    inside = ranked.selected
    start = torch.full_like(rank, torch.iinfo(ranked.form.integer).min)
    below, equal = torch.zeros_like(rank), torch.zeros_like(rank)
    for shift, n_values in ranked.form.digits:
        digit = _digits(ranked.key, start, shift, n_values)
        (counts,) = _histograms(digit, [inside.long()], n_values, ranked.group)
        up_to = counts.cumsum(0)
        found = torch.searchsorted(up_to, rank - below, right=True).clamp(max=n_values - 1)
        equal = _at(counts, found)
        below = below + _at(up_to, found) - equal
        inside = inside & (digit == found)
        start = start + (found << shift)
    return Place(start, below, equal)


def place_of_bound(ranked: Ranking, loose: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    """Where removing the largest of `loose`, all above the limit, must end.

    With e = score - limit, the sum of e over what stays must be <= 0. Added in ascending order the
    loose ones' e, all positive, pass 0 at the place wanted.

    Returns:
        () int64 each: a key above which all are removed, and how many equal to it are.
    """
    form = ranked.form
    mantissa = _mantissa(ranked.key, form)
    words = [(mantissa >> bit) & ((1 << _WORD) - 1) for bit in range(0, form.mantissa + 1, _WORD)]
    start = torch.full_like(ranked.n_selected, torch.iinfo(form.integer).min)
    fixed = ranked.selected & ~loose
    _, excess = _excesses(ranked, fixed, words, start, form.digits[0], limit)
    total = _running_sums(excess)[-1]
    inside, equal = loose, torch.zeros_like(start)
    for shift, n_values in form.digits:
        counts, excess = _excesses(ranked, inside, words, start, (shift, n_values), limit)
        up_to = total + _running_sums(excess.clamp(min=0.0))
        # Not `>`: the sum is NaN where infinities of both signs meet.
        passes = ~(up_to <= 0.0)
        found = torch.where(passes.any(), passes.long().argmax(), n_values - 1)
        total = _at(torch.cat([total[None], up_to]), found)
        equal = _at(counts, found)
        inside = inside & (_digits(ranked.key, start, shift, n_values) == found)
        start = start + (found << shift)
    fit = (-total / (value_of(start, form) - limit)).floor().nan_to_num(0.0)
    n_kept = torch.minimum(fit.clamp(min=0.0), equal.double()).long()
    return start, equal - n_kept


def largest(ranked: Ranking, among: Tensor, key: Tensor, n_equal: Tensor) -> Tensor:
    """(N,) bool: those of `among` above `key`, and the first n_equal of those equal to it."""
    equal = among & (ranked.key == key)
    before = sum_of_lower_ranks(equal.sum(), ranked.group)
    is_first = equal.cumsum(0) + before <= n_equal
    return (among & (ranked.key > key)) | (equal & is_first)


def _excesses(
    ranked: Ranking,
    inside: Tensor,
    words: list[Tensor],
    start: Tensor,
    digit: tuple[int, int],
    limit: Tensor,
) -> tuple[Tensor, Tensor]:
    """Of the scores `inside`, by their digit's value from that of the key `start` on: how many
    there are (int64), and the sum of score - limit (float64)."""
    form, (shift, n_values) = ranked.form, digit
    position = _digits(ranked.key, start, shift, n_values)
    amounts = [inside.long(), *(torch.where(inside, word, 0) for word in words)]
    counts, *sums = _histograms(position, amounts, n_values, ranked.group)
    keys = start + (torch.arange(n_values, device=start.device) << shift)
    magnitude = _unit(keys, form) * sum(
        part.double() * 2.0 ** (place * _WORD) for place, part in enumerate(sums)
    )
    total = torch.where(keys < 0, -magnitude, magnitude)
    # The unit of infinities is infinite, and times 0 it is not 0.
    return counts, torch.where(counts > 0, total - counts * limit, 0.0)


def _digits(key: Tensor, start: Tensor, shift: int, n_values: int) -> Tensor:
    """(N,) int64 in [0, n_values): the digit of a key that lies above `start`, modulo n_values.

    The modulus spreads the keys from elsewhere, which add 0 to their bin: atomics do not queue.
    Sums of `start` and a first digit may wrap around 2^64, and are right for it.
    """
    return ((key >> shift) - (start >> shift)) & (n_values - 1)


def _mantissa(key: Tensor, form: Format) -> Tensor:
    """int64, |score| in the unit of its exponent."""
    magnitude = torch.where(key < 0, ~key, key)
    hidden_bit = (magnitude >> form.mantissa > 0).long() << form.mantissa
    return (magnitude & ((1 << form.mantissa) - 1)) | hidden_bit


def _unit(key: Tensor, form: Format) -> Tensor:
    """Float64, what 1 in the mantissa of a key's score is worth."""
    exponent = torch.where(key < 0, ~key, key) >> form.mantissa
    return value_of(exponent.clamp(min=1) << form.mantissa, form) * 2.0**-form.mantissa


def _histograms(
    position: Tensor, amounts: list[Tensor], n_bins: int, group: dist.ProcessGroup | None
) -> Tensor:
    """int64, for each of the amounts (N,) its sums by position, of all ranks."""
    empty = position.new_zeros(n_bins)
    return sum_over(torch.stack([empty.index_add(0, position, one) for one in amounts]), group)


def _at(values: Tensor, place: Tensor) -> Tensor:
    """() values[place]; that, and `take` once decomposed by a compiler, would read `place`."""
    return values.gather(0, place.reshape(1)).squeeze(0)


def _running_sums(values: Tensor) -> Tensor:
    """cumsum, but added in the same order on every device, or two ranks could disagree."""
    step = 1
    while step < len(values):
        values = values + torch.nn.functional.pad(values[:-step], (step, 0))
        step *= 2
    return values
