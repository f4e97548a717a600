"""Plans: what is chosen, and that the published byte formula is what a pass really allocates."""

from dataclasses import replace

import pytest
import torch
from head_cases import coupled, make_problem, smooth_local

from rollfuse import Lora, Plan, explain, linear_policy_loss
from rollfuse.kernels.gemm import row_stride


def allocated_peak(run) -> int:
    """Bytes by which the CPU allocator's total rose at most while `run` ran."""
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        result = run()
    del result
    total = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["fused", "hold", "recompute", "unit"])
@pytest.mark.parametrize("bias,softcap", [(False, None), (True, 30.0)])
def test_peak_bytes_follow_the_formula(kind, dtype, bias, softcap):
    if kind == "hold" and softcap is not None and dtype != torch.float32:
        softcap = None  # refused, see test_policy.py
    frozen = "weight,bias" if kind == "unit" else ""
    problem = make_problem(
        n_rows=700, width=64, vocabulary=9000, dtype=dtype, bias=bias, softcap=softcap,
        frozen=frozen,
    )  # fmt: skip
    objective = smooth_local if kind == "fused" else coupled
    arguments = (problem.hidden, problem.head, problem.batch, objective, Plan(kind))
    report = explain(*arguments)

    def run():
        result = linear_policy_loss(*arguments[:4], plan=arguments[4])
        return torch.autograd.grad(result.loss, problem.leaves)

    returned = sum(leaf.nbytes for leaf in problem.leaves)
    peak = allocated_peak(run) - returned
    assert 0.9 * report.peak_bytes <= peak <= 1.1 * report.peak_bytes


@pytest.mark.parametrize("kind", ["fused", "hold", "recompute"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_main_grad", [False, True])
def test_peak_bytes_with_an_adapter_and_a_main_grad(kind, dtype, has_main_grad):
    problem = make_problem(n_rows=1500, width=64, vocabulary=9000, dtype=dtype, bias=False)
    lora = Lora(torch.randn(16, 64).requires_grad_(), torch.randn(9000, 16).requires_grad_())
    main_grad = torch.zeros_like(problem.weight, dtype=torch.float32) if has_main_grad else None
    head = replace(problem.head, lora=lora, main_grad=main_grad)
    objective = smooth_local if kind == "fused" else coupled
    arguments = (problem.hidden, head, problem.batch, objective)
    leaves = [problem.hidden, lora.a, lora.b] + ([] if has_main_grad else [problem.weight])

    def run():
        result = linear_policy_loss(*arguments, plan=Plan(kind))
        result.loss.backward()
        found = [leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        return found

    report = explain(*arguments, Plan(kind))
    peak = allocated_peak(run) - sum(leaf.nbytes for leaf in leaves)
    assert 0.9 * report.peak_bytes <= peak <= 1.1 * report.peak_bytes


def test_peak_bytes_where_a_rank_is_filled_up():
    """The copies of a rank of 17, 32 columns wide, are most of it."""
    problem = make_problem(n_rows=128, width=64, vocabulary=9000, bias=False, frozen="weight")
    head = replace(problem.head, lora=Lora(torch.randn(17, 64), torch.randn(9000, 17)))
    arguments = (problem.hidden, head, problem.batch, smooth_local)
    plan = Plan("recompute", invariant=True)

    def run():
        loss = linear_policy_loss(*arguments, plan=plan).loss
        return torch.autograd.grad(loss, problem.hidden)

    report = explain(*arguments, plan)
    peak = allocated_peak(run) - problem.hidden.nbytes
    assert 0.9 * report.peak_bytes <= peak <= 1.1 * report.peak_bytes


def test_one_chunk_where_it_needs_no_more_than_several():
    """A bfloat16 weight's gradient is then made directly, without V D float32."""
    for n_rows, is_one in ((40, True), (1024, True), (1100, True), (1600, False)):
        problem = make_problem(n_rows=n_rows, width=256, vocabulary=4000, dtype=torch.bfloat16)
        arguments = (problem.hidden, problem.head, problem.batch, smooth_local)
        report = explain(*arguments)
        assert report.slabwise == is_one, n_rows
        assert (report.n_chunks == 1) == is_one
        assert ("one chunk" in report.reason) == is_one
    wide = make_problem(n_rows=40)
    assert not explain(wide.hidden, wide.head, wide.batch, smooth_local).slabwise
    half = make_problem(n_rows=40, dtype=torch.float16)
    assert not explain(half.hidden, half.head, half.batch, smooth_local).slabwise


@pytest.mark.parametrize("vocabulary", [1, 16, 17, 32, 8192, 32768, 50257, 151936])
def test_rows_of_a_workspace_lie_an_odd_number_of_cache_lines_apart(vocabulary):
    stride = row_stride(vocabulary, torch.device("cpu"))
    assert vocabulary <= stride < vocabulary + 32 and stride % 32 == 16
    assert row_stride(vocabulary, torch.device("cuda")) == vocabulary


def test_the_kind_follows_from_what_is_declared():
    trainable, frozen = make_problem(), make_problem(frozen="weight,bias")
    kinds = [
        explain(p.hidden, p.head, p.batch, objective).kind
        for p in (trainable, frozen)
        for objective in (smooth_local, coupled)
    ]
    assert kinds == ["fused", "hold", "fused", "unit"]
    with torch.no_grad():
        report = explain(trainable.hidden, trainable.head, trainable.batch, smooth_local)
    assert report.flops == 2 * report.slots * 16 * 301
