"""The rivals of `bench tree attention`: each gets its keys and values laid out as it likes, free.

Legend: G branches, P prompt tokens, L tokens of a text, S of the tree, Hq and H heads, D width.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rollfuse.bench import measure
from rollfuse.bench.choice import Unavailable
from rollfuse.bench.entrant import Entrant
from rollfuse.kernels.tree_attention import KeyValues
from rollfuse.kernels.tree_plan import TreePlan

NAMES = ("SDPA per sequence", "flex_attention", "FlashInfer cascade")

Steps = Mapping[str, Callable[[], list[Tensor]]]
_PAGE = 16
_WORKSPACE = 128 << 20  # bytes, what FlashInfer recommends


@dataclass(frozen=True, slots=True)
class Inputs:
    """What every provider computes; each returns one (G, Hq, D) or a reshaping of it per layer."""

    q: Sequence[Tensor]  # by layer (G, Hq, D), rows in the plan's order
    layers: Sequence[KeyValues]
    plan: TreePlan
    slots: Tensor  # (G, L) int64, where each row's keys lie
    prompt: int

    @property
    def tree_slots(self) -> Tensor:
        """(S,), the prompt and then each row's tail."""
        return torch.cat([self.slots[0, : self.prompt], self.slots[:, self.prompt :].flatten()])


def entrants(inputs: Inputs) -> list[Entrant]:
    """All of them."""
    makers = (sdpa_steps, flex_steps, flashinfer_steps)
    named = zip(NAMES, makers, strict=True)
    return [Entrant(name, partial(make, inputs)) for name, make in named]


def sdpa_steps(inputs: Inputs) -> Steps:
    """PyTorch's fused attention over keys and values gathered for each sequence, prompt included.

    Either by its GQA option, or with the heads of a group as query rows, which needs none.
    """
    n, length = inputs.slots.shape
    n_heads, width = inputs.layers[0].keys.shape[1:]
    item = inputs.layers[0].keys.element_size()
    _need_room(2 * len(inputs.layers) * n * length * n_heads * width * item, inputs)
    gathered = [
        [slab[inputs.slots].transpose(1, 2).contiguous() for slab in layer]
        for layer in inputs.layers
    ]

    def with_gqa() -> list[Tensor]:
        return [
            scaled_dot_product_attention(q.unsqueeze(2), keys, values, enable_gqa=True)
            for q, (keys, values) in zip(inputs.q, gathered, strict=True)
        ]

    def packed() -> list[Tensor]:
        return [
            scaled_dot_product_attention(q.view(n, n_heads, -1, width), keys, values)
            for q, (keys, values) in zip(inputs.q, gathered, strict=True)
        ]

    return {"enable_gqa": with_gqa, "a group's heads as rows": packed}


def flex_steps(inputs: Inputs, *, compiled: bool = True) -> Steps:
    """flex_attention over the tree as one sequence, with a block mask of who sees which tail."""
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    attend = torch.compile(flex.flex_attention, dynamic=False) if compiled else flex.flex_attention
    n, length = inputs.slots.shape
    prompt, tail = inputs.prompt, length - inputs.prompt
    n_heads, width = inputs.layers[0].keys.shape[1:]
    slots, group = inputs.tree_slots, inputs.q[0].shape[1] // n_heads
    flat = [
        [slab[slots].transpose(0, 1).unsqueeze(0).contiguous() for slab in layer]
        for layer in inputs.layers
    ]

    def mask_of(rows: int, per_branch: int) -> Any:
        def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key < prompt) | ((key - prompt) // tail == query // per_branch)

        device = inputs.slots.device
        return flex.create_block_mask(seen, None, None, rows, len(slots), device=device)

    whole, by_group = mask_of(n, 1), mask_of(n * group, group)

    def with_gqa() -> list[Tensor]:
        found = []
        for q, (keys, values) in zip(inputs.q, flat, strict=True):
            rows = q.transpose(0, 1).unsqueeze(0)
            out = attend(rows, keys, values, block_mask=whole, enable_gqa=True)
            found.append(out.squeeze(0).transpose(0, 1))
        return found

    def packed() -> list[Tensor]:
        found = []
        for q, (keys, values) in zip(inputs.q, flat, strict=True):
            rows = q.view(n, n_heads, group, width).transpose(0, 1).reshape(1, n_heads, -1, width)
            out = attend(rows, keys, values, block_mask=by_group)
            found.append(out.view(n_heads, n, group, width).transpose(0, 1))
        return found

    return {"enable_gqa": with_gqa, "a group's heads as rows": packed}


def flashinfer_steps(inputs: Inputs) -> Steps:
    """Its cascade of two levels, prompt and tails, planned once for all layers."""
    if inputs.slots.device.type != "cuda":
        raise Unavailable("FlashInfer needs a CUDA device")
    if importlib.util.find_spec("flashinfer") is None:
        raise Unavailable("flashinfer is not installed")
    if inputs.q[0].dtype == torch.float32:
        raise Unavailable("FlashInfer needs float16 or bfloat16")
    return {"two levels": cascade_step(inputs, importlib.import_module("flashinfer"))}


def cascade_step(inputs: Inputs, flashinfer: Any) -> Callable[[], list[Tensor]]:
    """The tree in pages that follow each other, prompt first, every tail on pages of its own."""
    device = inputs.slots.device
    n, length = inputs.slots.shape
    n_heads, width = inputs.layers[0].keys.shape[1:]
    spans = [inputs.slots[0, : inputs.prompt], *inputs.slots[:, inputs.prompt :]]
    pages = [-(-len(span) // _PAGE) for span in spans]

    def ints(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    def paged(slab: Tensor) -> Tensor:
        held = slab.new_zeros(sum(pages), _PAGE, n_heads, width)
        first = 0
        for span, count in zip(spans, pages, strict=True):
            held[first : first + count].flatten(0, 1)[: len(span)] = slab[span]
            first += count
        return held

    layers = [tuple(paged(slab) for slab in layer) for layer in inputs.layers]
    workspace = torch.empty(_WORKSPACE, dtype=torch.uint8, device=device)
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, workspace, "NHD")
    last = [len(span) - (count - 1) * _PAGE for span, count in zip(spans, pages, strict=True)]
    wrapper.plan(
        [ints([0, n]), ints(range(n + 1))],
        [ints([0, pages[0]]), ints([i * pages[1] for i in range(n + 1)])],
        [ints(range(pages[0])), ints(range(pages[0], sum(pages)))],
        [ints(last[:1]), ints(last[1:])],
        inputs.q[0].shape[1], n_heads, width, _PAGE,
        q_data_type=inputs.q[0].dtype,
    )  # fmt: skip

    def step() -> list[Tensor]:
        return [wrapper.run(q, layer) for q, layer in zip(inputs.q, layers, strict=True)]

    return step


def _need_room(n_bytes: int, inputs: Inputs) -> None:
    free = measure.available_bytes(inputs.slots.device)
    if free is not None and n_bytes > 0.9 * free:
        raise Unavailable(f"needs about {n_bytes / 2**30:.1f} GiB, {free / 2**30:.1f} free")
