"""`python -m rollfuse.bench logits`: the policy loss from logits that exist, against its rivals.

A step is forward and backward, to the logits' gradient. Time is the median of interleaved repeats
and, as a ratio, of repeats paired with the floor: the logits read once and as many bytes written
once, at the speed that the same run measures. Peak memory is above the logits, the gradient
included. Errors are against float64 on the same logits; a configuration that fails or is wrong is
dropped, and a provider without one gets no numbers. The logits are made anew after each step, off
the clock.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rollfuse.bench import entrant, measure, report
from rollfuse.bench.cases import N_SEQUENCES
from rollfuse.bench.entrant import Entry, Plan
from rollfuse.bench.logits_cases import (
    TOKENS,
    VOCAB,
    Case,
    Inputs,
    Judge,
    floor_steps,
    make_inputs,
)
from rollfuse.bench.logits_rivals import PROVIDERS, entrants, memory_step, without_result
from rollfuse.bench.peak import peak_of

FLOOR = "floor (one read, one write)"
DTYPES = ("float32", "bfloat16", "float16")


def measure_case(
    case: Case,
    device: torch.device,
    repeats: int,
    providers: Sequence[str] = tuple(PROVIDERS),
    *,
    memory: bool = True,
) -> dict[str, Any]:
    """Check and time all; what the result file gets."""
    free = measure.available_bytes(device)
    # The logits twice, and something to work with.
    if free is not None and 2.5 * case.logits_bytes > 0.9 * free:
        reason = f"skipped: the logits twice need {2 * case.logits_bytes / 2**30:.1f} GiB"
        rows = [Entry(name, status=reason) for name in providers]
        return {"case": asdict(case), "rows": entrant.result_of(rows)}
    torch._dynamo.reset()  # compiled rivals specialise on each case
    entries, steps = _time_all(make_inputs(case, device), providers, device, repeats)
    if memory:
        _add_peaks(case, entries, steps, device)
    return {"case": asdict(case), "rows": entrant.result_of(entries)}


def _time_all(
    inputs: Inputs, providers: Sequence[str], device: torch.device, repeats: int
) -> tuple[list[Entry], dict[str, Callable[[], Any]]]:
    """The entries, the floor's first, and the steps of those that are right."""
    floors = floor_steps(inputs)
    first = {name: measure.seconds(step, device) for name, step in floors.items()}
    chosen = measure.fastest(floors, first, device)
    wanted = [one for one in entrants(inputs) if one.name in providers]
    plan = Plan(device, repeats, {FLOOR: floors[chosen]}, finish=lambda _: inputs.restore())
    found = entrant.measure_all(wanted, Judge(inputs).accept, plan)
    floor = Entry(FLOOR, configuration=chosen, seconds=measure.spread(found.times[FLOOR]))
    entries = [floor, *found.entries]
    for entry in entries:
        if entry.seconds is not None:
            entry.ratio = measure.paired_ratio(found.times[entry.provider], found.times[FLOOR])
            entry.facts["bandwidth"] = inputs.case.bytes() / entry.seconds.median
    return entries, found.steps


def _add_peaks(
    case: Case,
    entries: Sequence[Entry],
    steps: dict[str, Callable[[], Any]],
    device: torch.device,
) -> None:
    measured = [entry for entry in entries if entry.provider in steps]
    if device.type == "cpu":
        steps.clear()  # and with them the logits: the other process makes its own
    for entry in measured:
        if device.type == "cpu":
            make = partial(memory_step, case, entry.provider, entry.configuration)
            found = peak_of(make)
        else:
            found = measure.peak_memory(without_result(steps[entry.provider]), device)
        if isinstance(found, str):
            entry.note = "; ".join(part for part in (entry.note, f"memory: {found}") if part)
        else:
            entry.facts |= {"peak_bytes": found.allocated, "resident_bytes": found.resident}


def table(measured: dict[str, Any]) -> str:
    """One measured case as text."""
    case = Case(**measured["case"])
    title = (
        f"logits: {case.tokens} x {case.vocab} {case.dtype}, GRPO with entropy bonus, forward and "
        f"backward; {case.bytes() / 2**20:.4g} MiB to be read and written"
    )
    columns = {
        "ms": entrant.milliseconds,
        "x floor": entrant.ratio,
        "20..80 %": entrant.ratio_range,
        "GB/s": entrant.fact("bandwidth", "{:.1f}", 1e-9),
        "peak MiB": entrant.fact("peak_bytes", "{:.1f}", 2.0**-20),
        "RSS MiB": entrant.fact("resident_bytes", "{:.1f}", 2.0**-20),
        "logp error": entrant.fact("logp", "{:.1e}"),
        "entropy error": entrant.fact("entropy", "{:.1e}"),
        "gradient error": entrant.fact("dlogits", "{:.1e}"),
    }
    return entrant.table(title, measured["rows"], columns)


def tables(result: dict[str, Any]) -> str:
    """The tables of a stored result."""
    return "\n".join(table(measured) for measured in result["logits"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rollfuse.bench logits", description=__doc__)
    add = parser.add_argument
    add("--tokens", type=int, nargs="+", default=list(TOKENS), metavar="T")
    add("--vocab", type=int, nargs="+", default=list(VOCAB), metavar="V")
    add("--dtype", choices=DTYPES, default="float32")
    add("--providers", nargs="+", choices=tuple(PROVIDERS), default=list(PROVIDERS), metavar="NAME")
    add("--repeats", type=int, default=9, help="interleaved (a figure needs 9)")
    add("--threads", type=int, help="CPU threads (default: torch's choice)")
    add("--no-memory", action="store_true", help="skip the memory measurement")
    add("--json", type=Path, help="write the result here")
    return parser


def main(argv: list[str]) -> int:
    """Run the benchmark; 1 if our own result failed its check anywhere, else 0."""
    parser = _parser()
    options = parser.parse_args(argv)
    least = min(*options.tokens, *options.vocab, options.repeats, options.threads or 1)
    if least < 1 or options.threads == 0:
        parser.error("need numbers of at least 1")
    bad = [t for t in options.tokens if t % N_SEQUENCES or t < 2 * N_SEQUENCES]
    if bad:
        known = f"multiples of {N_SEQUENCES} from {2 * N_SEQUENCES} on"
        parser.error(f"--tokens: need {known}, got {bad}")
    device, facts = report.begin(f"logits {shlex.join(argv)}", options.threads)
    measured: list[dict[str, Any]] = []
    for vocab in sorted(options.vocab):
        for tokens in sorted(options.tokens):
            case = Case(tokens, vocab, options.dtype)
            memory = not options.no_memory
            one = measure_case(case, device, options.repeats, options.providers, memory=memory)
            measured.append(one)
            print(table(one), flush=True)
            if options.json is not None:  # after each case: an interrupted run keeps what it has
                result = {**facts, "repeats": options.repeats, "logits": measured}
                measure.write_json(options.json, result)
    return 1 if any(entrant.is_wrong(one["rows"]) for one in measured) else 0
