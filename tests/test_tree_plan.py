"""Plans against the trees they are made of: what each row reads, in which order, and how often."""

import random

import numpy as np
import pytest

from rollfuse.kernels.tree_plan import Item, Spans, plan_of


def random_spans(seed, *, depth=5, longest=40, most=4, shortest=1):
    """A random tree, depth first, with rows at every leaf and here and there inside."""
    draw = random.Random(seed)
    parent, start, length, rows, below = [], [], [], [], []

    def grow(above, begin, level):
        here = len(parent)
        n = draw.randint(shortest, longest)
        n_children = draw.randint(0, most) if level < depth else 0
        parent.append(above), start.append(begin), length.append(n), below.append(0)
        inside = draw.choice((1, n)) if draw.random() < 0.2 else 0
        rows.append(inside if n_children else draw.choice((1, 1, min(n, 3))))
        for _ in range(n_children):
            grow(here, begin + n, level + 1)
        below[here] = len(parent)

    for _ in range(draw.randint(1, 3)):
        grow(-1, 0, 0)
    slots = np.random.default_rng(seed).permutation(2 * sum(length))[: sum(length)]
    columns = [np.array(x, dtype=np.int64) for x in (parent, below, start, length, rows)]
    return Spans(*columns, slots=slots)


def chain(spans, i):
    found = []
    while i >= 0:
        found.insert(0, i)
        i = int(spans.parent[i])
    return found


def expected_rows(spans):
    """Of each row, in order: the slots of its path up to itself."""
    first = spans.length.cumsum() - spans.length
    rows = []
    for i, n in enumerate(spans.rows.tolist()):
        path = [spans.slots[first[j] : first[j] + spans.length[j]] for j in chain(spans, i)]
        slots = np.concatenate(path)
        rows.extend(slots[: len(slots) - n + k + 1] for k in range(n))
    return rows


def read_rows(plan):
    """Of each row: its items in the order of their ordinals as (first position, slots)."""
    rows = [{} for _ in range(plan.n_rows)]
    for item in plan.items.tolist():
        slots = plan.slots[item[Item.SLOT_BEGIN] : item[Item.SLOT_BEGIN] + item[Item.KV_LEN]]
        for row in range(item[Item.Q_BEGIN], item[Item.Q_BEGIN] + item[Item.Q_COUNT]):
            assert item[Item.ORDINAL] not in rows[row]
            rows[row][item[Item.ORDINAL]] = (item[Item.KV_BEGIN], slots)
    return rows


OPTIONS = [{}, {"group": 4}, {"short": 16}, {"split": 8}, {"split": 3, "group": 2}, {"kv_bytes": 2}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("seed", range(8))
def test_every_row_reads_its_own_path_once_and_in_order(seed, options):
    spans = random_spans(seed)
    plan = plan_of(spans, **options)
    expected = expected_rows(spans)
    assert plan.positions.tolist() == [len(slots) - 1 for slots in expected]
    for row, (found, slots) in enumerate(zip(read_rows(plan), expected, strict=True)):
        assert sorted(found) == list(range(len(found)))
        assert len(found) == plan.partials[row + 1] - plan.partials[row]
        parts = [found[k] for k in range(len(found))]
        assert [begin for begin, _ in parts] == np.cumsum([0, *(len(p) for _, p in parts)])[
            :-1
        ].tolist()
        everything = np.concatenate([part for _, part in parts])
        # What lies behind the row in its own node is not counted: its position is too high.
        assert everything[: len(slots)].tolist() == slots.tolist()
        tail = plan.items[plan.tails[row]]
        assert slots[-1] in plan.slots[tail[2] : tail[2] + tail[3]]


def read_bytes(plan, group, kv_bytes):
    """Of one channel of one key-value head: keys and values, partial results written and read."""
    rows = np.diff(plan.partials)
    return 2 * kv_bytes * plan.kv_read + 8 * group * int(rows[rows > 1].sum())


@pytest.mark.parametrize("split", [None, 64])
@pytest.mark.parametrize("kv_bytes", [2, 4])
@pytest.mark.parametrize("group", [1, 4, 8])
def test_long_nodes_are_read_once_and_partial_results_are_a_quarter_at_most(group, kv_bytes, split):
    for seed in range(40):
        spans = random_spans(seed, depth=3, longest=30)
        # At least 8 packed rows' length; a node's rows are those of the leaves below it.
        is_leaf = np.bincount(spans.parent[spans.parent >= 0], minlength=len(spans.parent)) == 0
        leaves = np.concatenate([[0], is_leaf.cumsum()])
        below = leaves[spans.below] - leaves[:-1]
        length = np.maximum(spans.length, 8 * below * group)
        n = int(length.sum())
        spans = Spans(
            spans.parent, spans.below, np.zeros_like(length), length, is_leaf.astype(np.int64),
            np.arange(n),
        )  # fmt: skip
        plan = plan_of(spans, group=group, kv_bytes=kv_bytes, split=split)
        assert plan.kv_read == n
        assert read_bytes(plan, group, kv_bytes) <= 1.25 * 2 * kv_bytes * n
        if split is None:
            assert len(plan.items) <= len(length)
        else:
            assert plan.items[:, Item.KV_LEN].min() >= min(64, length.min())


def test_a_node_of_few_keys_goes_into_its_childrens_items():
    def shared(n_keys, n_children, **options):
        length = np.array([n_keys, *[50] * n_children])
        parent = np.array([-1, *[0] * n_children])
        below = np.array([n_children + 1, *range(2, n_children + 2)])
        start = np.array([0, *[n_keys] * n_children])
        rows = np.array([0, *[1] * n_children])
        spans = Spans(parent, below, start, length, rows, np.arange(int(length.sum())))
        return plan_of(spans, **options)

    # (children - 1) * keys * bytes against 4 * packed rows.
    assert len(shared(1, 8, kv_bytes=4).items) == 8
    assert len(shared(2, 8, kv_bytes=4).items) == 9
    assert len(shared(2, 8, kv_bytes=2).items) == 8
    assert len(shared(4, 8, group=4).items) == 8
    assert len(shared(5, 8, group=4).items) == 9
    assert len(shared(20, 8, short=20).items) == 8
    assert len(shared(500, 1).items) == 1 and shared(500, 1).n_partials == 1


def test_a_short_node_with_rows_of_its_own_goes_into_its_childrens_items_too():
    def chain_of(lengths, rows, **options):
        n, length = len(lengths), np.array(lengths)
        parent, below, start = np.arange(n) - 1, np.full(n, n), length.cumsum() - length
        spans = Spans(parent, below, start, length, np.array(rows), np.arange(int(length.sum())))
        return plan_of(spans, **options)

    # Read once more by its own rows: keys * bytes against 4 * packed rows below.
    apart = chain_of([2, 3], [1, 2], kv_bytes=4)
    assert apart.items[:, Item.KV_LEN].tolist() == [2, 5]
    assert apart.items[:, Item.Q_COUNT].tolist() == [1, 2] and apart.n_partials == 3
    together = chain_of([3, 3], [1, 2], kv_bytes=4)
    assert together.items[:, Item.KV_LEN].tolist() == [3, 3]
    assert together.items[:, Item.Q_COUNT].tolist() == [3, 2] and together.n_partials == 5
    assert chain_of([3, 3], [1, 2], kv_bytes=4, group=2).n_partials == 3
    assert chain_of([9, 9, 9], [1, 1, 5], short=20).n_partials == 7
    # Its own rows do not count: they have no partial result of it to save.
    assert chain_of([8, 1], [8, 1], kv_bytes=4).items[:, Item.Q_COUNT].tolist() == [9, 1]


def test_an_advanced_plan_reads_the_new_tokens():
    spans = random_spans(3)
    is_leaf = np.bincount(spans.parent[spans.parent >= 0], minlength=len(spans.parent)) == 0
    columns = (spans.parent, spans.below, spans.start, spans.length)
    spans = Spans(*columns, is_leaf.astype(np.int64), spans.slots, room=3)
    plan, expected = plan_of(spans), expected_rows(spans)
    for step in range(3):
        new = 1000 * (step + 1) + np.arange(plan.n_rows)
        plan = plan.advanced(new)
        expected = [np.append(slots, slot) for slots, slot in zip(expected, new, strict=True)]
        assert plan.room == 2 - step
        for found, slots in zip(read_rows(plan), expected, strict=True):
            read = np.concatenate([found[k][1] for k in range(len(found))])
            assert read.tolist() == slots.tolist()
        assert plan.positions.tolist() == [len(slots) - 1 for slots in expected]


def test_no_spans_make_an_empty_plan():
    nothing = np.empty(0, np.int64)
    plan = plan_of(Spans(*[nothing] * 6))
    assert plan.n_rows == 0 and plan.n_partials == 0 and plan.items.shape == (0, 6)
