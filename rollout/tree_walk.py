"""verify_trees: several guesses a branch, as a tree of tokens, checked in one pass.

A drafter that prepares a guess for each of the target's likely next tokens, before it knows which
one it will be, hands over a tree whose first level are those candidates. All of it lies in the
TreeCache as forks; the pass answers every token; the walk follows what the branch itself draws.
What is drawn is what plain decoding would have drawn: the tree only decides how far one pass gets.

Source: the interface of Mirror Speculative Decoding, whose pipeline on two devices is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rollfuse.kernels import checks
from rollfuse.kernels.head import Head
from rollfuse.kernels.sampling import Sampled, Sampling
from rollfuse.kernels.target import Target
from rollfuse.rollout.branch import Branch
from rollfuse.rollout.token_tree import Ints, TokenTree
from rollfuse.rollout.tree_model import TreeModel

_PLAIN = Sampling()


class Walk(NamedTuple):
    """What one branch has got, (n,) each, n >= 1."""

    tokens: Ints
    logp: Tensor  # nats, under the distribution drawn from
    entropy: Tensor  # nats, of that distribution


class _End(NamedTuple):
    """Where a walk has left the tree."""

    node: _Node
    kept: int  # of the node's tokens
    rows: list[int]  # the answers met on the way


@dataclass(slots=True)
class _Node:
    """Guessed tokens without a fork among them, in a branch of their own."""

    branch: Branch | None  # None: pruned, or taken over
    tokens: list[int]
    children: dict[int, _Node] = field(default_factory=dict)  # by their first token
    answer: int = 0  # where the answers of its tokens begin


def verify_trees(
    model: TreeModel,
    branches: Sequence[Branch],
    trees: Sequence[Sequence[Sequence[int]]],
    sampling: Sampling = _PLAIN,
    *,
    head: Head | None = None,
) -> list[Walk]:
    """One pass over branches and what was guessed for them; branches go on by what they draw.

    Args:
        model: the target, on the cache of the branches.
        branches: B of them, none empty, with a stream each.
        trees: for each branch its guesses, token by token; those with a common beginning share it.
            None at all is plain decoding.
        sampling: the distribution, one for all.
        head: `head_of` the model where that gives its logits: they are not kept in memory then.

    Returns:
        For each branch what it has got: guessed tokens that it draws itself, and the first that was
        not guessed. They are appended to it; the last is still to compute.

    Raises:
        ValueError: a guess is empty, no token ids or has one out of range; two branches with one
            stream; as `TreeModel.forward`.
        OutOfPages: no room for the guesses. Either way the branches are as they were.
    """
    checks.need(len(trees) == len(branches), "trees", f"{len(branches)} trees", len(trees))
    guesses = [_guesses_of(tree, f"trees[{i}]") for i, tree in enumerate(trees)]
    model.cache.streams(branches)  # refuses two of one stream, or a branch twice
    for i, branch in enumerate(branches):
        ours = branch.is_of(model.cache.tree) and len(branch) > 0
        checks.need(ours, f"branches[{i}]", "a text of this cache", "another one's, or none")
    # Handles of our own: what is tried here must not count in the branches' later forks.
    roots = [_Node(branch.twin(), []) for branch in branches]
    ends: list[_End] = []
    try:
        for root, tree in zip(roots, guesses, strict=True):
            _plant(model, root, tree)
        drawn = _draw(model, roots, [branch.stream for branch in branches], sampling, head)
        ids = drawn.ids.cpu().numpy()
        ends = [_walk(root, ids) for root in roots]
        won = {id(end.node) for end in ends if end.node.tokens}
        _prune([node for root in roots for node in _below(root) if id(node) not in won])
        _make_room(model.cache.tree, branches, ends)
        for branch, end in zip(branches, ends, strict=True):
            if end.node.branch is not None:
                branch.follow(end.node.branch)
                end.node.branch = None
    finally:
        _prune([node for root in roots for node in _below(root)])
    rows = [torch.tensor(end.rows, device=drawn.ids.device) for end in ends]
    found = [Walk(drawn.ids[r].cpu().numpy(), drawn.logp[r], drawn.entropy[r]) for r in rows]
    model.cache.append(branches, [walk.tokens[-1:] for walk in found])
    return found


def _guesses_of(tree: Sequence[Sequence[int]], name: str) -> list[list[int]]:
    guesses = [np.asarray(guess) for guess in tree]
    for guess in guesses:
        good = guess.ndim == 1 and len(guess) > 0 and np.issubdtype(guess.dtype, np.integer)
        got = "an empty one" if guess.shape == (0,) else f"{guess.dtype} of shape {guess.shape}"
        checks.need(good, name, "guesses of at least one token id each", got)
    return [guess.tolist() for guess in guesses]


def _prune(nodes: list[_Node]) -> None:
    for node in nodes:
        if node.branch is not None:
            node.branch.prune()
            node.branch = None


def _make_room(tree: TokenTree, branches: Sequence[Branch], ends: list[_End]) -> None:
    """For the next token of each branch, where the walk has left it."""
    wanted = 0
    for branch, (node, kept, _) in zip(branches, ends, strict=True):
        if node.branch is not None:
            node.branch.truncate(len(node.branch) - len(node.tokens) + kept)
        end = (node.branch or branch).node
        wanted += tree.pages_wanted(end, 1, tree.grows(end))
    tree.make_room(wanted)


def _plant(model: TreeModel, parent: _Node, guesses: list[list[int]]) -> None:
    """Children of `parent` for these guesses, equal beginnings once."""
    guesses = sorted(guess for guess in guesses if guess)
    for token, same in groupby(guesses, key=lambda guess: guess[0]):
        group = list(same)
        n = 1
        while all(len(g) > n and g[n] == group[0][n] for g in group):
            n += 1
        assert parent.branch is not None
        branch = parent.branch.fork()[0]
        node = parent.children[token] = _Node(branch, group[0][:n])
        model.cache.append([branch], [node.tokens])
        _plant(model, node, [guess[n:] for guess in group])


def _draw(
    model: TreeModel,
    roots: list[_Node],
    streams: list[int],
    sampling: Sampling,
    head: Head | None,
) -> Sampled:
    """One pass; where each node's answers begin is noted in it."""
    branches: list[Branch] = []
    counts: list[int] = []
    noise: list[int] = []
    positions: list[Ints] = []
    for root, stream in zip(roots, streams, strict=True):
        for node in _below(root):
            assert node.branch is not None
            node.answer, count = len(noise), max(1, len(node.tokens))
            noise += [stream] * count
            positions.append(np.arange(len(node.branch) - count, len(node.branch)) + 1)
            branches.append(node.branch)
            counts.append(count)
    compute = model.forward if head is None else model.hidden
    rows = compute(branches, counts=np.array(counts, dtype=np.int64))
    target, where = Target(rows, head, sampling), rows.device
    at = torch.from_numpy(np.concatenate(positions)).to(where)
    return target.sample(torch.tensor(noise, dtype=torch.int64, device=where), at)


def _walk(root: _Node, ids: Ints) -> _End:
    """Follow the draws from the root on."""
    node, kept, rows = root, 0, [root.answer]
    while True:
        token = int(ids[rows[-1]])
        if kept < len(node.tokens):
            if node.tokens[kept] != token:
                break
        elif token in node.children:
            node, kept = node.children[token], 0
        else:
            break
        kept += 1
        rows.append(node.answer + kept - 1)
    return _End(node, kept, rows)


def _below(root: _Node) -> list[_Node]:
    """`root` and all nodes below, parents first."""
    found = [root]
    for node in found:
        found.extend(node.children.values())
    return found
