"""multi_draft: several drafts of one sequence, drawn independently, as good as they can be used."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rollfuse.kernels import checks
from rollfuse.kernels.drafts import Draft, DraftRows, ProposalRows
from rollfuse.kernels.residual import (
    acceptance_uniforms,
    blocks_of,
    draw_residual,
    drawn_logp,
    finish,
    need_proposal,
)
from rollfuse.kernels.sampling import Scored
from rollfuse.kernels.target import Target
from rollfuse.kernels.transport import select
from rollfuse.kernels.verification import Verdict, furthest, need_own_noise


def multi_draft(draft: Draft, target: Target, rows: DraftRows) -> Verdict:
    """Accept one of the next tokens of K drafts drawn independently from one proposal; and so on.

    Exact, and at each place no rule accepts one of the tokens more often: the probability is
    `multi_draft_bound(p, q, K)`. The drafts that have the accepted token go on to the next place;
    where none is accepted, the token is drawn from what the selection has not covered of p. With
    one draft it accepts as often as `exact`.

    The drafts of a sequence must be independent draws, with proposal rows that are equal where the
    texts before them are, and where one ends must not depend on its later tokens. Costs O(M^2 K)
    for the M tokens a proposal's row can draw, in a loop over them: meant for top-k proposals.
    Reads one whole row of the target a sequence and place.

    Raises:
        ValueError: without `draft.proposal`; on the CPU also two drafts of a sequence with one
            stream in one place, a token that was drawn with one of `draft.streams`, a token that
            its proposal cannot draw.

    Source: Sun et al., SpecTr, arXiv 2310.15141, for the problem; the transport is that of
    `rollfuse.kernels.transport`.
    """
    need_own_noise(draft)
    _need_independent(draft, rows)
    drawn_logp(draft)  # refuses tokens that cannot have been drawn
    walk = _Walk.begin(draft, rows)
    sequences = torch.arange(draft.n_sequences, device=draft.streams.device)
    for part in blocks_of(sequences, target.vocabulary):
        place = 0
        while part.shape[0]:
            part = _step(draft, target, rows, walk, part, place)
            place += 1
    accepted = _scores(draft, target, rows, walk)
    return finish(draft, target, rows, (walk.n_accepted, walk.followed), accepted, walk.replaced)


def _need_independent(draft: Draft, rows: DraftRows) -> None:
    """Raise if two drafts of a sequence have one stream in one place (CPU values only)."""
    if draft.drawn_with is None or not checks.may_read(draft.tokens):
        return
    sequence = rows.token_draft // draft.n_drafts
    drawn = torch.stack((sequence, rows.token_offset, draft.drawn_with), 1)
    _, which, counts = torch.unique(drawn, dim=0, return_inverse=True, return_counts=True)
    again = (counts[which] > 1).nonzero().squeeze(1)
    if again.shape[0]:
        token = int(again[0])
        got = f"stream {int(draft.drawn_with[token])} twice for sequence {int(sequence[token])}"
        raise ValueError(
            "drawn_with: need a stream of its own for each draft of a sequence (see fork_streams), "
            f"got {got}, place {int(rows.token_offset[token])}"
        )


class _Walk(NamedTuple):
    """Where the sequences stand; written in place."""

    alive: Tensor  # (B, K) which drafts begin with what was accepted
    n_accepted: Tensor  # (B,)
    followed: Tensor  # (B,) one of those drafts, with a next row if one of them has it
    replaced: Tensor  # (B,) int64 ids that replace rejected tokens, or -1

    @staticmethod
    def begin(draft: Draft, rows: DraftRows) -> _Walk:
        n_accepted = torch.zeros_like(draft.streams)
        alive = torch.ones_like(rows.length, dtype=torch.bool).view(-1, draft.n_drafts)
        _, followed = furthest(torch.zeros_like(rows.length), rows, draft.n_drafts)
        return _Walk(alive, n_accepted, followed, torch.full_like(n_accepted, -1))


def _step(
    draft: Draft, target: Target, rows: DraftRows, walk: _Walk, part: Tensor, place: int
) -> Tensor:
    """Judge place `place` of some sequences; returns those that go on."""
    length = rows.length.view(-1, draft.n_drafts)[part]
    alive = walk.alive[part] & (length > place)
    goes_on = alive.any(1)
    part, alive = part[goes_on], alive[goes_on]
    if not part.shape[0]:
        return part
    first = alive.int().argmax(1)
    log_p = target.log_probs(rows.start[part * draft.n_drafts + first] + place)
    bounds = draft.cu_seqlens[:-1].reshape(-1, draft.n_drafts)[part]
    index = (bounds + place).clamp(max=draft.n_tokens - 1)
    tokens = draft.tokens[index].masked_fill(~alive, -1)  # (n, K)
    q = need_proposal(draft).of_tokens(index.gather(1, first.unsqueeze(1)).squeeze(1))
    numbers = torch.arange(3 * place, 3 * place + 3, device=part.device)
    uniform = acceptance_uniforms(draft, part, numbers)
    column, filled = select(
        q.columns_of(log_p, -torch.inf).double().exp(),
        q.logp.double().exp(),
        _copies(q, tokens),
        uniform,
    )
    is_accepted = column >= 0
    chosen = _tokens_of_columns(q, column)
    alive = alive & (tokens == chosen.unsqueeze(1))
    walk.alive[part] = alive
    walk.n_accepted[part] += is_accepted
    reach = rows.reach.view(-1, draft.n_drafts)[part].masked_fill(~alive, -1)
    first = torch.where(is_accepted, reach.argmax(1), first)
    walk.followed[part] = part * draft.n_drafts + first
    cut = (~is_accepted).nonzero().squeeze(1)
    if cut.shape[0]:
        ended = part[cut]
        taken = (ProposalRows(q.logp[cut], None if q.ids is None else q.ids[cut]), filled[cut])
        positions = draft.positions[ended].long() + place
        walk.replaced[ended] = draw_residual(log_p[cut], taken, draft.streams[ended], positions)
    return part[is_accepted]


def _copies(q: ProposalRows, tokens: Tensor) -> Tensor:
    """(n, M) how often each column's token is among `tokens` (n, K), where -1 is none."""
    if q.ids is None:
        counts = tokens.new_zeros((q.logp.shape[0], q.logp.shape[1]))
        return counts.scatter_add(1, tokens.clamp_min(0), (tokens >= 0).long())
    is_it = (q.ids.unsqueeze(2) == tokens.unsqueeze(1)) & (q.logp > -torch.inf).unsqueeze(2)
    return is_it.sum(2)


def _tokens_of_columns(q: ProposalRows, column: Tensor) -> Tensor:
    """(n,) token ids; -2 for column -1, which is nobody's token."""
    token = column
    if q.ids is not None:
        token = q.ids.gather(1, column.clamp_min(0).unsqueeze(1)).squeeze(1)
    return token.masked_fill(column < 0, -2)


def _scores(draft: Draft, target: Target, rows: DraftRows, walk: _Walk) -> Scored:
    """Values of the accepted tokens of the drafts followed, 0 for the others."""
    of_token = rows.token_draft
    sequence = of_token // draft.n_drafts
    is_accepted = (walk.followed[sequence] == of_token) & (
        rows.token_offset < walk.n_accepted[sequence]
    )
    which = is_accepted.nonzero().squeeze(1)
    scored = target.score(draft.tokens[which], rows.of_token[which])
    return Scored(*(x.new_zeros(is_accepted.shape).index_put((which,), x) for x in scored))
