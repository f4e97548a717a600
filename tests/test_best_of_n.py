"""examples/best_of_n.py: the engine's samples of the same noise, pruned by hand."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers: the extra [examples]")

from best_of_n import best_of_n
from sampler_cases import PROMPT, Watched, all_pruned

from rollfuse import Engine, OutOfPages, fork_streams

N, N_TOKENS, STREAM = 9, 6, 14
Sample = tuple[list[float], list[int]]  # log-probs, tokens


def sampled(model: Watched, end: int | None) -> list[Sample]:
    ends = [] if end is None else [end]
    engine = Engine(model.model, max_new_tokens=N_TOKENS, stop_tokens=ends)
    streams = fork_streams(torch.tensor([STREAM]), N)[0]
    rollout = engine.generate([PROMPT], N, streams=streams)
    logp = torch.split(rollout.logp, rollout.lengths.tolist())
    pairs = zip(logp, rollout.responses(), strict=True)
    return [(one.tolist(), response.tolist()) for one, response in pairs]


def mean(sample: Sample, length: int) -> float:
    part = sample[0][:length]
    return sum(part) / len(part)


def survivor(samples: list[Sample], checkpoints: tuple[int, ...]) -> Sample:
    for length in checkpoints:
        samples = sorted(samples, key=lambda sample: mean(sample, length), reverse=True)
        samples = samples[: (len(samples) + 1) // 2]
    return max(samples, key=lambda sample: mean(sample, N_TOKENS))


@pytest.mark.parametrize("checkpoints", [(), (1,), (2, 4), (1, 2, 3, 4, 5)])
@pytest.mark.parametrize("end", [None, 5])
def test_it_is_the_best_of_the_engines_samples(checkpoints: tuple[int, ...], end: int | None):
    model = Watched(8)
    samples = sampled(model, end)
    assert end is None or len({len(text) for _, text in samples}) > 2
    with all_pruned(model):
        score, text = best_of_n(model, PROMPT, N, N_TOKENS, checkpoints, end, STREAM)
    expected = survivor(samples, checkpoints)
    assert text == expected[1]
    assert score == pytest.approx(mean(expected, N_TOKENS), abs=1e-12)


def test_pruning_can_lose_the_best():
    # Otherwise the test above could not see whether anything is pruned.
    samples = sampled(Watched(8), None)
    assert survivor(samples, (1, 2, 3, 4, 5)) != survivor(samples, ())


def test_the_prompt_is_computed_once_and_pruned_samples_leave_at_once():
    model = Watched(8, page_size=1)
    best_of_n(model, PROMPT, 8, 6, checkpoints=(2, 4))
    assert model.branches == [8, 8, 4, 4, 2, 2]
    assert model.rows == [len(PROMPT), 8, 4, 4, 2, 2]
    assert model.pages == [3, 3 + 8, 3 + 4 * 2, 3 + 4 * 3, 3 + 2 * 4, 3 + 2 * 5]


def test_samples_that_have_ended_are_not_computed_further():
    model = Watched(2)  # every second token is the end
    best_of_n(model, PROMPT, 16, 40, end=1)
    assert model.branches[0] == 16
    assert model.branches == sorted(model.branches, reverse=True)
    assert len(model.branches) < 40


def test_running_out_of_pages_leaves_nothing_behind():
    model = Watched(8, n_pages=12, page_size=1)
    with all_pruned(model), pytest.raises(OutOfPages):
        best_of_n(model, PROMPT, 4, 6)
