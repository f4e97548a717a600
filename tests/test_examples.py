"""Every example runs as it stands and learns or finds; what each computes has its own test file."""

from __future__ import annotations

import importlib

import pytest

pytest.importorskip("transformers", reason="needs transformers: the extra [examples]")


def run(name: str, needs: str | None = None) -> object:
    if needs is not None:
        pytest.importorskip(needs, reason=f"needs {needs}: the extra [examples]")
    return importlib.import_module(name).main()


@pytest.fixture(autouse=True)
def no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")


def test_bare_loop():
    rewards = run("bare_loop")
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.1


def test_transformers_trainer():
    losses = run("transformers_trainer", "accelerate")
    assert losses[-1] < 0.5 * losses[0]


def test_trl_grpo():
    rewards = run("trl_grpo", "trl")
    assert sum(rewards[-3:]) > sum(rewards[:3])


def test_lightning_module():
    metrics = run("lightning_module", "lightning")
    assert 0.0 < metrics["entropy"] < 5.0


@pytest.mark.parametrize("name", ["beam_search", "best_of_n", "tree_search"])
def test_searching_more_finds_more(name: str):
    found = run(name)
    assert found[-1] > found[0]


def test_vote():
    votes = run("vote")
    assert len(votes) == 4 and sum(votes.values()) == 64
