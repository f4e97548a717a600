"""Plans: what is chosen, and that the published byte formula is what a pass really allocates."""

import pytest
import torch
from head_cases import coupled, make_problem, smooth_local

from rollfuse import Plan, explain, linear_policy_loss
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
