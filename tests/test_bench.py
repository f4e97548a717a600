import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import pytest
import torch

from rollfuse.bench import card, check, gpu, head, measure, report
from rollfuse.bench.cases import Case, Inputs, Outcome, make_inputs, truth
from rollfuse.bench.floor import floor_steps
from rollfuse.bench.rivals import EAGER, OURS, Provider

CPU = torch.device("cpu")
TINY = Case(64, 16, 96)


def test_flops_and_bytes_by_hand() -> None:
    # Three products of 2 * 64 * 16 * 96 FLOPs; hidden 64 * 16 and weight 96 * 16, read and written.
    assert TINY.flops() == 3 * 2 * 64 * 16 * 96 == 589_824
    assert TINY.bytes() == 4 * 2 * (1024 + 1536) == 20_480
    frozen = replace(TINY, frozen_head=True, dtype="bfloat16")
    assert frozen.flops() == 2 * 2 * 64 * 16 * 96
    assert frozen.bytes() == 2 * (2 * 1024 + 1536)
    assert Case(2048, 1024, 32768).flops() == 412_316_860_416


def test_variants_have_the_rows_they_promise() -> None:
    masked = make_inputs(replace(TINY, variant="masked"), CPU)
    assert len(masked.active) == 32
    assert (masked.batch.weights.view(32, 2) > 0).tolist() == [[False, True]] * 32
    zero = make_inputs(replace(TINY, variant="zero_advantage"), CPU)
    assert zero.batch.advantages is not None
    assert int((zero.batch.advantages == 0).sum()) == 26  # 13 of 32 sequences of 2 tokens
    for inputs in (masked, zero):
        assert float(inputs.batch.weights.sum()) == pytest.approx(1.0, abs=1e-6)


def test_ratios_lie_on_both_sides_of_the_clip() -> None:
    inputs = make_inputs(TINY, CPU)
    logp, old = truth(inputs, inputs.objective).logp, inputs.batch.logp_old
    assert logp is not None and old is not None
    steps = (logp - old).sort().values.view(4, 16)
    expected = torch.tensor([-0.3, -0.05, 0.05, 0.3]).unsqueeze(1).expand(4, 16)
    assert torch.allclose(steps, expected.double(), atol=1e-5)


def test_truth_equals_autograd_in_float64() -> None:
    inputs = make_inputs(replace(TINY, dtype="float64", variant="masked"), CPU)
    true = truth(inputs, inputs.objective, rows_at_once=5)
    # Eager PyTorch computes in float32 from the logits on: the shared formula, independent code.
    got = next(iter(EAGER.steps(inputs).values()))()
    found = check.errors(got, true)
    assert check.complaint(found, "float32") is None, found
    assert max(found["dhidden"], found["dweight"]) < 2e-6


def test_errors_and_complaints() -> None:
    true = Outcome(
        torch.tensor(2.0), torch.zeros(2), torch.ones(2), torch.ones(2, 2), torch.ones(3, 2)
    )
    good = check.errors(true, true)
    assert set(good) == {
        "loss", "logp", "entropy", "dhidden", "dhidden_row", "dweight", "dweight_row",
    }  # fmt: skip
    assert check.complaint(good, "float32") is None
    scaled = check.errors(true._replace(dweight=0.97 * torch.ones(3, 2)), true)
    assert scaled["dweight"] == pytest.approx(0.03, rel=1e-5)
    assert all(check.complaint(scaled, dtype) for dtype in ("float32", "bfloat16", "float16"))
    # Rows of norm 1, 1 and 4 (RMS sqrt(6)): errors of 0.1, none and 0.4.
    uneven = true._replace(dweight=torch.diag(torch.tensor([1.0, 1.0, 4.0])))
    off = uneven._replace(dweight=torch.diag(torch.tensor([1.1, 1.0, 4.4])))
    assert check.errors(off, uneven)["dweight_row"] == pytest.approx(0.1, rel=1e-5)
    nan = check.errors(true._replace(logp=torch.tensor([0.0, torch.nan])), true)
    assert "logp" in (check.complaint(nan, "float32") or "")
    skipped = true._replace(logp=torch.tensor([0.0, torch.nan]), scored=torch.tensor([True, False]))
    assert check.complaint(check.errors(skipped, true), "float32") is None
    with pytest.raises(ValueError, match="dweight: need a gradient"):
        check.errors(true._replace(dweight=None), true)


def test_in_units_of_the_reference() -> None:
    assert check.in_units_of({"a": 3.0, "b": 1.0}, {"a": 2.0, "b": 0.0}) == {"a": 1.5}


def test_tiny_run_writes_well_formed_json(tmp_path, capsys) -> None:
    path, picture = tmp_path / "head.json", tmp_path / "head.png"
    arguments = (
        "--tokens 64 --hidden 16 --vocab 96 --repeats 3 --no-memory --providers rollfuse eager"
    )
    status = head.main([*arguments.split(), "--json", str(path), "--plot", str(picture)])
    assert status == 0
    result = json.loads(path.read_text())
    assert result["command"].startswith("python -m rollfuse.bench head --tokens 64")
    assert result["versions"]["torch"] == measure.version("torch")
    assert result["device"]["type"] == "cpu" and result["device"]["threads"] >= 1
    assert len(result["rows"]) == 3 * 3  # three variants; the floor and two providers
    for row in result["rows"]:
        assert row["status"] == "ok"
        assert row["seconds"]["low"] <= row["seconds"]["median"] <= row["seconds"]["high"]
        assert row["tflops"] * row["seconds"]["median"] == pytest.approx(589_824e-12, rel=1e-6)
        if row["provider"] == report.FLOOR:
            assert row["ratio"]["median"] == 1.0
        else:
            assert 0.0 < row["errors"]["dweight"] < 1e-5
    ours = [row for row in result["rows"] if row["provider"] == "rollfuse"]
    assert all(row["predicted_peak"] > 0 and row["plan"] for row in ours)
    assert picture.read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "64x16x96 float32 masked" in shown and "zero_advantage" in shown


def _wrong(inputs: Inputs):
    ((name, step),) = EAGER.steps(inputs).items()

    def scaled() -> Outcome:
        outcome = step()
        assert outcome.dweight is not None
        return outcome._replace(dweight=0.97 * outcome.dweight)

    return {name: scaled}


def _raises(inputs: Inputs):
    raise RuntimeError("no such kernel\nwith details")


def test_a_wrong_or_failing_provider_gets_no_numbers() -> None:
    providers = (
        EAGER,
        Provider("scaled", _wrong),
        Provider("broken", _raises),
        Provider("absent", _raises, "no_such_module_at_all", "no-such-package"),
        Provider("elsewhere", _raises, cuda_only=True),
        Provider("huge", _raises, logits_copies=1e12),
    )
    rows = head.measure_case(TINY, providers, head.Settings(CPU, repeats=2, memory=False))
    by_name = {row.provider: row for row in rows}
    assert by_name["eager"].status == "ok" and by_name["eager"].seconds is not None
    assert by_name["scaled"].status.startswith("wrong: dweight is off by 3.0e-02")
    assert by_name["broken"].status == "failed: no such kernel"
    assert by_name["absent"].status == "not installed (no-such-package)"
    assert by_name["elsewhere"].status == "needs CUDA"
    assert by_name["huge"].status.startswith("skipped: needs about")
    table = report.table(TINY, rows)
    for name in ("scaled", "broken", "absent", "elsewhere", "huge"):
        row = by_name[name]
        assert row.seconds is row.ratio is row.peak is row.errors is None
        (line,) = [line for line in table.splitlines() if line.startswith(name)]
        assert line.split()[1:9] == ["-"] * 8


def test_ours_is_checked_like_the_rest(monkeypatch) -> None:
    def wrong(options_argv: list[str]) -> int:
        monkeypatch.setattr(head, "OURS", bad)
        monkeypatch.setattr(head, "PROVIDERS", (bad,))
        return head.main(options_argv)

    bad = replace(OURS, steps=_wrong)
    arguments = "--tokens 64 --hidden 16 --vocab 96 --repeats 2 --no-memory --variants dense"
    assert wrong(arguments.split()) == 1


def test_floor_steps_compute_the_three_products() -> None:
    case = Case(64, 16, 8192)
    # What the closures hold tells what they computed: every way must agree with the whole one.
    found = {}
    for name, step in floor_steps(case, CPU).items():
        cells = dict(zip(step.__code__.co_freevars, step.__closure__ or (), strict=True))
        held = {key: cell.cell_contents for key, cell in cells.items()}
        held["dhidden"].fill_(torch.nan)
        held["dweight"].fill_(torch.nan)
        step()
        found[name] = held["dhidden"], held["dweight"], held["hidden"], held["weight"]
        assert not held["dhidden"].isnan().any() and not held["dweight"].isnan().any()
        logits = held["hidden"] @ held["weight"].T
        if name.endswith("columns"):
            assert torch.allclose(held["dhidden"], logits @ held["weight"], rtol=1e-3, atol=1e-2)
            assert torch.allclose(held["dweight"], logits.T @ held["hidden"], rtol=1e-3, atol=1e-2)
    assert set(found) == {"64 rows", "4096 columns"}


_KNOWN_PEAK = """
import dataclasses, json, torch
from rollfuse.bench import measure

def allocate():
    scratch = torch.ones(48 << 18)
    result = torch.ones(4 << 18)
    del scratch
    return (result,)

print(json.dumps(dataclasses.asdict(measure.peak_memory(allocate, torch.device("cpu")))))
"""


def test_peak_memory_of_known_tensors() -> None:
    """48 MiB of scratch beside the returned tensor, which is not counted."""
    environment = measure.exact_memory_environment()
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", _KNOWN_PEAK], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    peak = json.loads(done.stdout.splitlines()[-1])
    assert peak["allocated"] == 48 << 20
    if peak["resident"] is not None:  # Linux alone tells
        assert peak["resident"] == pytest.approx(48 << 20, rel=0.03)


def test_fastest_picks_the_fastest() -> None:
    steps = {str(ms): partial(time.sleep, ms / 1000) for ms in (60, 20, 200)}
    assert measure.fastest(steps, CPU) == "20"


def test_interleave_pairs_each_repeat() -> None:
    order: list[str] = []
    steps = {name: partial(order.append, name) for name in "abc"}
    times = measure.interleave(steps, 3, CPU)
    assert "".join(order) == "abcbcacab"
    assert all(len(values) == 3 for values in times.values())
    ratio = measure.paired_ratio([2.0, 6.0, 4.0], [1.0, 2.0, 4.0])
    assert ratio.median == 2.0


def test_tokens_that_do_not_split_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        make_inputs(Case(100, 16, 96), CPU)


def test_gpu_command_says_that_it_needs_a_gpu(monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "needs a GPU" in capsys.readouterr().err


def test_card_checks_pass_and_can_fail(monkeypatch) -> None:
    results = list(card.run_checks(CPU))
    assert [r for r in results if r.problem is not None] == []
    assert len(results) == 3 * 2 * 7 + 1
    right = card.linear_policy_loss

    def slightly_wrong(*args, **kwargs):
        out = right(*args, **kwargs)
        return replace(out, loss=0.97 * out.loss)

    monkeypatch.setattr(card, "linear_policy_loss", slightly_wrong)
    wrong = [r.name for r in card.run_checks(CPU) if r.problem is not None]
    assert len(wrong) == 3 * 2 * 3  # fused, recompute, unit in every dtype, with both heads
