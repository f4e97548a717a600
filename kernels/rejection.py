"""Rules that accept a draft's tokens by chance: lenient, exact and block; one draft a sequence.

p is the target's distribution, q what the draft was drawn from, u a uniform.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rollfuse.kernels import checks
from rollfuse.kernels.drafts import Draft, DraftRows
from rollfuse.kernels.residual import (
    acceptance_uniforms,
    blocks_of,
    drawn_logp,
    finish,
    need_proposal,
    residual_of_cut,
)
from rollfuse.kernels.sampling import Scored
from rollfuse.kernels.target import Target
from rollfuse.kernels.verification import Rule, Verdict, need_one_draft, need_own_noise


def lenient(lenience: float = 1.0) -> Rule:
    """BIASED: accept while u <= lenience * p / q; after a rejection draw from p. SPEC-RL.

    Needs the drawn tokens' log-probs alone. The law of one token is not p, at any lenience:

        min(q, lenience * p) + (1 - acc) * p,    acc = sum(min(q, lenience * p))

    because what replaces a rejected token should avoid what was accepted, and does not. The farther
    q is from p, the larger the bias; as the lenience grows the draft is taken whole. `exact` is the
    rule without bias where the whole of q is known, `coupled` where the stream is.

    Args:
        lenience: > 0; the paper's e^0.5 = 1.65.

    Raises:
        ValueError: lenience is no finite number > 0; in `verify`, without `draft.logp`, with
            several drafts a sequence, or a token was drawn with one of `draft.streams`.

    Source: SPEC-RL, arXiv 2509.23232, as published in its code; differs in the uniforms, which are
    the sequence's own, and not the same in every step.
    """
    good = 0.0 < lenience < math.inf
    checks.need(good, "lenience", "a finite number > 0", lenience)
    slack = math.log(lenience)

    def rule(draft: Draft, target: Target, rows: DraftRows) -> Verdict:
        need_one_draft(draft)
        need_own_noise(draft)
        if draft.logp is None:
            raise ValueError(
                "logp: need the log-probs the draft's tokens were drawn with, got None"
            )
        accepted = target.score(draft.tokens, rows.of_token)
        log_ratio = accepted.logp.double() - draft.logp.double() + slack
        n_accepted = rows.leading(_accepts(draft, rows, log_ratio))
        return finish(draft, target, rows, (n_accepted, _each(n_accepted)), accepted, None)

    return rule


def exact(draft: Draft, target: Target, rows: DraftRows) -> Verdict:
    """Accept while u <= p / q; a rejected token is replaced by a draw from (p - q)+.

    Exact, and no rule accepts a single token more often: sum(min(p, q)). Reads one whole row of the
    target and of the proposal a sequence, where it is cut.

    Raises:
        ValueError: without `draft.proposal` (a drawn token's log-prob alone does not tell what is
            left of p), with several drafts a sequence, a token was drawn with one of
            `draft.streams`, or, on the CPU, a token that its proposal cannot draw.

    Source: Leviathan et al., arXiv 2211.17192, algorithm 1; Chen et al., arXiv 2302.01318.
    """
    need_one_draft(draft)
    need_own_noise(draft)
    accepted, log_ratio = _ratios(draft, target, rows)
    n_accepted = rows.leading(_accepts(draft, rows, log_ratio))
    replaced = residual_of_cut(draft, target, rows, n_accepted)
    return finish(draft, target, rows, (n_accepted, _each(n_accepted)), accepted, replaced)


def block(draft: Draft, target: Target, rows: DraftRows) -> Verdict:
    """Accept the longest prefix that passes; a token is not judged alone but with those before it.

    Exact. In expectation no exact rule accepts more tokens of a draft. With w_0 = 1 and
    w_i = min(1, w_{i-1} p_i / q_i) at the drafted tokens, prefix i of n passes where

        u_i <= s_i / (s_i + 1 - w_i),  s_i = sum((w_i * p - q)+) over the row after it;  u_n <= w_n

    and the token after it is drawn from (w_i * p - q)+. Reads the whole rows of the target after
    the first tokens, a block at a time.

    Raises:
        ValueError: as `exact`.

    Source: Sun et al., "Block verification accelerates speculative decoding", arXiv 2403.10444,
    algorithm 2.
    """
    need_one_draft(draft)
    need_own_noise(draft)
    accepted, log_ratio = _ratios(draft, target, rows)
    weight = _running_weights(rows, log_ratio)
    bar = _bars(draft, target, rows, weight)
    place = rows.token_offset
    passes = _uniforms(draft, rows) <= bar
    reached = torch.where(passes, place + 1, 0)
    n_accepted = torch.zeros_like(rows.length).scatter_reduce(0, rows.token_draft, reached, "amax")
    last = torch.cat((weight, weight.new_ones(1)))  # a place more, for those that accept nothing
    at = draft.cu_seqlens[:-1] + n_accepted - 1
    scale = last[at.where(n_accepted > 0, draft.n_tokens)]
    replaced = residual_of_cut(draft, target, rows, n_accepted, scale)
    return finish(draft, target, rows, (n_accepted, _each(n_accepted)), accepted, replaced)


class _Ratios(NamedTuple):
    accepted: Scored
    log_ratio: Tensor  # (T,) float64 log(p / q) of the draft's tokens


def _ratios(draft: Draft, target: Target, rows: DraftRows) -> _Ratios:
    q = drawn_logp(draft).double()
    accepted = target.score(draft.tokens, rows.of_token)
    return _Ratios(accepted, (accepted.logp.double() - q).where(q > -torch.inf, -torch.inf))


def _accepts(draft: Draft, rows: DraftRows, log_ratio: Tensor) -> Tensor:
    """(T,) whether log u <= the log-ratio."""
    return _uniforms(draft, rows).log() <= log_ratio


def _uniforms(draft: Draft, rows: DraftRows) -> Tensor:
    """(T,) one a token."""
    return acceptance_uniforms(draft, rows.token_draft, rows.token_offset.unsqueeze(1)).squeeze(1)


def _running_weights(rows: DraftRows, log_ratio: Tensor) -> Tensor:
    """(T,) w_i = min(1, w_{i-1} * ratio_i) in each draft, from log-ratios.

    log w is the sum of the log-ratios less its largest value so far, 0 included.
    """
    if not log_ratio.shape[0]:
        return log_ratio
    place, draft = rows.token_offset, rows.token_draft
    longest = int(rows.length.max())
    padded = log_ratio.new_zeros((rows.length.shape[0], longest))
    padded[draft, place] = log_ratio
    total = padded.cumsum(1)
    return (total - total.cummax(1).values.clamp_min(0.0)).exp()[draft, place]


def _bars(draft: Draft, target: Target, rows: DraftRows, weight: Tensor) -> Tensor:
    """(T,) what the uniform of each place must not exceed."""
    proposal = need_proposal(draft)
    bar = weight.clone()
    # The last prefix's own weight; the others look at the row after them, which is their next
    # token's.
    inner = (rows.token_offset + 1 < rows.length[rows.token_draft]).nonzero().squeeze(1)
    for part in blocks_of(inner, target.vocabulary):
        p = target.log_probs(rows.of_token[part] + 1).exp()
        q = proposal.of_tokens(part + 1)
        w = weight[part]
        covered = q.columns_of(p).double()
        if q.ids is not None:
            # Ids that only fill the row up may name a token twice.
            covered = covered.masked_fill(q.logp == -torch.inf, 0.0)
        room = (w.unsqueeze(1) * covered - q.logp.double().exp()).clamp_min(0.0).sum(1)
        if q.ids is not None:
            room = room + w * (1.0 - covered.sum(1)).clamp_min(0.0)
        rest = room + 1.0 - w
        # Nothing left to draw and nothing to make up for: it does not matter, the next one decides.
        bar[part] = torch.where(rest > 0, room / rest, 1.0)
    return bar


def _each(n_accepted: Tensor) -> Tensor:
    return torch.arange(n_accepted.shape[0], device=n_accepted.device)
