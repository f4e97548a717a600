"""Optimal transport from K draws of a proposal to one token of a target.

Order the M tokens by falling p / q. With Q the share of the proposal in the first tokens, K draws
hit one of them with probability F(Q) = 1 - (1 - Q)^K. A selection that splits the order at some
boundaries into groups, goes to the first group that was hit and takes one of the draws in it, each
alike, has a law with F in the boundaries and straight lines between them: the chords of F.

How much is selected of each token we may choose, as a function Y of Q: concave, at most F, 1 at the
end. The best one has Y' = y / q with y <= p on the first tokens, as much as F leaves room for; y >=
p on the last ones, as little as F allows; and Y = F between them, where P - F is largest (P being
the share of the target). A selected token is then accepted with probability min(1, p / y), and what
is accepted in all is `multi_draft_bound`.

Any such Y is a mean of chords of F. Take all boundaries at which Y bends, until one of these bends
is made up of those of the chords; go on without that boundary. So each has a lifetime in [0, 1],
and a uniform draws boundaries: those that live longer. Nowhere are the M^K combinations of draws
looked at.

n sequences; everything is float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rollfuse.kernels import checks


class Selected(NamedTuple):
    """What was selected of the draws."""

    column: Tensor  # (n,) int64 place in the proposal; -1: none
    filled: Tensor  # (n, M) float64 probability of being accepted, of each token; at most p


class Transport(NamedTuple):
    """How to select; columns in the order of falling p / q."""

    order: Tensor  # (n, M) int64 columns as they were given
    ratio: Tensor  # (n, M) p / q
    slope: Tensor  # (n, M) y / q: what is selected of each token, before it is accepted
    filled: Tensor  # (n, M) min(p, y), where columns are as they were given
    lifetime: Tensor  # (n, M + 1) of the boundary before each token, and of the end


def multi_draft_bound(p: Tensor, q: Tensor, k: int) -> Tensor:
    """The highest probability with which one of `k` independent draws from q may stand for p.

        min over token sets S of 1 + p(S) - q(S)^k        (S empty: 1)

    No rule whose output has law p takes one of the draws more often, and `multi_draft` takes one as
    often. The smallest value is at a set of the tokens with the smallest p / q: it is concave in
    (p(S), q(S)), rises in p(S) and falls in q(S), so that at a minimum S also minimises p(S) - c
    q(S) for some c >= 0. That takes one sort.

    Args:
        p: (..., V) probabilities of the target.
        q: (..., V) probabilities of the draws.
        k: number of draws, >= 1.

    Returns:
        (...), float64.

    Raises:
        TypeError, ValueError: a shape or dtype is wrong, or k < 1.

    Source: for k = 1, sum(min(p, q)); the problem is that of Sun et al., SpecTr, arXiv 2310.15141.
    """
    checks.need_float(p, "p")
    checks.need_float(q, "q")
    checks.need_shape(q, tuple(p.shape), "q", "as p")
    checks.need(p.dim() >= 1 and p.shape[-1] >= 1, "p", "shape (..., V), V >= 1", tuple(p.shape))
    checks.need(k >= 1, "k", "a number of draws >= 1", k)
    p, q = p.double(), q.double()
    # 0 / 0 is put last, where it changes nothing.
    order = (p / q).nan_to_num(nan=torch.inf, posinf=torch.inf).argsort(-1)
    of_p, of_q = (x.gather(-1, order).cumsum(-1) for x in (p, q))
    return (1.0 + of_p - of_q**k).amin(-1).clamp_max(1.0)


def transport(p: Tensor, q: Tensor, n_draws: Tensor) -> Transport:
    """The best selection.

    Args:
        p: (n, M) probabilities of the target, of the tokens the proposal can draw.
        q: (n, M) probabilities of the proposal.
        n_draws: (n,) int64, >= 1.
    """
    p, q = p.double(), q.double()
    q = q / q.sum(1, keepdim=True)
    # Tokens that are never drawn go last, and have no part in it.
    p = p.where(q > 0, 0.0)
    ratio, order = torch.where(q > 0, p / q, 0.0).sort(dim=1, descending=True, stable=True)
    p, q = p.gather(1, order), q.gather(1, order)
    ahead = torch.cat((q.flip(1).cumsum(1).flip(1), q.new_zeros((q.shape[0], 1))), 1)
    slope = _slopes(p, q, ahead, n_draws)
    filled = torch.zeros_like(p).scatter(1, order, torch.minimum(p, slope * q))
    return Transport(order, ratio, slope, filled, _lifetimes(slope, ahead, n_draws))


def select(p: Tensor, q: Tensor, copies: Tensor, uniform: Tensor) -> Selected:
    """Select one of each sequence's draws, or none.

    Args:
        p: (n, M) probabilities of the target, of the tokens the proposal can draw.
        q: (n, M) probabilities of the proposal.
        copies: (n, M) int64, how often each token is among the draws; in sum 1 to K.
        uniform: (n, 3) float64: for the groups, for a draw in its group, for its acceptance.
    """
    found = transport(p, q, copies.sum(1))
    copies = copies.gather(1, found.order)
    column = torch.arange(copies.shape[1], device=copies.device)
    boundary = torch.arange(copies.shape[1] + 1, device=copies.device)
    first = (copies > 0).int().argmax(1, keepdim=True)
    ends = (boundary > first) & (found.lifetime > uniform[:, :1])
    end = ends.int().argmax(1, keepdim=True)
    counts = (copies * (column < end)).cumsum(1)
    total = counts[:, -1:]
    number = (uniform[:, 1:2] * total).long().minimum(total - 1)
    chosen = (counts > number).int().argmax(1, keepdim=True)
    is_accepted = uniform[:, 2:] * found.slope.gather(1, chosen) <= found.ratio.gather(1, chosen)
    token = found.order.gather(1, chosen).where(is_accepted, -1)
    return Selected(token.squeeze(1), found.filled)


def _slopes(p: Tensor, q: Tensor, ahead: Tensor, n_draws: Tensor) -> Tensor:
    """(n, M) y / q, falling. ahead: (n, M + 1) the share 1 - Q from each boundary on."""
    least = q.clamp_min(torch.finfo(q.dtype).tiny)
    ratio, chord = p / least, _chord(ahead[:, :-1], ahead[:, 1:], n_draws)
    gap = torch.cat((p.new_zeros((p.shape[0], 1)), (q * chord - p).cumsum(1)), 1)  # F - P
    # How far F is above Y: on the first tokens Y falls back behind F where p is small, on the last
    # ones, looked at from the end, where p is large.
    behind = gap - gap.cummin(1).values
    before = gap - gap.flip(1).cummin(1).values.flip(1)
    on_first = torch.minimum(ratio, chord + behind[:, :-1] / least)
    on_last = torch.maximum(ratio, chord - before[:, 1:] / least)
    column = torch.arange(p.shape[1], device=p.device)
    slope = torch.where(column < gap.argmin(1, keepdim=True), on_first, on_last)
    return slope.cummin(1).values


def _lifetimes(slope: Tensor, ahead: Tensor, n_draws: Tensor) -> Tensor:
    """(n, M + 1) lifetimes of the boundaries; both ends live for ever."""
    n, n_columns = slope.shape
    number = torch.arange(n_columns + 1, device=slope.device)
    lifetime, is_kept = torch.ones_like(ahead), torch.ones_like(ahead, dtype=torch.bool)
    left = (slope[:, :-1] - slope[:, 1:]).clamp_min(0.0)  # bends of Y that are not made yet
    here, clock = ahead[:, 1:-1], slope.new_zeros((n, 1))
    for _ in range(n_columns - 1):
        last = number.where(is_kept, 0).cummax(1).values[:, :-2]
        following = number.where(is_kept, n_columns).flip(1).cummin(1).values.flip(1)[:, 2:]
        bend = _chord(ahead.gather(1, last), here, n_draws)
        bend = (bend - _chord(here, ahead.gather(1, following), n_draws)).clamp_min(0.0)
        lasts = torch.where(left > 0, left / bend, 0.0).where(is_kept[:, 1:-1], torch.inf)
        shortest, which = lasts.min(1, keepdim=True)
        then = (clock + shortest).clamp_max(1.0)
        left = (left - (then - clock) * bend).clamp_min(0.0)
        clock, which = then, which + 1
        ends_at = torch.where(is_kept.gather(1, which), clock, lifetime.gather(1, which))
        lifetime = lifetime.scatter(1, which, ends_at)
        is_kept = is_kept.scatter(1, which, False)
    return lifetime


def _chord(x: Tensor, y: Tensor, n_draws: Tensor) -> Tensor:
    """(x^K - y^K) / (x - y) as a sum of products; (n, ...) with n_draws (n,) = K."""
    most = int(n_draws.max()) if n_draws.shape[0] else 1
    n_draws = n_draws.unsqueeze(1)
    out, power = torch.ones_like(x), torch.ones_like(y)
    for k in range(1, most):
        power = power * y
        out = torch.where(k < n_draws, x * out + power, out)
    return out
