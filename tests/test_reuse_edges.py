"""Drafters at their edges: what is counted as cut, whose news it is, which chance decides."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from tiny_models import tiny_qwen3

from rollfuse.kernels.drafts import Draft
from rollfuse.kernels.noise import new_streams
from rollfuse.kernels.residual import acceptance_uniforms
from rollfuse.kernels.verification import coupled
from rollfuse.rollout.drafter import Chunk, News, Request
from rollfuse.rollout.engine import Engine
from rollfuse.rollout.fallback import Fallback
from rollfuse.rollout.past_rollouts import PastRollouts
from rollfuse.rollout.record import Finish, Rollout, Source
from rollfuse.rollout.suffix_drafts import SuffixDrafts

PROMPT = np.array([1])


def rollout_of(tokens: list[list[int]]) -> Rollout:
    """Responses to one prompt."""
    n, borders = len(tokens), torch.tensor([0, *map(len, tokens)]).cumsum(0)
    flat = torch.tensor([token for text in tokens for token in text])
    return Rollout(
        prompts=(torch.from_numpy(PROMPT),), prompt_index=torch.zeros(n).long(), tokens=flat,
        cu_seqlens=borders, logp=-torch.ones(len(flat)), entropy=torch.ones(len(flat)),
        version=torch.zeros(len(flat)).long(), source=torch.zeros(len(flat), dtype=torch.uint8),
        streams=new_streams(0, n), finish=torch.zeros(n, dtype=torch.uint8),
    )  # fmt: skip


def request_for(streams: torch.Tensor) -> Request:
    """One sequence of the prompt for each stream."""
    return Request([PROMPT], np.zeros(len(streams), np.int64), streams.numpy(), 9, 10)


def asked_again(tokens: list[list[int]], refresh: float = 0.0) -> PastRollouts:
    """Asked about as many sequences as there were."""
    past = PastRollouts(refresh=refresh)
    past.record(rollout_of(tokens))
    past.start(request_for(new_streams(1, len(tokens))))
    return past


# -- past rollouts ----------------------------------------------------------------------------


def test_one_that_is_cut_at_its_first_token_counts_as_cut() -> None:
    past = asked_again([[2, 3], [4, 5]])
    past.propose([0, 1])
    past.advance([News(0, np.array([2, 3]), 2, 2), News(1, np.array([6]), 0, 2)])
    assert past.runs.tolist() == [2, 0] and past.lengths.tolist() == [2, 2]
    assert past.n_cut == 1


def test_a_stop_token_inside_a_guess_has_cut_nothing() -> None:
    model, past = tiny_qwen3(), PastRollouts()
    whole = Engine(model, max_new_tokens=8, stop_tokens=[]).generate([[3, 1, 4]], 2, seed=3)
    past.record(whole)
    stop = int(whole.response(0)[3])
    engine = Engine(model, max_new_tokens=8, stop_tokens=[stop])
    made = engine.generate([[3, 1, 4]], 2, seed=4, drafter=past)
    assert made.finish[0] == Finish.STOP and len(made.response(0)) <= 4
    assert set(made.source.tolist()) == {Source.VERIFIED}
    assert past.runs.tolist() == made.lengths.tolist()
    assert past.n_cut == 0


def test_what_is_recorded_is_no_longer_counted() -> None:
    past = asked_again([[2, 3], [4, 5]])
    past.propose([0, 1])
    past.advance([News(0, np.array([2, 3]), 2, 2), News(1, np.array([6]), 0, 2)])
    assert len(past.runs) == 2
    past.record(rollout_of([[2, 3], [6]]))
    assert (len(past.runs), len(past.lengths), past.n_cut) == (0, 0, 0)


def test_who_starts_afresh_does_not_tell_whose_guesses_are_accepted() -> None:
    """Else those that keep their responses would be the ones with high uniforms."""
    n = 2000
    past, streams = asked_again([[2]] * n, refresh=0.5), new_streams(1, n)
    is_fresh = torch.tensor([chunk is None for chunk in past.propose(range(n))])
    one_each, number = torch.arange(n + 1), torch.zeros(n, 1).long()
    for position in range(3):
        draft = Draft(torch.full((n,), 2), one_each, torch.full((n,), position), streams)
        is_low = acceptance_uniforms(draft, one_each[:-1], number).squeeze(1) < 0.5
        assert 0.45 < float((is_fresh == is_low).float().mean()) < 0.55


# -- several drafters -------------------------------------------------------------------------


class OnlyFor:
    """Guesses two tokens for one sequence, and keeps what it is told."""

    def __init__(self, sequence: int) -> None:
        self.sequence, self.told = sequence, list[News]()
        self.rule, self.source = coupled, Source.VERIFIED

    def start(self, request: Request) -> None:
        pass

    def propose(self, sequences: Sequence[int]) -> list[Chunk | None]:
        return [Chunk(np.array([7, 8])) if s == self.sequence else None for s in sequences]

    def advance(self, news: Sequence[News]) -> None:
        self.told += news

    def finish(self, sequences: Sequence[int]) -> None:
        pass


def test_a_text_that_ended_inside_a_guess_has_proved_it_as_far_as_it_went() -> None:
    drafter = Fallback([OnlyFor(0)])
    share = drafter.shares[0]
    for tokens, stayed, checked in (([7], 1, 1), ([7, 9], 1, 2), ([9], 0, 2)):
        before = share.stayed, share.checked
        drafter.propose([0])
        drafter.advance([News(0, np.array(tokens), stayed, 2)])
        assert (share.stayed - before[0], share.checked - before[1]) == (stayed, checked)


def test_who_did_not_guess_is_told_of_no_guess() -> None:
    zero, one = OnlyFor(0), OnlyFor(1)
    drafter = Fallback([zero, one])
    drafter.propose([0, 1, 2])
    texts = [np.array([7, 9]), np.array([7, 8, 5]), np.array([4])]
    drafter.advance([News(0, texts[0], 1, 2), News(1, texts[1], 2, 2), News(2, texts[2], 0, 0)])
    for who, counts in ((zero, [(1, 2), (0, 0), (0, 0)]), (one, [(0, 0), (2, 2), (0, 0)])):
        assert [(new.stayed, new.checked) for new in who.told] == counts
        # The tokens are every drafter's business.
        assert all(new.tokens is text for new, text in zip(who.told, texts, strict=True))


# -- suffixes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("alone", [False, True])
def test_a_sibling_is_guessed_from_unless_each_is_alone(alone: bool) -> None:
    drafter = SuffixDrafts(rollouts=0, alone=alone)
    drafter.start(request_for(new_streams(0, 2)))
    drafter.advance([News(0, np.array([7, 8, 9]), 0, 0), News(1, np.array([7, 8]), 0, 0)])
    found = drafter.propose([1])[0]
    assert (None if found is None else found.tokens.tolist()) == (None if alone else [9])
