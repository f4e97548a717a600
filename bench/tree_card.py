"""Checks of tree attention on the device at hand, against each row's own softmax in float64.

A tree with a long prompt, short and long branches, several rows at an end and a branch of a branch,
in pages that do not follow each other; queries read it while prompts are still being filled.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rollfuse.bench.card import DTYPES, Result
from rollfuse.kernels.tree_attention import tree_decode_attention
from rollfuse.rollout.branch import Branch
from rollfuse.rollout.tree_cache import TreeCache
from rollfuse.rollout.tree_step import TreeStep

KV_HEADS = 2
# Of the result as a whole, beyond what rounding the inputs' dtype costs.
LIMITS = {"float32": 2e-6, "bfloat16": 8e-3, "float16": 1e-3}


class Options(NamedTuple):
    """What a layer may do to its scores."""

    name: str
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False


OPTIONS = (
    Options("plain"),
    Options("window", window=37),
    Options("softcap", softcap=3.0),
    Options("sinks", has_sinks=True),
    Options("all of them", window=70, softcap=5.0, has_sinks=True),
)


def make_tree(cache: TreeCache) -> tuple[list[Branch], TreeStep]:
    """Branches, and the step that computes their last tokens; what comes before is computed."""
    draw = np.random.default_rng(0)
    prompts = [cache.root(draw.integers(100, size=n)) for n in (700, 33, 5)]
    cache.commit(cache.plan(prompts))
    branches = [*prompts[0].fork(20), *prompts[1].fork(3, at=20), *prompts[2].fork(1)]
    for _ in range(3):
        counts = draw.integers(1, 60, size=len(branches))
        cache.append(branches, [draw.integers(100, size=n) for n in counts])
    cache.commit(cache.plan(branches))
    branches += branches[2].fork(4, at=len(branches[2]) - 7)
    counts = draw.choice([1, 1, 1, 5, 130], size=len(branches))
    cache.append(branches, [draw.integers(100, size=n) for n in counts])
    return branches, cache.plan(branches)


def run_checks(device: torch.device) -> Iterator[Result]:
    """Every dtype, width, ratio of heads and option; yields a result as each is done."""
    for dtype in DTYPES:
        for width, group in ((64, 4), (80, 1), (128, 8), (256, 2)):
            for options in OPTIONS:
                yield check_attention(device, dtype, width, group, options)


def check_attention(
    device: torch.device, dtype: str, width: int, group: int, options: Options
) -> Result:
    """Written through the cache and read through the plan of one step."""
    cache = TreeCache(
        1, KV_HEADS, width, n_pages=600, page_size=16, n_heads=KV_HEADS * group,
        dtype=getattr(torch, dtype), device=device,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    for slab in cache.layers[0]:
        slab.copy_(torch.randn(slab.shape, generator=generator))
    _, step = make_tree(cache)
    new = torch.randn(3, step.plan.n_rows, KV_HEADS * group, width, generator=generator)
    q, keys, values = new.to(device, getattr(torch, dtype))
    cache.write(0, keys[:, :KV_HEADS], values[:, :KV_HEADS], step)
    sinks = torch.randn(KV_HEADS * group, generator=generator).to(device)
    found = tree_decode_attention(
        q, cache.layers[0], step.plan,
        window=options.window, softcap=options.softcap, sinks=sinks if options.has_sinks else None,
    )  # fmt: skip
    true = plain_attention(q, cache, step, options, sinks)
    error = float((found.double() - true).norm() / true.norm())
    limit = LIMITS[dtype]
    name = f"tree attention, {options.name}, width {width}, {group} heads a key, {dtype}"
    return Result(name, None if error <= limit else f"off by {error:.1e} (limit {limit:.0e})")


def plain_attention(
    q: Tensor, cache: TreeCache, step: TreeStep, options: Options, sinks: Tensor
) -> Tensor:
    """(N, Hq, D) float64, each row alone, its keys found by walking the tree."""
    out = []
    keys, values = (slab.double() for slab in cache.layers[0])
    group = q.shape[1] // KV_HEADS
    for row, slots in zip(q.double(), row_slots(cache, step), strict=True):
        index = torch.from_numpy(slots[-(options.window or len(slots)) :]).to(q.device)
        k, v = (slab[index].repeat_interleave(group, 1) for slab in (keys, values))
        scores = torch.einsum("hd,khd->hk", row, k) * row.shape[1] ** -0.5
        if options.softcap is not None:
            scores = options.softcap * torch.tanh(scores / options.softcap)
        if options.has_sinks:
            scores = torch.cat([scores, sinks.double().unsqueeze(1)], 1)
        out.append(torch.einsum("hk,khd->hd", scores.softmax(1)[:, : len(index)], v))
    return torch.stack(out)


def row_slots(cache: TreeCache, step: TreeStep) -> list[np.ndarray]:
    """Where each row's text lies, up to its own token."""
    tree = cache.tree
    end_of = {
        int(slot): (node, place)
        for node in tree.nodes()
        for place, slot in enumerate(tree.slots(node).tolist())
    }
    found = []
    for slot in step.slots.tolist():
        node, place = end_of[slot]
        parts = [tree.slots(node)[: place + 1]]
        while node.parent is not None:
            node = node.parent
            parts.insert(0, tree.slots(node))
        found.append(np.concatenate(parts))
    return found
