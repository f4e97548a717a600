"""The tree cache against a naive model that keeps every text apart, and a memory of its slots."""

import random

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rollfuse.kernels.noise import need_distinct_streams
from rollfuse.rollout.node import path
from rollfuse.rollout.pages import OutOfPages
from rollfuse.rollout.tree_cache import TreeCache
from rollfuse.rollout.tree_step import new_step

N_PAGES, PAGE = 40, 4
TOKENS = st.lists(st.integers(0, 2), min_size=0, max_size=7)


def small_cache(n_pages=N_PAGES, page_size=PAGE, **options):
    return TreeCache(2, 1, 2, n_pages=n_pages, page_size=page_size, **options)


def compute(cache, branches, **options):
    """A forward pass that writes the token, the position and the version as keys and values."""
    step = cache.plan(branches, **options)
    ids, positions = torch.from_numpy(step.ids), torch.from_numpy(step.plan.positions)
    keys = torch.stack([ids, positions], 1)[:, None].float()
    values = torch.full_like(keys, cache.version)
    for layer in range(len(cache.layers)):
        cache.write(layer, keys, values, step)
    cache.commit(step)
    return step


class Naive:
    """Texts apart from one another: each branch's tokens with the versions that wrote them."""

    def __init__(self, cache):
        self.cache, self.texts = cache, []

    def check(self):
        self.cache.check()
        for branch, text in self.texts:
            assert branch.tokens.tolist() == [token for token, _ in text]
            assert len(branch) == len(text)
            nodes = path(branch.node)
            slots = np.concatenate([self.cache.tree.slots(node) for node in nodes])
            n = branch.n_computed
            for keys, values in self.cache.layers:
                held = keys[slots[:n], 0].tolist()
                assert held == [[token, i] for i, (token, _) in enumerate(text[:n])]
                assert values[slots[:n], 0, 0].tolist() == [version for _, version in text[:n]]
            changes = [i for i in range(1, len(text)) if text[i][1] != text[i - 1][1]]
            ends = [*changes, len(text)] if text else []
            assert branch.versions == [(end, text[end - 1][1]) for end in ends]

    def append(self, chosen, parts):
        branches = [self.texts[i][0] for i in chosen]
        try:
            self.cache.append(branches, parts)
        except OutOfPages:
            return False
        for i, part in zip(chosen, parts, strict=True):
            new = np.atleast_1d(part).astype(int).tolist()
            self.texts[i][1].extend((token, self.cache.version) for token in new)
        return True

    def fork(self, i, n, at):
        branch, text = self.texts[i]
        self.texts.extend((child, text[:at]) for child in branch.fork(n, at=at))

    def truncate(self, i, at):
        self.texts[i][0].truncate(at)
        del self.texts[i][1][at:]

    def match(self, tokens):
        found = self.cache.match(tokens)
        version = self.cache.version
        known = [text for _, text in self.texts]
        longest = max((common(text, tokens, version) for text in known), default=0)
        length = 0 if found is None else len(found)
        assert length >= longest
        if found is not None:
            assert found.tokens.tolist() == tokens[:length]
            self.texts.append((found, [(token, version) for token in tokens[:length]]))

    def new_version(self):
        """What is not computed yet will be the new version's."""
        version = self.cache.version + 1
        for branch, text in self.texts:
            n = branch.n_computed
            text[n:] = [(token, version) for token, _ in text[n:]]
        self.cache.version = version


def common(text, tokens, version):
    pairs = zip(text, tokens, strict=False)
    agrees = [pair == (token, version) for pair, token in pairs]
    return agrees.index(False) if False in agrees else len(agrees)


class Machine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.naive = Naive(small_cache(checksum=True))
        self.pins = []

    def some(self, data):
        return data.draw(st.integers(0, len(self.naive.texts) - 1))

    @precondition(lambda self: len(self.naive.texts) < 12)
    @rule()
    def root(self):
        self.naive.texts.append((self.naive.cache.root(), []))

    @precondition(lambda self: self.naive.texts)
    @rule(data=st.data(), one_each=st.booleans())
    def append(self, data, one_each):
        n = len(self.naive.texts)
        chosen = sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=5)))
        if one_each:
            parts = np.array([data.draw(st.integers(0, 2)) for _ in chosen])
            self.naive.append(chosen, parts)
        else:
            self.naive.append(chosen, [data.draw(TOKENS) for _ in chosen])

    @precondition(lambda self: self.naive.texts and len(self.naive.texts) < 12)
    @rule(data=st.data(), n=st.integers(0, 3))
    def fork(self, data, n):
        i = self.some(data)
        self.naive.fork(i, n, data.draw(st.integers(0, len(self.naive.texts[i][1]))))

    @precondition(lambda self: self.naive.texts)
    @rule(data=st.data())
    def truncate(self, data):
        i = self.some(data)
        self.naive.truncate(i, data.draw(st.integers(0, len(self.naive.texts[i][1]))))

    @precondition(lambda self: self.naive.texts)
    @rule(data=st.data(), retain=st.booleans())
    def prune(self, data, retain):
        self.naive.texts.pop(self.some(data))[0].prune(retain=retain)

    @precondition(lambda self: self.naive.texts)
    @rule(data=st.data())
    def compute(self, data):
        chosen = data.draw(st.sets(st.integers(0, len(self.naive.texts) - 1)))
        branches = [self.naive.texts[i][0] for i in chosen if self.naive.texts[i][1]]
        if branches:
            compute(self.naive.cache, branches)
        assert all(branch.n_computed == len(branch) for branch in branches)

    @precondition(lambda self: len(self.naive.texts) < 12)
    @rule(tokens=TOKENS)
    def match(self, tokens):
        self.naive.match(tokens)

    @precondition(lambda self: self.naive.texts)
    @rule(data=st.data())
    def pin(self, data):
        self.pins.append(self.naive.texts[self.some(data)][0].pin())

    @precondition(lambda self: self.pins)
    @rule()
    def unpin(self):
        self.pins.pop().release()

    @rule()
    def new_version(self):
        self.naive.new_version()

    @invariant()
    def every_text_is_what_was_written(self):
        self.naive.check()

    def teardown(self):
        for pin in self.pins:
            pin.release()
        for branch, _ in self.naive.texts:
            branch.prune()
        cache = self.naive.cache
        cache.check()
        held = cache.statistics()
        assert held.n_pages_used == held.n_pages_evictable
        while cache.tree.evict_one():
            cache.check()
        assert cache.tree.pool.n_free == N_PAGES and not list(cache.tree.nodes())


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_pinned_text_is_not_written_over_and_its_pages_are_not_counted_as_evictable():
    cache = small_cache(n_pages=6)
    branch = cache.root([1, 2, 3])
    compute(cache, [branch])
    slots, pin = text_slots(cache, branch), branch.pin()
    branch.truncate(1)
    cache.append([branch], [[9, 9]])
    compute(cache, [branch])
    assert [cache.layers[0].keys[slot, 0, 0].item() for slot in slots] == [1, 2, 3]
    branch.prune(retain=True)
    found = cache.match([1, 2, 3])
    assert len(found) == 3
    found.prune(retain=True)
    held = cache.statistics()
    # Of two pages the pin holds the first; the other text's own page can go.
    assert (held.n_pages_used, held.n_pages_evictable) == (2, 1)
    with pytest.raises(OutOfPages, match="got 4 and 1 of retained"):
        cache.root([5] * 24)
    pin.release()
    cache.root([5] * 24)
    cache.check()


def test_texts_of_older_versions_go_first():
    cache = small_cache(n_pages=3)
    texts = {}
    for version in (0, 1):
        cache.version = version
        texts[version] = cache.root([version] * PAGE)
        compute(cache, [texts[version]])
    texts[1].prune(retain=True)
    texts[0].prune(retain=True)  # used last, written first
    cache.root([7] * 2 * PAGE)
    assert cache.match([0] * PAGE, version=0) is None
    assert cache.match([1] * PAGE) is not None


def test_outdated_entries_of_retained_texts_do_not_pile_up():
    cache = small_cache()
    cache.root([1, 2]).prune(retain=True)
    for _ in range(1000):
        cache.match([1, 2]).prune(retain=True)
    assert len(cache.tree._retained) <= 2 * len(cache.tree.length) + 1
    assert cache.tree.evict_one() and not cache.tree.evict_one()
    assert cache.tree.pool.n_free == N_PAGES


def test_a_root_without_room_leaves_nothing():
    cache = small_cache(n_pages=2)
    with pytest.raises(OutOfPages):
        cache.root(range(9))
    assert not list(cache.tree.nodes())
    cache.check()


def test_the_next_plan_serves_another_order_and_what_was_not_committed():
    cache = small_cache()
    branches = [cache.root([i, i]) for i in range(3)]
    compute(cache, branches)
    cache.append(branches, np.arange(3))
    cache.plan(branches)  # never committed
    cache.append(branches, np.arange(3) + 10)
    step = cache.plan(branches)
    assert step.plan.n_rows == 6
    assert step.ids[step.last].tolist() == [10, 11, 12]
    cache.commit(step)
    cache.append(branches, np.arange(3) + 20)
    compute(cache, branches)
    cache.append(branches, np.arange(3) + 30)
    other = cache.plan(branches[::-1])
    assert other.ids[other.last].tolist() == [32, 31, 30]


def test_deep_forks_and_chains():
    cache = small_cache(n_pages=5000, page_size=1)
    branch = cache.root([1])
    for i in range(3000):
        child = branch.fork()[0]
        other = branch.fork()[0]
        branch.prune()
        cache.append([child], [[i % 7]])
        other.prune()
        branch = child
    compute(cache, [branch])
    assert branch.n_computed == 3001
    assert branch.stream != cache.root([2]).stream


def test_another_caches_branches_and_steps_are_refused():
    one, two = small_cache(), small_cache()
    mine, theirs = one.root([1, 2]), two.root([3, 4])
    step = two.plan([theirs])
    for work in (
        lambda: one.append([theirs], [[7]]),
        lambda: one.append([theirs], np.array([7])),
        lambda: one.plan([mine, theirs]),
    ):
        with pytest.raises(ValueError, match="branches: need branches of this cache"):
            work()
    with pytest.raises(ValueError, match="step: need one of this cache"):
        one.commit(step)
    with pytest.raises(ValueError, match="step: need one of this cache"):
        one.write(0, torch.zeros(2, 1, 2), torch.zeros(2, 1, 2), step)
    for cache in (one, two):
        cache.check()
    assert mine.tokens.tolist() == [1, 2] and theirs.tokens.tolist() == [3, 4]


def test_100_000_random_operations_leak_nothing():
    draw = random.Random(0)
    naive = Naive(small_cache(n_pages=300, canary=False))
    cache, pins = naive.cache, []
    for i in range(100_000):
        kind = draw.random()
        if len(naive.texts) < 4 or (kind < 0.05 and len(naive.texts) < 60):
            naive.texts.append((cache.root(), []))
        elif kind < 0.5:
            chosen = sorted(draw.sample(range(len(naive.texts)), draw.randint(1, 4)))
            naive.append(chosen, [[draw.randrange(3)] * draw.choice((0, 1, 1, 5)) for _ in chosen])
        elif kind < 0.65 and len(naive.texts) < 60:
            k = draw.randrange(len(naive.texts))
            naive.fork(k, draw.randint(0, 3), draw.randint(0, len(naive.texts[k][1])))
        elif kind < 0.75:
            k = draw.randrange(len(naive.texts))
            naive.truncate(k, draw.randint(0, len(naive.texts[k][1])))
        elif kind < 0.9:
            k = draw.randrange(len(naive.texts))
            naive.texts.pop(k)[0].prune(retain=draw.random() < 0.3)
        elif kind < 0.95:
            naive.match([draw.randrange(3) for _ in range(6)])
        elif kind < 0.97 and len(pins) < 5:
            pins.append(naive.texts[draw.randrange(len(naive.texts))][0].pin())
        elif pins:
            pins.pop(draw.randrange(len(pins))).release()
        if i % 2000 == 0:
            naive.check()
    naive.check()
    for branch, _ in naive.texts:
        branch.prune()
    for pin in pins:
        pin.release()
    while cache.tree.evict_one():
        pass
    cache.check()
    assert cache.tree.pool.n_free == 300


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("at", [1, 15, 16, 21, 32])
def test_a_fork_copies_nothing_and_its_text_is_the_same_memory(page_size, at):
    cache = small_cache(n_pages=200, page_size=page_size)
    parent = cache.root(range(32))
    compute(cache, [parent])
    written = [x._version for layer in cache.layers for x in layer]
    used, slots = cache.statistics().n_pages_used, text_slots(cache, parent)
    children = parent.fork(64, at=at)
    assert [x._version for layer in cache.layers for x in layer] == written
    assert cache.statistics().n_pages_used == used
    assert all(text_slots(cache, child) == slots[:at] for child in children)
    cache.append(children, np.arange(64))
    assert text_slots(cache, parent) == slots
    new = [text_slots(cache, child)[-1] for child in children]
    assert len({*new, *slots}) == 64 + 32
    cache.check()


def text_slots(cache, branch):
    return np.concatenate([cache.tree.slots(node) for node in path(branch.node)]).tolist()


def test_plans_of_plain_decoding_are_moved_on_and_equal_to_new_ones():
    cache = small_cache(n_pages=400, page_size=16)
    prompt = cache.root(range(50))
    compute(cache, [prompt])
    branches = prompt.fork(5)
    made = 0
    for i in range(70):
        cache.append(branches, np.full(5, i))
        made_anew = new_step(cache.tree, [branch.node for branch in branches], cache._make_plan)
        step = compute(cache, branches)
        made += step.plan.room == 63
        for name in ("items", "positions", "partials", "tails"):
            first, second = getattr(step.plan, name), getattr(made_anew.plan, name)
            if name == "items":  # places in the slot list differ by the room of plans
                assert item_slots(step.plan) == item_slots(made_anew.plan)
                first, second = np.delete(first, 2, 1), np.delete(second, 2, 1)
            assert (first == second).all()
        assert step.ids.tolist() == [i] * 5 and step.slots.tolist() == made_anew.slots.tolist()
        assert step.last.tolist() == made_anew.last.tolist()
    assert 0 < made <= 2


def item_slots(plan):
    return [plan.slots[row[2] : row[2] + row[3]].tolist() for row in plan.items]


def test_branches_come_back_in_the_order_in_which_they_were_given():
    cache = small_cache(n_pages=100)
    branches = [cache.root([i, i, i]) for i in range(4)]
    branches += branches[1].fork(2) + branches[3].fork(1, at=1)
    cache.append(branches, np.arange(len(branches)) + 10)
    order = [5, 0, 6, 3, 1, 4, 2]
    step = compute(cache, [branches[i] for i in order])
    assert step.ids[step.last].tolist() == [10 + i for i in order]
    cache.append(branches, torch.arange(len(branches)) + 20)
    step = compute(cache, [branches[i] for i in order])
    assert step.ids[step.last].tolist() == [20 + i for i in order]
    lengths = [len(branches[i]) for i in order]
    assert cache.positions([branches[i] for i in order]).tolist() == lengths


def test_what_is_computed_already_is_pushed_through_again_and_not_written():
    cache = small_cache()
    branch = cache.root([5, 6, 7])
    compute(cache, [branch])
    step = cache.plan([branch, *branch.fork(2), *branch.fork(1, at=2)])
    assert step.ids.tolist() == [6, 7] and step.last.tolist() == [1, 1, 1, 0]
    assert (step.slots == N_PAGES * PAGE).all()


def test_a_new_version_takes_over_what_is_not_computed():
    cache = small_cache()
    branch = cache.root([1, 2, 3])
    compute(cache, [branch])
    cache.append([branch], [[4, 5]])
    cache.version = 7
    assert branch.versions == [(3, 0), (5, 7)]
    with pytest.raises(ValueError, match=r"branches\[0\]: need a text of version 7 alone, got"):
        cache.plan([branch], pure=True)
    cache.check()
    compute(cache, [branch])
    assert cache.match([1, 2, 3, 4, 5]) is None
    assert len(cache.match([1, 2, 3, 4], version=0)) == 3
    with pytest.raises(ValueError, match="version: need at least 7, got 6"):
        cache.version = 6


def test_retained_texts_go_by_age_and_pinned_ones_stay():
    cache = small_cache(n_pages=4)
    branches = [cache.root([i] * PAGE) for i in range(4)]
    compute(cache, branches)
    pin = branches[0].pin()
    for branch in branches:
        branch.prune(retain=True)
    cache.match([1] * PAGE).prune(retain=True)  # used again: now the latest
    cache.root([9] * PAGE)
    assert cache.match([2] * PAGE) is None
    assert all(cache.match([i] * PAGE) is not None for i in (0, 1, 3))
    pin.release()
    cache.check()


def test_a_fork_has_noise_of_its_own():
    cache = small_cache(n_pages=100)
    root = cache.root([1], stream=5)
    first, second = root.fork(3), root.fork(3)
    grand = [g for child in first for g in child.fork(2)]
    streams = [branch.stream for branch in (root, *first, *second, *grand)]
    need_distinct_streams(torch.tensor(streams))
    roots = [cache.root([2]), cache.root([2]), cache.match([2, 2])]
    streams += cache.streams(roots).tolist()
    need_distinct_streams(torch.tensor(streams))
    with pytest.raises(ValueError, match="a stream of its own for every member"):
        cache.streams([root, cache.root([1], stream=5)])
    again = small_cache().root([1], stream=5).fork(3)
    assert [branch.stream for branch in again] == streams[1:4]


@pytest.mark.parametrize("what", ["token", "key", "stale", "swapped"])
def test_self_checks_notice_a_spoiled_slot(what):
    cache = small_cache(checksum=True)
    branch = cache.root([1, 2, 3, 4, 5, 6])
    compute(cache, [branch])
    cache.check()
    slot = text_slots(cache, branch)[4]
    if what == "token":  # an address that is another token's
        cache._canary[slot] = cache._canary[text_slots(cache, branch)[3]]
    elif what == "stale":  # the same token at the same place, by an older policy
        cache._canary[slot] = cache._words(np.array([5]), np.array([4]), np.array([-1]))[0]
    elif what == "key":
        cache.layers[1].values[slot, 0, 1] += 1
    else:
        keys, values = cache.layers[1]
        keys[slot], values[slot] = values[slot].clone(), keys[slot].clone()
    is_value = what in ("key", "swapped")
    words = "the keys and values written in layer 1" if is_value else "the token, position and"
    with pytest.raises(RuntimeError, match=f"slot {slot}: need {words}"):
        cache.check()


@pytest.mark.parametrize("broken", ["reference", "free", "length", "computed", "slots"])
def test_check_notices_a_broken_tree(broken):
    cache = small_cache(canary=False)  # the tree alone
    branch = cache.root(range(6))
    other = branch.fork(1, at=3)[0]
    if broken == "computed":  # a node before the one above it
        cache.tree.computed[branch.node.number] = 1
    elif broken == "slots":  # two nodes over one page's slots
        cache.append([other], [[8]])
        page = other.node.pages[0]
        branch.node.pages[-1], taken = page, branch.node.pages[-1]
        cache.tree.pool.share(page)
        cache.tree.pool.give_back([taken])
    elif broken == "reference":
        cache.tree.pool._references[branch.node.pages[0]] -= 1
    elif broken == "free":
        cache.tree.pool._free.append(branch.node.pages[-1])
    else:
        cache.tree.length[branch.node.number] += 4
    with pytest.raises(RuntimeError, match="need"):
        cache.check()


def test_bad_input_leaves_the_cache_as_it_was():
    cache = small_cache(n_pages=3)
    branch, gone = cache.root([1, 2, 3]), cache.root()
    gone.prune()
    cases = [
        (ValueError, "at: need a position in 0..3, got 4", lambda: branch.fork(1, at=4)),
        (ValueError, "at: need a position in 0..3, got -1", lambda: branch.fork(1, at=-1)),
        (ValueError, "n: need a number of branches >= 0", lambda: branch.fork(-1)),
        (ValueError, "at: need a position in 0..3, got 5", lambda: branch.truncate(5)),
        (ValueError, "a live branch, got one that was pruned", lambda: gone.fork()),
        (ValueError, "a live branch", lambda: cache.append([branch, gone], [[1], [1]])),
        (ValueError, "each branch once", lambda: cache.append([branch] * 2, [[1], [1]])),
        (ValueError, "tokens: need 1 sequences, got 2", lambda: cache.append([branch], [[1], [2]])),
        (ValueError, r"tokens\[0\]: need a sequence", lambda: cache.append([branch], [[0.5]])),
        (OutOfPages, "need 3 free ones of 3, got 2", lambda: cache.append([branch], [[1] * 10])),
        (OutOfPages, "need 4 free ones of 3", lambda: cache.root([1] * 16)),
        (ValueError, r"branches\[0\]: need a text of at least", lambda: cache.plan([cache.root()])),
        (ValueError, "n_pages: need a count >= 1", lambda: small_cache(n_pages=0)),
        (ValueError, "a multiple of n_kv_heads", lambda: TreeCache(1, 2, 4, n_pages=1, n_heads=3)),
    ]
    for kind, words, work in cases:
        with pytest.raises(kind, match=words):
            work()
        cache.check()
        assert branch.tokens.tolist() == [1, 2, 3]
    for work in (
        lambda: branch.fork(1, at=1.0),
        lambda: branch.truncate(1.5),
        lambda: branch.fork(0.5),
    ):
        with pytest.raises(TypeError, match="interpreted as an integer"):
            work()
        cache.check()
    pin = branch.pin()
    pin.release()
    with pytest.raises(ValueError, match="pin: need one that holds"):
        pin.release()


def test_a_step_of_another_tree_is_refused():
    cache = small_cache()
    branch = cache.root([1, 2, 3])
    for change in (
        lambda: cache.append([branch], [[4]]),
        lambda: branch.truncate(2),
        lambda: branch.fork(1, at=1),
        lambda: setattr(cache, "version", 9),
    ):
        step = cache.plan([branch])
        change()
        with pytest.raises(ValueError, match="step: need one of the tree as it is"):
            cache.commit(step)
        assert branch.n_computed == 0
        cache.check()
