"""Code run by two processes that train together on this machine's CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# What is judged is what the ranks saved. Now and then the interpreter's teardown meets a thread of
# gloo's that still runs and aborts the process ("terminate called without an active exception"),
# so that the ranks part in order and then leave without one.
LEAVE = """
import os, sys
import torch.distributed as dist
if dist.is_initialized():
    dist.barrier()
    dist.destroy_process_group()
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
"""


def run_two_ranks(code: str, folder: Path) -> None:
    """Run `code` with RANK and WORLD_SIZE set and `folder` as sys.argv[1]; both must succeed."""
    script = folder / "rank.py"
    script.write_text("import torch\ntorch.set_num_threads(1)\n" + code + LEAVE)
    path = os.pathsep.join(str(ROOT / name) for name in ("src", "examples", "tests"))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launcher, str(script), str(folder)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CI": "true"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
