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

from collections.abc import Sequence
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
class Span:
    """A node as the plan sees it. A list of spans is in depth-first order, parents first.

    Args:
        parent: its place in the list, -1 for none.
        start: position of its first token.
        slots: (length,) int64, where its tokens lie.
        rows: how many of its last tokens are query rows, from 0 to length.
        room: how many more tokens it is about to get, one a step; for a leaf only.
    """

    parent: int
    start: int
    slots: Ints
    rows: int
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
        blocks: what the PyTorch path makes of it.
    """

    items: Ints32
    slots: Ints32
    positions: Ints
    partials: Ints32
    tails: Ints
    room: int = 0
    changes: Changes = field(default_factory=Changes)
    made_at: int = 0
    blocks: list[Any] = field(default_factory=list, repr=False)
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
            self, items=items, positions=self.positions + 1, room=self.room - 1, blocks=[], _on={}
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
    spans: Sequence[Span], *, group: int = 1, kv_bytes: int = 4, split: int | None = None
) -> TreePlan:
    """The plan of a tree's spans.

    A node becomes one item, read by all rows below it, unless that costs more bytes than it saves:
    a partial result is 8 bytes a row, head and channel to write and read, so a node of few keys
    goes into its children's items, which then read it once each. Long items are split, but not so
    far that the partial results are more than a quarter of the keys' and values' bytes.

    Args:
        spans: the nodes on the rows' paths.
        group: query heads that share a key-value head, Hq / Hkv.
        kv_bytes: of an element of the keys.
        split: the fewest keys of a part of an item, None not to split. Programs of a device share
            the work of one item by its parts.

    Returns:
        A TreePlan of N = sum of the spans' rows, numbered in the order of the spans.
    """
    rows = [span.rows for span in spans]
    rows_below, n_children = _below(spans)
    first_row = 0
    carried: list[list[Span]] = []  # of each span: what its children's items begin with
    ordinal: list[int] = []  # the items its children's rows have before theirs
    items: list[tuple[int, ...]] = []
    slots: list[Ints] = [np.empty(0, np.int64)]
    tails: list[int] = []
    n_slots = 0
    for i, span in enumerate(spans):
        is_root = span.parent < 0
        chain = [*([] if is_root else carried[span.parent]), span]
        n_before = 0 if is_root else ordinal[span.parent]
        length = sum(len(part.slots) for part in chain)
        packed = rows_below[i] * group
        repeats = (n_children[i] - 1) * length * kv_bytes
        if not span.rows and n_children[i] and (repeats <= 4 * packed or not length):
            carried.append(chain)
            ordinal.append(n_before)
            continue
        carried.append([])
        parts = _parts(length, packed, split) if packed else []
        for n, (begin, end) in enumerate(parts, n_before):
            place = (n_slots + begin, end - begin, chain[0].start + begin)
            items.append((first_row, rows_below[i], *place, n))
        ordinal.append(n_before + len(parts))
        slots.extend(part.slots for part in chain)
        if span.room:
            slots.append(np.zeros(span.room, np.int64))
        n_slots += length + span.room
        tails.extend([len(items) - 1] * span.rows)
        first_row += span.rows
    n_partials = np.repeat(np.array(ordinal, dtype=np.int32), rows)
    return TreePlan(
        items=np.array(items, dtype=np.int32).reshape(-1, len(Item)),
        slots=np.concatenate(slots).astype(np.int32),
        positions=_positions(spans),
        partials=np.concatenate([[0], n_partials.cumsum()]).astype(np.int32),
        tails=np.array(tails, dtype=np.int64),
        room=min((span.room for span in spans if span.rows), default=0),
    )


def _below(spans: Sequence[Span]) -> tuple[list[int], list[int]]:
    """Of each span: the query rows of it and of all below it; its children."""
    rows = [span.rows for span in spans]
    n_children = [0] * len(spans)
    for i in range(len(spans) - 1, -1, -1):
        parent = spans[i].parent
        if parent >= 0:
            rows[parent] += rows[i]
            n_children[parent] += 1
    return rows, n_children


def _parts(length: int, packed: int, split: int | None) -> list[tuple[int, int]]:
    """Where the parts of an item of `length` keys begin and end."""
    if split is None:
        return [(0, length)]
    # Partial bytes over key-value bytes are at most 2 * packed / part in a 2-byte dtype.
    part = max(split, 8 * packed)
    n = max(1, length // part)
    border = [length * k // n for k in range(n + 1)]
    return list(zip(border[:-1], border[1:], strict=True))


def _positions(spans: Sequence[Span]) -> Ints:
    """(N,) of the query rows: the last ones of their spans."""
    rows = np.array([span.rows for span in spans], dtype=np.int64)
    end = np.array([span.start + len(span.slots) for span in spans], dtype=np.int64)
    ends = rows.cumsum()
    return np.repeat(end - ends, rows) + np.arange(int(rows.sum()), dtype=np.int64)
