"""`bench logits`: what is checked, who gets numbers, what is counted and written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial

import pytest
import torch

from rollfuse.bench import logits, logits_rivals, table
from rollfuse.bench.choice import Wrong
from rollfuse.bench.logits_cases import Case, Judge, Outcome, floor_steps, make_inputs
from rollfuse.bench.logits_rivals import COPIES, OURS, PROVIDERS, memory_step
from rollfuse.bench.peak import peak_of
from rollfuse.kernels.objective import weighted_loss

CPU = torch.device("cpu")
TINY = Case(64, 96)


@pytest.fixture
def inputs():
    return make_inputs(TINY, CPU)


def in_float64(inputs, *, with_entropy=True):
    """The step by autograd in float64."""
    leaf = inputs.saved.double().requires_grad_()
    log_p = leaf.log_softmax(1)
    logp = log_p.gather(1, inputs.batch.targets.unsqueeze(1)).squeeze(1)
    entropy = -(log_p.exp() * log_p).sum(1)
    objective = inputs.objective if with_entropy else inputs.objective_without_entropy
    loss = weighted_loss(objective, logp, entropy, inputs.batch)
    (dlogits,) = torch.autograd.grad(loss, leaf)
    scores = (logp.detach(), entropy.detach()) if with_entropy else (None, None)
    return Outcome(loss.detach(), *scores, dlogits, ours=True)


def test_bytes_by_hand():
    assert TINY.bytes() == 2 * 64 * 96 * 4 == 2 * make_inputs(TINY, CPU).logits.nbytes
    assert Case(64, 96, "bfloat16").bytes() == 2 * 64 * 96 * 2


def test_the_truth_is_autograd_in_float64(inputs, monkeypatch):
    monkeypatch.setattr("rollfuse.bench.logits_cases._BLOCK", 96 * 5)  # blocks of 5 rows
    judge = Judge(inputs)
    for with_entropy in (True, False):
        found = judge.accept(in_float64(inputs, with_entropy=with_entropy))
        assert found["loss"] < 1e-7 and found["dlogits"] < 1e-12 and found["dlogits_row"] < 1e-12
        assert ("logp" in found) == ("entropy" in found) == with_entropy


def scaled(outcome):
    return outcome._replace(dlogits=0.97 * outcome.dlogits)


def last_row_unwritten(outcome):
    dlogits = outcome.dlogits.clone()
    dlogits[-1] = torch.nan
    return outcome._replace(dlogits=dlogits)


def one_row_short(outcome):
    dlogits = outcome.dlogits.clone()
    dlogits[dlogits.square().sum(1).argmax()] *= 0.97
    return outcome._replace(dlogits=dlogits)


def without_bonus_unnoticed(outcome):
    """The bonus is in it, and nothing says so."""
    return outcome._replace(logp=None, entropy=None)


def other_scores(outcome):
    return outcome._replace(logp=outcome.logp + 1e-3)


BUGS = (scaled, last_row_unwritten, one_row_short, without_bonus_unnoticed, other_scores)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_wrong_results_are_refused(inputs, bug):
    with pytest.raises(Wrong, match="is off by"):
        Judge(inputs).accept(bug(in_float64(inputs)))


@pytest.mark.parametrize("dtype", logits.DTYPES)
def test_ours_keeps_the_promise(dtype):
    inputs = make_inputs(Case(64, 96, dtype), CPU)
    judge = Judge(inputs)
    for name in OURS:
        (step,) = PROVIDERS[name](inputs).values()
        outcome = step()
        assert outcome.ours
        judge.accept(outcome)
        inputs.restore()


def test_overwritten_logits_are_made_anew(inputs):
    (step,) = PROVIDERS["rollfuse overwrite_logits"](inputs).values()
    first = step()
    assert first.dlogits.data_ptr() == inputs.logits.data_ptr()
    assert not torch.equal(inputs.logits, inputs.saved)
    gradient = first.dlogits.clone()
    inputs.restore()
    assert torch.equal(inputs.logits, inputs.saved)
    assert torch.equal(step().dlogits, gradient)
    inputs.restore()
    (step,) = PROVIDERS["rollfuse"](inputs).values()
    assert step().dlogits.data_ptr() != inputs.logits.data_ptr()
    assert torch.equal(inputs.logits, inputs.saved)


def test_the_floor_reads_and_writes_all_logits(inputs):
    steps = floor_steps(inputs)
    assert set(steps) == {"copy", "scaled in place"}
    version = inputs.logits._version
    steps["scaled in place"]()
    assert inputs.logits._version > version and torch.equal(inputs.logits, inputs.saved)
    with torch.no_grad():
        inputs.logits.fill_(torch.nan)
    steps["copy"]()
    assert torch.equal(inputs.logits, inputs.saved)


def by_name(result):
    return {row["provider"]: row for row in result["rows"]}


@pytest.mark.filterwarnings("ignore")  # rivals' deprecations
def test_everybody_computes_it_or_says_why_not():
    for name in ("trl", "liger_kernel"):
        pytest.importorskip(name, reason="needs the extra [rivals]")
    rows = by_name(logits.measure_case(TINY, CPU, 2, memory=False))
    assert list(rows) == [logits.FLOOR, *PROVIDERS]
    liger = rows.pop("Liger triton_grpo_loss")
    assert liger["status"] == "skipped: Triton kernels alone: needs a GPU"
    assert liger["seconds"] is None and not liger["facts"]
    floor = rows.pop(logits.FLOOR)
    assert floor["ratio"]["median"] == 1.0
    for name, row in rows.items():
        assert row["status"] == "ok", (name, row["status"])
        assert row["facts"]["dlogits"] < 1e-6 and row["facts"]["logp"] < 1e-5, name
        bandwidth = TINY.bytes() / row["seconds"]["median"]
        assert row["facts"]["bandwidth"] == pytest.approx(bandwidth)


_LIGER = """
import torch
from rollfuse.bench.logits_cases import Case, Judge, make_inputs
from rollfuse.bench.logits_rivals import liger_step

inputs = make_inputs(Case(64, 96), torch.device("cpu"))
step, judge = liger_step(inputs), Judge(inputs)
judge.accept(step())
inputs.restore()
judge.accept(step())
"""


def test_liger_gets_the_same_problem():
    for name in ("liger_kernel", "triton"):
        pytest.importorskip(name, reason="needs the extra [rivals]")
    paths = os.pathsep.join(sys.path)
    environment = {**os.environ, "PYTHONPATH": paths, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _LIGER], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_case_without_room_is_named(monkeypatch):
    monkeypatch.setattr(logits.measure, "available_bytes", lambda device: 2 * TINY.logits_bytes)
    rows = logits.measure_case(TINY, CPU, 1)["rows"]
    assert [row["provider"] for row in rows] == list(PROVIDERS)
    assert all(row["status"].startswith("skipped: the logits twice need") for row in rows)


def test_a_provider_without_room_is_named(monkeypatch):
    free = 4 * TINY.logits_bytes
    monkeypatch.setattr(logits.measure, "available_bytes", lambda device: free)
    rows = by_name(logits.measure_case(TINY, CPU, 1, ["rollfuse", "eager"], memory=False))
    assert rows["rollfuse"]["status"] == "ok"
    assert rows["eager"]["status"].startswith("skipped: needs about")


def peak(provider, configuration):
    case = Case(256, 16384)
    found = peak_of(partial(memory_step, case, provider, configuration))
    assert not isinstance(found, str), found
    return found.allocated / case.logits_bytes


def test_a_gradient_in_place_takes_no_memory():
    assert peak("rollfuse overwrite_logits", "in place") < 0.5
    assert 1.0 <= peak("rollfuse", "") < 1.5


@pytest.mark.parametrize(
    ("provider", "configuration"),
    [("eager", "log_softmax"), ("TRL selective_log_softmax", "with entropy")],
)
def test_what_rivals_are_said_to_need_is_near_what_they_take(provider, configuration):
    if provider.startswith("TRL"):
        pytest.importorskip("trl", reason="needs TRL: the extra [rivals]")
    assert 0.6 * COPIES[provider] < peak(provider, configuration) <= COPIES[provider]


def test_what_is_written_says_where_from_and_is_shown_again(tmp_path, capsys):
    path = tmp_path / "result.json"
    arguments = "--tokens 64 --vocab 96 --repeats 1 --no-memory --providers rollfuse eager"
    assert logits.main([*arguments.split(), "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    result = json.loads(path.read_text())
    assert {"device", "versions", "commit", "command", "time", "logits", "repeats"} <= set(result)
    assert result["command"].startswith("python -m rollfuse.bench logits --tokens 64")
    assert [row["provider"] for row in result["logits"][0]["rows"]] == [
        logits.FLOOR, "rollfuse", "eager",
    ]  # fmt: skip
    assert table.main([str(path)]) == 0
    # But for the heading, whose versions a file sorts.
    assert capsys.readouterr().out.split("commit")[1].strip() == printed.split("commit")[1].strip()


def test_our_own_wrong_result_costs_the_exit_status(monkeypatch):
    right = PROVIDERS["rollfuse"]

    def wrong(inputs):
        (step,) = right(inputs).values()
        return {"": lambda: scaled(step())}

    monkeypatch.setitem(logits_rivals.PROVIDERS, "rollfuse", wrong)
    arguments = "--tokens 64 --vocab 96 --repeats 1 --no-memory --providers rollfuse"
    assert logits.main(arguments.split()) == 1


@pytest.mark.parametrize(
    "arguments", [["--tokens", "100"], ["--vocab", "0"], ["--repeats", "0"], ["--threads", "0"]]
)
def test_bad_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        logits.main(arguments)
    assert "need " in capsys.readouterr().err
