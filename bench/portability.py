"""Compile every Triton kernel for GPUs that are not here, and fail on what would not run well.

    python -m rollfuse.bench portability [--all] [--json PATH]

Prints registers, spills and shared memory per kernel, launch configuration and target. The exit
status is 1 on a compile error, a vector register spilled to memory, local memory, more shared
memory than the target has, or a matrix instruction that rounds float32 operands to TF32. AMD's
scalar registers spill to lanes of vector registers, which is cheap: reported, not failed.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import multiprocessing
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from rollfuse.bench.measure import provenance, write_json

if TYPE_CHECKING:
    from rollfuse.kernels._triton.compile import CompileCase, Pointers, Resources, Target


class Task(NamedTuple):
    """One compilation, in names that travel to another process."""

    module: str
    number: int  # in the module's compile_cases()
    case: str
    target: str
    pointers: Pointers


class Row(NamedTuple):
    """What came of a task: what the program takes, and what is wrong with that."""

    task: Task
    resources: Resources | None  # None: it did not compile
    problems: tuple[str, ...]


def main(argv: list[str]) -> int:
    """Run the check with command-line arguments `argv`; returns the exit status."""
    options = _parser().parse_args(argv)
    if importlib.util.find_spec("triton") is None:
        raise SystemExit("the portability check needs triton; it is not installed")
    if _interpreter_is_on():
        return _relaunch(argv)
    tasks = plan(options.module, everything=options.all)
    if not tasks:
        raise SystemExit("the portability check needs at least one launch configuration; got none")
    width = max(len(task.case) for task in tasks)
    rows = list(_print_rows(compile_all(tasks, options.jobs), width))
    failed = [row for row in rows if row.problems]
    print(f"{len(rows)} compilations, {len(failed)} failed")
    if options.json is not None:
        facts = provenance(_command(argv), torch.device("cpu"))
        write_json(options.json, {**facts, "rows": [_cells(row) for row in rows]})
    return 1 if failed else 0


def plan(modules: list[str] | None, *, everything: bool) -> list[Task]:
    """The compilations to make: each launch configuration on each target.

    Args:
        modules: names of modules with a `compile_cases()`; None takes every kernel of rollfuse.
        everything: take all configurations and all that can be known of the pointers at launch,
            not a set that covers each kernel, dtype and block size once.
    """
    from rollfuse.kernels._triton.compile import TARGETS, kernel_modules

    tasks = []
    for module in modules or kernel_modules():
        for number, case in enumerate(importlib.import_module(module).compile_cases()):
            if everything or case.covering:
                tasks += [
                    Task(module, number, case.name, target.name, pointers)
                    for target in TARGETS
                    if case.backend in (None, target.backend)
                    for pointers in _pointers(target, everything)
                ]
    return tasks


def compile_all(tasks: list[Task], jobs: int) -> Iterator[Row]:
    """Compile in `jobs` processes with an empty cache; yields rows in the order of the tasks."""
    with tempfile.TemporaryDirectory() as cache:
        pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _use_cache, (cache,))
        with pool:
            futures = [pool.submit(_compile, task) for task in tasks]
            for task, future in zip(tasks, futures, strict=True):
                error = future.exception()
                if error is not None:
                    yield Row(task, None, (f"{type(error).__name__}: {error}",))
                else:
                    yield Row(task, *future.result())


def problems_of(resources: Resources, target: Target) -> tuple[str, ...]:
    """What makes these resources a failure on this target; empty when nothing does."""
    problems = []
    if resources.spills > 0:
        problems.append(f"vector-register spills: {resources.spills}")
    if resources.local_bytes > 0:
        problems.append(f"local memory: {resources.local_bytes} bytes a lane")
    if resources.shared_bytes > target.shared_limit:
        problems.append(
            f"shared memory: need at most {target.shared_limit} bytes, got {resources.shared_bytes}"
        )
    if resources.tf32_dots > 0:
        problems.append(f"TF32 matrix instructions: {resources.tf32_dots}")
    return tuple(problems)


def _compile(task: Task) -> tuple[Resources, tuple[str, ...]]:
    from rollfuse.kernels._triton.compile import TARGETS, compile_case

    target = next(target for target in TARGETS if target.name == task.target)
    case: CompileCase = importlib.import_module(task.module).compile_cases()[task.number]
    resources = compile_case(case, target, task.pointers)
    return resources, problems_of(resources, target)


def _use_cache(folder: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = folder


def _pointers(target: Target, everything: bool) -> tuple[Pointers, ...]:
    # A torch allocation is aligned, and on AMD nearly always under the 2 GiB that matter there.
    if target.backend == "cuda":
        return ("aligned", "unaligned") if everything else ("aligned",)
    return ("small", "aligned", "unaligned") if everything else ("small",)


def _interpreter_is_on() -> bool:
    return "TRITON_INTERPRET" in os.environ or os.environ.get("ROLLFUSE_BACKEND") == "interpret"


def _relaunch(argv: list[str]) -> int:
    """Start over in a process where Triton's interpreter is off: it cannot be left once entered."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("TRITON_INTERPRET", "ROLLFUSE_BACKEND")
    }
    command = [sys.executable, "-m", "rollfuse.bench", "portability", *argv]
    return subprocess.run(command, env=environment).returncode


HEADINGS = ("vregs", "sregs", "spills", "local B", "sspills", "shared B")


def _print_rows(rows: Iterator[Row], width: int) -> Iterator[Row]:
    line = f"{{:{width}}} {{:7}} {{:9}}" + " {:>8}" * len(HEADINGS) + "  {}"
    print(line.format("kernel", "target", "pointers", *HEADINGS, "verdict"))
    for row in rows:
        none = ("-",) * len(HEADINGS)
        numbers = none if row.resources is None else row.resources[: len(HEADINGS)]
        names = (row.task.case, row.task.target, row.task.pointers)
        print(line.format(*names, *numbers, "; ".join(row.problems) or "ok"), flush=True)
        yield row


def _command(argv: list[str]) -> str:
    return shlex.join(["python", "-m", "rollfuse.bench", "portability", *argv])


def _cells(row: Row) -> dict[str, object]:
    resources = {} if row.resources is None else row.resources._asdict()
    return {**row.task._asdict(), **resources, "problems": row.problems}


def _module(name: str) -> str:
    """The whole name of a module of kernels, from its own or its whole one."""
    from rollfuse.kernels._triton.compile import kernel_modules

    known = {module.rpartition(".")[2]: module for module in kernel_modules()}
    if name in known or importlib.util.find_spec(name) is not None:
        return known.get(name, name)
    raise argparse.ArgumentTypeError(f"need one of {', '.join(known)}, got {name!r}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m rollfuse.bench portability",
        description="Compile every Triton kernel for GPUs that are not here.",
    )
    parser.add_argument("--all", action="store_true", help="all launch configurations")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the table as JSON")
    parser.add_argument(
        "--module",
        action="append",
        metavar="NAME",
        type=_module,
        help="only the kernels of this module, such as `sampling`",
    )
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes (2)")
    return parser
