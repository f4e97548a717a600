"""PastRollouts: the responses of an earlier epoch as guesses of this one's.

A prompt that comes again gets its earlier responses back, copy by copy, as far as the present
policy would have given them: under `coupled`, as far as it draws the same tokens from the same
noise, which is exact; under `lenient`, as far as SPEC-RL's test lets them pass, which is not. From
the first other token on a sequence has noise of its own that nothing has used.

What to know before averaging over epochs. The weights were trained on the old responses and depend
on their noise through them: exactness is conditional on the weights. Responses of consecutive
epochs are positively correlated: each step's estimate stays as it is, an average over epochs has a
larger variance, and where the policy stands still a prompt sees nothing new. `cap` and `refresh`
bound that. A stored response is the guess of one sequence at most: two sequences verified against
the same noise would be one sample twice. Whether it is one must not depend on what its noise has
drawn: record rollouts whole (a selection by reward is a selection of noise), and the cap counts how
often a response was handed on, whatever came of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from rollfuse.kernels import checks
from rollfuse.kernels.noise import Purpose, noise_words, row_keys, uniforms
from rollfuse.kernels.verification import Rule, coupled
from rollfuse.rollout.drafter import Chunk, Ints, News, Request
from rollfuse.rollout.record import Rollout, Source
from rollfuse.rollout.response_store import Response, ResponseStore

# Tokens of the first guess; each further one, after one that stayed whole, is so many times longer:
# work is proportional to what stays.
_FIRST, _GROWTH = 64, 4


@dataclass(slots=True)
class _Reuse:
    """One sequence and the response it may take over."""

    old: Response
    size: int  # tokens of the next guess
    made: int = 0  # tokens taken over so far
    is_asked: bool = False  # the last step has decided on a guess of it
    is_cut: bool = False  # it has got another token than the guessed one
    is_left: bool = False  # it goes on by itself, cut or because it was not asked


@dataclass(slots=True)
class PastRollouts:
    """A `Drafter`; `record` every rollout with it, and hand it to the next `Engine.generate`.

    Args:
        rule: `coupled`, or a lenient rule.
        cap: rollouts in a row a response and what became of it may be a guess; then its sequence
            starts afresh. None: no cap.
        refresh: share of the sequences that start afresh in every rollout, in [0, 1].

    Raises:
        ValueError: a value is out of its range; in a `generate`, a sequence has a stream that has
            drawn what is to be verified, or a response has tokens past the vocabulary.
    """

    rule: Rule = coupled
    cap: int | None = 8
    refresh: float = 0.0
    source: Source = field(init=False)
    store: ResponseStore = field(init=False, default_factory=ResponseStore)
    _streams: Ints = field(init=False, default_factory=lambda: np.empty(0, np.int64))
    _reuses: dict[int, _Reuse] = field(init=False, default_factory=dict)
    # By prompt and stream: in how many rollouts in a row what it is given has been a guess by now.
    _uses: dict[tuple[bytes, int], int] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        checks.need(self.cap is None or self.cap >= 1, "cap", "a count >= 1", self.cap)
        checks.need(0.0 <= self.refresh <= 1.0, "refresh", "a share in [0, 1]", self.refresh)
        self.source = Source.VERIFIED if self.rule is coupled else Source.LENIENT

    def record(self, rollout: Rollout) -> None:
        """Take in the rollout that was generated with this drafter, or one without."""
        prompts = [prompt.numpy().tobytes() for prompt in rollout.prompts]
        pairs = zip(rollout.prompt_index.tolist(), rollout.streams.tolist(), strict=True)
        self.store.add(rollout, [self._uses.get((prompts[p], s), 0) for p, s in pairs])
        self._reuses, self._uses = {}, {}

    @property
    def runs(self) -> Ints:
        """Of the sequences that have had a guess: how many tokens they have taken over."""
        return np.array([reuse.made for reuse in self._guessed()], dtype=np.int64)

    @property
    def lengths(self) -> Ints:
        """How many they could have taken over."""
        return np.array([len(reuse.old.tokens) for reuse in self._guessed()], dtype=np.int64)

    @property
    def n_cut(self) -> int:
        """How many of these have got another token than the guessed one."""
        return sum(reuse.is_cut for reuse in self._reuses.values())

    def _guessed(self) -> list[_Reuse]:
        return [reuse for reuse in self._reuses.values() if reuse.made or reuse.is_cut]

    def state(self) -> dict[str, Tensor]:
        """Everything as tensors, for a checkpoint."""
        return self.store.state()

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.store.load(state)

    # -- as a Drafter -------------------------------------------------------------------------

    def start(self, request: Request) -> None:
        self._reuses, self._uses, self._streams = {}, {}, request.streams
        self.store.need_vocabulary(request.vocabulary)
        left = {prompt.tobytes(): self.store.last(prompt)[::-1] for prompt in request.prompts}
        fresh = self._starts_afresh(request.streams)
        for s, p in enumerate(request.prompt_index.tolist()):
            held = left[request.prompts[p].tobytes()]
            old = held.pop() if held else None
            worn = old is not None and self.cap is not None and old.uses >= self.cap
            if old is not None and len(old.tokens) and not worn and not fresh[s]:
                self._reuses[s] = _Reuse(old, _FIRST)
                key = request.prompts[p].tobytes(), int(request.streams[s])
                self._uses[key] = old.uses + 1
        self._need_new_streams()

    def propose(self, sequences: Sequence[int]) -> list[Chunk | None]:
        return [self._next_chunk(self._reuses.get(s)) for s in sequences]

    def advance(self, news: Sequence[News]) -> None:
        for sequence, tokens, stayed, checked in news:
            reuse = self._reuses.get(sequence)
            if reuse is None or reuse.is_left:
                continue
            is_decided = reuse.is_asked and checked > 0
            if is_decided:
                reuse.made += stayed
                reuse.is_cut = stayed < checked and stayed < len(tokens)
                reuse.size *= _GROWTH
            # A token it was not asked about has moved the sequence on from the old response.
            reuse.is_left = reuse.is_cut or not is_decided
            reuse.is_asked = False

    def finish(self, sequences: Sequence[int]) -> None:
        pass

    def _need_new_streams(self) -> None:
        """Two sequences with one noise would be one sample twice."""
        if not self._reuses:
            return
        seen = np.unique(np.concatenate([reuse.old.streams for reuse in self._reuses.values()]))
        again = np.isin(self._streams, seen)
        if again.any():
            s = int(again.argmax())
            raise ValueError(
                "streams: need streams that have drawn none of the older responses, got "
                f"{self._streams[s]} for sequence {s} (another seed for every rollout)"
            )

    def _next_chunk(self, reuse: _Reuse | None) -> Chunk | None:
        if reuse is None or reuse.is_left or reuse.made == len(reuse.old.tokens):
            return None
        old, here = reuse.old, slice(reuse.made, reuse.made + reuse.size)
        reuse.is_asked = True
        # What followed its last token was not recorded: it is drawn in a pass of its own.
        return Chunk(old.tokens[here], old.streams[here], old.logp[here], is_open=False)

    def _starts_afresh(self, streams: Ints) -> list[bool]:
        keys = row_keys(torch.from_numpy(streams), torch.zeros(1).long(), Purpose.REFRESH)
        draws = uniforms(noise_words(keys, torch.zeros(1, dtype=torch.int64))).squeeze(1)
        fresh: list[bool] = (draws < self.refresh).tolist()
        return fresh
