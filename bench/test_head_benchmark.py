"""The grid's cases under pytest-benchmark: `pytest bench/test_head_benchmark.py`.

Only the smallest unless ROLLFUSE_BENCH_GRID is set (hours on a CPU); `-k "trl and 128x256x8192"`
selects, by provider and by case.
"""

from __future__ import annotations

import os
from functools import lru_cache

import pytest
import torch

from rollfuse.bench.cases import VARIANTS, Case, grid, make_inputs, variants
from rollfuse.bench.choice import Judge, choose, why_not
from rollfuse.bench.floor import floor_steps
from rollfuse.bench.rivals import PROVIDERS

pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark: the extra [bench]")

SMALL = 10e9  # FLOPs: a tenth of a second on two cores
SIZES = [c for c in grid() if c.flops() <= SMALL or os.environ.get("ROLLFUSE_BENCH_GRID")]
CASES = [case for size in SIZES for case in variants(size, VARIANTS)]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@lru_cache(maxsize=1)  # the cases come one after the other
def judge_of(case: Case) -> Judge:
    torch._dynamo.reset()  # compiled rivals specialise on each case
    return Judge(make_inputs(case, DEVICE))


@pytest.mark.parametrize("provider", PROVIDERS, ids=lambda provider: provider.name)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_forward_and_backward(benchmark, case, provider) -> None:
    reason = why_not(provider, case, DEVICE)
    if reason is not None:
        pytest.skip(reason)
    choice = choose(provider, judge_of(case), DEVICE)
    assert not isinstance(choice, str), choice
    benchmark.group = case.name
    benchmark.extra_info.update(configuration=choice.configuration, gflop=case.flops() / 1e9)
    benchmark(choice.step)


@pytest.mark.parametrize("case", SIZES, ids=lambda case: case.name.replace(" ", "-"))
def test_floor(benchmark, case) -> None:
    benchmark.group = case.name
    benchmark(floor_steps(case, DEVICE)[f"{case.tokens} rows"])
