"""Layout: which hidden rows an op computes, and which pairs hang on each.

A *slot* is a row at one temperature; pairs are sorted by slot. Everything is worked out on the
host: from the batch's host copy where there is one, otherwise after one transfer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rollfuse.kernels import checks


@dataclass(frozen=True, slots=True)
class Chunk:
    """A run of slots [start, stop) and the pairs [first, last) of the layout that hang on them."""

    start: int
    stop: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Layout:
    """S slots and A selected pairs, sorted by slot; index tensors lie on the op's device."""

    n_slots: int
    n_pairs: int  # A
    rows: Tensor | None  # (S,) int64 row of each slot; None: slot s is row s
    unique_rows: bool  # no row has two slots
    pairs: Tensor | None  # (A,) int64 index of each pair in the batch; None: all, in order
    slot: Tensor  # (A,) int64 slot of each pair
    starts: np.ndarray | None  # (S + 1,) on the host; None: one pair a slot

    @property
    def one_per_slot(self) -> bool:
        return self.starts is None

    def chunks(self, chunk_rows: int) -> Iterator[Chunk]:
        """Runs of at most `chunk_rows` slots, as even as can be."""
        for start, stop in chunk_borders(self.n_slots, chunk_rows):
            first, last = start, stop
            if self.starts is not None:
                first, last = int(self.starts[start]), int(self.starts[stop])
            yield Chunk(start, stop, first, last)

    def part(self, keep: np.ndarray) -> LayoutPart:
        """The slots where `keep` (S,) bool is true, as a layout of their own."""
        device = self.slot.device
        slots = np.flatnonzero(keep)
        starts, pairs = None, slots
        if self.starts is not None:
            counts = np.diff(self.starts)[slots]
            starts = np.append(0, counts.cumsum())
            offset = np.arange(starts[-1]) - starts[:-1].repeat(counts)
            pairs = self.starts[slots].repeat(counts) + offset
        numbers = np.arange(len(slots))
        new_slot = numbers if starts is None else numbers.repeat(np.diff(starts))
        index = torch.from_numpy(slots).to(device, non_blocking=True)
        layout = Layout(
            len(slots),
            len(pairs),
            index if self.rows is None else self.rows[index],
            self.unique_rows,
            None,
            torch.from_numpy(new_slot).to(device, non_blocking=True),
            starts,
        )
        return LayoutPart(layout, index, torch.from_numpy(pairs).to(device, non_blocking=True))

    def padded(self, multiple: int) -> Layout:
        """With copies of the first slot at the end, up to a multiple; one pair a slot.

        What the copies' pairs get is for nobody.
        """
        if multiple == 1:
            return self
        more = -self.n_slots % multiple
        if not more:
            # The gradient of the rows waits as long as that of a layout that is filled up.
            return replace(self, unique_rows=False)
        assert self.one_per_slot
        n = self.n_slots + more
        first = self.slot.new_zeros(more)
        rows = self.slot if self.rows is None else self.rows
        pairs = self.slot if self.pairs is None else self.pairs
        return Layout(
            n,
            n,
            torch.cat([rows, rows[first]]),
            False,
            torch.cat([pairs, pairs[first]]),
            torch.arange(n, device=self.slot.device),
            None,
        )

    def with_a_row_each(self) -> Layout:
        """The same slots and pairs over rows that have been copied, one for each slot."""
        return replace(self, rows=None, unique_rows=True)

    def pick(self, values: Tensor) -> Tensor:
        """(A,) values of the selected pairs from (P,) values."""
        return values if self.pairs is None else values[self.pairs]

    def of_slots(self, values: Tensor) -> Tensor:
        """(S,) values from (A,) values that the pairs of a slot agree on."""
        if self.one_per_slot:
            return values
        out = values.new_empty(self.n_slots)
        out[self.slot] = values
        return out

    def spread(self, values: Tensor, n_pairs: int, fill: float) -> Tensor:
        """(P,) values from (A,): `fill` where a pair is not selected."""
        if self.pairs is None:
            return values
        out = values.new_full((n_pairs,), fill)
        return out.index_copy_(0, self.pairs, values)


def chunk_borders(n_slots: int, chunk_rows: int) -> Iterator[tuple[int, int]]:
    """[start, stop) of runs of at most `chunk_rows` slots, as even as can be."""
    n_chunks = -(-n_slots // chunk_rows)
    for i in range(n_chunks):
        yield n_slots * i // n_chunks, n_slots * (i + 1) // n_chunks


@dataclass(frozen=True, slots=True)
class LayoutPart:
    """Some slots of a layout, and where they and their pairs stand in it."""

    layout: Layout  # S' slots, A' pairs
    slots: Tensor  # (S',) int64
    pairs: Tensor  # (A',) int64


@dataclass(frozen=True, slots=True)
class Request:
    """What a layout is made from; tensors (P,) may lie on any device."""

    n_pairs: int
    n_rows: int
    rows: Tensor | None = None
    temperature: Tensor | float = 1.0
    selected: Tensor | None = None
    slot_per_pair: bool = False  # every pair gets a slot of its own
    name: str = "hidden"  # of what has the rows, for messages


def build_layout(request: Request, device: torch.device) -> Layout:
    """The layout of the selected pairs on `device`.

    Raises:
        ValueError: a pair without row: P is not R and `rows` is None, or a row index is >= R.
        RuntimeError: a CUDA graph is being captured, which would replay this batch's rows.
    """
    checks.refuse_capture(device, f"a loss or log-probs from {request.name}")
    if request.rows is None:
        checks.need(
            request.n_pairs == request.n_rows,
            request.name,
            f"{request.n_pairs} rows, one a pair (or rows=, the row of each pair)",
            request.n_rows,
        )
    selected, rows, temperature = _on_host(request)
    pairs = None if selected is None or selected.all() else np.flatnonzero(selected)
    n_pairs = request.n_pairs if pairs is None else len(pairs)
    if rows is None:
        slot_rows = pairs
        starts, unique, slot = None, True, np.arange(n_pairs)
    else:
        if len(rows) and (rows.max() >= request.n_rows or rows.min() < 0):
            raise ValueError(
                f"rows: need indices in [0, {request.n_rows}), got {rows.min()} to {rows.max()}"
            )
        rows = rows if pairs is None else rows[pairs]
        temperature = temperature if temperature is None or pairs is None else temperature[pairs]
        order, slot, slot_rows, starts, unique = _group(rows, temperature, request.slot_per_pair)
        if order is not None:
            pairs = order if pairs is None else pairs[order]

    def move(index: np.ndarray | None) -> Tensor | None:
        return None if index is None else torch.from_numpy(index).to(device, non_blocking=True)

    moved_slot = move(slot)
    assert moved_slot is not None
    n_slots = n_pairs if starts is None else len(starts) - 1
    identity = slot_rows is not None and n_slots == request.n_rows and _is_range(slot_rows)
    return Layout(
        n_slots,
        n_pairs,
        None if identity else move(slot_rows),
        unique,
        move(pairs),
        moved_slot,
        starts,
    )


def _on_host(
    request: Request,
) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]:
    """(selected, rows, temperature) as arrays, None where there is none; one transfer at most."""
    tensors = [request.selected, request.rows]
    # A temperature only splits rows where several pairs can share one.
    if isinstance(request.temperature, Tensor) and request.rows is not None:
        tensors.append(request.temperature)
    present = [t for t in tensors if t is not None]
    if any(t.device.type != "cpu" for t in present):
        # float64 holds every bool, row index and float32 exactly: one array, one transfer.
        packed = torch.stack([t.detach().double() for t in present]).cpu()
        found = iter(packed.numpy())
    else:
        widened = (t.double() if t.is_floating_point() else t for t in present)
        found = iter([t.detach().numpy() for t in widened])
    selected = None if request.selected is None else next(found).astype(bool)
    rows = None if request.rows is None else next(found).astype(np.int64)
    return selected, rows, next(found, None)


def _group(
    rows: np.ndarray, temperature: np.ndarray | None, slot_per_pair: bool
) -> tuple[np.ndarray | None, np.ndarray, np.ndarray, np.ndarray | None, bool]:
    """(order, slot, slot rows, starts, unique rows) of pairs grouped by row and temperature."""
    n = len(rows)
    if n < 2 or (np.diff(rows) > 0).all():
        return None, np.arange(n), rows, None, True
    keys = (rows,) if temperature is None else (temperature, rows)
    order = np.lexsort(keys)
    rows = rows[order]
    new_row = np.diff(rows, prepend=rows[0] - 1) != 0
    leads = new_row.copy()
    if temperature is not None:
        leads |= np.diff(temperature[order], prepend=np.inf) != 0
    if slot_per_pair:
        leads[:] = True
    slot = leads.astype(np.int64).cumsum() - 1
    unique = bool((leads == new_row).all())
    starts = None if leads.all() else np.append(np.flatnonzero(leads), n)
    return order, slot, rows[leads], starts, unique


def _is_range(index: np.ndarray) -> bool:
    return len(index) == 0 or (index[0] == 0 and bool((np.diff(index) == 1).all()))
