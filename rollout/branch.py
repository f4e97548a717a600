"""Branch: the handle of one text of a tree; Pin, which holds a text without going on from it."""

from __future__ import annotations

from operator import index

import numpy as np
import torch

from rollfuse.kernels import checks
from rollfuse.kernels.noise import fork_streams, new_streams
from rollfuse.rollout.node import Node, path
from rollfuse.rollout.token_tree import Ints, TokenTree


class Stream:
    """A stream that is made when it is asked for: the child of another one, or a text's of its own.

    Cells of streams, not of branches: a branch does not keep those it descends from.
    """

    __slots__ = ("number", "parent", "value")

    def __init__(self, value: int | None, parent: Stream | None, number: int) -> None:
        self.value, self.parent, self.number = value, parent, number

    def get(self) -> int:
        todo: list[Stream] = []
        cell: Stream | None = self
        while cell is not None and cell.value is None:
            todo.append(cell)
            cell = cell.parent
        above = None if cell is None else cell.value
        for cell in reversed(todo):
            if above is None:
                above = int(new_streams(0, 1, first=cell.number))
            else:
                above = int(fork_streams(torch.tensor([above]), 1, first=cell.number))
            cell.value, cell.parent = above, None
        assert self.value is not None
        return self.value


class Branch:
    """The handle of one text in a TreeCache. A branch ends by `prune`, not by being forgotten.

    Attributes:
        stream: whose noise samples this text, see `rollfuse.new_streams`. Every fork has one of its
            own, and so has, within its cache, every text that was given none.
    """

    __slots__ = ("_n_forks", "_node", "_stream", "_tree")

    def __init__(self, tree: TokenTree, node: Node, stream: Stream) -> None:
        self._tree, self._node, self._stream = tree, node, stream
        self._n_forks = 0
        node.handles += 1

    @property
    def node(self) -> Node:
        checks.need(self._node is not _GONE, "branch", "a live branch", "one that was pruned")
        return self._node

    def __len__(self) -> int:
        """Tokens of the text."""
        return self._tree.end(self.node)

    @property
    def tokens(self) -> Ints:
        """(len,) int64, the text."""
        tree = self._tree
        return np.concatenate([tree.token[tree.slots(node)] for node in path(self.node)])

    @property
    def n_computed(self) -> int:
        """Tokens whose keys and values are there, from the first on."""
        tree = self._tree
        return sum(int(tree.computed[node.number]) for node in path(self.node))

    @property
    def versions(self) -> list[tuple[int, int]]:
        """(end, version): up to which position which policy version writes the text."""
        found: list[tuple[int, int]] = []
        for node in path(self.node):
            if found and found[-1][1] == node.version:
                found.pop()
            if self._tree.length[node.number]:
                found.append((self._tree.end(node), node.version))
        return found

    @property
    def stream(self) -> int:
        return self._stream.get()

    def is_of(self, tree: TokenTree) -> bool:
        """Whether its text is one of this tree's."""
        return self._tree is tree

    def fork(self, n: int = 1, *, at: int | None = None) -> list[Branch]:
        """`n` new branches with this one's first `at` tokens (None: all). Copies nothing.

        Raises:
            ValueError: `at` is past the end or negative, `n` is negative, the branch was pruned.
            TypeError: one of them is no integer.
        """
        n, at = index(n), len(self) if at is None else index(at)
        checks.need(n >= 0, "n", "a number of branches >= 0", n)
        node = self._tree.node_at(self.node, at)
        if not n:
            self._tree.release(node)
        return [self._fork_on(node) for _ in range(n)]

    def twin(self) -> Branch:
        """Another handle of this text, to be forked and ended without a trace in this one's
        streams."""
        return Branch(self._tree, self.node, Stream(0, None, 0))

    def truncate(self, at: int) -> None:
        """Drop the tokens from position `at` on; what others share of them stays theirs."""
        old = self.node
        node = self._tree.cut(old, index(at))
        if node is not old:
            node.handles += 1
            self._leave(old)
            self._node = node

    def follow(self, other: Branch) -> None:
        """Stand where `other` stands, which ends; the stream stays this branch's own.

        Raises:
            ValueError: `other` is of another cache or was pruned.
        """
        checks.need(other.is_of(self._tree), "other", "a branch of this cache", "another one's")
        old, self._node = self.node, other.node
        other._node = _GONE
        self._leave(old)

    def prune(self, *, retain: bool = False) -> None:
        """End the branch. What nobody else holds is freed or, if `retain`, kept for `match` until
        its pages are needed."""
        node = self.node
        self._node = _GONE
        if retain:
            self._tree.retain(node)
        self._leave(node)

    def pin(self) -> Pin:
        """Keep the text as it is now, whatever becomes of its branches, until the pin's release."""
        return Pin(self._tree, self.node)

    def _fork_on(self, node: Node) -> Branch:
        """A fork of this one whose text ends in `node`."""
        self._n_forks += 1
        return Branch(self._tree, node, Stream(None, self._stream, self._n_forks - 1))

    def _leave(self, node: Node) -> None:
        node.handles -= 1
        self._tree.release(node)


class Pin:
    """Holds a text in a TreeCache until `release`."""

    __slots__ = ("_node", "_tree")

    def __init__(self, tree: TokenTree, node: Node) -> None:
        self._tree, self._node = tree, node
        node.pins += 1

    def release(self) -> None:
        """Let go of the text; raises ValueError the second time."""
        checks.need(self._node is not _GONE, "pin", "one that holds", "one that was released")
        self._node.pins -= 1
        self._tree.release(self._node)
        self._node = _GONE


_GONE = Node(-1, None, 0, 0)
