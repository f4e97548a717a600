"""`python -m rollfuse.bench head`: the fused policy loss against its rivals and the bare GEMMs.

Time is the median of interleaved repeats and, as a ratio, of repeats paired with the floor. Peak
memory is what a step takes above its inputs and returned gradients. Errors are against float64 on
the same operands. A provider whose result is wrong gets no numbers.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from rollfuse import explain
from rollfuse.bench import check, measure, plots, report
from rollfuse.bench.cases import (
    HEADLINE,
    HIDDEN,
    TOKENS,
    VARIANTS,
    VOCAB,
    Case,
    Inputs,
    Outcome,
    grid,
    make_inputs,
    truth,
    variants,
)
from rollfuse.bench.floor import floor_steps
from rollfuse.bench.peak import gradients_of, peak_in_own_process
from rollfuse.bench.report import FLOOR, Row
from rollfuse.bench.rivals import EAGER, OURS, PROVIDERS, Provider, Step

# What a library may raise on a machine or a size it does not support.
_RIVAL_ERRORS = (ImportError, RuntimeError, TypeError, ValueError, AttributeError, AssertionError)


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
    steps: dict[str, Step] = {}
    truths: dict[bool, Outcome] = {}
    eager_errors = _eager_errors(inputs, truths, device)
    for provider in providers:
        row = rows[provider.name]
        reason = provider.why_not(device) or _too_big(provider, case, device)
        if reason is not None:
            row.status = reason
            continue
        try:
            checked = _checked_steps(provider, inputs, truths, row)
            if checked:
                row.configuration = measure.fastest(checked, device)
                steps[provider.name] = checked[row.configuration]
        except _RIVAL_ERRORS as error:
            if provider is OURS:
                raise
            row.status = f"failed: {_first_line(error)}"
        if row.errors is not None and eager_errors is not None:
            row.errors_over_eager = check.in_units_of(row.errors, eager_errors)
    truths.clear()  # float64 gradients: the largest tensors here
    floor_row = _time_all(case, rows, steps, settings)
    if OURS.name in steps:
        _explain(inputs, rows[OURS.name])
    if settings.memory:
        _measure_peaks(case, rows, steps, device)
    return [floor_row, *rows.values()]


def _eager_errors(
    inputs: Inputs, truths: dict[bool, Outcome], device: torch.device
) -> check.Errors | None:
    """Errors of plain PyTorch in the same dtype: what an error is judged by."""
    if _too_big(EAGER, inputs.case, device) is not None:
        return None
    step = next(iter(EAGER.steps(inputs).values()))
    return check.errors(step(), _truth(EAGER, inputs, truths))


def _truth(provider: Provider, inputs: Inputs, truths: dict[bool, Outcome]) -> Outcome:
    with_entropy = provider.entropy_gradient
    if with_entropy not in truths:
        truths[with_entropy] = truth(inputs, provider.objective(inputs))
    return truths[with_entropy]


def _checked_steps(
    provider: Provider, inputs: Inputs, truths: dict[bool, Outcome], row: Row
) -> dict[str, Step]:
    """The provider's steps, or none (and a status) when one of them gives a wrong result."""
    steps = provider.steps(inputs)
    true = _truth(provider, inputs, truths)
    for configuration, step in steps.items():
        found = check.errors(step(), true)
        complaint = check.complaint(found, inputs.case.dtype)
        if complaint is not None:
            row.status = f"wrong: {complaint} [{configuration}]"
            row.errors = None
            return {}
        worst = row.errors or found
        row.errors = {name: max(error, worst[name]) for name, error in found.items()}
    return steps


def _too_big(provider: Provider, case: Case, device: torch.device) -> str | None:
    free = measure.available_bytes(device)
    # The float64 truth stays beside the step: two copies of weight and gradient.
    held = case.vocab * case.hidden * 16 + case.tokens * case.hidden * 8
    need = provider.needs_bytes(case) + held
    if free is None or need <= 0.9 * free:
        return None
    return f"skipped: needs about {need / 2**30:.1f} GiB, {free / 2**30:.1f} free"


def _time_all(case: Case, rows: dict[str, Row], steps: dict[str, Step], settings: Settings) -> Row:
    """Fill in times and ratios; returns the floor's row."""
    candidates = floor_steps(case, settings.device)
    for candidate in candidates.values():
        candidate()
    chosen = measure.fastest(candidates, settings.device)
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
            row.note = f"{row.note}; memory: {found}".lstrip("; ")
        else:
            row.peak = found


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:120]


# -- command line ---------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rollfuse.bench head", description=__doc__)
    add = parser.add_argument
    add("--tokens", type=int, nargs="+", default=list(TOKENS), metavar="T")
    add("--hidden", type=int, nargs="+", default=list(HIDDEN), metavar="D")
    add("--vocab", type=int, nargs="+", default=list(VOCAB), metavar="V")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
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
    options = _parser().parse_args(argv)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    command = "python -m rollfuse.bench head " + shlex.join(argv)
    settings = Settings(
        device,
        repeats=3 if options.quick else options.repeats,
        memory=not (options.no_memory or options.quick),
    )
    wanted = [p for p in PROVIDERS if not options.providers or p.name in options.providers]
    facts = measure.provenance(command.strip(), device)
    print(report.heading(facts))
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
    ours = [row for row in rows if row.provider == OURS.name]
    return 1 if any(row.status.startswith("wrong") for row in ours) else 0
