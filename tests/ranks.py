"""Functions run on several gloo processes, and what each of them returned."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from quick_interpreter import quicken


def on_ranks(function: Callable[..., Any], n_ranks: int, folder: Path, *args: Any) -> list[Any]:
    """`function(*args)` on each of `n_ranks` processes, what they returned in their order."""
    mp.spawn(_rank, (n_ranks, str(folder), function, args), nprocs=n_ranks)
    return [torch.load(folder / f"{rank}.pt") for rank in range(n_ranks)]


def _rank(
    rank: int, n_ranks: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    quicken()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=n_ranks,
        timeout=timedelta(seconds=60),
    )
    torch.save(function(*args), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    # Without the interpreter's teardown, in which a thread of gloo's may still run and abort.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
