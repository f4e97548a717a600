"""Tree attention against each row's own softmax over its whole path, in float64.

The slabs hold NaN wherever no token of the tree lies, so a key that is not the tree's cannot pass.
Tolerances are the error of plain PyTorch in the same dtype.
"""

from __future__ import annotations

import gc
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from rollfuse.kernels._triton import tree_tiles
from rollfuse.kernels._triton.tree_tiles import tile_lists, work_of
from rollfuse.kernels.dispatch import backend, triton_serves
from rollfuse.kernels.tree_attention import KeyValues, tree_decode_attention, write_key_values
from rollfuse.kernels.tree_plan import Ints, Item, Spans, TreePlan, plan_of

DEVICE = torch.device("cuda" if backend.name in ("cuda", "rocm") else "cpu")
pytestmark = pytest.mark.kernels

N_KV_HEADS = 2
N_SLOTS = 3000


class Tree(NamedTuple):
    spans: Spans
    paths: list[Ints]  # of each query row: the slots of its text up to its own token


class Options(NamedTuple):
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


def tree_of(*lengths: list[int]) -> Tree:
    """Every node of a level has the same children; `lengths` holds those of each level's nodes."""
    free = np.random.permutation(N_SLOTS)
    nodes: list[list[int]] = []  # parent, below, start, length, rows
    paths: list[Ints] = []

    def grow(parent: int, path: Ints, levels: list[list[int]]) -> None:
        for length in levels[0]:
            n_used = sum(node[3] for node in nodes)
            whole = np.concatenate([path, free[n_used : n_used + length]])
            # Leaves decode or verify, nodes inside are sometimes being filled.
            has_rows = len(levels) == 1 or np.random.rand() < 0.3
            rows = np.random.randint(1, min(length, 4) + 1) if has_rows else 0
            paths.extend(whole[: len(whole) - rows + i + 1] for i in range(rows))
            node = [parent, 0, len(path), length, rows]
            nodes.append(node)
            if len(levels) > 1:
                grow(len(nodes) - 1, whole, levels[1:])
            node[1] = len(nodes)

    grow(-1, np.empty(0, np.int64), list(lengths))
    columns = np.array(nodes).T
    return Tree(Spans(*columns, slots=free[: columns[3].sum()]), paths)


SMALL = ([70], [1, 90], [3, 20, 1])
DEEP = ([40], [1], [65, 2], [1], [9, 1], [30])
WIDE = ([150], [5] * 20)  # twenty branches of one prompt
LONE = ([9, 70],)  # every row is finished by one program
FILL = ([5], [90], [1, 4])


class Slabs(NamedTuple):
    q: Tensor
    keys: Tensor
    values: Tensor


def slabs_of(tree: Tree, group: int, width: int, dtype: torch.dtype) -> Slabs:
    """Queries between other memory, and keys and values of the tree's slots alone."""
    shape = (N_SLOTS, N_KV_HEADS, width)
    q = torch.randn(len(tree.paths), 3, N_KV_HEADS * group, width)
    q[:, 0], q[:, 2] = math.nan, math.nan
    keys, values = torch.full(shape, math.nan), torch.full(shape, math.nan)
    slots = torch.from_numpy(tree.spans.slots)
    keys[slots], values[slots] = torch.randn(2, len(slots), *shape[1:])
    return Slabs(*(x.to(DEVICE, dtype) for x in (q, keys, values)))._replace(
        q=q.to(DEVICE, dtype)[:, 1]
    )


def attend(slabs: Slabs, plan: TreePlan, options: Options) -> Tensor:
    layer = KeyValues(slabs.keys, slabs.values)
    return tree_decode_attention(slabs.q, layer, plan, **options._asdict())


def plain(slabs: Slabs, tree: Tree, options: Options, dtype: torch.dtype) -> Tensor:
    """Each row alone: eager attention in `dtype`, the softmax in at least float32."""
    q, keys, values = (x.to(dtype) for x in slabs)
    group = q.shape[1] // N_KV_HEADS
    wide = torch.promote_types(dtype, torch.float32)
    out = []
    for x, path in zip(q, tree.paths, strict=True):
        seen = torch.from_numpy(path).to(DEVICE)
        if options.window is not None:
            seen = seen[-options.window :]
        k, v = (slab[seen].repeat_interleave(group, 1) for slab in (keys, values))
        s = torch.einsum("hd,khd->hk", x, k) * options.scale
        if options.softcap is not None:
            s = options.softcap * torch.tanh(s / options.softcap)
        if options.sinks is not None:
            s = torch.cat([s.to(wide), options.sinks[:, None].to(wide)], 1)
        p = s.to(wide).softmax(1).to(dtype)[:, : len(seen)]
        out.append(torch.einsum("hk,khd->hd", p, v))
    return torch.stack(out).double()


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def check(tree: Tree, slabs: Slabs, options: Options, plan: TreePlan) -> None:
    got = attend(slabs, plan, options)
    assert got.dtype == slabs.q.dtype and got.is_contiguous()
    want = plain(slabs, tree, options, torch.float64)
    # Our sums are longer in float32, and the interpreter cuts bfloat16 off instead of rounding.
    times = {torch.float32: 3.0, torch.bfloat16: 2.0, torch.float16: 0.8}[got.dtype]
    assert error(got, want) <= times * error(plain(slabs, tree, options, got.dtype), want)


def problem(
    lengths: tuple[list[int], ...],
    group: int = 4,
    width: int = 64,
    dtype: torch.dtype = torch.float32,
    split: int | None = 1,
) -> tuple[Tree, Slabs, TreePlan]:
    tree = tree_of(*lengths)
    plan = plan_of(tree.spans, group=group, kv_bytes=dtype.itemsize, split=split)
    return tree, slabs_of(tree, group, width, dtype), plan


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("lengths", "group", "width"),
    [(SMALL, 1, 16), (SMALL, 4, 64), (DEEP, 4, 48), (WIDE, 8, 128), (DEEP, 1, 80), (FILL, 8, 144)],
    ids=["small-1", "small-4", "deep-4", "wide-8", "deep-1", "fill-8"],
)
def test_rows_equal_their_own_softmax(lengths, group, width, dtype):
    tree, slabs, plan = problem(lengths, group, width, dtype)
    check(tree, slabs, Options(width**-0.5 * 2), plan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [SMALL, DEEP], ids=["small", "deep"])
def test_windows(lengths, dtype):
    """From long to short; what all windows have left behind is gone from the slabs."""
    tree, slabs, plan = problem(lengths, dtype=dtype)
    for window in (500, 100, 64, 7, 1):
        begin = max(0, int(plan.positions.min()) - window + 1)
        for path in tree.paths:
            gone = torch.from_numpy(path[:begin]).to(DEVICE)
            slabs.keys[gone], slabs.values[gone] = math.nan, math.nan
        check(tree, slabs, Options(0.2, window), plan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [SMALL, LONE], ids=["small", "lone"])
def test_softcaps_and_sinks(lengths, dtype):
    tree, slabs, plan = problem(lengths, dtype=dtype)
    assert (plan.n_partials > plan.n_rows) == (lengths is SMALL)
    sinks = torch.randn(slabs.q.shape[1]).to(DEVICE) + 3.0
    for options in (
        Options(0.4, softcap=2.0),
        Options(0.2, sinks=sinks),
        Options(0.4, 50, 5.0, sinks),
        Options(0.2, sinks=torch.full_like(sinks, -math.inf)),
    ):
        check(tree, slabs, options, plan)


def test_steps_share_their_tiles_and_read_no_key_to_come():
    """The slots of tokens to come hold NaN until they are written."""
    slots = np.random.permutation(N_SLOTS)
    columns = np.array([[-1, 3, 0, 90, 0], [0, 2, 90, 1, 1], [0, 3, 90, 20, 1]]).T
    spans, new = Spans(*columns, slots=slots[:111], room=2), slots[111:113]
    tree = Tree(spans, [slots[:91], np.delete(slots[:111], 90)])
    slabs, plan = slabs_of(tree, 4, 64, torch.float32), plan_of(spans, group=4)
    check(tree, slabs, Options(0.2), plan)
    step = plan.advanced(new)
    paths = [np.append(path, slot) for path, slot in zip(tree.paths, new, strict=True)]
    for slab in slabs[1:]:
        slab[torch.from_numpy(new).to(DEVICE)] = torch.randn(2, *slab.shape[1:]).to(DEVICE)
    check(Tree(spans, paths), slabs, Options(0.2), step)
    if triton_serves(DEVICE):
        assert work_of(step, DEVICE, 4, (16, 64)) is work_of(plan, DEVICE, 4, (16, 64))


@pytest.mark.skipif(not triton_serves(DEVICE), reason="needs a GPU or ROLLFUSE_BACKEND=interpret")
def test_work_goes_with_its_plan():
    _, slabs, plan = problem(SMALL)
    gc.collect()
    before = len(tree_tiles._WORK)
    attend(slabs, plan, Options(0.2))
    assert len(tree_tiles._WORK) == before + 1
    del plan
    gc.collect()
    assert len(tree_tiles._WORK) == before


@pytest.mark.parametrize("heights", [(16, 64), (16, 32), (16, 64, 128)])
def test_tiles_hold_every_packed_row_once(heights):
    tree = tree_of(*WIDE)
    plan = plan_of(tree.spans, group=8)
    lists = tile_lists(plan, 8, heights)
    held = [np.zeros(int(item[Item.Q_COUNT]) * 8, int) for item in plan.items]
    for height, tiles in lists.items():
        for item, first in tiles:
            held[item][first : first + height] += 1
            assert first < len(held[item])
        # Longest first, but for the at most 3 keys of a leaf after the last row of a tile.
        assert (np.diff(plan.items[tiles[:, 0], Item.KV_LEN]) <= 3).all()
    assert all((rows == 1).all() for rows in held)
    assert sum(len(tiles) for tiles in lists.values()) > len(plan.items)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n_kv_heads", "width"), [(2, 80), (5, 256), (1, 1)])
def test_write(n_kv_heads, width, dtype):
    """Two blocks a row, part of a block, one element."""
    new = torch.randn(2, n_kv_heads, 6, width + 1, device=DEVICE).to(dtype)[..., 1:].transpose(1, 2)
    slots = torch.tensor([7, 1, 0, 9, 8, 3], device=DEVICE)
    slabs = torch.full((2, 10, n_kv_heads, width), math.nan, device=DEVICE, dtype=dtype)
    want = slabs.clone()
    want[:, slots] = new
    write_key_values(KeyValues(slabs[0], slabs[1]), new[0], new[1], slots)
    assert torch.allclose(slabs, want, rtol=0, atol=0, equal_nan=True)


def test_queries_of_any_strides_and_autocast_outside():
    # One row a text, as in decoding: there queries reach the product as they came.
    slots = np.random.permutation(N_SLOTS)[:51]
    columns = np.array([[-1, 1, 0, 31, 1], [-1, 2, 0, 20, 1]]).T
    single = Tree(Spans(*columns, slots=slots), [slots[:31], slots[31:]])
    for tree in (single, tree_of(*WIDE)):
        plan = plan_of(tree.spans, group=4)
        slabs = slabs_of(tree, 4, 64, torch.float32)
        wide = torch.randn(*slabs.q.shape[:2], 2 * slabs.q.shape[2], device=DEVICE)
        turned = slabs.q.transpose(0, 1).contiguous().transpose(0, 1)
        for q in (wide[..., ::2], turned):
            with torch.autocast(DEVICE.type, torch.bfloat16):
                check(tree, slabs._replace(q=q), Options(0.2), plan)


def test_a_plan_made_before_a_change_is_refused():
    _, slabs, plan = problem(LONE)
    plan.changes.count += 1
    with pytest.raises(ValueError, match="plan: need one of the tree as it is"):
        attend(slabs, plan, Options(0.2))


def test_no_rows():
    plan = plan_of(Spans(*np.empty((6, 0), np.int64)))
    keys = torch.empty(4, 2, 16, device=DEVICE)
    q = torch.empty(0, 8, 16, device=DEVICE)
    assert attend(Slabs(q, keys, keys), plan, Options(1.0)).shape == (0, 8, 16)
    nothing = torch.empty(0, 2, 16, device=DEVICE)
    write_key_values(
        KeyValues(keys, keys), nothing, nothing, torch.empty(0, dtype=torch.int64, device=DEVICE)
    )
    assert keys.isnan().all()
