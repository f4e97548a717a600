"""`python -m rollfuse.bench demo`: does the demo learn, how fast, and do its controls not?

The demo is run for several seeds, and with the first of them once at learning rate 0 and once with
advantages in random order: neither can learn anything, so held-out accuracy must stay under 0.5.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rollfuse.bench import measure
from rollfuse.config import Config

GOAL = 0.9  # held-out exact match


class Run(NamedTuple):
    """One training from the warm start to its last step."""

    name: str
    seconds: float  # warm start, steps, measurements, checkpoints and report
    accuracy: list[tuple[int, float]]  # (step, held-out exact match)
    seconds_to_goal: float | None  # of the steps until GOAL was first seen; None: never

    @property
    def first(self) -> float:
        return self.accuracy[0][1]

    @property
    def last(self) -> float:
        return self.accuracy[-1][1]


def run_demo(name: str, config: Config) -> Run:
    """Train in a directory that is thrown away."""
    from rollfuse.loop import train
    from rollfuse.run import read_records

    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        path = train(config, Path(folder) / "run")
        seconds = time.perf_counter() - started
        records = read_records(path / "metrics.jsonl")
    accuracy = [
        (int(r["step"]), float(r["heldout_accuracy"])) for r in records if "heldout_accuracy" in r
    ]
    reached = next((step for step, value in accuracy if value >= GOAL), None)
    to_goal = None
    if reached is not None:
        to_goal = sum(r["seconds"] for r in records if "seconds" in r and r["step"] <= reached)
    return Run(name, seconds, accuracy, to_goal)


def table(runs: Sequence[Run]) -> str:
    lines = [f"{'run':<22} {'before':>7} {'after':>7} {'seconds':>8}  seconds in steps to {GOAL}"]
    for run in runs:
        goal = "never" if run.seconds_to_goal is None else f"{run.seconds_to_goal:.0f}"
        lines.append(
            f"{run.name:<22} {run.first:>7.3f} {run.last:>7.3f} {run.seconds:>8.0f}  {goal}"
        )
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """1 if the median seed misses the goal or a control reaches 0.5, else 0."""
    parser = argparse.ArgumentParser(prog="python -m rollfuse.bench demo", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=Config().steps, help="GRPO steps of each run")
    parser.add_argument("--json", type=Path, help="write the runs here")
    options = parser.parse_args(argv)
    if options.steps < 1:
        parser.error(f"--steps: need at least 1, got {options.steps}")
    command = f"python -m rollfuse.bench demo {shlex.join(argv)}".strip()
    facts = measure.provenance(command, torch.device("cpu"))
    wanted: dict[str, dict[str, Any]] = {f"seed {seed}": {"seed": seed} for seed in options.seeds}
    wanted["learning rate 0"] = {"seed": options.seeds[0], "lr": 0.0}
    wanted["shuffled advantages"] = {"seed": options.seeds[0], "shuffle_advantages": True}
    runs = []
    for name, changes in wanted.items():
        runs.append(run_demo(name, Config(steps=options.steps, **changes)))
        if options.json is not None:
            measure.write_json(options.json, {**facts, "runs": [run._asdict() for run in runs]})
    print(table(runs))
    seeds, controls = runs[: len(options.seeds)], runs[len(options.seeds) :]
    learns = statistics.median(run.last for run in seeds) >= GOAL
    return 0 if learns and all(run.last < 0.5 for run in controls) else 1
