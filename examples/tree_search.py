"""Monte-Carlo tree search over tokens, for a reward that only a whole response has.

A node of the search is a branch: its text's keys and values stay while the search may come back to
it. Four steps, over and over: walk down by UCT, add the likeliest token not yet tried, complete the
text a few times by sampling, and credit the rewards to all nodes on the way. The logits that were
made when a node was added serve its children and the first token of every completion; what
completions have written is given up at once.

Source: UCT, Kocsis and Szepesvari, "Bandit based Monte-Carlo planning" (2006).

    python examples/tree_search.py
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from rollfuse import Branch, TreeModel, sample_tokens, tree_cache_for

VOCABULARY = 16


@dataclass(eq=False)
class Node:
    branch: Branch
    logits: Tensor | None = None  # (1, V) after its text; None for a whole response
    untried: list[int] = field(default_factory=list)  # the likeliest last
    children: list[Node] = field(default_factory=list)
    visits: int = 0
    total: float = 0.0  # of the mean rewards of its visits


@dataclass
class TreeSearch:
    """Searches responses of `n_tokens` tokens, or up to the token `end`, for a high reward."""

    model: TreeModel
    reward: Callable[[list[int]], float]  # of a response's tokens
    n_tokens: int
    end: int | None = None
    width: int = 4  # the likeliest tokens tried after a text
    n_completions: int = 4
    exploration: float = 1.0  # about the range of the rewards
    best: tuple[float, list[int]] = (-math.inf, [])  # of the last search

    def search(
        self, prompt: Sequence[int], n_simulations: int, stream: int | None = None
    ) -> tuple[float, list[int]]:
        """The highest reward met, and the response that has it.

        Args:
            stream: the noise, of which each completion's is forked; None: a new one.
        """
        self._n_prompt, self.best = len(prompt), (-math.inf, [])
        self._nodes = [Node(self.model.cache.root(prompt, stream=stream))]
        try:
            self._compute(self._nodes[0])
            for _ in range(n_simulations):
                self._simulate(self._nodes[0])
            return self.best
        finally:
            for node in self._nodes:
                node.branch.prune()

    def _simulate(self, root: Node) -> None:
        way = [root]
        while way[-1].children and not way[-1].untried:
            way.append(max(way[-1].children, key=lambda child: self._bound(child, way[-1])))
        if way[-1].untried:
            way.append(self._added(way[-1], way[-1].untried.pop()))
        reward = self._completed(way[-1])
        for node in way:
            node.visits += 1
            node.total += reward

    def _bound(self, child: Node, parent: Node) -> float:
        spread = math.sqrt(math.log(parent.visits) / child.visits)
        return child.total / child.visits + self.exploration * spread

    def _added(self, parent: Node, token: int) -> Node:
        child = Node(parent.branch.fork()[0])
        self._nodes.append(child)
        self.model.cache.append([child.branch], [[token]])
        if not self._is_whole(child.branch):
            self._compute(child)
        parent.children.append(child)
        return child

    def _compute(self, node: Node) -> None:
        node.logits = self.model.forward([node.branch])
        width = min(self.width, node.logits.shape[1])
        node.untried = node.logits[0].topk(width).indices.tolist()[::-1]

    def _completed(self, node: Node) -> float:
        """The mean reward of completions of the node's text, or its own if it is whole."""
        if node.logits is None:
            return self._judged(node.branch)
        cache = self.model.cache
        branches = node.branch.fork(self.n_completions)
        try:
            live, logits = branches, node.logits.expand(len(branches), -1)
            while live:
                positions = cache.positions(live)
                ids = sample_tokens(logits, cache.streams(live), positions).ids
                cache.append(live, ids)
                live = [branch for branch in live if not self._is_whole(branch)]
                logits = self.model.forward(live) if live else logits
            return sum(self._judged(branch) for branch in branches) / len(branches)
        finally:
            for branch in branches:
                branch.prune()

    def _judged(self, branch: Branch) -> float:
        response = branch.tokens[self._n_prompt :].tolist()
        reward = self.reward(response)
        if reward > self.best[0]:
            self.best = reward, response
        return reward

    def _is_whole(self, branch: Branch) -> bool:
        return len(branch) == self._n_prompt + self.n_tokens or branch.tokens[-1] == self.end


def tiny_model() -> Any:
    """Stands for `AutoModelForCausalLM.from_pretrained(...)`."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=VOCABULARY, **shape, **heads))


def main() -> list[float]:
    """Look for six ascending tokens; returns the reward found in each number of simulations."""
    torch.manual_seed(0)
    policy, found = tiny_model(), []
    model = TreeModel(policy, tree_cache_for(policy, n_pages=4096, page_size=4))

    def ascending(response: list[int]) -> float:
        return sum(a < b for a, b in zip(response, response[1:], strict=False)) / 5

    for n_simulations in (1, 10, 100):
        searcher = TreeSearch(model, ascending, n_tokens=6)
        reward, text = searcher.search([5, 1, 3], n_simulations, stream=0)
        print(f"{n_simulations:3d} simulations  reward {reward:.2f}  {text}")
        found.append(reward)
    return found


if __name__ == "__main__":
    main()
