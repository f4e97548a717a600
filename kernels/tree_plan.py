"""TreePlan: which query rows read which keys, once for all rows that share them.

Texts that share beginnings form a tree whose nodes are spans of tokens. Query rows are numbered
depth first, so the rows below a node are one interval, and an item of the plan is "these rows read
these keys". A key counts for a row if it is not after it: rows of the node itself are causal by
that, rows below it see all of it. Prefill, decoding and verification are the same thing, with many,
one or a few rows a text.

Legend: N query rows, I items, S entries of the slot list, Hq query heads, Hkv key-value heads,
    D width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Ints = npt.NDArray[np.int64]
Ints32 = npt.NDArray[np.int32]


class Item(IntEnum):
    """The columns of `TreePlan.items`."""

    Q_BEGIN = 0  # first query row
    Q_COUNT = 1  # rows, at least one
    SLOT_BEGIN = 2  # first entry of the slot list
    KV_LEN = 3  # keys, at least one; their positions follow each other
    KV_BEGIN = 4  # position of the first key in its text
    ORDINAL = 5  # how many items of the same rows come before it


@dataclass(slots=True)
class Changes:
    """How often a tree has changed: a plan made before a change is refused."""

    count: int = 0


@dataclass(frozen=True, slots=True)
class Spans:
    """The nodes of a tree as a plan sees them, depth first: n of them, parents before children.

    Args:
        parent: (n,) int64, the place of each one's parent, -1 for none.
        below: (n,) int64, the place behind the last one below it.
        start: (n,) int64, position of its first token.
        length: (n,) int64, its tokens.
        rows: (n,) int64, how many of its last tokens are query rows.
        slots: (sum of length,) int64, where the tokens lie, in this order.
        room: how many more tokens each one with a row is about to get, one a step; those are leaves
            with one row each, if it is not 0.
    """

    parent: Ints
    below: Ints
    start: Ints
    length: Ints
    rows: Ints
    slots: Ints
    room: int = 0


@dataclass(slots=True, eq=False)
class TreePlan:
    """Flat metadata of one forward pass; see `plan_of`. All arrays lie on the host.

    Attributes:
        items: (I, 6) int32, the columns of `Item`. The items of a row have the ordinals 0, 1, ...,
            in the order of their positions, and together hold every key of the row once.
        slots: (S,) int32, where the keys of the items lie.
        positions: (N,) int64, of the query rows in their texts.
        partials: (N + 1,) int32, the running number of items a row has: its partial results are
            partials[row] + ordinal.
        tails: (N,) int64, the item that holds each row's own key.
        room: by how many tokens every tail can grow before a new plan is needed.
        changes: of the tree it was made of.
        made_at: their count then.
        blocks: what the PyTorch path makes of it, by window.
    """

    items: Ints32
    slots: Ints32
    positions: Ints
    partials: Ints32
    tails: Ints
    room: int = 0
    changes: Changes = field(default_factory=Changes)
    made_at: int = 0
    blocks: dict[int | None, Any] = field(default_factory=dict, repr=False)
    _on: dict[torch.device, PlanTensors] = field(default_factory=dict, repr=False)

    @property
    def is_stale(self) -> bool:
        """Whether the tree has changed since."""
        return self.made_at != self.changes.count

    @property
    def n_rows(self) -> int:
        return len(self.positions)

    @property
    def n_partials(self) -> int:
        return int(self.partials[-1])

    @property
    def kv_read(self) -> int:
        """Keys that one layer reads (and as many values), counted with repetitions."""
        return int(self.items[:, Item.KV_LEN].sum())

    def on(self, device: torch.device) -> PlanTensors:
        """The arrays as tensors on `device`, copied there once."""
        if device not in self._on:
            arrays = (self.items, self.slots, self.positions, self.partials)
            self._on[device] = PlanTensors(
                *(torch.from_numpy(array).to(device, non_blocking=True) for array in arrays)
            )
        return self._on[device]

    def advanced(self, slots: Ints) -> TreePlan:
        """The plan of the next step, when each row's text has got one more token.

        Only the new slots and the small arrays travel to a device; the slot list stays there.

        Args:
            slots: (N,), where the new tokens lie. This plan needs room >= 1 and one row a text.
        """
        assert self.room >= 1 and len(slots) == self.n_rows
        items = self.items.copy()
        end = items[self.tails, Item.SLOT_BEGIN] + items[self.tails, Item.KV_LEN]
        items[self.tails, Item.KV_LEN] += 1
        self.slots[end] = slots
        plan = replace(
            self, items=items, positions=self.positions + 1, room=self.room - 1, blocks={}, _on={}
        )
        plan.made_at = self.changes.count
        for device, old in self._on.items():
            small = (torch.from_numpy(x).to(device, non_blocking=True) for x in (items, end, slots))
            new_items, place, new = small
            if device.type != "cpu":  # there the list is this very memory
                old.slots[place] = new.to(old.slots.dtype)
            plan._on[device] = old._replace(items=new_items, positions=old.positions + 1)
        return plan


class PlanTensors(NamedTuple):
    """The arrays of a TreePlan on a device, of the same shapes and dtypes."""

    items: Tensor
    slots: Tensor
    positions: Tensor
    partials: Tensor


def plan_of(
    spans: Spans, *, group: int = 1, kv_bytes: int = 4, short: int = 0, split: int | None = None
) -> TreePlan:
    """The plan of a tree's spans.

    A node becomes one item, read by its own rows and all below it, unless that costs more bytes
    than it saves: a partial result is 8 bytes a row, head and channel to write and read, so a node
    of few keys goes into its children's items, which then read it once each, and its own rows, if
    it has any, have an item for themselves. Long items are split, but not so far that the partial
    results are more than a quarter of the keys' and values' bytes.

    Args:
        spans: the nodes on the rows' paths; every one has a row, or one below it does.
        group: query heads that share a key-value head, Hq / Hkv.
        kv_bytes: of an element of the keys.
        short: so does a node of at most so many keys, unless it has 8 for each packed row.
        split: the fewest keys of a part of an item, None not to split. Programs of a device share
            the work of one item by its parts.

    Returns:
        A TreePlan of N = sum(rows) rows, numbered in the order of the spans.
    """
    first_row = np.concatenate([[0], spans.rows.cumsum()])
    q_count = first_row[spans.below] - first_row[:-1]
    carried, goes_down = _merged(spans, q_count, group, kv_bytes, short)
    is_item = ~goes_down | (spans.rows > 0)
    q_count = np.where(goes_down, spans.rows, q_count)
    n_keys = carried + spans.length
    # At most 2 * packed rows / keys of a part are partial bytes, in a dtype of 2 bytes.
    least = np.maximum(split or 1, 8 * q_count * group)
    n_parts = np.where(is_item, np.maximum(1, n_keys // least) if split else 1, 0)
    before = _summed_above(spans, np.where(goes_down, 0, n_parts))
    room = np.where(spans.rows > 0, spans.room, 0)
    kept = np.flatnonzero(is_item)
    slots, begin = _item_slots(spans, kept, carried, n_keys + room)
    # One entry a part: its item's place in `kept`, and its number there.
    item = np.repeat(np.arange(len(kept)), n_parts[kept])
    which, of = counted(n_parts[kept]), n_parts[kept][item]
    node = kept[item]
    border = n_keys[node] * which // of
    items = np.empty((len(item), len(Item)), dtype=np.int32)
    items[:, Item.Q_BEGIN] = first_row[node]
    items[:, Item.Q_COUNT] = q_count[node]
    items[:, Item.SLOT_BEGIN] = begin[item] + border
    items[:, Item.KV_LEN] = n_keys[node] * (which + 1) // of - border
    items[:, Item.KV_BEGIN] = spans.start[node] - carried[node] + border
    items[:, Item.ORDINAL] = before[node] + which
    ends = np.zeros(len(spans.rows), dtype=np.int64)
    ends[kept] = n_parts[kept].cumsum() - 1
    own = np.repeat(np.arange(len(spans.rows)), spans.rows)
    partials = np.concatenate([[0], (before + n_parts)[own].cumsum()]).astype(np.int32)
    last = spans.start + spans.length - spans.rows
    positions = last[own] + counted(spans.rows)
    return TreePlan(items, slots, positions, partials, tails=ends[own], room=spans.room)


def _merged(
    spans: Spans, q_count: Ints, group: int, kv_bytes: int, short: int
) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """How many keys of nodes above go into each node's item, and whose go into their children's."""
    n_children = np.bincount(spans.parent[spans.parent >= 0], minlength=len(spans.parent))
    # Who reads a node that goes down, in the place of its one item.
    readers = n_children + (spans.rows > 0)
    packed_below = (q_count - spans.rows) * group
    carried = np.zeros_like(spans.length)
    goes_down = np.zeros(len(spans.length), dtype=bool)
    for level in _levels(spans.parent):
        above = spans.parent[level]
        merged_above = (above >= 0) & goes_down[above]
        carried[level] = np.where(merged_above, carried[above] + spans.length[above], 0)
        n_keys = carried[level] + spans.length[level]
        repeated = (readers[level] - 1) * n_keys * kv_bytes
        is_short = (n_keys <= short) & (n_keys < 8 * packed_below[level])
        is_cheaper = (repeated <= 4 * packed_below[level]) | is_short | (n_keys == 0)
        goes_down[level] = is_cheaper & (n_children[level] > 0)
    return carried, goes_down


def _summed_above(spans: Spans, values: Ints) -> Ints:
    """(n,), the sum of `values` over the nodes above each."""
    total = np.zeros_like(values)
    for level in _levels(spans.parent)[1:]:
        above = spans.parent[level]
        total[level] = total[above] + values[above]
    return total


def _levels(parent: Ints) -> list[Ints]:
    """The places of the nodes without a parent, of their children, of theirs and so on."""
    depths: list[int] = []
    for above in parent.tolist():  # parents stand before their children
        depths.append(depths[above] + 1 if above >= 0 else 0)
    depth = np.array(depths, dtype=np.int64)
    order = np.argsort(depth, kind="stable")
    return np.split(order, np.bincount(depth).cumsum()[:-1]) if len(order) else []


def _item_slots(spans: Spans, kept: Ints, carried: Ints, capacity: Ints) -> tuple[Ints32, Ints]:
    """The slot list, with a gap behind each item's keys for those to come, and where each item of
    `kept` begins in it."""
    begin = capacity[kept].cumsum() - capacity[kept]
    slots = np.zeros(int(capacity[kept].sum()), dtype=np.int32)
    first_slot = spans.length.cumsum() - spans.length
    node, place = kept, begin + carried[kept]
    while len(node):
        count = spans.length[node]
        inside = counted(count)
        slots[np.repeat(place, count) + inside] = spans.slots[
            np.repeat(first_slot[node], count) + inside
        ]
        # What was carried into it comes from its parent, which lies before it.
        goes_up = carried[node] > 0
        node, place = spans.parent[node[goes_up]], place[goes_up]
        place = place - spans.length[node]
    return slots, begin


def counted(counts: Ints) -> Ints:
    """0, 1, ... counts[0] - 1, 0, 1, ... counts[1] - 1 and so on."""
    ends = counts.cumsum()
    return np.arange(int(counts.sum())) - np.repeat(ends - counts, counts)
