"""The interpreted run of the kernels' tests must notice a wrong constant in any of them.

A copy of the tree is spoilt at one `tl.store` of one kernel: floats are stored 3 % too small,
integers one too small. The tests of that kernel, run on the copy in Triton's interpreter, must
fail, and by a comparison rather than a crash.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "kernels" / "_triton"
# The tests that compare each module's kernels with PyTorch.
COMPARISONS = {
    "gradient": "test_gradient.py",
    "sampling": "test_sampling.py",
    "statistics": "test_statistics.py",
    "tree_attention": "test_tree_attention.py",
    "tree_write": "test_tree_attention.py",
    "truncation": "test_truncation.py",
}
SPOIL = """

@triton.jit
def spoil(value):
    if value.dtype.is_floating():
        return value * 0.97
    else:
        return tl.where(value > 0, value - 1, value)
"""

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton for its interpreter"
)


def stores(source: str) -> list[ast.Call]:
    """The calls of tl.store in order; the second argument is what is stored."""
    calls = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.store"
    ]
    return sorted(calls, key=lambda call: call.lineno)


def spoilt(source: str, number: int) -> str:
    """`source` with the value of its store `number` wrapped in `spoil`."""
    value = stores(source)[number].args[1]
    assert value.end_lineno == value.lineno
    lines = source.splitlines(keepends=True)
    line = lines[value.lineno - 1].encode()  # ast counts bytes
    start, end = value.col_offset, value.end_col_offset
    new = line[:start] + b"spoil(" + line[start:end] + b")" + line[end:]
    lines[value.lineno - 1] = new.decode()
    return "".join(lines) + SPOIL


def copy_of_tree(folder: Path) -> Path:
    for name in ("kernels", "losses", "rollout", "bench", "src", "tests"):
        shutil.copytree(
            ROOT / name,
            folder / name,
            symlinks=True,
            ignore=shutil.ignore_patterns("__pycache__", "results", "*.egg-info"),
        )
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def interpreted_tests(tree: Path, file: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, f"tests/{file}"],
        cwd=tree,
        env={**os.environ, "ROLLFUSE_BACKEND": "interpret"},
        capture_output=True,
        text=True,
    )


def test_every_module_with_a_kernel_is_compared():
    with_stores = {path.stem for path in KERNELS.glob("*.py") if stores(path.read_text())}
    assert with_stores == set(COMPARISONS)


@pytest.mark.parametrize(
    ("module", "number"),
    [
        (module, number)
        for module in COMPARISONS
        for number in range(len(stores((KERNELS / f"{module}.py").read_text())))
    ],
)
def test_a_spoilt_store_is_noticed(module: str, number: int, tmp_path: Path):
    source = (KERNELS / f"{module}.py").read_text()
    tree = copy_of_tree(tmp_path / "tree")
    (tree / "kernels" / "_triton" / f"{module}.py").write_text(spoilt(source, number))
    done = interpreted_tests(tree, COMPARISONS[module])
    where = f"{module}: {ast.unparse(stores(source)[number])}"
    assert done.returncode == 1, f"{where} was spoilt and nobody noticed:\n{done.stdout}"
    noticed = re.search(r"^E +(AssertionError|assert )", done.stdout, re.MULTILINE)
    assert noticed, f"{where} was spoilt, and no comparison failed:\n{done.stdout}"
