import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from rollfuse.bench import check, choice, head, measure, report, table
from rollfuse.bench.cases import (
    VARIANTS,
    Case,
    Inputs,
    Outcome,
    make_inputs,
    over_fp32_gemm,
    truth,
)
from rollfuse.bench.floor import floor_steps
from rollfuse.bench.peak import peak_in_own_process
from rollfuse.bench.rivals import EAGER, OURS, PROVIDERS, Provider
from rollfuse.kernels.objective import weighted_loss

CPU = torch.device("cpu")
RESULTS = Path(__file__).resolve().parent.parent / "bench" / "results"
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
    assert len(masked.active) == masked.case.active_tokens == 32
    assert (masked.batch.weights.view(32, 2) > 0).tolist() == [[False, True]] * 32
    zero = make_inputs(replace(TINY, variant="zero_advantage"), CPU)
    assert zero.batch.advantages is not None
    assert int((zero.batch.advantages == 0).sum()) == 26  # 13 of 32 sequences of 2 tokens
    assert len(zero.active) == zero.case.active_tokens == 64
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
    assert check.complaint(found, check.ROUNDING["float32"]) is None, found
    assert max(found["dhidden"], found["dweight"]) < 2e-6


def test_the_reference_rounds_to_float32_and_to_the_operands() -> None:
    for dtype, least, most in (("float32", 5e-8, 1e-6), ("bfloat16", 1e-3, 2e-3)):
        inputs = make_inputs(replace(TINY, dtype=dtype), CPU)
        reference = over_fp32_gemm(inputs, inputs.objective)
        assert reference.dhidden.dtype == inputs.hidden.dtype
        found = check.errors(reference, truth(inputs, inputs.objective))
        assert least < found["dhidden"] < most and least < found["dweight"] < most
        assert found["logp"] < 2e-6 and found["entropy"] < 2e-6


LIMITS = [*check.PROMISE.values(), *check.ROUNDING.values()]


def test_errors_and_complaints() -> None:
    limits = check.ROUNDING["float32"]
    true = Outcome(
        torch.tensor(2.0), torch.zeros(2), torch.ones(2), torch.ones(2, 2), torch.ones(3, 2)
    )
    good = check.errors(true, true)
    assert set(good) == {
        "loss", "logp", "entropy",
        "dhidden", "dhidden_row", "dhidden_rounding", "dhidden_row_rounding",
        "dweight", "dweight_row", "dweight_rounding", "dweight_row_rounding",
    }  # fmt: skip
    assert check.complaint(good, limits) is None
    scaled = check.errors(true._replace(dweight=0.97 * torch.ones(3, 2)), true)
    assert scaled["dweight"] == pytest.approx(0.03, rel=1e-5)
    assert all(check.complaint(scaled, strict) for strict in LIMITS)
    # Rows of norm 1, 1 and 4 (RMS sqrt(6)): errors of 0.1, none and 0.4.
    uneven = true._replace(dweight=torch.diag(torch.tensor([1.0, 1.0, 4.0])))
    off = uneven._replace(dweight=torch.diag(torch.tensor([1.1, 1.0, 4.4])))
    assert check.errors(off, uneven)["dweight_row"] == pytest.approx(0.1, rel=1e-5)
    nan = check.errors(true._replace(logp=torch.tensor([0.0, torch.nan])), true)
    assert "logp" in (check.complaint(nan, limits) or "")
    skipped = true._replace(logp=torch.tensor([0.0, torch.nan]), scored=torch.tensor([True, False]))
    assert check.complaint(check.errors(skipped, true), limits) is None
    with pytest.raises(ValueError, match="dweight: need a gradient"):
        check.errors(true._replace(dweight=None), true)


def test_the_rounding_of_the_result_is_not_held_against_it() -> None:
    limits, exact = check.PROMISE["bfloat16"], torch.randn(100, 50, dtype=torch.float64)
    true = Outcome(torch.tensor(0.0), None, None, exact, exact)

    def found(gradient: torch.Tensor) -> check.Errors:
        return check.errors(true._replace(dhidden=gradient, dweight=gradient), true)

    rounded = found(exact.bfloat16())
    assert rounded["dhidden"] == rounded["dhidden_rounding"] == pytest.approx(1.65e-3, rel=0.05)
    assert check.complaint(rounded, limits) is None
    # What goes into a product on a GPU is rounded once more.
    twice = (exact * (1.0 + (torch.rand_like(exact) - 0.5) * 2.0**-7)).bfloat16()
    assert found(twice)["dhidden"] > 2e-3
    assert "dhidden is off" in (check.complaint(found(twice), limits) or "")
    assert check.complaint(found(exact * 1.0015), limits) is None
    assert check.complaint(found(exact * 1.0025), limits) is not None


def test_three_halves_of_an_fp32_gemm_are_too_much() -> None:
    found = {"loss": 0.0}
    limits = check.PROMISE["float32"]
    assert check.complaint(found, limits, {"dhidden": 1.4, "dhidden_row": 9.0}) is None
    assert check.complaint(found, limits, {"dhidden": 1.6}) == (
        "dhidden is off by 1.60 x an fp32 GEMM (limit 1.5)"
    )
    assert check.complaint(found, limits, {"dweight": float("nan")}) is not None
    assert check.complaint(found, check.ROUNDING["float32"], {"dhidden": 1.6}) is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_our_op_keeps_the_promise(dtype, variant) -> None:
    inputs = make_inputs(replace(TINY, dtype=dtype, variant=variant), CPU)
    found = choice.choose(OURS, choice.Judge(inputs), CPU)
    assert isinstance(found, choice.Choice), found


def _planted(inputs: Inputs, *, temperature: float, normalizer_gradient: bool) -> Outcome:
    """The step in float64 with a bug or without."""
    leaves = [leaf.detach().double().requires_grad_() for leaf in inputs.leaves()]
    logits = leaves[0] @ leaves[1].T / temperature
    log_z = logits.logsumexp(1)
    picked = logits.gather(1, inputs.batch.targets.unsqueeze(1)).squeeze(1)
    logp = picked - (log_z if normalizer_gradient else log_z.detach())
    log_p = logits.log_softmax(1)
    entropy = -(log_p.exp() * log_p).sum(1)
    loss = weighted_loss(inputs.objective, logp, entropy, inputs.batch)
    dhidden, dweight = torch.autograd.grad(loss, leaves)
    return Outcome(loss.detach(), None, None, dhidden, dweight)  # the gradients must tell


def test_planted_bugs_are_beyond_every_limit() -> None:
    inputs = make_inputs(TINY, CPU)
    true = truth(inputs, inputs.objective)
    right = check.errors(_planted(inputs, temperature=1.0, normalizer_gradient=True), true)
    assert max(right["dhidden"], right["dweight"]) < 1e-12
    lost = check.errors(_planted(inputs, temperature=1.1, normalizer_gradient=True), true)
    dropped = check.errors(_planted(inputs, temperature=1.0, normalizer_gradient=False), true)
    for limits in LIMITS:
        assert check.complaint(right, limits) is None
        for wrong in (lost, dropped):
            assert "dhidden is off" in (check.complaint({**wrong, "loss": 0.0}, limits) or "")


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
            assert 0.0 < row["errors_over_gemm"]["dweight"] < 5.0
    ours = [row for row in result["rows"] if row["provider"] == "rollfuse"]
    assert all(row["predicted_peak"] > 0 and row["plan"] for row in ours)
    assert picture.read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "64x16x96 float32 masked" in shown and "zero_advantage" in shown
    # Several files are shown one after the other, each as it was when it was measured.
    older = tmp_path / "older.json"
    for row in result["rows"]:
        del row["errors_over_gemm"]
    older.write_text(json.dumps(result))
    picture.unlink()
    assert table.main([str(path), str(older), "--plot", str(picture)]) == 0
    again = capsys.readouterr().out
    assert shown[shown.index("\n64x16x96") :].rstrip() in again and again.count("masked: ") == 2
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_only_results_with_rows_make_tables(tmp_path, capsys) -> None:
    (tmp_path / "loop.json").write_text('{"runs": []}')
    with pytest.raises(SystemExit):
        table.main([str(tmp_path / "loop.json")])
    assert "need a result with rows, got keys runs" in capsys.readouterr().err


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
        Provider("huge", _raises, workspace=lambda case: 1e16),
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
        assert line.split()[1:11] == ["-"] * 10


def _mixed(inputs: Inputs):
    """Two that work beside one that is wrong and one that fails when run."""
    (right,), (wrong,) = EAGER.steps(inputs).values(), _wrong(inputs).values()
    return {
        "wrong": wrong,
        "right": right,
        "failing": partial(_raises, inputs),
        "slow": lambda: (_skipped.append(60.0), right())[1],
    }


# Seconds by which the clock of a test has been put forward: no load is heavy enough to undo them.
_skipped: list[float] = []


def test_a_bad_configuration_costs_only_itself(monkeypatch) -> None:
    clock = time.perf_counter
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + sum(_skipped))
    providers = (
        Provider("mixed", _mixed, note="a note"),
        Provider("hopeless", lambda inputs: {"a": _mixed(inputs)["wrong"], "b": inputs.nothing}),
        Provider("wrong twice", lambda inputs: dict.fromkeys("ab", _mixed(inputs)["wrong"])),
    )
    rows = head.measure_case(TINY, providers, head.Settings(CPU, repeats=2, memory=False))
    _, mixed, hopeless, twice = rows
    assert mixed.status == "ok" and mixed.configuration == "right" and mixed.seconds is not None
    assert mixed.errors is not None and mixed.errors["dweight"] < 1e-5
    assert mixed.note.startswith("a note; dropped: wrong: dweight is off by 3.0e-02")
    assert mixed.note.endswith("[wrong]; failed: no such kernel [failing]")
    assert hopeless.status.startswith("failed: ")
    assert twice.status.endswith("[b]") and twice.status.startswith("wrong: dweight is off")
    assert hopeless.seconds is twice.seconds is twice.errors is None


def test_what_our_own_op_raises_is_not_survived() -> None:
    for steps in (_raises, lambda inputs: {"one": partial(_raises, inputs)}):
        with pytest.raises(RuntimeError, match="no such kernel"):
            choice.choose(replace(OURS, steps=steps), choice.Judge(make_inputs(TINY, CPU)), CPU)


@pytest.mark.parametrize("provider", PROVIDERS, ids=lambda provider: provider.name)
def test_every_provider_computes_every_variant(provider) -> None:
    reason = provider.why_not(TINY, CPU)
    if reason is not None:
        pytest.skip(reason)
    for variant in VARIANTS:
        case = replace(TINY, variant=variant)
        if provider.why_not(case, CPU) is not None:
            continue
        settings = head.Settings(CPU, repeats=1, memory=False)
        floor, row = head.measure_case(case, [provider], settings)
        assert row.status == "ok" and row.note == provider.note, (variant, row.status, row.note)
        assert row.seconds is not None and row.ratio is not None and row.errors is not None
        assert row.errors["dhidden"] < 1e-5 and row.errors["dweight"] < 1e-5
        assert row.errors_over_eager and row.errors_over_gemm


def test_the_memory_a_rival_needs() -> None:
    largest = Case(8192, 1024, 151936)
    logits = 4 * 8192 * 151936
    assert EAGER.needs_bytes(largest) == largest.bytes() + int(1.15 * 4.9 * logits)
    assert EAGER.needs_bytes(replace(largest, variant="masked")) < 0.6 * EAGER.needs_bytes(largest)
    by_name = {provider.name: provider for provider in PROVIDERS}
    held = 16 * largest.vocab * largest.hidden
    for name in ("rollfuse", "compile", "trl", "liger scores", "liger grpo", "cut-cross-entropy"):
        assert by_name[name].needs_bytes(largest) + held < 0.9 * (24 << 30), name
    # TRL's chunks are of columns: a larger vocabulary costs nothing but its operands.
    trl, wide = by_name["trl"], replace(largest, vocab=2 * largest.vocab)
    assert trl.needs_bytes(wide) - wide.bytes() == trl.needs_bytes(largest) - largest.bytes()


def test_estimates_of_memory_cover_what_was_measured() -> None:
    by_name = {provider.name: provider for provider in PROVIDERS}
    rows = [
        report.Row.from_dict(row)
        for path in RESULTS.glob("head-*.json")
        for row in json.loads(path.read_text())["rows"]
    ]
    measured = [row for row in rows if row.peak is not None]
    assert measured
    for row in measured:
        assert row.peak is not None
        provider, case = by_name[row.provider], row.case
        room = provider.needs_bytes(case) - case.operand_bytes()
        assert row.peak.allocated <= room, (case.name, row.provider, row.configuration)


def test_the_estimate_for_eager_is_not_far_above() -> None:
    case = Case(512, 64, 16384)
    (configuration,) = EAGER.steps(make_inputs(case, CPU))
    peak = peak_in_own_process(case, EAGER.name, configuration)
    assert not isinstance(peak, str), peak
    estimate = EAGER.needs_bytes(case) - case.operand_bytes()
    assert 0.8 * estimate < peak.allocated < estimate


def test_ours_is_checked_like_the_rest(monkeypatch) -> None:
    def wrong(options_argv: list[str]) -> int:
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
    assert set(found) == {"64 rows", "64 padded rows", "4096 columns"}


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
    first = {"60": 0.01, "20": 0.5, "200": 0.01}  # a short first run says little
    assert measure.fastest(steps, first, CPU) == "20"


def test_slow_steps_are_not_run_again() -> None:
    def never() -> None:
        raise AssertionError("run again")

    assert measure.fastest({"a": never, "b": never}, {"a": 31.0, "b": 30.0}, CPU) == "b"
    steps = {"slow": never, "a": partial(time.sleep, 0.02), "b": partial(time.sleep, 0.001)}
    assert measure.fastest(steps, {"slow": 30.0, "a": 0.02, "b": 9.0}, CPU) == "b"


def test_compilation_is_not_part_of_a_slow_first_run(monkeypatch) -> None:
    outcome, runs = truth(make_inputs(TINY, CPU), make_inputs(TINY, CPU).objective), []

    def step(*, compiles: bool) -> Outcome:
        runs.append(compiles)
        if compiles and len(runs) == 1:
            time.sleep(0.5)
            counters["stats"]["unique_graphs"] += 1
        return outcome

    monkeypatch.setattr(measure, "SLOW", 0.0)
    assert choice._first_run(partial(step, compiles=True), CPU)[1] < 0.5
    assert len(runs) == 2
    choice._first_run(partial(step, compiles=False), CPU)
    assert len(runs) == 3


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
