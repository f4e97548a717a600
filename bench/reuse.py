"""`python -m rollfuse.bench reuse`: GRPO with and without reuse of earlier rollouts, side by side.

The demo's task with few problems, so that they come again: the same warm start, problems, seeds and
hyper-parameters for every kind of `--reuse`, and the kinds in turn for every seed. Steps are timed
as the runs themselves record them: generation, grading and update, without measuring.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shlex
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from rollfuse import loop
from rollfuse.bench import measure
from rollfuse.bench.report import aligned, heading
from rollfuse.config import REUSES, Config
from rollfuse.run import read_records

Records = list[dict[str, Any]]


def run(config: Config, folder: Path) -> Records:
    """Train, and what the run recorded of its steps."""
    with contextlib.redirect_stdout(io.StringIO()):
        loop.train(config, folder)
    return read_records(folder / "metrics.jsonl")


def facts_of(records: Records, per_epoch: int) -> dict[str, float]:
    """One run in numbers. What reuse can do anything about begins with the second epoch."""
    steps = [record for record in records if "seconds" in record]
    accuracy = [r["heldout_accuracy"] for r in records if "heldout_accuracy" in r]
    last, later = steps[-per_epoch:], steps[per_epoch:]
    drawn = [step["drawn_tokens" if "drawn_tokens" in step else "tokens"] for step in steps]
    found = {
        "seconds of steps": sum(step["seconds"] for step in steps),
        "seconds of generation": sum(step["generation_seconds"] for step in steps),
        "tokens": sum(step["tokens"] for step in steps),
        "tokens drawn": sum(drawn),
        "tokens drawn after the first epoch": sum(drawn[per_epoch:]),
        "reward of the last epoch": statistics.mean(step["reward"] for step in last),
        "held-out before": accuracy[0],
        "held-out after": accuracy[-1],
    }
    for name in (
        "accepted_run", "run_least", "run_most", "match_rate", "match_least", "match_most",
        "total_variation",
    ):  # fmt: skip
        values = [step[name] for step in later if name in step]
        if values:
            found[name] = statistics.mean(values)
    return found


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Medians over the seeds, by kind; and of the ratios to the plain run of the same seed."""
    found: dict[str, dict[str, float]] = {}
    plain = {r["seed"]: r["facts"] for r in runs if r["reuse"] == "none"}
    for kind in dict.fromkeys(r["reuse"] for r in runs):
        mine = [r for r in runs if r["reuse"] == kind]
        names = mine[0]["facts"]
        found[kind] = {n: statistics.median(r["facts"][n] for r in mine) for n in names}
        for name in ("seconds of steps", "seconds of generation", "tokens drawn"):
            ratios = [r["facts"][name] / plain[r["seed"]][name] for r in mine if plain]
            if ratios:
                found[kind][f"{name}, x none"] = statistics.median(ratios)
    return found


def table(result: dict[str, Any]) -> str:
    """A stored result as text, a column for each kind."""
    found = result["summary"]
    kinds = list(found)
    names = dict.fromkeys(name for kind in kinds for name in found[kind])
    rows = [["", *kinds, ""]]
    for name in names:
        cells = [f"{found[kind][name]:.4g}" if name in found[kind] else "-" for kind in kinds]
        rows.append([name, *cells, ""])
    return f"median of {len(result['seeds'])} seeds\n{aligned(rows)}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rollfuse.bench reuse", description=__doc__)
    add = parser.add_argument
    add("--kinds", nargs="+", default=list(REUSES), choices=REUSES)
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--epochs", type=int, default=5)
    add("--problems", type=int, default=1024, help="to train on (1024)")
    add("--lr", type=float, help="learning rate (the demo's)")
    add("--json", type=Path, help="write the runs here")
    return parser


def config_of(options: argparse.Namespace, kind: str, seed: int) -> Config:
    known = Config()
    per_epoch = options.problems // known.prompts_per_step
    return Config(
        seed=seed,
        problems=options.problems,
        steps=options.epochs * per_epoch,
        reuse=kind,
        lr=options.lr,
        reference=False,
        eval_every=options.epochs * per_epoch,
        checkpoint_every=options.epochs * per_epoch,
        device="cpu",
    )


def main(argv: list[str]) -> int:
    """Run the comparison; returns 0."""
    parser = _parser()
    options = parser.parse_args(argv)
    size = Config().prompts_per_step
    if options.epochs < 1 or options.problems < size or options.problems % size:
        parser.error(f"--epochs: need at least 1; --problems: need a multiple of {size}")
    command = f"python -m rollfuse.bench reuse {shlex.join(argv)}".strip()
    torch.set_num_threads(1)
    facts = measure.provenance(command, torch.device("cpu"))
    print(heading(facts), flush=True)
    per_epoch = options.problems // size
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for turn, seed in enumerate(options.seeds):
            first = turn % len(options.kinds)  # what drifts on the machine favours none
            for kind in options.kinds[first:] + options.kinds[:first]:
                config = config_of(options, kind, seed)
                records = run(config, Path(folder) / f"{kind}-{seed}")
                steps = [record for record in records if "seconds" in record]
                runs.append(
                    {
                        "reuse": kind,
                        "seed": seed,
                        "facts": facts_of(records, per_epoch),
                        "rewards": [step["reward"] for step in steps],
                        "seconds": [step["seconds"] for step in steps],
                    }
                )
                print(f"seed {seed} {kind}: {runs[-1]['facts']}", flush=True)
    order = {kind: i for i, kind in enumerate(options.kinds)}
    runs.sort(key=lambda one: (order[one["reuse"]], one["seed"]))
    result = {
        **facts,
        "config": asdict(config_of(options, "none", 0)),
        "seeds": options.seeds,
        "summary": summary(runs),
        "runs": runs,
    }
    print(table(result))
    if options.json is not None:
        measure.write_json(options.json, result)
    return 0
