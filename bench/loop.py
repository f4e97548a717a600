"""`python -m rollfuse.bench loop`: our GRPO loop against TRL's GRPOTrainer, side by side.

Two-digit arithmetic, character tokens, a Qwen3 of a million parameters, one thread. Both start from
the same warm start, see the same problems in the same order and are graded by the same function;
held-out accuracy is measured by the same greedy decoding, off the clock.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import shlex
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from rollfuse.bench import measure, our_loop, plots
from rollfuse.bench.race import Race, Run, exact_match, need_same_race
from rollfuse.loop import draw_problems
from rollfuse.policy import SmallModel, WarmStart, load_policy, small_policy, warm_start
from rollfuse.rollout.tasks import Task, arithmetic_task

# About a million parameters.
SHAPE = SmallModel(layers=4, hidden=128, intermediate=512, heads=4, kv_heads=2)
# About a third of the held-out problems right: there are groups to learn from and much to learn.
WARM_START = WarmStart(problems=8000, steps=450, batch_size=64, lr=1e-3)


def make_warm_start(task: Task, folder: Path, plan: WarmStart, *, seed: int) -> None:
    """Save the policy that both trainers start from."""
    policy = small_policy(task, SHAPE, seed=seed)
    warm_start(policy, task, plan, seed=seed)
    policy.save(folder)


def run_ours(race: Race) -> Run:
    tokenizer = load_policy(race.model).tokenizer
    return our_loop.train(race, lambda model: _accuracy(model, tokenizer, race.task))


def run_trl(race: Race) -> Run:
    from rollfuse.bench import trl_loop

    policy = load_policy(race.model)
    config = our_loop.config_of(race)
    batches = [
        draw_problems(race.task.train, step * race.prompts, config) for step in range(race.steps)
    ]
    return trl_loop.train(
        policy.model,
        policy.tokenizer,
        batches,
        race,
        lambda model: _accuracy(model, policy.tokenizer, race.task),
    )


def _accuracy(model: Any, tokenizer: Any, task: Task) -> float:
    return exact_match(model, tokenizer, task, task.heldout)


def summary(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """Medians over the seeds, by trainer: completions per CPU second, shares, accuracies."""
    found: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(run.name for run in runs):
        mine = [run for run in runs if run.name == name]
        rates = [run.completions / run.clock.total for run in mine]
        found[name] = {"completions per CPU second": statistics.median(rates)}
        for phase in mine[0].clock.split():
            shares = [1e3 * run.clock.split()[phase] / run.completions for run in mine]
            found[name][f"{phase}, CPU ms a completion"] = statistics.median(shares)
        flat = [run.flat_groups / run.groups for run in mine]
        found[name]["groups without spread"] = statistics.median(flat)
        for label, index in (("accuracy before", 0), ("accuracy after", -1)):
            found[name][label] = statistics.median(run.points[index]["accuracy"] for run in mine)
        found[name]["CPU seconds"] = statistics.median(run.clock.total for run in mine)
    return found


def table(found: dict[str, dict[str, float]]) -> str:
    """The summary as aligned text, a column for each trainer, and the ratio of the rates."""
    names = list(found)
    rows = [["", *names]]
    rows += [[label, *(f"{found[n][label]:.3f}" for n in names)] for label in found[names[0]]]
    width = max(len(row[0]) for row in rows)
    lines = [row[0].ljust(width) + "".join(cell.rjust(12) for cell in row[1:]) for row in rows]
    if len(names) == 2:
        ours, theirs = (found[n]["completions per CPU second"] for n in names)
        lines.append(f"{names[0]} makes {ours / theirs:.2f} x the completions of {names[1]}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rollfuse.bench loop", description=__doc__)
    add = parser.add_argument
    add("--steps", type=int, default=100, help="optimiser steps of each run (100)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="a run of both for each (0 1 2)")
    add("--lr", type=float, default=3e-4, help="learning rate (3e-4)")
    add("--measure-every", type=int, default=10, help="steps between accuracies (10)")
    add("--warm-steps", type=int, default=WARM_START.steps, help="supervised steps (450)")
    add("--ours-only", action="store_true", help="leave TRL out")
    add("--json", type=Path, help="write the runs here")
    add("--plot", type=Path, help="draw accuracy over CPU seconds here (PNG)")
    return parser


def main(argv: list[str]) -> int:
    """Run the comparison; 2 if what it needs is not installed."""
    parser = _parser()
    options = parser.parse_args(argv)
    if min(options.steps, options.measure_every) < 1:
        parser.error("--steps and --measure-every: need at least 1")
    if options.plot is not None and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot: need matplotlib, from the extra rollfuse[bench]")
    missing = [name for name in ("trl", "datasets") if importlib.util.find_spec(name) is None]
    if missing and not options.ours_only:
        names = ", ".join(missing)
        print(f"bench loop needs {names}: rollfuse[rivals]; or say --ours-only", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    importlib.import_module("transformers.utils.logging").disable_progress_bar()
    facts = measure.provenance(
        f"python -m rollfuse.bench loop {shlex.join(argv)}".strip(), torch.device("cpu")
    )
    task = arithmetic_task()
    runs: list[Run] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seeds:
            model = Path(folder) / f"warm-{seed}"
            make_warm_start(task, model, replace(WARM_START, steps=options.warm_steps), seed=seed)
            race = Race(
                task, model, options.steps, learning_rate=options.lr, seed=seed,
                measure_every=options.measure_every,
            )  # fmt: skip
            entrants = [run_ours] if options.ours_only else [run_ours, run_trl]
            # Who starts alternates: what drifts on the machine favours neither.
            of_seed = []
            for entrant in entrants if seed % 2 == 0 else reversed(entrants):
                of_seed.append(entrant(race))
                print(f"seed {seed}\n{table(summary(of_seed[-1:]))}\n", flush=True)
            need_same_race(of_seed[0], of_seed[-1])
            runs += of_seed
            if options.json is not None:
                record = [run.as_dict() for run in runs]
                result = {
                    **facts,
                    "race": _described(race, options.warm_steps),
                    "summary": summary(runs),
                }
                measure.write_json(options.json, {**result, "runs": record})
    runs.sort(key=lambda run: run.name)
    print(table(summary(runs)))
    if options.plot is not None:
        lines = {f"{run.name}, seed {run.seed}": run.points for run in runs}
        plots.draw_loop(lines, options.plot)
    return 0


def _described(race: Race, warm_steps: int) -> dict[str, object]:
    """The setup for the record; the warm start's temporary folder says nothing."""
    config = asdict(our_loop.config_of(replace(race, model=Path("warm-start"))))
    # With a model these mean nothing: it has the shape and the warm start below.
    ignored = {*asdict(SHAPE), *(name for name in config if name.startswith("warm_"))}
    used = {name: value for name, value in config.items() if name not in ignored}
    return {
        "task": race.task.name,
        "config": used,
        "model": asdict(SHAPE),
        "warm_start": asdict(replace(WARM_START, steps=warm_steps)),
    }
