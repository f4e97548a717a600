"""`python -m rollfuse.bench head`: the fused policy loss against its rivals and the bare GEMMs.

Time is the median of interleaved repeats and, as a ratio, of repeats paired with the floor. Peak
memory is what a step takes above its inputs and returned gradients. Errors are against float64 on
the same operands; "x fp32 GEMM" is the gradients' error over that of a float64 softmax over float32
GEMMs. A configuration that fails or is wrong is dropped; a provider without one gets no numbers.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

from rollfuse import explain
from rollfuse.bench import check, measure, plots, report
from rollfuse.bench.cases import (
    HEADLINE,
    HIDDEN,
    N_SEQUENCES,
    TOKEN_LOCAL,
    TOKENS,
    VARIANTS,
    VOCAB,
    Case,
    Inputs,
    grid,
    make_inputs,
    variants,
)
from rollfuse.bench.choice import Judge, choose, why_not
from rollfuse.bench.floor import floor_steps
from rollfuse.bench.peak import gradients_of, peak_in_own_process
from rollfuse.bench.report import FLOOR, Row
from rollfuse.bench.rivals import EAGER, PROVIDERS, Provider, Step


@dataclass(frozen=True, slots=True)
class Settings:
    """How to measure: device, repeats (at least 9 for a figure one quotes), and memory or not."""

    device: torch.device
    repeats: int
    memory: bool = True


def measure_case(case: Case, providers: Sequence[Provider], settings: Settings) -> list[Row]:
    """Rows of one case, the floor first."""
    torch._dynamo.reset()  # compiled rivals specialise on each case, as a fixed training shape does
    device = settings.device
    inputs = make_inputs(case, device)
    rows = {p.name: Row(case, p.name, note=p.note) for p in providers}
    # The truths, the largest tensors here, are gone when this returns.
    steps = _choose_all(inputs, providers, rows, device)
    floor_row = _time_all(case, rows, steps, settings)
    for provider in providers:
        if provider.ours and provider.name in steps:
            _explain(inputs, rows[provider.name])
    if settings.memory:
        _measure_peaks(case, rows, steps, device)
    return [floor_row, *rows.values()]


def _choose_all(
    inputs: Inputs, providers: Sequence[Provider], rows: dict[str, Row], device: torch.device
) -> dict[str, Step]:
    """The step of each provider that is right; fills in errors, and why there is no step."""
    judge = Judge(inputs)
    steps: dict[str, Step] = {}
    for provider in providers:
        row = rows[provider.name]
        choice = why_not(provider, inputs.case, device) or choose(provider, judge, device)
        if isinstance(choice, str):
            row.status = choice
            continue
        steps[provider.name] = choice.step
        row.configuration = choice.configuration
        row.errors, row.errors_over_gemm = choice.errors, choice.over_gemm
        _add_note(row, choice.dropped and f"dropped: {choice.dropped}")
    eager = rows[EAGER.name].errors if EAGER.name in rows else _eager_errors(judge, device)
    for row in rows.values():
        if row.errors is not None and eager is not None:
            row.errors_over_eager = check.in_units_of(row.errors, eager)
    return steps


def _eager_errors(judge: Judge, device: torch.device) -> check.Errors | None:
    """Errors of plain PyTorch in the same dtype, where it is not measured itself."""
    if why_not(EAGER, judge.inputs.case, device) is not None:
        return None
    step = next(iter(EAGER.steps(judge.inputs).values()))
    return check.errors(step(), judge.truth(EAGER))


def _time_all(case: Case, rows: dict[str, Row], steps: dict[str, Step], settings: Settings) -> Row:
    """Fill in times and ratios; returns the floor's row."""
    candidates = floor_steps(case, settings.device)
    first = {name: measure.seconds(step, settings.device) for name, step in candidates.items()}
    chosen = measure.fastest(candidates, first, settings.device)
    timed: dict[str, measure.Step] = {FLOOR: candidates[chosen], **steps}
    times = measure.interleave(timed, settings.repeats, settings.device)
    floor_row = Row(case, FLOOR, configuration=chosen)
    for name, values in times.items():
        row = floor_row if name == FLOOR else rows[name]
        row.seconds = measure.spread(values)
        row.ratio = measure.paired_ratio(values, times[FLOOR])
        row.tflops = case.flops() / row.seconds.median / 1e12
    return floor_row


def _explain(inputs: Inputs, row: Row) -> None:
    plan = explain(inputs.hidden, inputs.weight, inputs.batch, inputs.objective)
    row.plan, row.predicted_peak = plan.kind, plan.peak_bytes


def _measure_peaks(
    case: Case, rows: dict[str, Row], steps: dict[str, Step], device: torch.device
) -> None:
    for name, step in steps.items():
        row = rows[name]
        if device.type == "cuda":
            row.peak = measure.peak_memory(partial(gradients_of, step), device)
            continue
        found = peak_in_own_process(case, name, row.configuration)
        if isinstance(found, str):
            _add_note(row, f"memory: {found}")
        else:
            row.peak = found


def _add_note(row: Row, text: str) -> None:
    row.note = "; ".join(part for part in (row.note, text) if part)


# -- command line ---------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rollfuse.bench head", description=__doc__)
    add = parser.add_argument
    add("--tokens", type=int, nargs="+", default=list(TOKENS), metavar="T")
    add("--hidden", type=int, nargs="+", default=list(HIDDEN), metavar="D")
    add("--vocab", type=int, nargs="+", default=list(VOCAB), metavar="V")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    add("--variants", nargs="+", choices=VARIANTS, default=list(TOKEN_LOCAL))
    add("--frozen-head", action="store_true", help="no gradient to the head's weight")
    add("--providers", nargs="+", choices=[p.name for p in PROVIDERS], metavar="NAME")
    add("--repeats", type=int, default=9, help="interleaved repeats (a figure needs 9)")
    add("--threads", type=int, default=None, help="CPU threads (default: torch's choice)")
    add("--headline", action="store_true", help="T=2048 D=1024 V=32768 alone")
    add("--quick", action="store_true", help="one small case, 3 repeats, no memory")
    add("--no-memory", action="store_true", help="skip the memory measurement")
    add("--json", type=Path, help="write the rows here")
    add("--plot", type=Path, help="draw them here (PNG)")
    return parser


def _cases(options: argparse.Namespace) -> list[Case]:
    if options.headline:
        sizes = [HEADLINE]
    elif options.quick:
        sizes = [Case(128, 256, 8192)]
    else:
        sizes = list(grid(tuple(options.tokens), tuple(options.hidden), tuple(options.vocab)))
    return [
        Case(c.tokens, c.hidden, c.vocab, options.dtype, c.variant, options.frozen_head)
        for size in sizes
        for c in variants(size, tuple(options.variants))
    ]


def main(argv: list[str]) -> int:
    """Run the benchmark; 1 if our own result failed its check anywhere, else 0."""
    parser = _parser()
    options = parser.parse_args(argv)
    numbers = [*options.tokens, *options.hidden, *options.vocab, options.repeats]
    if options.threads is not None:
        numbers.append(options.threads)
    if min(numbers) < 1:
        parser.error(f"need numbers of at least 1, got {min(numbers)}")
    bad = [t for t in options.tokens if t % N_SEQUENCES or t < 2 * N_SEQUENCES]
    if bad:
        least = 2 * N_SEQUENCES
        parser.error(f"--tokens: need multiples of {N_SEQUENCES} from {least} on, got {bad}")
    if options.plot is not None and find_spec("matplotlib") is None:
        parser.error("--plot: need matplotlib, from the extra rollfuse[bench]")
    device, facts = report.begin(f"head {shlex.join(argv)}", options.threads)
    settings = Settings(
        device,
        repeats=3 if options.quick else options.repeats,
        memory=not (options.no_memory or options.quick),
    )
    wanted = [p for p in PROVIDERS if not options.providers or p.name in options.providers]
    rows: list[Row] = []
    for case in _cases(options):
        measured = measure_case(case, wanted, settings)
        rows += measured
        print(report.table(case, measured), flush=True)
        if options.json is not None:  # after each case: an interrupted run keeps what it has
            result = {**facts, "repeats": settings.repeats, "rows": [r.as_dict() for r in rows]}
            measure.write_json(options.json, result)
    if options.plot is not None:
        plots.draw_head([row.as_dict() for row in rows], options.plot)
    ours = {provider.name for provider in wanted if provider.ours}
    return 1 if any(row.provider in ours and row.status.startswith("wrong") for row in rows) else 0
