"""`bench tree fork`: what a fork must be to get numbers."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from rollfuse.bench import entrant, tree_fork
from rollfuse.bench.choice import Wrong
from rollfuse.bench.entrant import Plan

CPU = torch.device("cpu")
TEXT = tree_fork.Case(branches=3, text=50, layers=2, kv_heads=1, width=4)


def rows_by_name(result):
    return {row["provider"]: row for row in result["rows"]}


def test_forks_copy_nothing_and_rivals_all():
    pytest.importorskip("transformers", reason="needs transformers: the extra [grpo]")
    rows = rows_by_name(tree_fork.measure_case(TEXT, CPU, 2))
    assert [row["status"] for row in rows.values()] == ["ok"] * 4
    for name, row in rows.items():
        copied = 0 if row["ours"] else 3 * _places()[0] * 2 * 2 * 4 * 4
        assert row["facts"]["bytes_copied"] == copied, name
        assert row["facts"]["seconds_per_branch"] > 0


def _places():
    text = tree_fork.make_text(TEXT, CPU)
    step = tree_fork._at_any_token(text, lambda at: at)
    return [step() for _ in range(3)]


def test_forks_are_at_many_places_and_let_go_of():
    assert len(set(_places())) == 3
    text = tree_fork.make_text(TEXT, CPU)
    free = text.cache.statistics().n_pages_free
    entrants = [e for e in tree_fork.entrants(text) if e.ours]
    plan = Plan(CPU, 2, finish=tree_fork._let_go)
    entrant.measure_all(entrants, partial(tree_fork._accept, text), plan)
    text.cache.check()
    assert text.cache.statistics().n_pages_free == free


def _elsewhere(text):
    return tree_fork._fork(text, 20)._replace(at=21)


def _one_missing(text):
    forked = tree_fork._fork(text, 20)
    return forked._replace(branches=forked.branches[1:])


def _written(text):
    forked = tree_fork._fork(text, 20)
    text.cache.layers[1].values[-1] = 0.0
    return forked


def _other_values(text):
    forked = tree_fork._fork(text, 20)
    text.slabs[1][1][0, 0, 19] += 1.0
    return forked


def _copied_wrong(text):
    copies = [tuple(x[:, :, :20].repeat(3, 1, 1, 1) for x in layer) for layer in text.slabs]
    copies[1][0][2, 0, 19] = 0.0
    return tree_fork.Forked(20, [], copies)


@pytest.mark.parametrize(
    "wrong", [_elsewhere, _one_missing, _written, _other_values, _copied_wrong]
)
def test_a_wrong_fork_is_refused(wrong):
    text = tree_fork.make_text(TEXT, CPU)
    tree_fork._accept(text, tree_fork._fork(text, 20))
    with pytest.raises(Wrong):
        tree_fork._accept(text, wrong(text))
