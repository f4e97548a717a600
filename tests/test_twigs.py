"""Twigs against the texts they make, and the tokens and pages they may take."""

import random

import numpy as np
import pytest

from rollfuse.rollout.tree_cache import TreeCache
from rollfuse.rollout.twigs import have_room, plant, twigs_of


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
    parent = np.array([parent for parent, _ in wanted])
    return cache, roots, wanted, twigs_of(parent, [np.array(tokens) for _, tokens in wanted])


@pytest.mark.parametrize("seed", range(40))
def test_each_text_is_its_parents_and_its_twig_and_what_they_share_lies_there_once(seed):
    cache, roots, wanted, twigs = setting(seed)
    before = [root.tokens.tolist() for root in roots]
    held = cache.statistics().n_tokens
    branches = plant(cache, roots, twigs)
    for branch, (parent, tokens) in zip(branches, wanted, strict=True):
        assert branch.tokens.tolist() == before[parent] + tokens
    prefixes = {(parent, *tokens[: n + 1]) for parent, tokens in wanted for n in range(len(tokens))}
    assert cache.statistics().n_tokens == held + len(prefixes)
    cache.check()
    for branch in branches:
        branch.prune()
    assert cache.tree.pool.n_free == cache.tree.pool.n_pages


@pytest.mark.parametrize("seed", range(40))
def test_there_is_room_iff_planting_finds_the_pages(seed):
    cache, roots, _, twigs = setting(seed)
    assert have_room(cache, roots, twigs)
    free = cache.tree.pool.n_free
    plant(cache, roots, twigs)
    taken = free - cache.tree.pool.n_free
    for spare in (0, 1):
        cache, roots, wanted, twigs = setting(seed)
        hold = cache.tree.pool.take(free - taken + spare)
        assert have_room(cache, roots, twigs) == (spare == 0)
        if not spare:
            assert [len(b) for b in plant(cache, roots, twigs)]
            assert cache.tree.pool.n_free == 0
        cache.tree.pool.give_back(hold)


def test_retained_texts_make_room():
    cache = TreeCache(1, 1, 2, n_pages=4, page_size=1)
    cache.root([1, 2]).prune(retain=True)
    root = cache.root([5])
    twigs = twigs_of(np.array([0, 0]), [np.array([6, 7]), np.array([6, 8])])
    assert have_room(cache, [root], twigs)
    assert [b.tokens.tolist() for b in plant(cache, [root], twigs)] == [[5, 6, 7], [5, 6, 8]]
