"""Counted, not timed: what one decoding step reads of keys and values, over what the tree holds.

Read are the keys and values of the plan's items and the partial results, in float32 with the
logarithms of their normalisers; these are written, too. A row of a single item has none. "Long"
trees have nodes of at least 8 packed rows only: 8 * (rows below) * Hq / H keys. Of the others the
CPU's plan reads nodes of up to 32 keys again: that costs it less than another call.

Legend: Hq and H heads, D width.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np
import torch

from rollfuse.bench import report
from rollfuse.rollout.branch import Branch
from rollfuse.rollout.tree_cache import TreeCache

LONG = 8  # packed rows
# Forks of every branch at each level: a group, a tree of two forks a level, a wide root, a chain.
SHAPES = ((16,), (64,), (256,), (2, 2, 2, 2), (4, 4, 4), (8, 8), (32, 2), (2, 32), (1, 16))
LENGTHS = (0.25, 1.0, 1.25, 4.0, 32.0)  # of a node, in LONG packed rows
GROUPS = (1, 4, 8)  # Hq / H
DTYPES = (torch.float32, torch.bfloat16)
LIMIT = 1.25


@dataclass(frozen=True, slots=True)
class Count:
    """One tree: bytes of one layer and key-value head."""

    plan: str  # "GPU" or "CPU": whose way to cut items
    shape: tuple[int, ...]
    length: float
    group: int
    dtype: str
    is_long: bool
    tree_bytes: int
    kv_bytes: int
    partial_bytes: int  # read; as many are written

    @property
    def read(self) -> float:
        """Bytes read, over the tree's."""
        return (self.kv_bytes + self.partial_bytes) / self.tree_bytes

    @property
    def moved(self) -> float:
        """Bytes read or written, over the tree's."""
        return self.read + self.partial_bytes / self.tree_bytes


def grid(
    shapes: Sequence[tuple[int, ...]], lengths: Sequence[float], *, width: int = 128
) -> Iterator[Count]:
    """The counts of trees of all these shapes and lengths, of every group and dtype."""
    for device in ("meta", "cpu"):  # "meta" holds nothing, and is planned for as a GPU is
        for shape, length, group, dtype in product(shapes, lengths, GROUPS, DTYPES):
            yield count(shape, length, group, dtype, torch.device(device), width=width)


def count(
    shape: Sequence[int],
    length: float,
    group: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    width: int = 128,
) -> Count:
    """The counts of a tree whose nodes are `length` times LONG packed rows long.

    Args:
        shape: how many children a node has, from the root on.
    """
    branches, cache, lengths = _tree(shape, length, group, dtype, device)
    plan = cache.plan(branches).plan
    n_partials = np.diff(plan.partials)
    merged = int(n_partials[n_partials > 1].sum())
    key = 2 * width * dtype.itemsize
    rows_below = np.prod(shape) // np.cumprod([1, *shape])
    counts = np.cumprod([1, *shape])
    return Count(
        plan="CPU" if device.type == "cpu" else "GPU",
        shape=tuple(shape),
        length=length,
        group=group,
        dtype=str(dtype).removeprefix("torch."),
        is_long=bool((np.array(lengths) >= LONG * rows_below * group).all()),
        tree_bytes=int((counts * lengths).sum()) * key,
        kv_bytes=plan.kv_read * key,
        partial_bytes=4 * merged * group * (width + 1),
    )


def _tree(
    shape: Sequence[int], length: float, group: int, dtype: torch.dtype, device: torch.device
) -> tuple[list[Branch], TreeCache, list[int]]:
    """The branches of a full tree, each at its last token, and its nodes' lengths by level."""
    counts = np.cumprod([1, *shape])
    lengths = [max(1, round(length * LONG * group * int(counts[-1] // n))) for n in counts.tolist()]
    n_pages = sum(
        int(n) * (-(-tokens // 16) + 1) for n, tokens in zip(counts, lengths, strict=True)
    )
    cache = TreeCache(
        1, 1, 1, n_pages=n_pages, n_heads=group, dtype=dtype, device=device, canary=False
    )
    branches = [cache.root(np.arange(lengths[0]), stream=0)]
    for children, tokens in zip(shape, lengths[1:], strict=True):
        cache.commit(cache.plan(branches))
        parents, branches = branches, [b for parent in branches for b in parent.fork(children)]
        for parent in parents:
            parent.prune()
        if tokens > 1:
            cache.append(branches, [np.arange(tokens - 1)] * len(branches))
            cache.commit(cache.plan(branches))
        cache.append(branches, np.arange(len(branches)))
    return branches, cache, lengths


def measure_case(width: int) -> dict[str, Any]:
    """What the result file gets."""
    found = grid(SHAPES, LENGTHS, width=width)
    rows = [{**asdict(one), "read": one.read, "moved": one.moved} for one in found]
    return {"case": {"width": width, "limit": LIMIT}, "rows": rows}


def table(result: dict[str, Any]) -> str:
    """The worst tree of each kind, as text."""
    lines = [("plan", "nodes", "trees", "median", "worst", "with writes", "the worst")]
    for plan, is_long in product(("GPU", "CPU"), (True, False)):
        rows = [r for r in result["rows"] if r["plan"] == plan and r["is_long"] == is_long]
        worst = max(rows, key=lambda row: row["read"])
        about = "forks {shape}, nodes x {length}, {group} heads a group, {dtype}".format(**worst)
        median, top = np.median([row["read"] for row in rows]), max(row["moved"] for row in rows)
        numbers = (f"{len(rows)}", f"{median:.3f}", f"{worst['read']:.3f}", f"{top:.3f}")
        lines.append((plan, "long" if is_long else "some short", *numbers, about))
    return f"\nbytes read a step, over the tree's\n{report.aligned(lines)}"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--width", type=int, default=128, metavar="D")


def run(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Counts need no device."""
    return measure_case(options.width)
