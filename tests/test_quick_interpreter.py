"""The interpreter of the tests computes what Triton's own does, and saves what it is there for."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Several rows of several blocks under cuts and two streams: loops, functions in functions, words
# that overflow. Prints the bits, and how often the language was patched for 2 rows and for 5.
CODE = """
import sys
import torch
from rollfuse import NoiseFamily, Sampling, new_streams, sample_tokens
import quick_interpreter
from triton.runtime import interpreter

patch, n_patches = interpreter._patch_lang, 0

def counted(fn):
    global n_patches
    n_patches += 1
    return patch(fn)

interpreter._patch_lang = counted
if sys.argv[1] == "quick":
    quick_interpreter.quicken()
for n_rows in (2, 5):
    n_patches = 0
    for family in NoiseFamily:
        logits = torch.randn(n_rows, 2500, generator=torch.Generator().manual_seed(3))
        streams = new_streams(1, 2 * n_rows).view(n_rows, 2)
        sampling = Sampling(0.8, top_k=40, top_p=0.9, min_p=0.01, noise=family)
        drawn = sample_tokens(logits, streams, torch.arange(n_rows), sampling)
        for values in drawn:
            print(values.dtype, values.tolist())
    print(n_patches, file=sys.stderr)
"""


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton for its interpreter"
)
def test_the_same_bits_with_as_many_patches_however_many_rows():
    def run(kind: str) -> tuple[str, list[int]]:
        path = os.pathsep.join(str(ROOT / name) for name in ("src", "tests"))
        done = subprocess.run(
            [sys.executable, "-c", CODE, kind],
            env={**os.environ, "PYTHONPATH": path, "ROLLFUSE_BACKEND": "interpret"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout, [int(line) for line in done.stderr.split()[-2:]]

    (own, (two, five)), (quick, (quick_two, quick_five)) = run("own"), run("quick")
    assert quick == own and "nan" not in own
    assert quick_two == quick_five < two < five
