"""Attention of query rows to the keys of a tree: those that rows share are read once for all.

An item of the plan gives its rows a partial result over its keys, normalised, and the logarithm of
its normaliser; the partial results of a row are then averaged with the softmax of those logarithms.

Legend: N query rows, Hq query heads, H key-value heads, g = Hq / H, D width of a head; B items of a
block, M rows and L keys of each, padded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rollfuse.kernels import checks
from rollfuse.kernels.dispatch import backend, use_triton
from rollfuse.kernels.tree_plan import Ints, Item, TreePlan

if backend.name != "cpu":
    from rollfuse.kernels._triton.tree_attention import attend as attend_triton
    from rollfuse.kernels._triton.tree_write import write as write_triton

# A block of items is padded to at most this much of what its items hold, or to few elements.
_PADDING = 1.25
_SMALL = 1 << 11
# The logarithm of the normaliser of no keys: finite, so that nothing and nothing is not NaN.
_NOTHING = -1e30
# Scores held at once where PyTorch has no fused attention (a softcap).
_SCORES = 1 << 22


class KeyValues(NamedTuple):
    """One layer's keys and values, by slot: each (n_slots, H, D), contiguous."""

    keys: Tensor
    values: Tensor


class Options(NamedTuple):
    """What a layer's scores go through: s = softcap * tanh(q k scale / softcap)."""

    scale: float
    window: int | None
    softcap: float | None


def tree_decode_attention(
    q: Tensor,
    layer: KeyValues,
    plan: TreePlan,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Each row's attention to its own key and those before it in its text.

    Prefill, decoding and verification alike; no gradient flows. A block of keys is read once for
    all rows below its node, the g heads that share it included: `plan.kv_read` keys and values in
    all, and the partial results.

    Args:
        q: (N, Hq, D), the rows of `plan`, any strides; float32, bfloat16, float16, and float64 on
            the PyTorch path.
        layer: keys and values, the rows' own ones written (`write_key_values`), in q's dtype.
        plan: of a tree that has not changed since.
        scale: of the scores; None: D ** -0.5.
        window: the last `window` keys count, the row's own included; None: all.
        softcap: None: none.
        sinks: (Hq,), a logit of each head that takes part in the softmax and has no value.

    Returns:
        (N, Hq, D), q's dtype, contiguous.

    Raises:
        ValueError: shapes, devices or numbers do not fit each other or the plan; a stale plan.
        TypeError: wrong or different dtypes.

    Source: partial softmax and its merge as in Dao et al., "Flash-Decoding" (2023); reading a
    prefix once as in Juravsky et al., "Hydragen", arXiv 2402.05099, here for any tree.
    """
    _check(q, layer, plan, sinks)
    options = Options(q.shape[2] ** -0.5 if scale is None else float(scale), window, softcap)
    checks.need(window is None or window >= 1, "window", "None or a count >= 1", window)
    checks.need(softcap is None or softcap > 0, "softcap", "None or a number > 0", softcap)
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        # Both paths walk a vector of a head by steps of one.
        q = q if q.stride(2) == 1 else q.contiguous()
        if use_triton(q) and q.dtype != torch.float64:
            sinks = None if sinks is None else sinks.float().contiguous()
            result: Tensor = attend_triton(q, *layer, plan, sinks=sinks, **options._asdict())
            return result
        return attend_torch(q, layer, plan, options, sinks)


def write_key_values(layer: KeyValues, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """Put the keys and values of new tokens into their slots.

    Args:
        layer: changed in place.
        keys, values: (N, H, D), any strides, in the layer's dtype.
        slots: (N,), int64.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit.
    """
    for name, new, old in (("keys", keys, layer.keys), ("values", values, layer.values)):
        checks.need_shape(new, (len(slots), *old.shape[1:]), name, "(rows, H, D) of the cache")
        checks.need_same_device(new, old, name, f"the cache's {name}")
        if new.dtype != old.dtype:
            raise TypeError(f"{name}: need the cache's dtype {old.dtype}, got {new.dtype}")
    with torch.no_grad():
        if use_triton(keys) and keys.dtype != torch.float64:
            keys, values = (x if x.stride(2) == 1 else x.contiguous() for x in (keys, values))
            write_triton(keys, values, *layer, slots)
            return
        layer.keys.index_copy_(0, slots, keys)
        layer.values.index_copy_(0, slots, values)


@dataclass(slots=True, eq=False)
class Block:
    """Items of like sizes, for one call of batched attention."""

    rows: Tensor | None  # (B * M,) int64; an item's last row fills it up. None: 0, 1, ... N - 1
    slots: Tensor  # (B * L,) int32; an item's first slot fills it up
    run: int | None  # the first slot where all slots of a single item follow each other
    partials: Tensor  # (n,) int64, where the results of the n rows not filled up go
    valid: Tensor | None  # (n,) int64 in [0, B * M), None where nothing was filled up
    query: Ints  # (B, M), positions of the rows
    first: Ints  # (B,), positions of the first keys
    length: Ints  # (B,), keys
    window: int | None
    mask: Tensor | None = None  # made at the first use, for all layers
    has_mask: bool = False


class Part(NamedTuple):
    """Partial results of some rows."""

    out: Tensor  # (n, Hq, D), averages of values
    lse: Tensor  # (n, Hq), the logarithms of their normalisers


def attend_torch(
    q: Tensor, layer: KeyValues, plan: TreePlan, options: Options, sinks: Tensor | None
) -> Tensor:
    """`tree_decode_attention` with PyTorch's own operations."""
    if not plan.n_rows:
        return torch.empty_like(q)
    blocks = _blocks_of(plan, q.device, options.window)
    parts = [_attend_block(q, layer, block, options) for block in blocks]
    if any(block.rows is not None for block in blocks):
        parts = _in_order(parts, blocks, plan)
    # Where every block has every row, its results are a row's next part as they are.
    merged = parts[0]
    for i, part in enumerate(parts[1:], 2):
        merged = _joined(merged, part, is_last=i == len(parts) and sinks is None)
    if sinks is None:
        return merged.out.to(q.dtype).contiguous()
    share = torch.sigmoid(merged.lse - sinks.to(merged.lse.dtype))
    return (merged.out * share.unsqueeze(-1)).to(q.dtype)


def _joined(one: Part, two: Part, *, is_last: bool) -> Part:
    """The averages over the keys of both parts."""
    share = torch.sigmoid(two.lse - one.lse).unsqueeze(-1)
    out = torch.lerp(one.out.to(share.dtype), two.out.to(share.dtype), share)
    return Part(out, one.lse if is_last else torch.logaddexp(one.lse, two.lse))


def _in_order(parts: list[Part], blocks: list[Block], plan: TreePlan) -> list[Part]:
    """Parts of all rows: the first one of each row, the second one, ...; nothing where a row has
    fewer."""
    out = parts[0].out.new_zeros(plan.n_partials, *parts[0].out.shape[1:])
    lse = parts[0].lse.new_full((plan.n_partials, parts[0].lse.shape[1]), _NOTHING)
    for part, block in zip(parts, blocks, strict=True):
        valid = block.valid
        kept = part if valid is None else Part(part.out[valid], part.lse[valid])
        out.index_copy_(0, block.partials, kept.out)
        lse.index_copy_(0, block.partials, kept.lse)
    counts = np.diff(plan.partials)
    found = []
    for ordinal in range(int(counts.max())):
        place = plan.partials[:-1] + np.minimum(ordinal, counts - 1)
        index = torch.from_numpy(place.astype(np.int64)).to(out.device)
        part = Part(out.index_select(0, index), lse.index_select(0, index))
        if ordinal >= counts.min():
            beyond = torch.from_numpy(counts <= ordinal).to(out.device)
            part = Part(part.out, part.lse.masked_fill(beyond.unsqueeze(1), _NOTHING))
        found.append(part)
    return found


def _attend_block(q: Tensor, layer: KeyValues, block: Block, options: Options) -> Part:
    """The block's B * M rows' results over its keys."""
    n_items, n_queries = block.query.shape
    n_heads, width = layer.keys.shape[1:]
    # (B, H, M * g, D): the heads of a group are rows of one product.
    packed = q if block.rows is None else q.index_select(0, block.rows)
    packed = packed.reshape(n_items, n_queries, n_heads, -1, width)
    group = packed.shape[3]
    packed = packed.transpose(1, 2).reshape(n_items, n_heads, n_queries * group, width)
    keys, values = (_gathered(slab, block) for slab in layer)
    if not block.has_mask:
        block.mask, block.has_mask = _mask(block, packed, group), True
    mask = block.mask
    if options.softcap is None and q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            packed, keys, values, 0.0, False, attn_mask=mask, scale=options.scale
        )
    else:
        out, lse = _plain(packed, keys, values, mask, options)
    if mask is not None and block.window is not None:
        lse = lse.masked_fill((mask == -torch.inf).all(-1), _NOTHING)
    shape = (n_items, n_heads, n_queries, group)
    rows = n_items * n_queries
    out = out.view(*shape, width).transpose(1, 2).reshape(rows, n_heads * group, width)
    return Part(out, lse.reshape(shape).transpose(1, 2).reshape(rows, n_heads * group))


def _gathered(slab: Tensor, block: Block) -> Tensor:
    """(B, H, L, D): the block's keys or values, where possible without a copy."""
    n_items = len(block.length)
    if block.run is not None:
        part = slab[block.run : block.run + int(block.length[0])]
    else:
        part = slab.index_select(0, block.slots)
    return part.view(n_items, -1, *slab.shape[1:]).transpose(1, 2)


def _mask(block: Block, like: Tensor, group: int) -> Tensor | None:
    """(B, 1, M * g or 1, L), 0 for keys that count and -inf for others; None if all count."""
    n_keys, window = int(block.length.max()), block.window
    key = np.arange(n_keys)
    last = block.first + block.length - 1
    is_causal = bool((block.query < last[:, None]).any())
    cuts = window is not None and bool((block.query - window >= block.first[:, None]).any())
    if not is_causal and not cuts:
        if bool((block.length == n_keys).all()):
            return None
        hidden = (key >= block.length[:, None])[:, None, :]
    else:
        position = (block.first[:, None] + key)[:, None, :]
        query = block.query[:, :, None]
        hidden = (position > np.minimum(query, last[:, None, None])) | (
            (position <= query - window) if window is not None else False
        )
        hidden = hidden.repeat(group, 1)
    mask = torch.from_numpy(hidden).to(like.device).unsqueeze(1)
    return like.new_zeros(mask.shape).masked_fill_(mask, -torch.inf)


def _plain(
    q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    """The fused operation's results where there is none, for as many rows at once as is bounded."""
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    step = max(1, _SCORES // (q.shape[0] * q.shape[1] * keys.shape[2]))
    for start in range(0, q.shape[2], step):
        rows = slice(start, start + step)
        scores = (q[:, :, rows] @ keys.transpose(2, 3)).to(lse.dtype) * options.scale
        if options.softcap is not None:
            scores = torch.tanh(scores / options.softcap) * options.softcap
        if mask is not None:
            scores = scores + (mask[:, :, rows] if mask.shape[2] > 1 else mask)
        # A row without any key that counts gets zeros, not NaN.
        top = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(lse.dtype).min)
        weights = (scores - top).exp()
        total = weights.sum(-1, keepdim=True)
        lse[:, :, rows] = (total.log() + top).squeeze(-1).clamp(min=_NOTHING)
        out[:, :, rows] = (weights / total.clamp(min=1e-30)).to(q.dtype) @ values
    return out, lse


def _blocks_of(plan: TreePlan, device: torch.device, window: int | None) -> list[Block]:
    """The plan's items in blocks, made once for all layers of a window."""
    if window not in plan.blocks:
        plan.blocks[window] = sorted(
            _blocks(plan, device, window), key=lambda block: int(block.first.min())
        )
    found: list[Block] = plan.blocks[window]
    return found


def _inside(plan: TreePlan, window: int | None) -> Ints:
    """The items without the keys that the windows of all their rows have left behind, and without
    those that are left with none."""
    items = plan.items.astype(np.int64)
    if window is None:
        return items
    begin = items[:, Item.Q_BEGIN]
    borders = np.stack([begin, begin + items[:, Item.Q_COUNT]], 1).reshape(-1)
    # reduceat takes the minimum from each border to the next: every other one is an item's.
    first_row = np.minimum.reduceat(np.append(plan.positions, 0), borders)[::2]
    behind = np.maximum(first_row - window + 1 - items[:, Item.KV_BEGIN], 0)
    items[:, (Item.SLOT_BEGIN, Item.KV_BEGIN)] += behind[:, None]
    items[:, Item.KV_LEN] -= behind
    return items[items[:, Item.KV_LEN] > 0]


def _blocks(plan: TreePlan, device: torch.device, window: int | None) -> Iterator[Block]:
    items = _inside(plan, window)
    count, length = items[:, Item.Q_COUNT], items[:, Item.KV_LEN]
    for part in _alike(count, length):
        chosen = items[part]
        n_queries, n_keys = int(count[part].max()), int(length[part].max())
        query = np.arange(n_queries)
        inside = query < chosen[:, Item.Q_COUNT, None]
        rows = chosen[:, Item.Q_BEGIN, None] + np.minimum(query, chosen[:, Item.Q_COUNT, None] - 1)
        key = np.arange(n_keys)
        key = np.where(key < chosen[:, Item.KV_LEN, None], key, 0)
        slots = plan.slots[chosen[:, Item.SLOT_BEGIN, None] + key]
        partials = (plan.partials[rows] + chosen[:, Item.ORDINAL, None])[inside].astype(np.int64)
        is_every = rows.size == plan.n_rows and bool((np.diff(rows.reshape(-1)) == 1).all())
        run = len(part) == 1 and bool((np.diff(slots[0]) == 1).all())
        yield Block(
            rows=None if is_every else torch.from_numpy(rows.reshape(-1)).to(device),
            slots=torch.from_numpy(slots.reshape(-1)).to(device),
            run=int(slots[0, 0]) if run else None,
            partials=torch.from_numpy(partials).to(device),
            valid=None if inside.all() else torch.from_numpy(np.flatnonzero(inside)).to(device),
            query=plan.positions[rows],
            first=chosen[:, Item.KV_BEGIN],
            length=chosen[:, Item.KV_LEN],
            window=window,
        )


def _alike(count: Ints, length: Ints) -> Iterator[Ints]:
    """Numbers of items of like sizes, so that padding them to the largest costs little."""
    order = np.lexsort((-length, -count))
    begin, held = 0, 0
    n_queries = n_keys = 0
    sizes = zip(count[order].tolist(), length[order].tolist(), strict=True)
    for i, (queries, keys) in enumerate(sizes):
        widest, longest = max(n_queries, queries), max(n_keys, keys)
        padded = (i + 1 - begin) * widest * longest
        if i > begin and padded > max(_SMALL, _PADDING * (held + queries * keys)):
            yield order[begin:i]
            begin, held, widest, longest = i, 0, queries, keys
        held += queries * keys
        n_queries, n_keys = widest, longest
    if len(order):
        yield order[begin:]


def _check(q: Tensor, layer: KeyValues, plan: TreePlan, sinks: Tensor | None) -> None:
    checks.need_float(q, "q")
    shape = tuple(layer.keys.shape)
    good = len(shape) == 3 and tuple(layer.values.shape) == shape
    both = (shape, tuple(layer.values.shape))
    checks.need(good, "layer", "keys and values of shape (n_slots, H, D)", both)
    good = layer.keys.is_contiguous() and layer.values.is_contiguous()
    checks.need(good, "layer", "contiguous keys and values", "others")
    checks.need(q.dim() == 3, "q", "shape (N, Hq, D)", tuple(q.shape))
    n_rows, n_heads, width = q.shape
    checks.need(width == shape[2], "q", f"the keys' width D = {shape[2]}", width)
    checks.need(n_heads % shape[1] == 0, "q", f"a multiple of {shape[1]} heads", n_heads)
    checks.need(n_rows == plan.n_rows, "q", f"the plan's {plan.n_rows} rows", n_rows)
    checks.need(not plan.is_stale, "plan", "one of the tree as it is", "one made before a change")
    checks.need_same_device(q, layer.keys, "q", "the keys")
    if not q.dtype == layer.keys.dtype == layer.values.dtype:
        got = f"{q.dtype}, {layer.keys.dtype} and {layer.values.dtype}"
        raise TypeError(f"q, keys, values: need one dtype, got {got}")
    if sinks is not None:
        checks.need_float(sinks, "sinks")
        checks.need_shape(sinks, (n_heads,), "sinks", "one a query head")
        checks.need_same_device(sinks, q, "sinks", "q")
