"""TreeStep: one forward pass over branches of a tree, made anew or moved on from the one before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rollfuse.kernels import checks
from rollfuse.kernels.tree_plan import Spans, TreePlan, counted
from rollfuse.rollout.node import Node
from rollfuse.rollout.token_tree import Ints, TokenTree

# Steps of plain decoding that one plan serves before it is made anew.
_ROOM = 64


class Paths(NamedTuple):
    """The rows of the nodes on the ways to the branches' ends, n nodes."""

    parent: Ints  # (n,) the place of each one's parent, -1 for none
    first_row: Ints  # (n,)
    n_rows: Ints  # (n,)
    is_whole: npt.NDArray[np.bool_]  # (n,) whether each of its tokens has a row
    end: Ints  # (B,) the place of each branch's last node

    @property
    def last(self) -> Ints:
        """(B,) the row after which each branch goes on."""
        return self.first_row[self.end] + self.n_rows[self.end] - 1

    def rows(self, counts: Ints) -> Ints:
        """The rows of the last counts[b] >= 1 tokens of each branch, branch by branch.

        Raises:
            ValueError: a token among them has none.
        """
        found = np.empty(int(counts.sum()), dtype=np.int64)
        # From the ends upwards: how many rows are still to find, and the place behind them.
        node, left, behind = self.end, counts, counts.cumsum()
        while len(node):
            here = np.minimum(left, self.n_rows[node])
            first = self.first_row[node] + self.n_rows[node] - here
            inside = counted(here)
            found[np.repeat(behind - here, here) + inside] = np.repeat(first, here) + inside
            goes_up = left > here
            good = (self.is_whole[node] & (self.parent[node] >= 0))[goes_up].all()
            needed = "as many tokens at most as this pass computes"
            checks.need(bool(good), "counts", needed, counts.tolist())
            left, behind = (left - here)[goes_up], (behind - here)[goes_up]
            node = self.parent[node[goes_up]]
        return found


@dataclass(slots=True, eq=False)
class TreeStep:
    """What one forward pass computes.

    Attributes:
        plan: which row reads which keys.
        ids: (N,) int64, the rows' tokens.
        slots: (N,) int64, where their keys and values go; for a row that is computed again, a slot
            that nobody reads.
        paths: where each branch's rows are.
    """

    plan: TreePlan
    ids: Ints
    slots: Ints
    paths: Paths
    numbers: Ints  # of the nodes that it computes
    lengths: Ints  # theirs
    shape: int  # of the tree
    ends: list[int]  # the numbers of the branches' nodes
    _slots_on: Tensor | None = None

    @property
    def last(self) -> Ints:
        """(B,) the row after which each branch goes on."""
        return self.paths.last

    def slots_on(self, device: torch.device) -> Tensor:
        """`slots` on `device`, copied there once."""
        if self._slots_on is None:
            self._slots_on = torch.from_numpy(self.slots).to(device, non_blocking=True)
        return self._slots_on


def next_step(old: TreeStep, tree: TokenTree, ends: list[int]) -> TreeStep | None:
    """`old` moved on, if these are its branches and each has got one token since."""
    if old.shape != tree.shape.count or old.plan.room < 1:
        return None
    if ends != old.ends or len(old.ids) != len(ends):
        return None
    numbers = old.numbers
    length = tree.length[numbers]
    one_more = (length == old.lengths + 1) & (tree.computed[numbers] == old.lengths)
    if not one_more.all():
        return None
    slots = tree.last_slots(numbers)
    plan = old.plan.advanced(slots)
    return TreeStep(plan, tree.token[slots], slots, old.paths, numbers, length, old.shape, ends)


def new_step(
    tree: TokenTree, ends: Sequence[Node], make_plan: Callable[[Spans], TreePlan]
) -> TreeStep:
    """The step that computes the texts that end in `ends`, none of which is empty."""
    nodes, parent, below = _paths(ends)
    numbers = np.array([node.number for node in nodes], dtype=np.int64)
    length = tree.length[numbers]
    todo = length - tree.computed[numbers]
    place = np.zeros(len(tree.length), dtype=np.int64)
    place[numbers] = np.arange(len(numbers))
    end = place[np.array([node.number for node in ends], dtype=np.int64)]
    again = np.zeros(len(nodes), dtype=bool)
    again[end] = todo[end] == 0
    rows = np.where(again, 1, todo)
    # Plain decoding: each branch has an end of its own that grows, by one token.
    is_plain = int(rows.sum()) == len(ends) and bool((rows[end] == 1).all())
    is_plain = is_plain and not again.any() and all(node.is_open for node in ends)
    slots = tree.slots_of(nodes)
    spans = Spans(
        parent=parent,
        below=below,
        start=np.array([node.start for node in nodes], dtype=np.int64),
        length=length,
        rows=rows,
        slots=slots,
        room=_ROOM if is_plain else 0,
    )
    plan = make_plan(spans)
    plan.changes, plan.made_at = tree.changes, tree.changes.count
    # The rows of a node are its last tokens.
    where = slots[np.repeat(length.cumsum() - rows, rows) + counted(rows)]
    return TreeStep(
        plan,
        ids=tree.token[where],
        slots=np.where(np.repeat(again, rows), len(tree.token), where),
        paths=Paths(parent, rows.cumsum() - rows, rows, rows == length, end),
        numbers=numbers[rows > 0],
        lengths=length[rows > 0],
        shape=tree.shape.count,
        ends=[node.number for node in ends],
    )


def _paths(ends: Sequence[Node]) -> tuple[list[Node], Ints, Ints]:
    """The nodes on the ways to `ends`, depth first; the place of each one's parent, -1 for none;
    the place behind the last one below each."""
    roots: list[Node] = []
    below: dict[int, list[Node]] = {}
    for end in ends:
        node: Node | None = end
        child: Node | None = None
        while node is not None:
            children = below.get(node.number)
            is_new = children is None
            if children is None:
                below[node.number] = children = []
            if child is not None:
                children.append(child)
            if not is_new:
                break
            child, node = node, node.parent
        else:
            assert child is not None
            roots.append(child)
    nodes: list[Node] = []
    parent: list[int] = []
    todo = [(root, -1) for root in reversed(roots)]
    while todo:
        node, above = todo.pop()
        children = below[node.number]
        if children:
            here = len(nodes)
            todo.extend([(child, here) for child in reversed(children)])
        nodes.append(node)
        parent.append(above)
    behind = list(range(1, len(nodes) + 1))
    for i in range(len(nodes) - 1, -1, -1):
        above = parent[i]
        if above >= 0 and behind[i] > behind[above]:
            behind[above] = behind[i]
    return nodes, np.array(parent, dtype=np.int64), np.array(behind, dtype=np.int64)
