"""SuffixDrafts: a text goes on as it, its siblings or forerunners did from the same context.

The guess is deterministic, so the test for it is: does the sequence draw that token itself. No
distribution has to be stored, the law is the policy's, and the tokens are those of plain decoding.

Source: HistoSpec (verl's specRL recipe), DAS (arXiv 2511.13841), RhymeRL (arXiv 2508.18588) and
prompt lookup; differs in the structure (a suffix automaton, which live siblings extend as well) and
in the rule, which is the sequence's own draw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from rollfuse.kernels import checks
from rollfuse.kernels.verification import Rule, coupled
from rollfuse.rollout.drafter import Chunk, Ints, News, Request
from rollfuse.rollout.record import Rollout, Source
from rollfuse.rollout.response_store import ResponseStore
from rollfuse.rollout.suffix_automaton import ROOT, SuffixAutomaton


@dataclass(slots=True)
class SuffixDrafts:
    """A `Drafter` from a group's own texts; with `record`, from those of earlier rollouts too.

    Args:
        longest: tokens of a guess, at most.
        least_match: how many tokens of a text's end must have occurred before.
        least: guessing ends before the chance that all of it stays, by what was seen, falls below
            this: about what checking a token costs of drawing one.
        rollouts: of how many earlier ones the responses to a prompt are kept; 0: of none.
        alone: a sequence is guessed from its own prompt and response alone (prompt lookup).

    Raises:
        ValueError: a value is out of its range.
    """

    longest: int = 16
    least_match: int = 2
    least: float = 0.2
    rollouts: int = 2
    alone: bool = False
    rule: Rule = field(init=False, default=coupled)
    source: Source = field(init=False, default=Source.VERIFIED)
    store: ResponseStore | None = field(init=False)
    _automaton: dict[int, SuffixAutomaton] = field(init=False, default_factory=dict)
    _state: dict[int, int] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        checks.need(self.longest >= 1, "longest", "a count >= 1", self.longest)
        checks.need(self.least_match >= 1, "least_match", "a count >= 1", self.least_match)
        checks.need(0.0 <= self.least <= 1.0, "least", "a probability", self.least)
        checks.need(self.rollouts >= 0, "rollouts", "a count >= 0", self.rollouts)
        good = not (self.alone and self.rollouts)
        needed = "0 where a sequence is guessed from itself alone"
        checks.need(good, "rollouts", needed, self.rollouts)
        self.store = ResponseStore(self.rollouts) if self.rollouts else None

    def record(self, rollout: Rollout) -> None:
        """Take in a rollout's responses, for the next ones to the same prompts."""
        if self.store is not None:
            self.store.add(rollout)
        self._automaton, self._state = {}, {}

    def state(self) -> dict[str, Tensor]:
        """Everything as tensors, for a checkpoint."""
        return {} if self.store is None else self.store.state()

    def load(self, state: Mapping[str, Tensor]) -> None:
        if self.store is not None:
            self.store.load(state)

    # -- as a Drafter -------------------------------------------------------------------------

    def start(self, request: Request) -> None:
        self._automaton, self._state = {}, {}
        if self.store is not None:
            self.store.need_vocabulary(request.vocabulary)
        shared: dict[bytes, tuple[SuffixAutomaton, int]] = {}
        for s, p in enumerate(request.prompt_index.tolist()):
            prompt = request.prompts[p]
            known = None if self.alone else shared.get(prompt.tobytes())
            if known is None:
                known = shared[prompt.tobytes()] = self._begun(prompt)
            self._automaton[s], self._state[s] = known

    def propose(self, sequences: Sequence[int]) -> list[Chunk | None]:
        return [self._guess(s) for s in sequences]

    def advance(self, news: Sequence[News]) -> None:
        for s, tokens, *_ in news:
            self._state[s] = _extended(self._automaton[s], self._state[s], tokens)

    def finish(self, sequences: Sequence[int]) -> None:
        pass

    def _guess(self, s: int) -> Chunk | None:
        tokens = self._automaton[s].continuation(
            self._state[s], self.longest, self.least_match, self.least
        )
        return Chunk(np.array(tokens, dtype=np.int64)) if tokens else None

    def _begun(self, prompt: Ints) -> tuple[SuffixAutomaton, int]:
        """An automaton that knows the prompt and what followed it; where the prompt ends."""
        automaton = SuffixAutomaton()
        state = _extended(automaton, ROOT, prompt)
        for old in self.store.of(prompt) if self.store is not None else ():
            _extended(automaton, state, old.tokens)
        return automaton, state


def _extended(automaton: SuffixAutomaton, state: int, tokens: Ints) -> int:
    for token in tokens.tolist():
        state = automaton.extend(state, token)
    return state
