"""Where top-k, top-p and min-p cut a row: one number, the nats below the row's largest z.

In this order, which is Hugging Face's: top-k keeps the k largest z; top-p the fewest of the largest
of those that have a share p of their mass; min-p what has at least min_p of the largest
probability. What ties with the last one kept is kept, so that the number says all, and a loss that
is given it cuts at the same place (`rollfuse.kernels.rows.widened`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rollfuse.kernels.dispatch import backend, use_triton
from rollfuse.kernels.rows import Transform, widened
from rollfuse.kernels.statistics import Scratch, bits_from_top, exponentials, finite, prepare

if backend.name != "cpu":
    from rollfuse.kernels._triton.truncation import centre_rows as centre_rows_triton
    from rollfuse.kernels._triton.truncation import cut_rows as cut_rows_triton

# Logits per block of rows on the PyTorch path, as in `rollfuse.kernels.drawing`.
_BLOCK_ELEMENTS = 1 << 17
# The k largest maxima of groups of so many columns are no larger than the k largest z.
_GROUP = 64
# Rounding of the least z that can be within top-p, in nats.
_SLACK = 1e-3


class Cuts(NamedTuple):
    """What each of S rows is cut to; None: not at all."""

    top_k: Tensor | None = None  # (S,) int64
    top_p: Tensor | None = None  # (S,) float32 or float64
    min_p: Tensor | None = None  # (S,) likewise

    @property
    def is_any(self) -> bool:
        return any(cut is not None for cut in self)

    def rows(self, start: int, stop: int) -> Cuts:
        return Cuts(*(None if cut is None else cut[start:stop] for cut in self))


def support_of(logits: Tensor, transform: Transform, cuts: Cuts) -> Tensor:
    """(S,) nats below each row's largest z that the cuts leave, +inf where nothing is cut.

    NaN where a cut is no possible one, which is known of device tensors here only.
    """
    top_k, top_p, min_p = cuts
    support = transform.factor.new_full(transform.factor.shape, torch.inf)
    if top_k is not None or top_p is not None:
        by_kernel = use_triton(logits) and logits.dtype != torch.float64
        cut_rows = cut_rows_triton if by_kernel else cut_rows_torch
        support = cut_rows(logits, transform, top_k, top_p)
    if min_p is not None:
        support = torch.minimum(support, 0.0 - min_p.log())
        support = support.where((min_p >= 0) & (min_p <= 1), torch.nan)
    if top_k is not None:
        support = support.where(top_k >= 1, torch.nan)
    if top_p is not None:
        support = support.where((top_p > 0) & (top_p <= 1), torch.nan)
    return support


def centred(logits: Tensor, transform: Transform, support: Tensor) -> Tensor:
    """(S,) supports in the middle between the last token kept and the first one cut.

    The set is the same, and a trainer whose logits differ a little from the sampler's cuts at the
    same place: on the border itself every other token would change sides.
    """
    if use_triton(logits) and logits.dtype != torch.float64:
        return centre_rows_triton(logits, transform, widened(support) / transform.factor, support)
    scratch = Scratch(logits, transform, _BLOCK_ELEMENTS)
    found = torch.empty_like(support)
    for start, stop in scratch.blocks(logits.shape[0]):
        part, last = transform.rows(start, stop), support[start:stop]
        pre = prepare(logits[start:stop], part, scratch)
        below = pre - finite(pre.amax(1)).unsqueeze(1)
        is_out = below < -(widened(last) / part.factor).unsqueeze(1)
        kept = -below.masked_fill(is_out, 0.0).amin(1) * part.factor
        first = -below.masked_fill_(~is_out, -torch.inf).amax(1) * part.factor
        # Where nothing is cut that has a probability there is no border; NaN stays what it is.
        found[start:stop] = torch.where(first.isfinite(), 0.5 * (kept + first), last + torch.inf)
    return found


def cut_rows_torch(
    logits: Tensor, transform: Transform, top_k: Tensor | None, top_p: Tensor | None
) -> Tensor:
    """(S,) nats that top-k and top-p leave."""
    scratch = Scratch(logits, transform, _BLOCK_ELEMENTS)
    support = torch.empty_like(transform.factor)
    for start, stop in scratch.blocks(logits.shape[0]):
        part = transform.rows(start, stop)
        pre = prepare(logits[start:stop], part, scratch)
        top = pre.amax(1)
        k, p, _ = Cuts(top_k, top_p).rows(start, stop)
        total = None
        if k is not None:
            least = _least_of_top_k(pre, k)
        else:
            assert p is not None
            exps = exponentials(
                bits_from_top(pre, top, part, scratch.first), part, scratch.second[: stop - start]
            )
            total = exps.sum(1, dtype=torch.float64)
            # Together, what is below this has less than a share 1 - p.
            nats = ((1.0 - p) * total / pre.shape[1]).log() - _SLACK
            least = (top + (nats / part.factor).to(top.dtype)).where(p < 1, torch.inf)
        ranked = _ranked(pre, least)
        border = top.new_full(top.shape, -torch.inf)
        if k is not None:
            place = (k.clamp(max=ranked.shape[1]) - 1).clamp(min=0)
            kth = ranked.gather(1, place.unsqueeze(1)).squeeze(1)
            border = kth.where(k < pre.shape[1], -torch.inf)
        if p is not None:
            border = torch.maximum(border, _edge(ranked, top, part.factor, p, border, total))
        support[start:stop] = (finite(top) - border) * part.factor
    return support


def _least_of_top_k(pre: Tensor, k: Tensor) -> Tensor:
    """(s,) no more than the k-th largest of each row of pre (s, V), -inf where that costs much."""
    n_cols = pre.shape[1]
    most = int(k.clamp(0, n_cols).max()) if k.numel() else 0
    n_groups = n_cols // _GROUP
    if not 0 < most <= n_groups:
        return pre.new_full((pre.shape[0],), -torch.inf)
    maxima = pre[:, : n_groups * _GROUP].view(-1, n_groups, _GROUP).amax(2)
    largest = maxima.topk(most, dim=1).values
    return largest.gather(1, (k - 1).clamp(min=0).unsqueeze(1)).squeeze(1)


def _ranked(pre: Tensor, least: Tensor) -> Tensor:
    """(s, most of a row's) values >= least (s,) of each row, falling; -inf where there are none."""
    keep = pre >= least.unsqueeze(1)
    counts = keep.sum(1)
    width = max(1, int(counts.max()))
    if width == pre.shape[1]:
        return pre.where(keep, -torch.inf).sort(1, descending=True).values
    row, column = keep.nonzero(as_tuple=True)
    first = (counts.cumsum(0) - counts)[row]
    place = torch.arange(len(row), device=row.device) - first
    packed = pre.new_full((pre.shape[0], width), -torch.inf)
    packed[row, place] = pre[row, column]
    return packed.sort(1, descending=True).values


def _edge(  # noqa: PLR0913
    ranked: Tensor,
    top: Tensor,
    factor: Tensor,
    p: Tensor,
    border: Tensor,
    total: Tensor | None,
) -> Tensor:
    """(s,) pre(g) of the last one within top-p of what is not below the border (s,).

    ranked (s, w) has all that can be; total (s,) is the mass of the row, None: that of what is not
    below the border. The last one is where what is before it has less than the share p.
    """
    distance = ranked.double() - finite(top).double().unsqueeze(1)
    masses = distance.mul_(factor.double().unsqueeze(1)).exp_()
    masses.masked_fill_(ranked < border.unsqueeze(1), 0.0)
    if total is None:
        total = masses.sum(1)
    before = masses.cumsum(1).sub_(masses)
    within = (before < (p * total).unsqueeze(1)).sum(1, keepdim=True)
    edge = ranked.gather(1, (within - 1).clamp_(min=0)).squeeze(1)
    return edge.where(p < 1, -torch.inf)
