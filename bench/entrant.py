"""Who takes part in a case of `bench tree` or `bench logits`, and the rows that come of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch

from rollfuse.bench import measure, report
from rollfuse.bench.choice import fastest_right
from rollfuse.bench.measure import Spread


@dataclass(frozen=True, slots=True)
class Entrant:
    """One provider.

    Attributes:
        steps: makes its steps, by configuration; raises `choice.Unavailable`.
        ours: whether its errors are raised, and cost the run its exit status.
        about: what a reader of its row should know, such as what is timed.
    """

    name: str
    steps: Callable[[], Mapping[str, Callable[[], Any]]]
    ours: bool = False
    about: str = ""


@dataclass(slots=True)
class Entry:
    """What became of it; without numbers where `status` is not "ok"."""

    provider: str
    ours: bool = False
    status: str = "ok"
    configuration: str = ""
    note: str = ""
    seconds: Spread | None = None
    ratio: Spread | None = None  # paired; of which times, the case says
    facts: dict[str, Any] = field(default_factory=dict)  # what the check found, and counts


class Measured(NamedTuple):
    """All entries, and the times and steps of those that are right."""

    entries: list[Entry]
    times: dict[str, list[float]]
    steps: dict[str, Callable[[], Any]]


@dataclass(frozen=True, slots=True)
class Plan:
    """How to measure.

    Attributes:
        repeats: interleaved; at least 9 for a figure one quotes.
        extra: steps timed beside the entrants, such as a floor's.
        finish: gets each result, off the clock; for entrants of a single configuration.
    """

    device: torch.device
    repeats: int
    extra: Mapping[str, measure.Step] = field(default_factory=dict)
    finish: Callable[[Any], None] = lambda result: None


def measure_all(
    entrants: Sequence[Entrant], accept: Callable[[Any], dict[str, Any]], plan: Plan
) -> Measured:
    """Check every configuration of every entrant, then time the fastest right one of each.

    Args:
        accept: the facts of a result; raises `choice.Wrong`.
    """
    entries: list[Entry] = []
    steps: dict[str, Callable[[], Any]] = {}

    def finished(result: Any) -> dict[str, Any]:
        try:
            return accept(result)
        finally:
            plan.finish(result)

    for entrant in entrants:
        entry = Entry(entrant.name, entrant.ours, note=entrant.about)
        entries.append(entry)
        found = fastest_right(entrant.steps, finished, plan.device, ours=entrant.ours)
        if isinstance(found, str):
            entry.status = found
            continue
        steps[entrant.name] = found.step
        entry.configuration, entry.facts = found.configuration, found.verdict
        dropped = found.dropped and f"dropped: {found.dropped}"
        entry.note = "; ".join(part for part in (entrant.about, dropped) if part)
    timed = {**plan.extra, **steps}
    times = measure.interleave(timed, plan.repeats, plan.device, finish=plan.finish)
    for entry in entries:
        if entry.provider in steps:
            entry.seconds = measure.spread(times[entry.provider])
    return Measured(entries, times, steps)


def result_of(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """The entries as they stand in a result file."""
    return [asdict(entry) for entry in entries]


def is_wrong(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether one of ours failed its check."""
    return any(row["ours"] and row["status"].startswith("wrong") for row in rows)


Column = Callable[[Mapping[str, Any]], str]


def table(title: str, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, Column]) -> str:
    """Rows of `result_of` as aligned text.

    Args:
        columns: by heading, what they show of a row that has numbers.
    """
    lines = [("provider", *columns, "configuration or reason")]
    for row in rows:
        has_numbers = row["status"] == "ok"
        cells = [column(row) if has_numbers else "-" for column in columns.values()]
        about = [row["configuration"] if has_numbers else row["status"], row["note"]]
        lines.append((row["provider"], *cells, "; ".join(part for part in about if part)))
    return f"\n{title}\n{report.aligned(lines)}"


def fact(name: str, form: str = "{}", scale: float | None = None) -> Column:
    """A column of `facts`, "-" where a row lacks it."""

    def cell(row: Mapping[str, Any]) -> str:
        value = row["facts"].get(name)
        return "-" if value is None else form.format(value if scale is None else value * scale)

    return cell


def milliseconds(row: Mapping[str, Any]) -> str:
    return f"{row['seconds']['median'] * 1e3:.3f}"


def ratio(row: Mapping[str, Any]) -> str:
    return f"{row['ratio']['median']:.3f}" if row["ratio"] else "-"


def ratio_range(row: Mapping[str, Any]) -> str:
    return f"{row['ratio']['low']:.2f}..{row['ratio']['high']:.2f}" if row["ratio"] else "-"
