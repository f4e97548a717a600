"""The cases of `bench head` under pytest-benchmark: `pytest bench/test_head_benchmark.py`.

Two sizes keep a run short: one bound by launches and memory, one by its GEMMs.
"""

from __future__ import annotations

import pytest
import torch

from rollfuse.bench import check
from rollfuse.bench.cases import VARIANTS, Case, make_inputs, truth
from rollfuse.bench.floor import floor_steps
from rollfuse.bench.rivals import PROVIDERS

pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark: the extra [bench]")

SIZES = ((128, 256, 8192), (512, 1024, 8192))
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("provider", PROVIDERS, ids=lambda provider: provider.name)
def test_forward_and_backward(benchmark, provider, size, variant) -> None:
    reason = provider.why_not(DEVICE)
    if reason is not None:
        pytest.skip(reason)
    case = Case(*size, variant=variant)
    inputs = make_inputs(case, DEVICE)
    configuration, step = next(iter(provider.steps(inputs).items()))
    found = check.errors(step(), truth(inputs, provider.objective(inputs)))
    assert check.complaint(found, case.dtype) is None
    benchmark.group = case.name
    benchmark.extra_info.update(configuration=configuration, gflop=case.flops() / 1e9)
    benchmark(step)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_floor(benchmark, size) -> None:
    case = Case(*size)
    benchmark.group = case.name
    benchmark(floor_steps(case, DEVICE)[f"{case.tokens} rows"])
