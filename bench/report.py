"""What a benchmark prints first; rows of the head benchmark, and the table that shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from rollfuse.bench import measure
from rollfuse.bench.cases import Case
from rollfuse.bench.check import Errors
from rollfuse.bench.measure import Peak, Spread

FLOOR = "floor (GEMMs)"

_HEADINGS = (
    "provider", "ms", "x floor", "20..80 %", "TFLOP/s", "peak MiB", "RSS MiB",
    "dX error", "dW error", "x eager", "x fp32 GEMM", "configuration or reason",
)  # fmt: skip


@dataclass(slots=True)
class Row:
    """One provider on one case; without numbers where `status` is not "ok"."""

    case: Case
    provider: str
    status: str = "ok"
    configuration: str = ""
    note: str = ""
    seconds: Spread | None = None
    ratio: Spread | None = None  # to the floor of the dense case, paired
    tflops: float | None = None  # of the dense case's GEMMs
    peak: Peak | None = None
    predicted_peak: int | None = None  # bytes, by the published formula; ours alone
    plan: str | None = None
    errors: Errors | None = None
    errors_over_eager: Errors | None = None
    errors_over_gemm: Errors | None = None  # of a float64 softmax over fp32 GEMMs

    def as_dict(self) -> dict[str, object]:
        plain = asdict(self)
        plain["case"]["name"] = self.case.name
        return plain

    @staticmethod
    def from_dict(plain: Mapping[str, Any]) -> Row:
        """The row that `as_dict` described; what older results do not tell is None."""
        values = {field.name: plain[field.name] for field in fields(Row) if field.name in plain}
        sizes = {key: value for key, value in plain["case"].items() if key != "name"}
        values["case"] = Case(**sizes)
        for name, kind in (("seconds", Spread), ("ratio", Spread), ("peak", Peak)):
            if values[name] is not None:
                values[name] = kind(**values[name])
        return Row(**values)


def begin(arguments: str, threads: int | None) -> tuple[torch.device, dict[str, object]]:
    """Set the threads and print where this runs; the device, and what a result file tells of it.

    Args:
        arguments: of `python -m rollfuse.bench`.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = measure.provenance(f"python -m rollfuse.bench {arguments}".strip(), device)
    print(heading(facts), flush=True)
    return device, facts


def heading(facts: Mapping[str, object]) -> str:
    """The lines above the tables: device, versions, commit."""
    device, versions = facts["device"], facts["versions"]
    assert isinstance(device, dict) and isinstance(versions, dict)
    known = ", ".join(f"{name} {number}" for name, number in versions.items() if number)
    return (
        f"{device['name']}, {device['threads']} of {device['cpus']} CPU threads\n"
        f"{known}\ncommit {facts['commit']}\n{facts['command']}"
    )


def table(case: Case, rows: Sequence[Row]) -> str:
    """The rows of one case as aligned text."""
    traffic = f"{case.flops() / 1e9:.4g} GFLOP, {case.bytes() / 2**20:.4g} MiB read and written"
    return f"\n{case.name}: {traffic}\n{aligned([_HEADINGS, *(_cells(row) for row in rows)])}"


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lines of as many cells each, the first and last column to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = []
    for first, *numbers, last in lines:
        middle = "  ".join(c.rjust(w) for c, w in zip(numbers, widths[1:-1], strict=True))
        texts.append(f"{first.ljust(widths[0])}  {middle}  {last}".rstrip())
    return "\n".join(texts)


def _cells(row: Row) -> tuple[str, ...]:
    errors = row.errors or {}
    about = row.status if row.seconds is None else row.plan or row.configuration
    resident = row.peak.resident if row.peak is not None else None
    return (
        row.provider,
        f"{row.seconds.median * 1e3:.2f}" if row.seconds else "-",
        f"{row.ratio.median:.3f}" if row.ratio else "-",
        f"{row.ratio.low:.2f}..{row.ratio.high:.2f}" if row.ratio else "-",
        f"{row.tflops:.3f}" if row.tflops else "-",
        f"{row.peak.allocated / 2**20:.1f}" if row.peak else "-",
        f"{resident / 2**20:.1f}" if resident is not None else "-",
        f"{errors['dhidden']:.1e}" if row.seconds and "dhidden" in errors else "-",
        f"{errors['dweight']:.1e}" if row.seconds and "dweight" in errors else "-",
        _multiple(row, row.errors_over_eager),
        _multiple(row, row.errors_over_gemm),
        f"{about}; {row.note}" if row.note else about,
    )


def _multiple(row: Row, multiples: Errors | None) -> str:
    """The worse gradient's."""
    known = [m for name, m in (multiples or {}).items() if name in ("dhidden", "dweight")]
    return f"{max(known):.2f}" if row.seconds and known else "-"
