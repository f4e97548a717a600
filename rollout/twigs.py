"""Twigs: what texts of a tree get all at once, equal beginnings once.

Legend: R twigs, each the end of a text from then on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rollfuse.rollout.branch import Branch
from rollfuse.rollout.pages import OutOfPages
from rollfuse.rollout.token_tree import Ints
from rollfuse.rollout.tree_cache import TreeCache


class Twigs(NamedTuple):
    """Distinct continuations of texts; those of one text that begin alike follow each other."""

    parent: Ints  # (R,) the number of the text each continues, non-decreasing
    tokens: list[Ints]  # R of them, none empty
    shared: Ints  # (R,) how many of its first tokens are those of the twig before, of one parent


def twigs_of(parent: Ints, tokens: list[Ints]) -> Twigs:
    """Twigs in that order."""
    shared = np.zeros_like(parent)
    for i in np.flatnonzero(parent[1:] == parent[:-1]).tolist():
        n = min(len(tokens[i]), len(tokens[i + 1]))
        differs = tokens[i][:n] != tokens[i + 1][:n]
        shared[i + 1] = differs.argmax() if differs.any() else n
    return Twigs(parent, tokens, shared)


def have_room(cache: TreeCache, branches: Sequence[Branch], twigs: Twigs) -> bool:
    """Whether the pages that `plant` takes are free, or could be made so: then they are."""
    tree = cache.tree
    is_forked = np.bincount(twigs.parent[twigs.shared == 0]) > 1
    n_pages = 0
    for row, tokens, shared in zip(twigs.parent, twigs.tokens, twigs.shared.tolist(), strict=True):
        node = branches[row].node
        grows = not shared and not is_forked[row] and tree.grows(node)
        n_pages += tree.pages_wanted(node, len(tokens) - shared, grows)
    try:
        tree.make_room(n_pages)
    except OutOfPages:
        return False
    return True


def plant(cache: TreeCache, branches: Sequence[Branch], twigs: Twigs) -> list[Branch]:
    """A branch for each twig; every one of `branches` has one at least, and becomes its first."""
    parent, tokens, shared = twigs
    at = (np.array([len(branch) for branch in branches])[parent] + shared).tolist()
    first = np.flatnonzero(shared == 0)
    grown = forked(branches, parent[first])
    cache.append(grown, [tokens[i] for i in first.tolist()])
    found = dict(zip(first.tolist(), grown, strict=True))
    # Each of the others begins within the one before it: first all second ones, then all third.
    turn = np.arange(len(parent)) - np.repeat(first, np.diff(first, append=len(parent)))
    for n in range(1, int(turn.max()) + 1):
        here = np.flatnonzero(turn == n).tolist()
        grown = [found[i - 1].fork(at=at[i])[0] for i in here]
        cache.append(grown, [tokens[i][shared[i] :] for i in here])
        found |= zip(here, grown, strict=True)
    return [found[i] for i in range(len(parent))]


def forked(branches: Sequence[Branch], parent: Ints) -> list[Branch]:
    """A branch for each entry of `parent`, which is sorted and names each of `branches`: that one
    first, then forks of it."""
    found: list[Branch] = []
    for branch, count in zip(branches, np.bincount(parent).tolist(), strict=True):
        found.append(branch)
        if count > 1:
            found.extend(branch.fork(count - 1))
    return found
