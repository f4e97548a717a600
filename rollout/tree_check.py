"""What a tree of texts holds, and whether its nodes and pages agree."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rollfuse.rollout.node import Node
from rollfuse.rollout.token_tree import TokenTree


@dataclass(frozen=True, slots=True)
class Statistics:
    """What a tree holds: `n_tokens` once each, `n_text_tokens` as often as a branch has them."""

    n_nodes: int
    n_tokens: int
    n_text_tokens: int
    n_pages_used: int
    n_pages_free: int
    n_pages_evictable: int  # among those used, held by retained texts alone


def statistics_of(tree: TokenTree) -> Statistics:
    """What is held now."""
    nodes = list(tree.nodes())
    return Statistics(
        n_nodes=len(nodes),
        n_tokens=sum(int(tree.length[node.number]) for node in nodes),
        n_text_tokens=sum(tree.end(node) * node.handles for node in nodes),
        n_pages_used=tree.pool.n_pages - tree.pool.n_free,
        n_pages_free=tree.pool.n_free,
        n_pages_evictable=tree.n_evictable(),
    )


def check_tree(tree: TokenTree) -> None:
    """Raise RuntimeError naming the first inconsistency of nodes and pages."""
    held: list[int] = []
    owner = np.full(len(tree.token), -1, dtype=np.int64)
    numbers: set[int] = set()
    for node in tree.nodes():
        _check_node(tree, node)
        _need(node.number not in numbers, "a number of its own", node)
        numbers.add(node.number)
        slots = tree.slots(node)
        _need(bool((owner[slots] < 0).all()), "slots of its own", node)
        owner[slots] = node.number
        held.extend(node.pages)
    tree.pool.check(held)
    if numbers & set(tree.free_numbers) or len(numbers) + len(tree.free_numbers) != len(
        tree.length
    ):
        raise RuntimeError("numbers: need each one free or a node's, got another state")


def _check_node(tree: TokenTree, node: Node) -> None:
    length, computed = int(tree.length[node.number]), int(tree.computed[node.number])
    _need(node.is_held, "a node that something holds", node)
    _need(0 <= computed <= length, "0 <= computed <= length", node)
    above = 0 if node.parent is None else tree.end(node.parent)
    _need(node.start == above, f"a start at {above}", node)
    wanted = -(-(node.offset + length) // tree.page_size) if length else 0
    _need(len(node.pages) == wanted, f"{wanted} pages", node)
    _need(tree.siblings(node).get(node.number) is node, "a place below its parent", node)
    if node.parent is not None and computed:
        whole = tree.computed[node.parent.number] == tree.length[node.parent.number]
        _need(bool(whole), "a parent computed before", node)


def _need(good: bool, needed: str, node: Node) -> None:
    if not good:
        raise RuntimeError(f"tree: need {needed}, got another state of the node at {node.start}")
