"""The decode attention of a group: G branches, one prompt, tails of their own, one query row each.

A step is one decoding step's attention in all layers, each with keys and values of its own, with
everything prepared that an engine prepares once for all layers. The floor is what no attention can
do without: reading the tree's keys and values once, and q and the output; on a CPU, if that takes
longer, the products.

Legend: G branches, P and r tokens of prompt and tail, Hq and H heads, D width.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rollfuse.bench import attention_rivals, check, entrant, measure
from rollfuse.bench.choice import Wrong
from rollfuse.bench.entrant import Entrant, Plan
from rollfuse.bench.floor import product_step, reading_steps
from rollfuse.kernels.tree_attention import tree_decode_attention
from rollfuse.rollout.node import path
from rollfuse.rollout.tree_cache import TreeCache

DTYPES = ("float32", "bfloat16", "float16")
_PAGE = 16


@dataclass(frozen=True, slots=True)
class Case:
    """One problem size."""

    branches: int = 16
    prompt: int = 8192
    tail: int = 128  # tokens of each branch, the query row's own included
    heads: int = 32
    kv_heads: int = 8
    width: int = 128
    layers: int = 1
    dtype: str = "float32"

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def kv_bytes(self) -> int:
        """Of one token's key and value in one layer."""
        return 2 * self.kv_heads * self.width * self.torch_dtype.itemsize

    @property
    def tree_tokens(self) -> int:
        return self.prompt + self.branches * self.tail

    @property
    def text_tokens(self) -> int:
        """What reading each sequence apart reads."""
        return self.branches * (self.prompt + self.tail)

    def bytes(self) -> int:
        """The tree's keys and values once, q and the output, in all layers."""
        rows = 2 * self.branches * self.heads * self.width * self.torch_dtype.itemsize
        return self.layers * (self.tree_tokens * self.kv_bytes + rows)

    def flops(self) -> int:
        """Of the two products with every key that counts, in all layers."""
        return self.layers * 4 * self.heads * self.width * self.text_tokens


def make_inputs(case: Case, device: torch.device, *, seed: int = 0) -> attention_rivals.Inputs:
    """The tree, written as a model writes it, and the query rows, in the order of the plan."""
    tail_pages = -(-case.tail // _PAGE) + 1
    cache = TreeCache(
        case.layers, case.kv_heads, case.width,
        n_pages=-(-case.prompt // _PAGE) + case.branches * tail_pages,
        page_size=_PAGE, n_heads=case.heads, dtype=case.torch_dtype, device=device, canary=False,
    )  # fmt: skip
    generator = torch.Generator(device).manual_seed(seed)

    def normal(n: int, heads: int) -> Tensor:
        shape = (n, heads, case.width)
        return torch.randn(shape, generator=generator, device=device).to(case.torch_dtype)

    prompt = cache.root(np.arange(case.prompt), stream=0)
    branches = [prompt]
    for appended in (0, case.tail - 1, 1):
        if appended:
            cache.append(branches, [np.arange(appended)] * len(branches))
        step = cache.plan(branches)
        for layer in range(case.layers):
            keys, values = (normal(len(step.ids), case.kv_heads) for _ in range(2))
            cache.write(layer, keys, values, step)
        cache.commit(step)
        if branches == [prompt]:
            branches = prompt.fork(case.branches)
            prompt.prune()
    cache.check()
    in_order = [branches[i] for i in np.argsort(step.last)]
    nodes = [path(branch.node) for branch in in_order]
    slots = np.stack([np.concatenate([cache.tree.slots(n) for n in way]) for way in nodes])
    return attention_rivals.Inputs(
        q=[normal(case.branches, case.heads) for _ in range(case.layers)],
        layers=cache.layers,
        plan=step.plan,
        slots=torch.from_numpy(slots).to(device),
        prompt=case.prompt,
    )


def truth(inputs: attention_rivals.Inputs) -> Tensor:
    """(layers * G * Hq, D) float64."""
    found = []
    for q, layer in zip(inputs.q, inputs.layers, strict=True):
        for row, slots in zip(q, inputs.slots, strict=True):
            keys, values = (slab[slots].double().transpose(0, 1) for slab in layer)
            packed = row.double().view(keys.shape[0], -1, keys.shape[2])
            scores = packed @ keys.transpose(1, 2) * keys.shape[2] ** -0.5
            found.append((scores.softmax(-1) @ values).flatten(0, 1))
    return torch.cat(found)


def ours(inputs: attention_rivals.Inputs) -> Entrant:
    def step() -> list[Tensor]:
        layers = zip(inputs.q, inputs.layers, strict=True)
        return [tree_decode_attention(q, layer, inputs.plan) for q, layer in layers]

    return Entrant("rollfuse", lambda: {"": step}, ours=True)


def measure_case(
    case: Case, device: torch.device, repeats: int, providers: Sequence[str] | None = None
) -> dict[str, Any]:
    """Check and time all; what the result file gets."""
    inputs = make_inputs(case, device)
    entrants = [ours(inputs), *attention_rivals.entrants(inputs)]
    wanted = [e for e in entrants if providers is None or e.name in providers]
    extra, floor_of = _floor(case, device)
    plan = Plan(device, repeats, extra)
    found = entrant.measure_all(wanted, _judge(case, inputs, device), plan)
    floors = floor_of(found.times)
    for entry in found.entries:
        if entry.seconds is not None:
            entry.ratio = measure.paired_ratio(found.times[entry.provider], floors["seconds"])
            entry.facts["bandwidth"] = case.bytes() / entry.seconds.median
    spreads = {name: measure.spread(times) for name, times in floors.items()}
    return {
        "case": asdict(case),
        "rows": entrant.result_of(found.entries),
        "floor": {**spreads, "bytes": case.bytes(), "flops": case.flops()},
        "kv_read": {
            "ours": case.layers * inputs.plan.kv_read * case.kv_bytes,
            "tree": case.layers * case.tree_tokens * case.kv_bytes,
            "per_sequence": case.layers * case.text_tokens * case.kv_bytes,
        },
    }


def _judge(
    case: Case, inputs: attention_rivals.Inputs, device: torch.device
) -> Callable[[list[Tensor]], dict[str, Any]]:
    """What tells the errors of a result against float64, and raises Wrong if they are too large."""
    true = truth(inputs)
    # Half precision, and products on a GPU, are rounded in more ways than one.
    is_exact = device.type == "cpu" and case.dtype == "float32"
    limits = check.PROMISE if is_exact else check.ROUNDING

    def accept(result: list[Tensor]) -> dict[str, Any]:
        got = torch.cat([out.reshape(-1, case.width) for out in result])
        if got.shape != true.shape:
            raise Wrong(f"need {tuple(true.shape)} rows and channels, got {tuple(got.shape)}")
        errors = check.tensor_errors("out", got, true)
        complaint = check.complaint(errors, limits[case.dtype])
        if complaint is not None:
            raise Wrong(complaint)
        return dict(errors)

    return accept


Times = dict[str, list[float]]


def _floor(
    case: Case, device: torch.device
) -> tuple[dict[str, measure.Step], Callable[[Times], Times]]:
    """Steps to be timed with the others, and what makes the floor, by repeat, of their times."""
    reads = reading_steps(case.bytes(), device)
    product, flops = product_step(device, case.torch_dtype)
    steps = {**reads, "product": product}
    for warm in steps.values():
        warm()
    # A GPU has products to spare here.
    share = case.flops() / flops if device.type == "cpu" else 0.0

    def floor_of(times: Times) -> Times:
        of_bytes = [min(both) for both in zip(*(times[name] for name in reads), strict=True)]
        of_products = [share * t for t in times["product"]]
        whole = [max(both) for both in zip(of_bytes, of_products, strict=True)]
        return {"seconds": whole, "bytes_seconds": of_bytes, "products_seconds": of_products}

    return steps, floor_of


def table(result: dict[str, Any]) -> str:
    """The measured case as text."""
    case, floor, read = Case(**result["case"]), result["floor"], result["kv_read"]
    mib = {name: f"{n / 2**20:.4g}" for name, n in read.items()}
    title = (
        f"attention: {case.branches} branches, prompt {case.prompt}, tails {case.tail}, "
        f"{case.heads}/{case.kv_heads} heads of {case.width}, {case.layers} layers, {case.dtype}\n"
        f"MiB of keys and values read: ours {mib['ours']}, each sequence's {mib['per_sequence']}, "
        f"the tree's {mib['tree']}\n"
        f"floor: {floor['seconds']['median'] * 1e3:.3f} ms "
        f"(bytes {floor['bytes_seconds']['median'] * 1e3:.3f}, "
        f"products {floor['products_seconds']['median'] * 1e3:.3f})"
    )
    columns = {
        "ms": entrant.milliseconds,
        "x floor": entrant.ratio,
        "20..80 %": entrant.ratio_range,
        "tree GB/s": entrant.fact("bandwidth", "{:.1f}", 1e-9),
        "error": entrant.fact("out", "{:.1e}"),
    }
    return entrant.table(title, result["rows"], columns)


def add_flags(parser: argparse.ArgumentParser) -> None:
    known, add = Case(), parser.add_argument
    add("--branches", type=int, default=known.branches, metavar="G")
    add("--prompt", type=int, default=known.prompt, metavar="P")
    add("--tail", type=int, default=known.tail, metavar="r", help="the query row's token included")
    add("--heads", type=int, default=known.heads, metavar="Hq")
    add("--kv-heads", type=int, default=known.kv_heads, metavar="H")
    add("--width", type=int, default=known.width, metavar="D")
    add("--layers", type=int, default=known.layers, help="in a step (1; more on a GPU, 8 or so)")
    add("--dtype", choices=DTYPES, default=known.dtype)
    add("--providers", nargs="+", choices=("rollfuse", *attention_rivals.NAMES), metavar="NAME")


def run(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The case that the flags describe."""
    names = ("branches", "prompt", "tail", "heads", "kv_heads", "width", "layers", "dtype")
    case = Case(**{name: getattr(options, name) for name in names})
    return measure_case(case, device, options.repeats, options.providers)
