"""`python -m rollfuse.bench gpu`: check every kernel on this card, then benchmark, in one go.

Nothing is measured if a check fails. The cases that matter most come first and the time limit cuts
the rest, so that the whole run stays under it.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from rollfuse import TokenBatch, grpo, policy_loss
from rollfuse.bench import card, measure, report
from rollfuse.bench.cases import Case, grid
from rollfuse.bench.head import Settings, measure_case
from rollfuse.bench.rivals import OURS, PROVIDERS

_RESERVE = 60.0  # seconds a case may take at most; none is started with less left


def cases() -> list[Case]:
    """A model of today first, then its variants, then the grid."""
    main = (8192, 4096, 128256, "bfloat16")
    return [
        Case(*main),
        Case(*main, variant="masked"),
        Case(*main, frozen_head=True),
        Case(*main, variant="zero_advantage"),
        Case(2048, 1024, 32768),
        *(Case(c.tokens, c.hidden, c.vocab, "bfloat16") for c in grid()),
    ]


def main(argv: list[str]) -> int:
    """0: checked and measured. 1: a check failed. 2: there is no GPU, or torch cannot use it."""
    parser = argparse.ArgumentParser(prog="python -m rollfuse.bench gpu", description=__doc__)
    parser.add_argument("--minutes", type=float, default=7.5, help="time limit (7.5)")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), help="result (gpu.json)")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        built = torch.version.hip or torch.version.cuda or "neither CUDA nor ROCm"
        print(
            f"bench gpu needs a GPU that torch can use; torch {torch.__version__} is built with "
            f"{built} and sees none. On a CPU use `python -m rollfuse.bench head`.",
            file=sys.stderr,
        )
        return 2
    deadline = time.monotonic() + 60.0 * options.minutes
    device = torch.device("cuda", torch.cuda.current_device())
    facts = measure.provenance(f"python -m rollfuse.bench gpu {shlex.join(argv)}".strip(), device)
    print(report.heading(facts))
    results = _check(device)
    result: dict[str, object] = {**facts, "checks": [r._asdict() for r in results]}
    failed = [r for r in results if r.problem is not None]
    if failed:
        print(f"{len(failed)} of {len(results)} checks failed: nothing is measured")
    else:
        _benchmark(device, deadline, result, options.json)
    measure.write_json(options.json, result)
    print(f"wrote {options.json}")
    return 1 if failed or result.get("wrong") else 0


def _check(device: torch.device) -> list[card.Result]:
    results = []
    for found in card.run_checks(device):
        print(f"{'ok  ' if found.problem is None else 'FAIL'} {found.name} {found.problem or ''}")
        results.append(found)
    return results


def _benchmark(
    device: torch.device, deadline: float, result: dict[str, object], path: Path
) -> None:
    """Measure until the deadline nears; what is done is on the disk after every case."""
    rows: list[report.Row] = []
    skipped: list[str] = []
    result["from_logits"] = _from_logits(device)
    print(f"policy_loss from logits: {result['from_logits']}")
    for case in cases():
        if time.monotonic() + _RESERVE > deadline:
            skipped.append(case.name)
            continue
        measured = measure_case(case, PROVIDERS, Settings(device, repeats=15))
        rows += measured
        print(report.table(case, measured), flush=True)
        result["rows"], result["skipped"] = [row.as_dict() for row in rows], skipped
        measure.write_json(path, result)
        torch.cuda.empty_cache()
    result["wrong"] = [
        row.case.name for row in rows if row.provider == OURS.name and row.seconds is None
    ]
    if skipped:
        print(f"out of time for {len(skipped)} cases: {', '.join(skipped)}")


def _from_logits(device: torch.device, tokens: int = 8192, vocab: int = 151936) -> object:
    """Loss and in-place gradient from bfloat16 logits; beside it, one pass that rewrites them."""
    logits = torch.randn(tokens, vocab, device=device, dtype=torch.bfloat16).requires_grad_()
    batch = TokenBatch(
        targets=torch.randint(vocab, (tokens,), device=device),
        weights=torch.full((tokens,), 1.0 / tokens, device=device),
        advantages=torch.randn(tokens, device=device),
        logp_old=torch.full((tokens,), -12.0, device=device),
    )
    objective = grpo(entropy_coef=0.01)

    def step() -> torch.Tensor:
        # A view stands for the output of a model: a leaf cannot be overwritten.
        out = policy_loss(logits.view_as(logits), batch, objective, overwrite_logits=True)
        return torch.autograd.grad(out.loss, logits)[0]

    plain = torch.empty_like(logits, requires_grad=False)
    steps: dict[str, measure.Step] = {
        "policy_loss": step,
        "read and write once": partial(plain.mul_, 1.0),
    }
    for warm in steps.values():
        warm()
    times = measure.interleave(steps, 15, device)
    found = {name: asdict(measure.spread(values)) for name, values in times.items()}
    return {"tokens": tokens, "vocab": vocab, "dtype": "bfloat16", "seconds": found}
