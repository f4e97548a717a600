"""Twigs against the texts they make, and the tokens and pages they may take."""

import random

import numpy as np
import pytest
import torch

from rollfuse.rollout.pages import OutOfPages
from rollfuse.rollout.tree_cache import TreeCache
from rollfuse.rollout.twigs import twigs_of


def continuations(draw):
    """Distinct ones of a few texts, many of which begin alike, in order."""
    n_parents = draw.randint(1, 4)
    found = {
        (parent, *(draw.randrange(2) for _ in range(draw.randint(1, 7))))
        for parent in range(n_parents)
        for _ in range(draw.randint(1, 9))
    }
    found |= {(parent, 0) for parent in range(n_parents)}
    return [(parent, list(tokens)) for parent, *tokens in sorted(found)]


def setting(seed, n_pages=200):
    """A cache, texts in it, and what they are to get: as pairs, and as Twigs."""
    draw = random.Random(seed)
    cache = TreeCache(1, 1, 2, n_pages=n_pages, page_size=draw.choice((1, 2, 3, 8)))
    wanted = continuations(draw)
    roots = [cache.root([9] * draw.randint(0, 5)) for _ in range(wanted[-1][0] + 1)]
    if len(roots) > 1 and draw.random() < 0.5:  # one that does not grow in place
        roots[1].prune()
        roots[1] = roots[0].fork()[0]
    parent = [parent for parent, _ in wanted]
    return cache, roots, wanted, twigs_of(parent, [np.array(tokens) for _, tokens in wanted])


@pytest.mark.parametrize("seed", range(40))
def test_each_text_is_its_parents_and_its_twig_and_what_they_share_lies_there_once(seed):
    cache, roots, wanted, twigs = setting(seed)
    before = [root.tokens.tolist() for root in roots]
    held = cache.statistics().n_tokens
    branches = cache.plant(roots, twigs)
    for branch, (parent, tokens) in zip(branches, wanted, strict=True):
        assert branch.tokens.tolist() == before[parent] + tokens
    prefixes = {(parent, *tokens[: n + 1]) for parent, tokens in wanted for n in range(len(tokens))}
    assert cache.statistics().n_tokens == held + len(prefixes)
    cache.check()
    for branch in branches:
        found = cache.match(branch.tokens)
        assert found is not None and len(found) == len(branch)
        found.prune()
    for branch in branches:
        branch.prune()
    assert cache.tree.pool.n_free == cache.tree.pool.n_pages


@pytest.mark.parametrize("seed", range(40))
def test_a_page_too_few_changes_nothing(seed):
    cache, roots, _, twigs = setting(seed)
    free = cache.tree.pool.n_free
    cache.plant(roots, twigs)
    taken = free - cache.tree.pool.n_free
    cache, roots, _, twigs = setting(seed)
    hold = cache.tree.pool.take(free - taken + 1)
    before = [root.tokens.tolist() for root in roots], cache.statistics()
    with pytest.raises(OutOfPages, match=f"need {taken} free ones"):
        cache.plant(roots, twigs)
    assert before == ([root.tokens.tolist() for root in roots], cache.statistics())
    cache.tree.pool.give_back(hold)
    cache.check()
    assert [len(branch) for branch in cache.plant(roots, twigs)]
    cache.check()


def test_a_branch_goes_on_as_its_first_twig_and_the_others_are_forks_of_it():
    cache = TreeCache(1, 1, 2, n_pages=9, page_size=2)
    root, other = cache.root([5], stream=7), cache.root([5], stream=7)
    planted = cache.plant([root], twigs_of([0, 0], [np.array([6, 7]), np.array([6, 8])]))
    assert planted[0] is root and root.stream == 7
    assert planted[1].stream == other.fork()[0].stream
    with pytest.raises(ValueError, match="branches: need each branch once"):
        cache.plant([other, other], twigs_of([0, 1], [np.array([1]), np.array([1])]))
    cache.check()


def test_retained_texts_make_room():
    cache = TreeCache(1, 1, 2, n_pages=4, page_size=1)
    cache.root([1, 2]).prune(retain=True)
    root = cache.root([5])
    planted = cache.plant([root], twigs_of([0, 0], [np.array([6, 7]), np.array([6, 8])]))
    assert [branch.tokens.tolist() for branch in planted] == [[5, 6, 7], [5, 6, 8]]


def test_a_plan_made_before_planting_in_place_is_refused():
    cache = TreeCache(1, 1, 2, n_pages=4, page_size=4)
    root = cache.root([5])
    step = cache.plan([root])
    # One twig on a text that grows: no node is new, only tokens.
    assert cache.plant([root], twigs_of([0], [np.array([6, 7])])) == [root]
    assert cache.statistics().n_nodes == 1
    row = torch.zeros(1, 1, 2)
    with pytest.raises(ValueError, match="step: need"):
        cache.write(0, row, row, step)
    with pytest.raises(ValueError, match="step: need"):
        cache.commit(step)
    assert root.n_computed == 0
