"""examples/tree_search.py: it finds what greedy decoding and as much sampling do not."""

from __future__ import annotations

import random
from itertools import product

import pytest

pytest.importorskip("transformers", reason="needs transformers: the extra [examples]")

from sampler_cases import PROMPT, Watched, all_pruned
from tree_search import TreeSearch

from rollfuse import Engine, OutOfPages


def unlikely(model: Watched, n_tokens: int) -> list[int]:
    """A response of which each token is the policy's fourth choice."""
    text = list(PROMPT)
    for _ in range(n_tokens):
        text.append(int(model.logp(text).topk(4).indices[3]))
    return text[len(PROMPT) :]


def greedy(model: Watched, n_tokens: int) -> list[int]:
    text = list(PROMPT)
    for _ in range(n_tokens):
        text.append(int(model.logp(text).argmax()))
    return text[len(PROMPT) :]


def test_it_finds_the_rewarded_response():
    model, n_tokens = Watched(12, n_pages=4096), 6
    target = unlikely(model, n_tokens)

    def reward(response: list[int]) -> float:
        return sum(a == b for a, b in zip(response, target, strict=True)) / n_tokens

    searcher = TreeSearch(model, reward, n_tokens, n_completions=2, exploration=0.3)
    with all_pruned(model):
        assert searcher.search(PROMPT, 150) == (1.0, target)
    assert reward(greedy(model, n_tokens)) <= 0.5
    engine = Engine(model.model, max_new_tokens=n_tokens, stop_tokens=[])
    samples = engine.generate([PROMPT], 2 * 150, seed=0).responses()
    assert max(reward(response.tolist()) for response in samples) < 1.0


def test_in_the_end_it_has_seen_everything():
    model = Watched(4)
    rewards = {text: random.random() for text in product(range(4), repeat=3)}
    searcher = TreeSearch(model, lambda response: rewards[tuple(response)], 3, width=9)
    with all_pruned(model):
        found = searcher.search(PROMPT, 300)
    assert found[0] == max(rewards.values()) == rewards[tuple(found[1])]
    assert len(searcher._nodes) == 1 + 4 + 4**2 + 4**3


def test_visits_and_rewards_reach_every_node_on_the_way():
    model, n_tokens = Watched(6), 4
    searcher = TreeSearch(model, lambda response: response[0] / 5, n_tokens, width=3)
    with all_pruned(model):
        searcher.search(PROMPT, 80)
    root = searcher._nodes[0]
    assert root.visits == 80
    for node in searcher._nodes:
        below = sum(child.visits for child in node.children)
        if node.children:
            assert node.visits == below + (node is not root)
    # Every response below a child of the root begins with its token: so does its mean reward.
    first = sorted(model.logp(PROMPT).topk(3).indices.tolist())
    means = sorted(child.total / child.visits for child in root.children)
    assert means == pytest.approx([token / 5 for token in first])
    best = max(root.children, key=lambda child: child.total / child.visits)
    assert best.visits == max(child.visits for child in root.children)


def test_logits_that_are_there_are_not_computed_again():
    model, n_tokens, n_completions = Watched(6, page_size=1), 4, 3
    searcher = TreeSearch(model, lambda response: 0.0, n_tokens, width=2)
    searcher.n_completions = n_completions
    depths: list[int] = []
    added = searcher._added

    def noted(parent, token):
        depths.append(len(parent.branch) + 1 - len(PROMPT))
        return added(parent, token)

    searcher._added = noted
    searcher.search(PROMPT, 60)
    assert sorted(set(depths)) == [1, 2, 3, 4] and len(depths) == 2 + 4 + 8 + 16
    # An added node needs one row, each of its completions one for all tokens but first and last.
    rows = sum(1 + n_completions * (n_tokens - d - 1) for d in depths if d < n_tokens)
    assert sum(model.rows) == len(PROMPT) + rows
    # What completions have written is gone before the next pass for a node.
    assert max(model.pages) <= len(PROMPT) + len(depths) + n_completions * n_tokens


def test_responses_end_at_the_end_token():
    model, seen = Watched(4), set[tuple[int, ...]]()

    def reward(response: list[int]) -> float:
        seen.add(tuple(response))
        return 0.0

    with all_pruned(model):
        TreeSearch(model, reward, n_tokens=3, end=1).search(PROMPT, 200)
    every = {t[: t.index(1) + 1] if 1 in t else t for t in product(range(4), repeat=3)}
    assert seen == every


def test_completions_of_one_node_differ():
    model, seen = Watched(48), list[tuple[int, ...]]()

    def reward(response: list[int]) -> float:
        seen.append(tuple(response))
        return 0.0

    TreeSearch(model, reward, n_tokens=8, n_completions=6).search(PROMPT, 1)
    assert len(seen) == 6 and len(set(seen)) >= 5


def test_errors_leave_nothing_behind():
    def fails(response: list[int]) -> float:
        raise KeyError("no reward")

    model = Watched(6, n_pages=30, page_size=1)
    with all_pruned(model), pytest.raises(KeyError):
        TreeSearch(model, fails, 4).search(PROMPT, 3)
    with all_pruned(model), pytest.raises(OutOfPages):
        TreeSearch(model, lambda response: 0.0, 9).search(PROMPT, 50)


def test_noise_is_the_streams():
    model = Watched(48)
    searcher = TreeSearch(model, lambda response: float(sum(response)), 6)
    one, again, other = (searcher.search(PROMPT, 10, stream) for stream in (1, 1, 2))
    assert one == again != other
