"""Every example runs as it stands and learns; what each one computes has a test file of its own."""

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
