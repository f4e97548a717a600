"""What a pass's answers become: which guessed tokens stay, what is drawn after them, who ends.

Legend: s sequences that go on, A answers of the pass that concern them (a sequence's are its text's
and those of the beginnings of its guess), V vocabulary, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rollfuse.kernels.drafts import Draft
from rollfuse.kernels.head import Head
from rollfuse.kernels.sampling import Sampled, Sampling
from rollfuse.kernels.target import Target
from rollfuse.kernels.verification import Rule, Verdict, coupled, verify
from rollfuse.rollout.decoding import Decoding, Totals
from rollfuse.rollout.drafter import Chunk
from rollfuse.rollout.record import RUNNING, Drawn, Finish, Source
from rollfuse.rollout.stopping import TextWatch

Ints = npt.NDArray[np.int64]


class Judgement(NamedTuple):
    """Of each sequence of a pass, in its order."""

    stay: Ints  # (s,) how many guessed tokens of its text stay
    ids: Ints  # (s,) the token after them
    finish: npt.NDArray[np.uint8]  # (s,) why it ends with that, or RUNNING
    checked: Ints  # (s,) how many guessed tokens were decided on
    drawn: Drawn  # all of these tokens, sequence by sequence


@dataclass(slots=True)
class Judge:
    """Decides by one rule, under one distribution.

    Args:
        sampling: the distribution.
        rule: which guessed tokens stay.
        source: what becomes the source of those.
        noise: (B,) the sequences' own streams.
        lengths: (B,) tokens of their prompts.
        longest: of a response, in tokens.
        stop_tokens: ids that end one.
        watches: who looks for stop strings, by sequence.
    """

    sampling: Sampling
    rule: Rule
    source: Source
    noise: Ints
    lengths: Ints
    longest: int
    stop_tokens: Ints
    watches: dict[int, TextWatch] = field(default_factory=dict)

    def judge(self, decoding: Decoding, answers: Tensor, head: Head | None) -> Judgement:
        """The verdict on every sequence of `decoding`.

        Args:
            answers: (.., V) logits row by row, see `Decoding.answers`; (.., D) with a head.
        """
        places = _places(decoding)
        if len(places.answer) != len(answers) or (places.answer != places.order).any():
            index = torch.from_numpy(places.answer).to(answers.device, non_blocking=True)
            answers = answers.index_select(0, index)
        own = self.noise[places.sequence]
        streams = _row_streams(decoding, places, own)
        target = Target(answers, head, self.sampling)
        n_accepted, drawn = self._verdict(decoding, places, target, streams)
        # One transfer for all that the host decides by.
        flat = torch.cat([drawn.ids, n_accepted]).cpu().numpy()
        ids, accepted = flat[: len(own)], flat[len(own) :]
        stay = np.minimum(accepted, places.n_answers - 1)
        stay, finish = self._ends(decoding, places, ids, stay)
        decoding.totals.drafted += int(places.n_guessed.sum())
        decoding.totals.accepted += int(np.minimum(accepted, stay + 1).sum())
        is_guess = places.offset < np.repeat(accepted, places.n_answers)
        if self.rule is not coupled:  # others draw what they draw with the sequence's own noise
            streams = np.where(is_guess, streams, own)
        counts = places.offset <= np.repeat(stay, places.n_answers)
        if ids[counts].min() < 0:
            raise ValueError("logits: need a finite maximum in every row, got a row without")
        if not counts.all():
            index = torch.from_numpy(np.flatnonzero(counts)).to(answers.device, non_blocking=True)
            drawn = Sampled(*(values.index_select(0, index) for values in drawn))
        made = Drawn(
            sequence=places.sequence[counts],
            step=(np.repeat(decoding.made, places.n_answers) + places.offset)[counts],
            ids=ids[counts],
            stream=streams[counts],
            source=np.where(is_guess, self.source, Source.SAMPLED).astype(np.uint8)[counts],
            logp=drawn.logp,
            entropy=drawn.entropy,
            support=drawn.support if self.sampling.is_cut else None,
        )
        return Judgement(stay, ids[places.first + stay], finish, places.n_guessed, made)

    def _verdict(
        self, decoding: Decoding, places: _Places, target: Target, streams: Ints
    ) -> tuple[Tensor, Sampled]:
        """(s,) how many guessed tokens stay, and what each answer gave (A,)."""
        device = target.rows.device
        starts = self.lengths[decoding.sequence] + decoding.made

        def there(values: npt.NDArray[Any]) -> Tensor:
            return torch.from_numpy(values).to(device, non_blocking=True)

        if not places.n_guessed.any():
            drawn = target.sample(there(streams), there(starts))
            return torch.zeros_like(drawn.ids), drawn
        chunks = [decoding.chunks.get(s) for s in decoding.sequence.tolist()]
        guesses = [chunk for chunk in chunks if chunk is not None]
        logp = [chunk.logp for chunk in guesses if chunk.logp is not None]
        known = len(logp) == len(guesses)
        draft = Draft(
            tokens=there(np.concatenate([chunk.tokens for chunk in guesses])),
            cu_seqlens=there(np.append(0, places.n_guessed.cumsum())),
            positions=there(starts),
            streams=there(self.noise[decoding.sequence]),
            drawn_with=there(streams[places.is_guessed]),
            logp=there(np.concatenate(logp)) if known else None,
            closed=there(places.n_guessed == places.n_answers),
        )
        verdict = verify(self.rule, draft, target)
        if draft.logp is not None:
            _measure(decoding.totals, places, draft, verdict, target)
        drawn = Sampled(verdict.ids, verdict.logp, verdict.entropy, verdict.support)
        return verdict.n_accepted, drawn

    def _ends(
        self, decoding: Decoding, places: _Places, ids: Ints, stay: Ints
    ) -> tuple[Ints, npt.NDArray[np.uint8]]:
        """(s,) guessed tokens before the last one of the pass, and why the sequence ends there."""
        is_stop = np.isin(ids, self.stop_tokens)
        if places.is_plain:
            finish = np.where(is_stop, Finish.STOP, RUNNING)
        else:
            # The first stop token among those that stay or follow them.
            none = int(places.n_answers.max()) + 1
            at = np.where(is_stop, places.offset, none)
            first = np.minimum.reduceat(at, places.first)
            finish = np.where(first <= stay, Finish.STOP, RUNNING)
            stay = np.minimum(stay, first)
        is_last = decoding.made + stay + 1 == self.longest
        finish = np.where((finish == RUNNING) & is_last, Finish.LENGTH, finish).astype(np.uint8)
        if self.watches:
            self._look(decoding, places, ids, stay, finish)
        return stay, finish

    def _look(
        self,
        decoding: Decoding,
        places: _Places,
        ids: Ints,
        stay: Ints,
        finish: npt.NDArray[np.uint8],
    ) -> None:
        """End sequences at the token that completes a stop string, unless a stop token is there."""
        for i, s in enumerate(decoding.sequence.tolist()):
            tokens = ids[places.first[i] : places.first[i] + stay[i] + 1].tolist()
            for n, token in enumerate(tokens):
                if self.watches[s].push(token):
                    if n < stay[i] or finish[i] != Finish.STOP:
                        finish[i] = Finish.STOP_STRING
                    stay[i] = n
                    break


class _Places(NamedTuple):
    """Where the answers of each sequence are."""

    n_answers: Ints  # (s,)
    first: Ints  # (s,) the first of them
    n_guessed: Ints  # (s,) how many of them have a guessed token to decide on
    sequence: Ints  # (A,) whose an answer is
    offset: Ints  # (A,) its number among that sequence's
    answer: Ints  # (A,) which row of the pass it is
    order: Ints  # (A,) 0, 1, 2, ...

    @property
    def is_plain(self) -> bool:
        """One answer a sequence."""
        return len(self.sequence) == len(self.n_answers)

    @property
    def is_guessed(self) -> npt.NDArray[np.bool_]:
        """(A,) whether there is a guessed token for an answer to decide on."""
        found: npt.NDArray[np.bool_] = self.offset < np.repeat(self.n_guessed, self.n_answers)
        return found


def _places(decoding: Decoding) -> _Places:
    row, count = decoding.places()
    first = count.cumsum() - count
    order = np.arange(int(count.sum()))
    offset = order - np.repeat(first, count)
    chunks = decoding.chunks
    guessed = np.zeros_like(count)
    for i, s in enumerate(decoding.sequence.tolist() if chunks else ()):
        guessed[i] = len(chunks[s].tokens) if s in chunks else 0
    sequence = np.repeat(decoding.sequence, count)
    return _Places(count, first, guessed, sequence, offset, np.repeat(row, count) + offset, order)


def _measure(
    totals: Totals, places: _Places, draft: Draft, verdict: Verdict, target: Target
) -> None:
    """Add to the totals what the guesses' log-probs tell of the distance of the distributions.

    A token drawn from q is worth max(0, 1 - p / q) of it, on average the total variation: that of
    every token decided on, the first that is rejected included.
    """
    assert draft.logp is not None
    device = draft.tokens.device
    offset = torch.from_numpy(places.offset[places.is_guessed]).to(device)
    of_draft = torch.repeat_interleave(draft.cu_seqlens.diff())
    n_accepted = verdict.n_accepted[of_draft]
    row = torch.from_numpy(np.flatnonzero(places.is_guessed)).to(device)
    is_cut = offset == n_accepted
    logp = verdict.logp[row]
    if bool(is_cut.any()):
        logp = logp.masked_scatter(is_cut, target.score(draft.tokens[is_cut], row[is_cut]).logp)
    decided = offset <= n_accepted
    ratio = (logp - draft.logp)[decided].exp()
    totals.compared += int(decided.sum())
    totals.variation += float((1.0 - ratio).clamp_min(0.0).sum())


def _row_streams(decoding: Decoding, places: _Places, own: Ints) -> Ints:
    """(A,) the noise of each answer: what drew its guessed token if that is known."""
    streams = own
    for i, s in enumerate(decoding.sequence.tolist() if decoding.chunks else ()):
        chunk: Chunk | None = decoding.chunks.get(s)
        if chunk is not None and chunk.streams is not None:
            streams = own.copy() if streams is own else streams
            streams[places.first[i] : places.first[i] + len(chunk.tokens)] = chunk.streams
    return streams
