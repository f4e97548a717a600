"""examples/vote.py: the majority of the engine's samples of the same noise."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers: the extra [examples]")

from sampler_cases import PROMPT, Watched, all_pruned
from vote import Votes, is_decided, vote

from rollfuse import Engine, OutOfPages, fork_streams

N, N_TOKENS = 15, 5


def last_modulo_three(response: list[int]) -> int:
    return response[-1] % 3


def all_votes(model: Watched, stream: int, end: int | None) -> Votes:
    ends = [] if end is None else [end]
    engine = Engine(model.model, max_new_tokens=N_TOKENS, stop_tokens=ends)
    streams = fork_streams(torch.tensor([stream]), N)[0]
    rollout = engine.generate([PROMPT], N, streams=streams)
    return Counter(last_modulo_three(response.tolist()) for response in rollout.responses())


def test_it_counts_the_engines_samples():
    model = Watched(8)
    with all_pruned(model):
        answer, votes = vote(model, PROMPT, N, N_TOKENS, last_modulo_three, stream=7)
    expected = all_votes(model, 7, None)
    assert len(expected) == 3 and votes == expected
    assert answer == expected.most_common(1)[0][0]


def test_stopping_early_does_not_change_the_answer():
    model = Watched(8)
    n_early = n_compared = 0
    for stream in range(12):
        with all_pruned(model):
            answer, votes = vote(model, PROMPT, N, N_TOKENS, last_modulo_three, 5, stream)
        expected = all_votes(model, stream, 5)
        assert votes <= expected
        n_early += votes != expected
        (first, count), (_, second) = expected.most_common(2)
        if count > second:
            n_compared += 1
            assert answer == first
    assert n_early >= 3 and n_compared >= 6


def test_the_prompt_is_computed_once():
    model = Watched(8)
    vote(model, PROMPT, N, N_TOKENS, last_modulo_three)
    assert model.branches == [N] * N_TOKENS
    assert model.rows == [len(PROMPT)] + [N] * (N_TOKENS - 1)


def test_a_response_without_an_answer_has_no_vote():
    model = Watched(8)
    answer, votes = vote(model, PROMPT, N, N_TOKENS, lambda response: None)
    assert answer is None and not votes
    _, votes = vote(model, PROMPT, N, N_TOKENS, lambda response: response[-1] % 2 or None)
    assert set(votes) == {1} and 0 < votes[1] < N


@pytest.mark.parametrize(
    ("counts", "n_live", "decided"),
    [
        ({}, 0, False), ({}, 3, False), ({"a": 3}, 2, True), ({"a": 3}, 3, False),
        ({"a": 5, "b": 2}, 2, True), ({"a": 5, "b": 2}, 3, False), ({"b": 1, "a": 9}, 7, True),
    ],
)  # fmt: skip
def test_a_vote_is_decided_once_nothing_can_draw_level(counts, n_live, decided):
    assert is_decided(Counter(counts), n_live) is decided


def test_errors_leave_nothing_behind():
    def fails(response: list[int]) -> None:
        raise KeyError("no answer")

    model = Watched(8, n_pages=30, page_size=1)
    with all_pruned(model), pytest.raises(KeyError):
        vote(model, PROMPT, 4, 2, fails)
    with all_pruned(model), pytest.raises(OutOfPages):
        vote(model, PROMPT, 8, 9, fails)
