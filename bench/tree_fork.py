"""Forking: N branches from the middle of a text, against copying its keys and values for each.

Every fork is at another token. Time is for one call that makes all branches; what it made is
compared with the text and let go of off the clock. Rivals are spared what comes next: a cache that
grows by concatenation is copied once more with the first token.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rollfuse.bench import entrant, measure
from rollfuse.bench.choice import Unavailable, Wrong
from rollfuse.bench.entrant import Entrant, Plan
from rollfuse.rollout.branch import Branch
from rollfuse.rollout.node import path
from rollfuse.rollout.tree_cache import TreeCache


@dataclass(frozen=True, slots=True)
class Case:
    """One text to fork."""

    branches: int = 64
    text: int = 8192
    layers: int = 8
    kv_heads: int = 2
    width: int = 48


class Forked(NamedTuple):
    """What a step has made: branches of ours, or keys and values (N, H, at, D) by layer."""

    at: int
    branches: list[Branch]
    copies: list[tuple[Tensor, Tensor]]
    appended: int = 0  # tokens behind the fork


@dataclass(frozen=True, slots=True)
class Text:
    """The text, in a tree and as a cache of its own."""

    case: Case
    cache: TreeCache
    branch: Branch
    slabs: list[tuple[Tensor, Tensor]]  # by layer (1, H, L, D)
    writes: list[int]  # how often each tensor of the tree's had been written


def make_text(case: Case, device: torch.device, *, seed: int = 0) -> Text:
    page = 16
    # A page for each branch's first token, and for the text.
    n_pages = -(-case.text // page) + 2 * case.branches
    cache = TreeCache(
        case.layers, case.kv_heads, case.width,
        n_pages=n_pages, page_size=page, device=device, canary=False,
    )  # fmt: skip
    branch = cache.root(np.arange(case.text), stream=seed)
    step = cache.plan([branch])
    generator = torch.Generator(device).manual_seed(seed)
    shape = (case.text, case.kv_heads, case.width)
    slabs = []
    for layer in range(case.layers):
        new = [torch.randn(shape, generator=generator, device=device) for _ in range(2)]
        cache.write(layer, new[0], new[1], step)
        keys, values = (x.transpose(0, 1).unsqueeze(0).contiguous() for x in new)
        slabs.append((keys, values))
    cache.commit(step)
    return Text(case, cache, branch, slabs, _writes(cache))


def _writes(cache: TreeCache) -> list[int]:
    return [slab._version for layer in cache.layers for slab in layer]


def entrants(text: Text) -> list[Entrant]:
    """Ours with and without the first token of each branch, and those who copy."""
    return [
        Entrant("rollfuse", lambda: {"": _at_any_token(text, partial(_fork, text))}, ours=True),
        Entrant(
            "rollfuse, and a token each",
            lambda: {"": _at_any_token(text, partial(_fork_and_append, text))},
            ours=True,
        ),
        Entrant("copy, index_select", partial(_copying, text)),
        Entrant("copy, DynamicCache", partial(_dynamic_cache, text)),
    ]


def _at_any_token(text: Text, fork: Callable[[int], Forked]) -> Callable[[], Forked]:
    """`fork` at another token each time, the same ones for every provider."""
    generator = np.random.default_rng(0)
    places = itertools.cycle(generator.integers(1, text.case.text, 64, endpoint=True).tolist())
    return lambda: fork(next(places))


def _fork(text: Text, at: int) -> Forked:
    return Forked(at, text.branch.fork(text.case.branches, at=at), [])


def _fork_and_append(text: Text, at: int) -> Forked:
    forked = _fork(text, at)
    text.cache.append(forked.branches, np.arange(text.case.branches))
    return forked._replace(appended=1)


def _copying(text: Text) -> Mapping[str, Callable[[], Forked]]:
    """Rows selected into new tensors, as latr does it, or into tensors that exist."""
    _need_room(text)
    n = text.case.branches
    rows = torch.zeros(n, dtype=torch.int64, device=text.slabs[0][0].device)
    buffers = [[slab.new_empty(n, *slab.shape[1:]) for slab in layer] for layer in text.slabs]

    def selected(at: int) -> Forked:
        copies = [
            (keys[:, :, :at].index_select(0, rows), values[:, :, :at].index_select(0, rows))
            for keys, values in text.slabs
        ]
        return Forked(at, [], copies)

    def into_buffers(at: int) -> Forked:
        copies = []
        for layer, held in zip(text.slabs, buffers, strict=True):
            keys, values = (
                buffer[:, :, :at].copy_(slab[:, :, :at].expand(n, -1, -1, -1))
                for slab, buffer in zip(layer, held, strict=True)
            )
            copies.append((keys, values))
        return Forked(at, [], copies)

    return {
        "into new tensors": _at_any_token(text, selected),
        "into tensors that exist": _at_any_token(text, into_buffers),
    }


def _dynamic_cache(text: Text) -> Mapping[str, Callable[[], Forked]]:
    """transformers' own: cut, then `batch_repeat_interleave`."""
    _need_room(text)
    from transformers import DynamicCache

    def forked(at: int) -> Forked:
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(text.slabs):
            cache.update(keys[:, :, :at], values[:, :, :at], layer)
        cache.batch_repeat_interleave(text.case.branches)
        return Forked(at, [], [(layer.keys, layer.values) for layer in cache.layers])

    return {"batch_repeat_interleave": _at_any_token(text, forked)}


def _need_room(text: Text) -> None:
    need = 2 * text.case.branches * sum(k.nbytes + v.nbytes for k, v in text.slabs)
    free = measure.available_bytes(text.slabs[0][0].device)
    if free is not None and need > 0.9 * free:
        raise Unavailable(f"needs about {need / 2**30:.1f} GiB, {free / 2**30:.1f} free")


def _accept(text: Text, forked: Forked) -> dict[str, Any]:
    """The bytes that were copied; raises Wrong unless every branch has the text's beginning."""
    at, n = forked.at, text.case.branches
    if forked.copies:
        for (keys, values), whole in zip(forked.copies, text.slabs, strict=True):
            for got, slab in zip((keys, values), whole, strict=True):
                if len(got) != n or not bool((got == slab[:, :, :at]).all()):
                    raise Wrong(f"need {n} times the first {at} keys and values, got others")
        return {"bytes_copied": sum(x.nbytes for layer in forked.copies for x in layer)}
    if len({id(branch) for branch in forked.branches}) != n:
        raise Wrong(f"need {n} branches, got {len(forked.branches)}")
    tree = text.cache.tree
    for branch in forked.branches:
        slots = np.concatenate([tree.slots(node) for node in path(branch.node)])
        if len(slots) != at + forked.appended or branch.n_computed != at:
            raise Wrong(f"need {at} tokens and {forked.appended} new ones, got {len(slots)}")
        for layer, whole in zip(text.cache.layers, text.slabs, strict=True):
            for slab, expected in zip(layer, whole, strict=True):
                if not bool((slab[slots[:at]].transpose(0, 1) == expected[0, :, :at]).all()):
                    raise Wrong(f"need the first {at} keys and values, got others")
    text.cache.check()
    # PyTorch counts what is written to a tensor; ours has no others to copy to.
    if _writes(text.cache) != text.writes:
        raise Wrong("need a fork that copies nothing, got one that wrote keys or values")
    return {"bytes_copied": 0}


def _let_go(forked: Forked) -> None:
    for branch in forked.branches:
        branch.prune()


def measure_case(case: Case, device: torch.device, repeats: int) -> dict[str, Any]:
    """Check and time all; what the result file gets."""
    text = make_text(case, device)
    plan = Plan(device, repeats, finish=_let_go)
    found = entrant.measure_all(entrants(text), partial(_accept, text), plan)
    for entry in found.entries:
        if entry.seconds is not None:
            entry.facts["seconds_per_branch"] = entry.seconds.median / case.branches
            times = found.times[entry.provider]
            entry.ratio = measure.paired_ratio(times, found.times["rollfuse"])
    return {"case": asdict(case), "rows": entrant.result_of(found.entries)}


def table(result: dict[str, Any]) -> str:
    """The measured case as text."""
    case = Case(**result["case"])
    title = (
        f"fork: {case.branches} branches at any token of {case.text}, "
        f"{case.layers} layers of {case.kv_heads} heads of {case.width}, float32"
    )
    columns = {
        "us a branch": entrant.fact("seconds_per_branch", "{:.2f}", 1e6),
        "x ours": entrant.ratio,
        "20..80 %": entrant.ratio_range,
        "MiB copied at first": entrant.fact("bytes_copied", "{:.4g}", 2.0**-20),
    }
    return entrant.table(title, result["rows"], columns)


def add_flags(parser: argparse.ArgumentParser) -> None:
    known, add = Case(), parser.add_argument
    add("--branches", type=int, default=known.branches, metavar="N")
    add("--text", type=int, default=known.text, metavar="L", help="its tokens")
    add("--layers", type=int, default=known.layers)
    add("--kv-heads", type=int, default=known.kv_heads, metavar="H")
    add("--width", type=int, default=known.width, metavar="D")


def run(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The case that the flags describe."""
    names = ("branches", "text", "layers", "kv_heads", "width")
    case = Case(**{name: getattr(options, name) for name in names})
    return measure_case(case, device, options.repeats)
