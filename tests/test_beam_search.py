"""examples/beam_search.py: against every response there is, and against whole forward passes."""

from __future__ import annotations

import heapq
from itertools import product

import pytest

pytest.importorskip("transformers", reason="needs transformers: the extra [examples]")

from beam_search import Scored, beam_search
from sampler_cases import PROMPT, Watched, all_pruned

from rollfuse import OutOfPages

VOCABULARY, END = 5, 2


def every_response(model: Watched, n_tokens: int, end: int | None) -> list[Scored]:
    """All of them, the likeliest first."""
    found: dict[tuple[int, ...], float] = {}
    for text in product(range(VOCABULARY), repeat=n_tokens):
        response = text[: text.index(end) + 1] if end in text else text
        if response not in found:
            steps = range(len(response))
            logp = (model.logp([*PROMPT, *response[:i]])[response[i]] for i in steps)
            found[response] = float(sum(logp))
    return sorted(((score, list(text)) for text, score in found.items()), reverse=True)


def plain_search(model: Watched, n_beams: int, n_tokens: int, end: int | None) -> list[Scored]:
    """Beam search that computes every text anew and gives no beam up early."""
    beams: list[Scored] = [(0.0, [])]
    ended: list[Scored] = []
    for _ in range(n_tokens):
        grown: list[Scored] = []
        for score, text in beams:
            logp = model.logp([*PROMPT, *text]).tolist()
            grown += [(score + logp[token], [*text, token]) for token in range(VOCABULARY)]
        ended += [scored for scored in grown if scored[1][-1] == end]
        beams = heapq.nlargest(n_beams, [s for s in grown if s[1][-1] != end])
    return heapq.nlargest(n_beams, ended + beams)


def assert_same(found: list[Scored], expected: list[Scored]) -> None:
    assert [text for _, text in found] == [text for _, text in expected]
    scores = [score for score, _ in expected]
    assert [score for score, _ in found] == pytest.approx(scores, abs=1e-12)


@pytest.mark.parametrize(("end", "n_responses"), [(None, 125), (END, 85)])
def test_with_room_for_all_it_is_exact(end: int | None, n_responses: int):
    model = Watched(VOCABULARY)
    with all_pruned(model):
        found = beam_search(model, PROMPT, 130, 3, end)
    assert len(found) == n_responses
    assert_same(found, every_response(model, 3, end))


@pytest.mark.parametrize("n_beams", [1, 2, 3, 7])
@pytest.mark.parametrize("end", [None, END])
def test_beams_are_those_of_whole_forward_passes(n_beams: int, end: int | None):
    model = Watched(VOCABULARY)
    with all_pruned(model):
        found = beam_search(model, PROMPT, n_beams, 7, end)
    assert_same(found, plain_search(model, n_beams, 7, end))


def test_nothing_is_computed_twice():
    model = Watched(VOCABULARY, n_pages=60, page_size=1)
    found = beam_search(model, PROMPT, 3, 6)
    assert model.rows == [len(PROMPT), 3, 3, 3, 3, 3]
    # Beams share what they have in common, and those given up have left nothing.
    assert max(model.pages) <= len(PROMPT) + 3 * 5
    assert len({tuple(text) for _, text in found}) == 3


def test_what_cannot_get_ahead_is_given_up():
    model = Watched(VOCABULARY)
    likeliest = int(model.logp(PROMPT).argmax())
    assert beam_search(model, PROMPT, 1, 50, end=likeliest)[0][1] == [likeliest]
    assert len(model.branches) == 1


def test_running_out_of_pages_leaves_nothing_behind():
    model = Watched(VOCABULARY, n_pages=12, page_size=1)
    with all_pruned(model), pytest.raises(OutOfPages):
        beam_search(model, PROMPT, 20, 6)
