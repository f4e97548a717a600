"""verify: which tokens of a draft a policy takes as its own, and what it draws where it stops.

A rule is a function (draft, target, rows) -> Verdict. Those here draw a token in every row and
compare: they need no distribution of the draft's, no uniforms and no residual.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rollfuse.kernels import checks
from rollfuse.kernels.drafts import Draft, DraftRows, rows_of
from rollfuse.kernels.target import Target


class Verdict(NamedTuple):
    """B sequences, R rows of the target.

    Sequence b goes on with the first n_accepted[b] tokens of draft followed[b], then next_token[b].
    The rows that stand for them are n_accepted[b] + 1 rows of that draft, from its first one on; of
    the other rows `ids` and what stands beside them are defined but mean nothing.
    """

    n_accepted: Tensor  # (B,) int64
    next_token: Tensor  # (B,) int64; -1 where nothing was drawn
    ids: Tensor  # (R,) int64, the token each row stands for; -1 where there is none
    logp: Tensor  # (R,) nats, of that token under the target
    entropy: Tensor  # (R,) nats, of the target
    support: Tensor  # (R,) nats below the largest z past which the target has no probability
    followed: Tensor  # (B,) int64, one of the drafts; b itself where each sequence has one


Rule = Callable[[Draft, Target, DraftRows], Verdict]


def verify(rule: Rule, draft: Draft, target: Target) -> Verdict:
    """Accept a prefix of every draft and draw what follows it.

    Drafts without tokens, and a row after each, are plain sampling: `sample_tokens` with the
    sequences' own streams at their positions, under any rule. No gradient flows.

    After a cut a sequence goes on with its own stream (`draft.streams`), at the position past
    `next_token`; noise that was seen by whoever made the draft is not used again.

    Args:
        rule: `coupled`, `one_hot`, `coupled_list`, `lenient(...)`, `exact`, `block` or
            `multi_draft`, or a function of the same signature.
        draft: what is proposed.
        target: what it is judged by; T + N rows, or T (see `Target`).

    Returns:
        what was accepted and drawn. A sequence whose draft is wholly accepted has next_token -1
        where the target has no row for it, or where it is as long as it may become; so has one
        whose row nothing can be drawn from (on the CPU that raises).

    Raises:
        TypeError, ValueError: draft and target do not fit each other (numbers of rows, device; on
            the CPU also ids outside the vocabulary), or the rule needs what the draft lacks.
    """
    _check_types(rule, draft, target)
    checks.need_same_device(target.rows, draft.tokens, "target.rows", "draft")
    with torch.no_grad():
        rows = rows_of(draft, target.n_rows)
        _check_vocabulary(draft, target.vocabulary)
        if draft.n_tokens == 0:
            return _compare(draft, target, rows, draft.streams[rows.draft // draft.n_drafts])
        return rule(draft, target, rows)


def coupled(draft: Draft, target: Target, rows: DraftRows) -> Verdict:
    """Accept while the target, with the noise a token was drawn with, draws the same token.

    Exact: every token is the target's own draw, with noise that what precedes it does not depend
    on. Nothing of the draft's distributions is needed; `draft.drawn_with` is. Accepts a token with
    probability sum over v of 1 / sum over w of max(p_w / p_v, q_w / q_v), at least (1 - TV) /
    (1 + TV), where TV is the distance of p (target) and q (draft).

    Raises:
        ValueError: without `draft.drawn_with`, or several drafts a sequence (see `coupled_list`);
            on the CPU also if two sequences would be judged by the same noise, whose tokens would
            be one sample twice.

    Source: Daliri, Musco, Suresh, "Coupling without communication and drafter-invariant
    speculative decoding", arXiv 2408.07978, algorithm 2 (Gumbel sampling).
    """
    need_one_draft(draft)
    drawn_with = need_drawn_with(draft)
    streams = draft.streams[rows.draft].index_put((rows.of_token,), drawn_with)
    return _compare(draft, target, rows, streams)


def one_hot(draft: Draft, target: Target, rows: DraftRows) -> Verdict:
    """Accept while the target, with the sequence's own noise, draws the draft's token.

    Exact for drafts that are no draws (suffix trees, n-grams, the greedy output of a model):
    accepts with the target's probability of the token, which no exact rule can do better.

    Raises:
        ValueError: several drafts a sequence, or a token was drawn with one of `draft.streams`.
    """
    need_one_draft(draft)
    need_own_noise(draft)
    return _compare(draft, target, rows, draft.streams[rows.draft])


def coupled_list(draft: Draft, target: Target, rows: DraftRows) -> Verdict:
    """`coupled` over several drafts a sequence: follow those that agree as long as one does.

    A row's noise is the largest of the noises of the drafts whose tokens so far are the row's own
    text, each with the stream of its next token; that set depends on the past alone, so the law is
    the target's. A row that no such draft goes on from has the sequence's own noise. Rows that
    stand for one text are taken to be equal. Of the drafts that are accepted furthest the longest
    one is `followed`, of equally long ones one that a row follows.

    Accepts more often than `coupled`: no draft that agrees is lost because another one differs.

    Raises:
        ValueError: without `draft.drawn_with`; on the CPU also as `coupled`.

    Source: Daliri et al., arXiv 2408.07978, for one draft; the largest of K Gumbels is a Gumbel
    shifted by log K, for every token alike.
    """
    need_drawn_with(draft)
    return _compare(draft, target, rows, _streams_of_matches(draft, rows))


def need_one_draft(draft: Draft) -> None:
    checks.need(draft.n_drafts == 1, "n_drafts", "one draft a sequence", draft.n_drafts)


def need_drawn_with(draft: Draft) -> Tensor:
    """The streams that drew the tokens; raises where two sequences have the same (CPU only)."""
    if draft.drawn_with is None:
        raise ValueError("drawn_with: need the stream each token was drawn with, got None")
    if checks.may_read(draft.tokens):
        _need_noise_apart(draft, draft.drawn_with)
    return draft.drawn_with


def _need_noise_apart(draft: Draft, drawn_with: Tensor) -> None:
    length = draft.cu_seqlens.diff()
    place = torch.arange(draft.n_tokens) - draft.cu_seqlens[:-1].repeat_interleave(length)
    sequence = torch.arange(len(length)).repeat_interleave(length) // draft.n_drafts
    # A sequence's own stream may have drawn its draft, nobody else's.
    in_order, number = draft.streams.sort()
    found = torch.searchsorted(in_order, drawn_with).clamp_(max=draft.n_sequences - 1)
    is_others = (in_order[found] == drawn_with) & (number[found] != sequence)
    # Equal noise of the same place side by side, of each sequence in one piece.
    order = (draft.positions[sequence] + place).argsort(stable=True)
    order = order[drawn_with[order].argsort(stable=True)]
    one, two = order[:-1], order[1:]
    at = draft.positions[sequence] + place
    is_same = (drawn_with[one] == drawn_with[two]) & (at[one] == at[two])
    is_others[two] |= is_same & (sequence[one] != sequence[two])
    if bool(is_others.any()):
        token = int(is_others.nonzero()[0])
        raise ValueError(
            "drawn_with: need noise that judges no other sequence, got stream "
            f"{int(drawn_with[token])} for token {token}"
        )


def need_own_noise(draft: Draft) -> None:
    """Raise if a token was drawn with noise that shall judge one of the batch (CPU values only)."""
    if draft.drawn_with is None or not checks.may_read(draft.tokens):
        return
    same = torch.isin(draft.drawn_with, draft.streams)
    if bool(same.any()):
        token = int(same.nonzero()[0])
        raise ValueError(
            "streams: need streams that no draft token was drawn with (see renewed_streams), got "
            f"stream {int(draft.drawn_with[token])} for token {token} again"
        )


def positions_of_rows(draft: Draft, rows: DraftRows) -> Tensor:
    """(R,) int64: the position of the token each row stands for."""
    return draft.positions[rows.draft // draft.n_drafts].long() + rows.offset


def next_rows(
    draft: Draft, rows: DraftRows, n_accepted: Tensor, followed: Tensor
) -> tuple[Tensor, Tensor]:
    """(B,) the rows that stand for the next tokens, and whether there is one."""
    row = rows.start[followed] + n_accepted
    exists = rows.has_last[followed] | (n_accepted < rows.length[followed])
    if draft.max_length is not None:
        exists = exists & (draft.positions + n_accepted < draft.max_length)
    return row, exists


def _until_end(ids: Tensor, positions: Tensor, max_length: int | None) -> Tensor:
    """`ids` with -1 at positions past the end."""
    return ids if max_length is None else ids.masked_fill(positions >= max_length, -1)


def _compare(draft: Draft, target: Target, rows: DraftRows, streams: Tensor) -> Verdict:
    """The verdict on drafts whose tokens count where they are what is drawn with `streams`."""
    positions = positions_of_rows(draft, rows)
    drawn = target.sample(streams, positions)
    leading = rows.leading(drawn.ids[rows.of_token] == draft.tokens)
    n_accepted, followed = furthest(leading, rows, draft.n_drafts)
    row, exists = next_rows(draft, rows, n_accepted, followed)
    # One id more, for sequences without a next row.
    ids = torch.cat((drawn.ids, drawn.ids.new_full((1,), -1)))
    next_token = ids[row.where(exists, target.n_rows)]
    ids = _until_end(drawn.ids, positions, draft.max_length)
    return Verdict(n_accepted, next_token, ids, *drawn[1:], followed=followed)


def furthest(leading: Tensor, rows: DraftRows, n_drafts: int) -> tuple[Tensor, Tensor]:
    """(B,) most accepted tokens of a sequence's drafts, and the draft of these to follow."""
    leading = leading.view(-1, n_drafts)
    most = leading.amax(1)
    best = rows.reach.view(-1, n_drafts).masked_fill(leading < most.unsqueeze(1), -1).argmax(1)
    first = torch.arange(most.shape[0], device=most.device) * n_drafts
    return most, first + best


def _streams_of_matches(draft: Draft, rows: DraftRows) -> Tensor:
    """(R, K) the streams of each row: its own where no draft matches, one of them again to fill."""
    n_drafts = draft.n_drafts
    siblings = torch.arange(n_drafts, device=draft.tokens.device)
    own = draft.streams[rows.draft // n_drafts].unsqueeze(1).expand(-1, n_drafts)
    if draft.n_tokens == 0:
        return own
    bounds = draft.cu_seqlens[:-1].long()

    def others(of_draft: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        """(n, K) the siblings' tokens in the same place, and whether they have one."""
        sibling = (of_draft // n_drafts * n_drafts).unsqueeze(1) + siblings
        has = offset.unsqueeze(1) < rows.length[sibling]
        token = bounds[sibling] + offset.unsqueeze(1)
        return token.clamp(max=draft.n_tokens - 1), has

    token, has = others(rows.token_draft, rows.token_offset)
    equal = has & (draft.tokens[token] == draft.tokens.unsqueeze(1))
    shared = torch.stack([rows.leading(column) for column in equal.unbind(1)], 1)  # (N, K)
    token, has = others(rows.draft, rows.offset)
    matches = has & (rows.offset.unsqueeze(1) <= shared[rows.draft])
    assert draft.drawn_with is not None
    theirs = draft.drawn_with[token]
    fill = theirs.gather(1, matches.int().argmax(1, keepdim=True))
    filled = torch.where(matches, theirs, fill)
    return torch.where(matches.any(1, keepdim=True), filled, own)


def _check_types(rule: object, draft: object, target: object) -> None:
    name = getattr(rule, "__name__", repr(rule))
    needed = "rule: need a function of a draft, a target and its rows (exact, lenient(1.0), ...)"
    if not callable(rule):
        raise TypeError(f"{needed}, got {name}")
    try:
        inspect.signature(rule).bind(draft, target, None)
    except TypeError:
        raise TypeError(f"{needed}, got {name}{inspect.signature(rule)}") from None
    for value, kind, what in ((draft, Draft, "draft"), (target, Target, "target")):
        if not isinstance(value, kind):
            raise TypeError(f"{what}: need a {kind.__name__}, got {type(value).__name__}")


def _check_vocabulary(draft: Draft, vocabulary: int) -> None:
    proposal = draft.proposal
    if proposal is not None and proposal.ids is None:
        width = proposal.logp.shape[1]
        needed = f"rows over the target's vocabulary of {vocabulary} ids"
        checks.need(width == vocabulary, "proposal.logp", needed, f"{width} columns")
    if not draft.n_tokens or not checks.may_read(draft.tokens):
        return
    named = [("tokens", draft.tokens)]
    if proposal is not None and proposal.ids is not None:
        named.append(("proposal.ids", proposal.ids))
    for name, ids in named:
        low, high = int(ids.min()), int(ids.max())
        good = low >= 0 and high < vocabulary
        checks.need(good, name, f"token ids in [0, {vocabulary})", f"{low} to {high}")
