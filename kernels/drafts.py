"""Draft: tokens that somebody proposes for sequences, and what is known of how they were drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rollfuse.kernels import checks
from rollfuse.kernels.noise import need_distinct_streams

# How far a proposal's probabilities may be from 1 in sum: bfloat16 log-probs are.
_SLACK = 1e-2


class ProposalRows(NamedTuple):
    """What some draft tokens were drawn from; n tokens.

    On a device ids are not looked at beforehand: one that is no token's cannot be drawn.
    """

    logp: Tensor  # (n, V) or (n, k) in nats
    ids: Tensor | None  # (n, k) int64; None: column v is token v

    def logp_of(self, tokens: Tensor) -> Tensor:
        """(n,) log-probs of one token a row; -inf for those a row cannot draw."""
        if self.ids is None:
            known = tokens.clamp(0, self.logp.shape[1] - 1)
            logp = self.logp.gather(1, known.unsqueeze(1)).squeeze(1)
            return logp.masked_fill(known != tokens, -torch.inf)
        is_it = self.ids == tokens.unsqueeze(1)
        return self.logp.masked_fill(~is_it, -torch.inf).amax(1)

    def columns_of(self, values: Tensor, nothing: float = 0.0) -> Tensor:
        """(n, V) or (n, k): of `values` (n, V), what each row can draw; `nothing` of no token."""
        if self.ids is None:
            return values
        known = self.ids.clamp(0, values.shape[1] - 1)
        return values.gather(1, known).masked_fill_(known != self.ids, nothing)

    def subtracted(self, values: Tensor, from_: Tensor) -> Tensor:
        """(n, V): `from_` less `values` (n, V) or (n, k) of what each row can draw."""
        if self.ids is None:
            return from_ - values
        known = self.ids.clamp(0, from_.shape[1] - 1)
        less = values.to(from_.dtype).masked_fill(known != self.ids, 0.0)
        return from_.scatter_add(1, known, -less)


@dataclass(frozen=True, slots=True)
class Proposal:
    """The distributions that draft tokens were drawn from, a row a token, each summing to 1.

    Sums within 1 % of it are taken as they are (`multi_draft` divides by them): by what bfloat16
    log-probs are off, the laws of `exact` and `block` may be off. Better have them in float32.

    A deterministic draft needs none (see `one_hot`), or one id a row with log-prob 0.

    Args:
        logp: (T, V), or (T, k) beside `ids`: log-probs in nats, float; -inf is never drawn.
        ids: (T, k) int64, the only tokens row t can draw, distinct; None: all of them. A row with
            fewer is filled up with any ids of the vocabulary, also its own, with log-prob -inf.

    Raises:
        TypeError, ValueError: a shape, dtype or device is wrong; on the CPU also a row that does
            not sum to 1 within 1 % (the log-probs of a top-k draw are those after the cut), or
            that names a token twice.
    """

    logp: Tensor
    ids: Tensor | None = None

    def __post_init__(self) -> None:
        checks.need_float(self.logp, "proposal.logp")
        good = self.logp.dim() == 2 and self.logp.shape[1] >= 1
        checks.need(good, "proposal.logp", "shape (T, V) or (T, k)", tuple(self.logp.shape))
        if self.ids is not None:
            _need_int64(self.ids, "proposal.ids")
            checks.need_shape(self.ids, tuple(self.logp.shape), "proposal.ids", "one a log-prob")
            checks.need_same_device(self.ids, self.logp, "proposal.ids", "proposal.logp")
        if checks.may_read(self.logp):
            self._check_values()

    def _check_values(self) -> None:
        total = self.logp.float().exp().sum(1)
        bad = ~((total - 1.0).abs() <= _SLACK)
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            got = f"{float(total[row])} in row {row}"
            raise ValueError(f"proposal.logp: need rows of probabilities that sum to 1, got {got}")
        if self.ids is not None and self.ids.shape[1] > 1:
            # Ids that are never drawn fill a row up.
            fill = -1 - torch.arange(self.ids.shape[1])
            in_order = torch.where(self.logp == -torch.inf, fill, self.ids).sort(1).values
            twice = (in_order[:, 1:] == in_order[:, :-1]).any(1)
            if bool(twice.any()):
                got = f"one twice in row {int(twice.nonzero()[0])}"
                raise ValueError(f"proposal.ids: need distinct ids in a row, got {got}")

    def of_all(self) -> ProposalRows:
        return ProposalRows(self.logp, self.ids)

    def of_tokens(self, index: Tensor) -> ProposalRows:
        """The rows of some draft tokens."""
        return ProposalRows(self.logp[index], None if self.ids is None else self.ids[index])


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens proposed for B sequences, end to end: one draft a sequence, or `n_drafts` in a row.

    T tokens, N = B * n_drafts drafts; any of them may be empty.

    Args:
        tokens: (T,) int64.
        cu_seqlens: (N + 1,) int64 or int32: draft n is tokens[cu_seqlens[n] : cu_seqlens[n + 1]].
        positions: (B,) int64 or int32, the position in its sequence of each draft's first token.
        streams: (B,) int64, the sequences' own noise for this verification.
        drawn_with: (T,) int64, the stream each token was drawn with, or None: none, or not known.
        logp: (T,) float, log-prob of each token under what it was drawn from, in nats.
        proposal: all of what each token was drawn from.
        closed: (N,) bool, True for drafts that no row follows, see `Target`; None: all or none.
        n_drafts: so many consecutive drafts are for one sequence and begin at its position.
        max_length: how long a sequence may become, at most; None: any length. No token is drawn at
            a position past the end.

    Raises:
        TypeError, ValueError: a shape, dtype or device is wrong; on the CPU also values: offsets
            that do not cover the tokens, negative ids or positions, two sequences with one stream,
            log-probs that are not finite or above 0, drafts that go on past `max_length`.
    """

    tokens: Tensor
    cu_seqlens: Tensor
    positions: Tensor
    streams: Tensor
    drawn_with: Tensor | None = None
    logp: Tensor | None = None
    proposal: Proposal | None = None
    closed: Tensor | None = None
    n_drafts: int = 1
    max_length: int | None = None

    def __post_init__(self) -> None:
        self._check_kinds()
        _need_int64(self.tokens, "tokens")
        checks.need(self.tokens.dim() == 1, "tokens", "shape (T,)", tuple(self.tokens.shape))
        _need_int64(self.streams, "streams")
        checks.need(self.streams.dim() == 1, "streams", "shape (B,)", tuple(self.streams.shape))
        checks.need_int(self.positions, "positions")
        checks.need_int(self.cu_seqlens, "cu_seqlens")
        n_sequences, n_tokens = self.streams.shape[0], self.tokens.shape[0]
        n_drafts = n_sequences * self.n_drafts
        checks.need_shape(self.positions, (n_sequences,), "positions", "one a sequence")
        checks.need_shape(self.cu_seqlens, (n_drafts + 1,), "cu_seqlens", "one more than drafts")
        if self.drawn_with is not None:
            _need_int64(self.drawn_with, "drawn_with")
            checks.need_shape(self.drawn_with, (n_tokens,), "drawn_with", "one a token")
        if self.closed is not None:
            checks.need_bool(self.closed, "closed")
            checks.need_shape(self.closed, (n_drafts,), "closed", "one a draft")
        if self.logp is not None:
            checks.need_float(self.logp, "logp")
            checks.need_shape(self.logp, (n_tokens,), "logp", "one a token")
        if self.proposal is not None:
            got = self.proposal.logp.shape[0]
            checks.need(got == n_tokens, "proposal", f"{n_tokens} rows, one a token", got)
        for name, value in self._tensors():
            checks.need_same_device(value, self.tokens, name, "tokens")
        if checks.may_read(self.tokens):
            self._check_values()

    def _check_kinds(self) -> None:
        for value, name in ((self.n_drafts, "n_drafts"), (self.max_length, "max_length")):
            is_none = value is None and name == "max_length"
            if isinstance(value, bool) or not (is_none or isinstance(value, int)):
                raise TypeError(f"{name}: need an int, got {type(value).__name__}")
        checks.need(self.n_drafts >= 1, "n_drafts", "a number >= 1", self.n_drafts)
        if not isinstance(self.proposal, Proposal | None):
            raise TypeError(f"proposal: need a Proposal, got {type(self.proposal).__name__}")

    @property
    def n_tokens(self) -> int:
        return self.tokens.shape[0]

    @property
    def n_sequences(self) -> int:
        return self.streams.shape[0]

    def _tensors(self) -> list[tuple[str, Tensor]]:
        found = [
            ("cu_seqlens", self.cu_seqlens),
            ("positions", self.positions),
            ("streams", self.streams),
            ("drawn_with", self.drawn_with),
            ("logp", self.logp),
            ("closed", self.closed),
            ("proposal", None if self.proposal is None else self.proposal.logp),
        ]
        return [(name, value) for name, value in found if value is not None]

    def _check_values(self) -> None:
        bounds, n_tokens = self.cu_seqlens, self.n_tokens
        ends = (int(bounds[0]), int(bounds[-1]))
        checks.need(ends == (0, n_tokens), "cu_seqlens", f"0 ... {n_tokens}", ends)
        lengths = bounds.diff()
        checks.need(
            bool((lengths >= 0).all()), "cu_seqlens", "numbers that do not fall", bounds.tolist()
        )
        if len(torch.unique(self.streams)) < self.n_sequences:
            need_distinct_streams(self.streams)
        if self.max_length is not None:
            begins_at = self.positions.repeat_interleave(self.n_drafts).long()
            late = begins_at > self.max_length - lengths
            if bool(late.any()):
                draft = int(late.nonzero()[0])
                got = f"{int(begins_at[draft]) + int(lengths[draft])} tokens with draft {draft}"
                raise ValueError(f"max_length: need at most {self.max_length} tokens, got {got}")
        for name, values in (("token ids", self.tokens), ("positions", self.positions)):
            low = int(values.min()) if values.shape[0] else 0
            checks.need(low >= 0, name.replace("token ids", "tokens"), f"{name} >= 0", low)
        if self.logp is not None:
            bad = ~((self.logp <= 1e-3) & (self.logp > -torch.inf))
            if bool(bad.any()):
                token = int(bad.nonzero()[0])
                got = f"{float(self.logp[token])} for token {token}"
                raise ValueError(f"logp: need finite log-probs <= 0, got {got}")


class DraftRows(NamedTuple):
    """Which row of a target stands for what; R rows, N drafts, T tokens."""

    draft: Tensor  # (R,) the draft of each row
    offset: Tensor  # (R,) of the draft's tokens, so many precede what the row stands for
    of_token: Tensor  # (T,) the row that judges each token
    start: Tensor  # (N,) the first row of each draft
    length: Tensor  # (N,) tokens of each draft
    has_last: Tensor  # (N,) whether a row follows each draft

    @property
    def token_draft(self) -> Tensor:
        """(T,) the draft of each token."""
        return self.draft[self.of_token]

    @property
    def token_offset(self) -> Tensor:
        """(T,) the place of each token in its draft."""
        return self.offset[self.of_token]

    @property
    def reach(self) -> Tensor:
        """(N,) orders the drafts that have one text accepted: by length, a last row, their order.

        The `argmax` of a sequence's drafts has a row for the next token if any of them does.
        """
        return 2 * self.length + self.has_last

    def leading(self, good: Tensor) -> Tensor:
        """(N,) how many tokens of each draft come before its first one that is not good (T,)."""
        draft = self.token_draft
        stop = torch.where(good, self.length[draft], self.token_offset)
        return self.length.scatter_reduce(0, draft, stop, "amin")


def rows_of(draft: Draft, n_rows: int) -> DraftRows:
    """The layout of a target's rows, without reading values on a device.

    Raises:
        ValueError: there are neither T nor T + N rows or, where drafts say whether they are closed,
            not T and one for each that is not.
    """
    n_tokens, n_drafts = draft.n_tokens, draft.cu_seqlens.shape[0] - 1
    has_last = _has_last(draft, n_rows)
    bounds = draft.cu_seqlens.long()
    length = bounds.diff()
    before = has_last.long().cumsum(0) - has_last.long()
    start = bounds[:-1] + before
    numbers = torch.arange(n_drafts, device=bounds.device)
    of_row = numbers.repeat_interleave(length + has_last, output_size=n_rows)
    offset = torch.arange(n_rows, device=bounds.device) - start[of_row]
    of_token = before.repeat_interleave(length, output_size=n_tokens)
    of_token = of_token + torch.arange(n_tokens, device=bounds.device)
    return DraftRows(of_row, offset, of_token, start, length, has_last)


def _has_last(draft: Draft, n_rows: int) -> Tensor:
    """(N,) whether a row follows each draft, of a target with so many."""
    n_tokens, n_drafts = draft.n_tokens, draft.cu_seqlens.shape[0] - 1
    if draft.closed is not None:
        if checks.may_read(draft.closed):
            needed = n_tokens + int((~draft.closed).sum())
            what = f"{needed} rows (one a draft token, and one after each draft that is not closed)"
            checks.need(n_rows == needed, "target.rows", what, n_rows)
        return ~draft.closed
    checks.need(
        n_rows in (n_tokens, n_tokens + n_drafts),
        "target.rows",
        f"{n_tokens} rows (one a draft token), or {n_tokens + n_drafts} (and one after each draft)",
        n_rows,
    )
    is_open = n_rows == n_tokens + n_drafts
    return torch.full((n_drafts,), is_open, dtype=torch.bool, device=draft.tokens.device)


def _need_int64(value: Tensor, name: str) -> None:
    checks.need_tensor(value, name)
    if value.dtype != torch.int64:
        raise TypeError(f"{name}: need int64, got {value.dtype}")
