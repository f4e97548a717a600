"""Branch: the handle of one text of a tree; Pin, which holds a text without going on from it."""

from __future__ import annotations

import numpy as np
import torch

from rollfuse.kernels import checks
from rollfuse.kernels.noise import fork_streams, new_streams
from rollfuse.rollout.node import Node, path
from rollfuse.rollout.token_tree import Ints, TokenTree


class Branch:
    """The handle of one text in a TreeCache. A branch ends by `prune`, not by being forgotten.

    Attributes:
        stream: whose noise samples this text, see `rollfuse.new_streams`. Every fork has a fresh
            one, and so has every text that was given none.
    """

    __slots__ = ("_lineage", "_n_forks", "_node", "_stream", "_tree")

    def __init__(self, tree: TokenTree, node: Node, stream: int | None) -> None:
        self._tree, self._node, self._stream = tree, node, stream
        # Where a stream that was not given comes from: the number of a parent's fork or of a root.
        self._lineage: tuple[Branch | None, int] = (None, 0)
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
        if self._stream is None:
            parent, number = self._lineage
            if parent is None:
                self._stream = int(new_streams(0, 1, first=number))
            else:
                self._stream = int(fork_streams(torch.tensor([parent.stream]), 1, first=number))
        return self._stream

    def fork(self, n: int = 1, *, at: int | None = None) -> list[Branch]:
        """`n` new branches with this one's first `at` tokens (None: all). Copies nothing.

        Raises:
            ValueError: `at` is past the end or negative, `n` is negative, the branch was pruned.
        """
        checks.need(n >= 0, "n", "a number of branches >= 0", n)
        node = self._tree.node_at(self.node, len(self) if at is None else at)
        children = [Branch(self._tree, node, None) for _ in range(n)]
        for number, child in enumerate(children, self._n_forks):
            child._lineage = (self, number)
        self._n_forks += n
        if not n:
            self._tree.release(node)
        return children

    def truncate(self, at: int) -> None:
        """Drop the tokens from position `at` on; what others share of them stays theirs."""
        old = self.node
        node = self._tree.cut(old, at)
        if node is not old:
            node.handles += 1
            self._leave(old)
            self._node = node

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
