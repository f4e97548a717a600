"""`python -m rollfuse.bench tree CASE`: the tree cache against those who keep every text apart.

Timed are medians of interleaved repeats, paired for ratios, and only of results that passed their
check. `bytes` is counted.
"""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

from rollfuse.bench import (
    entrant,
    measure,
    report,
    tree_attention,
    tree_bytes,
    tree_engine,
    tree_fork,
    tree_reuse,
)

CASES = {
    "attention": tree_attention,
    "fork": tree_fork,
    "engine": tree_engine,
    "reuse": tree_reuse,
    "bytes": tree_bytes,
}


def table(result: dict[str, Any]) -> str:
    """The tables of a stored result."""
    text: str = CASES[result["tree"]].table(result)
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rollfuse.bench tree", description=__doc__)
    cases = parser.add_subparsers(dest="tree", required=True, metavar="CASE")
    for name, case in CASES.items():
        about = (case.__doc__ or "").strip()
        one = cases.add_parser(name, help=about.splitlines()[0], description=about)
        case.add_flags(one)
        one.add_argument("--repeats", type=int, default=9, help="interleaved (a figure needs 9)")
        one.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
        one.add_argument("--json", type=Path, help="write the result here")
    return parser


def main(argv: list[str]) -> int:
    """Run one case; 1 if our own result failed its check, else 0."""
    parser = _parser()
    options = parser.parse_args(argv)
    for name, value in vars(options).items():
        numbers = value if isinstance(value, list) else [value]
        if any(type(number) is int and number < 1 for number in numbers):
            parser.error(f"--{name.replace('_', '-')}: need at least 1, got {value}")
    device, facts = report.begin(f"tree {shlex.join(argv)}", options.threads)
    found = CASES[options.tree].run(options, device)
    result = {**facts, "tree": options.tree, "repeats": options.repeats, **found}
    if options.json is not None:
        measure.write_json(options.json, result)
    # As it is read back: one table for what is stored and what is new.
    print(table(json.loads(json.dumps(result, default=measure.plain))))
    return 1 if options.tree != "bytes" and entrant.is_wrong(result["rows"]) else 0
