"""The checks of drawing and verifying on a device, here on the CPU: they notice what is wrong."""

from dataclasses import replace

import pytest
import torch

from rollfuse.bench import sampling_card
from rollfuse.kernels.linear_sampling import linear_sample
from rollfuse.kernels.sampling import sample_tokens

CPU = torch.device("cpu")


def test_what_is_right_passes():
    results = list(sampling_card.run_checks(CPU))
    assert len(results) == 3 * len(sampling_card.SAMPLINGS) + 2 + len(sampling_card.RULES)
    assert [result for result in results if result.problem] == []


@pytest.mark.parametrize(
    ("name", "spoil", "words"),
    [
        ("plain", lambda s: replace(s, temperature=0.97 * s.temperature), "is off by|differ"),
        ("top-k", lambda s: replace(s, top_k=49), "is off by|tokens differ|support"),
        ("top-p", lambda s: replace(s, top_p=0.81), "is off by|tokens differ|support"),
        ("min-p", lambda s: replace(s, min_p=0.021), "is off by|support"),
        ("vLLM's noise", lambda s: sampling_card.SAMPLINGS["plain"], "tokens differ"),
    ],
)
def test_wrong_samples_are_noticed(name, spoil, words, monkeypatch):
    def wrong(logits, streams, positions, sampling):
        if logits.dtype == torch.float32:  # not the truth
            sampling = spoil(sampling)
        return sample_tokens(logits, streams, positions, sampling)

    monkeypatch.setattr(sampling_card, "sample_tokens", wrong)
    found = sampling_card.check_samples(CPU, "float32", name, sampling_card.SAMPLINGS[name])
    assert found.problem is not None
    assert any(word in found.problem for word in words.split("|"))


def test_a_lost_stream_is_noticed(monkeypatch):
    def wrong(logits, streams, positions):
        return sample_tokens(
            logits, streams[:, :1] if logits.dtype == torch.float32 else streams, positions
        )

    monkeypatch.setattr(sampling_card, "sample_tokens", wrong)
    assert "tokens differ" in (sampling_card.check_several_streams(CPU).problem or "")


def test_a_lost_softcap_is_noticed(monkeypatch):
    def wrong(hidden, head, *rest):
        if hidden.dtype == torch.float32:
            head = replace(head, softcap=None)
        return linear_sample(hidden, head, *rest)

    monkeypatch.setattr(sampling_card, "linear_sample", wrong)
    assert sampling_card.check_linear(CPU).problem is not None


@pytest.mark.parametrize("name", sampling_card.RULES)
def test_a_wrong_verdict_is_noticed(name, monkeypatch):
    original = sampling_card.verify

    def wrong(rule, draft, target):
        if target.rows.dtype == torch.float32:
            draft = replace(draft, positions=draft.positions + 1)
        return original(rule, draft, target)

    monkeypatch.setattr(sampling_card, "verify", wrong)
    found = sampling_card.check_rule(CPU, name, sampling_card.RULES[name])
    assert "verdicts differ" in (found.problem or "")
