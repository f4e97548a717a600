"""`bench gpu` on a machine without one: checks on the CPU, clock and losses on fakes."""

from __future__ import annotations

import json
import signal
import time
from dataclasses import replace

import pytest
import torch

from rollfuse.bench import card, gpu, measure, sampling_card, tree_card
from rollfuse.bench.cases import Case
from rollfuse.bench.report import FLOOR, Row

CPU = torch.device("cpu")
CASES = [Case(64, 16, 96), Case(128, 16, 96), Case(192, 16, 96)]
can_interrupt = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs SIGALRM")


def rows_of(case: Case, status: str = "ok") -> list[Row]:
    spread = measure.Spread(1.0, 1.0, 1.0) if status == "ok" else None
    return [Row(case, FLOOR), Row(case, "rollfuse", status, seconds=spread)]


@pytest.fixture
def fake_gpu(monkeypatch, tmp_path):
    """Runs the command with a card of fakes; returns its status and its file."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    device = {"name": "fake", "threads": 1, "cpus": 1}
    facts = {"device": device, "versions": {}, "commit": None, "command": "bench gpu"}
    monkeypatch.setattr(measure, "provenance", lambda command, device: facts)
    monkeypatch.setattr(card, "run_checks", lambda device: iter([card.Result("a", None)]))
    monkeypatch.setattr(tree_card, "run_checks", lambda device: iter([]))
    monkeypatch.setattr(sampling_card, "run_checks", lambda device: iter([]))
    monkeypatch.setattr(gpu, "_from_logits", lambda device: {"tokens": 1})
    monkeypatch.setattr(gpu, "cases", lambda: CASES)
    path = tmp_path / "gpu.json"

    def run(measure_case, minutes: float = 1.0) -> tuple[int, dict]:
        monkeypatch.setattr(gpu, "measure_case", measure_case)
        status = gpu.main(["--json", str(path), "--minutes", str(minutes)])
        return status, json.loads(path.read_text())

    run.path = path
    return run


def measured(result: dict) -> list[str]:
    return [row["case"]["name"] for row in result["rows"] if row["provider"] == "rollfuse"]


def test_says_that_it_needs_a_gpu(monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "needs a GPU" in capsys.readouterr().err


def test_all_cases_are_measured_and_the_checks_are_written_before(fake_gpu) -> None:
    def measure_case(case, providers, settings):
        written = json.loads(fake_gpu.path.read_text())
        assert written["checks"] == [{"name": "a", "problem": None}]
        assert (
            len(measured(written)) == CASES.index(case) if "rows" in written else case == CASES[0]
        )
        return rows_of(case)

    status, result = fake_gpu(measure_case)
    assert status == 0
    assert measured(result) == [case.name for case in CASES]
    assert result["from_logits"] == {"tokens": 1}
    assert result["unmeasured"] == {} and result["wrong"] == []


def test_a_case_without_memory_costs_only_itself(fake_gpu, capsys) -> None:
    def measure_case(case, providers, settings):
        if case == CASES[0]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")
        return rows_of(case)

    status, result = fake_gpu(measure_case)
    assert status == 0  # the card is small, nothing is wrong
    assert measured(result) == [case.name for case in CASES[1:]]
    reason = "out of memory: CUDA out of memory. Tried to allocate"
    assert result["unmeasured"] == {CASES[0].name: reason}
    assert f"{CASES[0].name}: {reason}" in capsys.readouterr().out


def test_a_case_that_fails_costs_only_itself_and_the_exit_status(fake_gpu) -> None:
    def measure_case(case, providers, settings):
        if case == CASES[1]:
            raise RuntimeError("illegal instruction")
        return rows_of(case)

    status, result = fake_gpu(measure_case)
    assert status == 1
    assert measured(result) == [CASES[0].name, CASES[2].name]
    assert result["unmeasured"] == {CASES[1].name: "failed: illegal instruction"}
    assert result["wrong"] == [CASES[1].name]


def test_a_wrong_result_of_ours_shows_in_the_exit_status(fake_gpu) -> None:
    statuses = dict(zip(CASES, ("ok", "wrong: dweight", "skipped: needs about"), strict=True))
    status, result = fake_gpu(lambda case, *rest: rows_of(case, statuses[case]))
    assert status == 1
    assert result["wrong"] == [CASES[1].name]


@can_interrupt
def test_the_time_limit_cuts_a_case_off(fake_gpu) -> None:
    def measure_case(case, providers, settings):
        if case == CASES[1]:
            try:
                time.sleep(30.0)
            except Exception:  # as what guards against a rival's failure
                pytest.fail("the limit was caught")
        return rows_of(case)

    handler, start = signal.getsignal(signal.SIGALRM), time.monotonic()
    status, result = fake_gpu(measure_case, minutes=0.5 / 60)
    assert time.monotonic() - start < 5.0
    assert status == 0
    assert measured(result) == [CASES[0].name]
    assert result["unmeasured"] == {case.name: "out of time" for case in CASES[1:]}
    assert signal.getsignal(signal.SIGALRM) is handler
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@can_interrupt
def test_a_limit_that_was_swallowed_comes_again() -> None:
    swallowed = 0
    with pytest.raises(gpu.OutOfTime), gpu.time_limit(time.monotonic() + 0.05):
        while swallowed < 2:
            try:
                time.sleep(30.0)
            except gpu.OutOfTime:
                swallowed += 1
                if swallowed == 2:
                    raise
    assert swallowed == 2


def test_without_a_signal_no_case_is_started_late(monkeypatch) -> None:
    monkeypatch.setattr(gpu, "_can_interrupt", lambda: False)
    late = gpu.attempt(lambda: "ran", time.monotonic() + gpu._RESERVE - 1.0)
    assert late == gpu.Unmeasured("out of time", failed=False)
    assert gpu.attempt(lambda: "ran", time.monotonic() + gpu._RESERVE + 1.0) == "ran"


@pytest.mark.parametrize("problem", ["off by much", None])
def test_nothing_is_measured_after_a_failed_check(fake_gpu, monkeypatch, problem) -> None:
    def run_checks(device):
        yield card.Result("a", problem)
        if problem is None:
            raise RuntimeError("no such kernel")

    monkeypatch.setattr(card, "run_checks", run_checks)
    status, result = fake_gpu(lambda *rest: pytest.fail("measured"))
    assert status == 1
    assert result["checks"][0] == {"name": "a", "problem": problem}
    assert problem or result["checks"][1]["problem"] == "failed: no such kernel"
    assert "rows" not in result


def test_card_checks_pass_and_can_fail(monkeypatch) -> None:
    results = list(card.run_checks(CPU))
    assert [r for r in results if r.problem is not None] == []
    assert len(results) == 3 * 2 * 12 + 4
    right = card.linear_policy_loss

    def slightly_wrong(*args, **kwargs):
        out = right(*args, **kwargs)
        return replace(out, loss=0.995 * out.loss)

    monkeypatch.setattr(card, "linear_policy_loss", slightly_wrong)
    wrong = [r.name for r in card.run_checks(CPU) if r.problem is not None]
    # fused, recompute, unit, and cut and adapted the first two, in every dtype, with both heads;
    # hold not with a softcap under halves
    assert len(wrong) == 3 * 2 * 7 + 4


def test_the_loss_from_logits_runs() -> None:
    found = gpu._from_logits(CPU, tokens=64, vocab=100)
    assert found["seconds"].keys() == {"policy_loss", "read and write once"}
