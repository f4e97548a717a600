"""`python -m rollfuse.bench table FILE...`: the tables of stored results, and their plot.

A full grid takes hours, so it is measured in several runs. Each is shown under its own heading:
ratios are to the floor of the same run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rollfuse.bench import logits, plots, report, reuse, sampling, tree
from rollfuse.bench.report import Row


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m rollfuse.bench table", description=__doc__)
    parser.add_argument(
        "files", type=Path, nargs="+", metavar="FILE", help="JSON of any but demo and loop"
    )
    parser.add_argument("--plot", type=Path, help="draw the rows of all files here (PNG)")
    options = parser.parse_args(argv)
    drawn: list[dict[str, Any]] = []
    for path in options.files:
        try:
            result = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            parser.error(f"{path}: need a result of a measurement, got {error}")
        # What tells a result apart, and who shows it.
        shown = {
            "logits": logits.tables, "tree": tree.table, "seeds": reuse.table,
            "cases": sampling.table,
        }  # fmt: skip
        kind = next((kind for kind in shown if kind in result), None)
        if kind is not None:
            print(f"{report.heading(result)}\n{shown[kind](result)}\n")
            continue
        if "rows" not in result:
            parser.error(f"{path}: need a result with rows, got keys {', '.join(result)}")
        print(f"{report.heading(result)}\n{tables(result['rows'])}\n")
        drawn += result["rows"]
    if options.plot is not None:
        plots.draw_head(drawn, options.plot)
    return 0


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """The tables of rows as `Row.as_dict` gives them, case by case."""
    known = [Row.from_dict(row) for row in rows]
    cases = groupby(known, key=lambda row: row.case)
    return "\n".join(report.table(case, list(group)) for case, group in cases)
