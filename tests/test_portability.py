"""The portability check must pass what is good and fail each kind of thing that is not."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rollfuse.bench import portability

ROOT = Path(__file__).resolve().parent.parent
KERNELS = sorted((ROOT / "kernels" / "_triton").glob("*.py"))
PLANTED = "portability_cases"

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
    pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="the interpreter is on"),
]


# A warp has 32 lanes on NVIDIA and 64 on AMD, so the tile that spills is not the same.
FAULTS = {
    ("double", "sm_90"): "",
    ("double", "gfx942"): "",
    ("ieee", "sm_90"): "",
    ("ieee", "gfx942"): "",
    ("does_not_compile", "sm_90"): "CompilationError",
    ("does_not_compile", "gfx942"): "CompilationError",
    ("spills_32_lanes", "sm_90"): "vector-register spills",
    ("spills_128_lanes", "gfx942"): "vector-register spills",
    ("shared", "sm_90"): "shared memory: need at most",
    ("shared", "gfx942"): "shared memory: need at most",
    ("tf32", "sm_90"): "TF32",
    ("tf32", "gfx942"): "TF32",
}


def test_each_planted_fault_is_found():
    planned = portability.plan([PLANTED], everything=False)
    tasks = [task for task in planned if (task.case, task.target) in FAULTS]
    assert len(tasks) == len(FAULTS)
    for row in portability.compile_all(tasks, jobs=1):
        found, fault = "; ".join(row.problems), FAULTS[row.task.case, row.task.target]
        assert fault in found, row
        assert bool(found) == bool(fault), row


def test_default_plan_takes_covering_cases_and_all_takes_more():
    covering = portability.plan([PLANTED], everything=False)
    everything = portability.plan([PLANTED], everything=True)
    assert set(covering) < set(everything)
    assert {task.target for task in covering} == {
        *("sm_80", "sm_90", "sm_100"),
        *("gfx90a", "gfx942", "gfx950"),
    }
    assert {task.pointers for task in everything} == {"small", "aligned", "unaligned"}
    assert 1 in {task.number for task in everything} - {task.number for task in covering}


def planted(folder: Path, *names: str) -> str:
    """Write a module with only the named planted cases; returns the module's name."""
    (folder / "chosen.py").write_text(
        f"import {PLANTED}\n\n"
        "def compile_cases():\n"
        f"    return [c for c in {PLANTED}.compile_cases() if c.covering and c.name in {names}]\n"
    )
    return "chosen"


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = ["src", "tests", str(folder)]
    return subprocess.run(
        [sys.executable, "-m", "rollfuse.bench", "portability", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_command_leaves_the_interpreter_and_writes_json(tmp_path: Path):
    table = tmp_path / "table.json"
    good = planted(tmp_path, "double")
    done = run(tmp_path, "--module", good, "--json", str(table), ROLLFUSE_BACKEND="interpret")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 compilations, 0 failed" in done.stdout
    report = json.loads(table.read_text())
    assert len(report["rows"]) == 6
    assert all(row["registers"] > 0 and row["problems"] == [] for row in report["rows"])


def test_command_fails_when_one_kernel_does(tmp_path: Path):
    done = run(tmp_path, "--module", planted(tmp_path, "double", "does_not_compile"))
    assert done.returncode == 1
    assert "12 compilations, 6 failed" in done.stdout


def test_command_fails_without_a_configuration(tmp_path: Path):
    done = run(tmp_path, "--module", planted(tmp_path))
    assert done.returncode == 1
    assert "needs at least one launch configuration" in done.stderr


def launched_kernels(path: Path) -> set[str]:
    """Names of jit functions that are called as `name[grid](...)`."""
    tree = ast.parse(path.read_text())
    jitted = {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    }
    return {
        call.func.value.id
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Subscript)
        and isinstance(call.func.value, ast.Name)
        and call.func.value.id in jitted
    }


@pytest.mark.parametrize(
    "path", [path for path in KERNELS if launched_kernels(path)], ids=lambda path: path.stem
)
def test_every_launched_kernel_has_a_covering_case(path: Path):
    launched = launched_kernels(path)
    module = importlib.import_module(f"rollfuse.kernels._triton.{path.stem}")
    covered = {case.kernel.__name__ for case in module.compile_cases() if case.covering}
    assert launched <= covered
