"""`bench tree reuse`: what is timed, and what a rollout must be to get numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rollfuse.bench import tree_reuse
from rollfuse.bench.choice import Wrong
from rollfuse.bench.entrant import Plan
from rollfuse.bench.tree_reuse import COUPLED, FLOOR, LENIENT, PLAIN

CPU = torch.device("cpu")
CASE = tree_reuse.Case(
    prompts=3, branches=4, batch=4, prompt=6, response=8, hidden=32, layers=1, vocabulary=64
)


@pytest.fixture(scope="module")
def setting():
    pytest.importorskip("transformers", reason="needs transformers: the extra [grpo]")
    return tree_reuse.make_setting(CASE, CPU)


def test_the_more_weights_have_moved_the_more_is_drawn(setting):
    before = {name: value.clone() for name, value in setting.engine.model.state_dict().items()}
    drawn = []
    for size in (0.0, 0.1, 3.0):
        move = tree_reuse.measure_move(CASE, setting, size, Plan(CPU, 1))
        rows = {row["provider"]: row for row in move["rows"]}
        assert list(rows) == [PLAIN, COUPLED, LENIENT, FLOOR]
        assert all(row["status"] == "ok" and row["ratio"] for row in rows.values())
        assert rows[PLAIN]["facts"]["drawn"] == rows[PLAIN]["facts"]["tokens"] == 3 * 4 * 8
        # One pass a wave, of a group each.
        assert rows[FLOOR]["facts"]["drawn"] == 0 and rows[FLOOR]["facts"]["passes"] == 3
        drawn.append(rows[COUPLED]["facts"]["drawn"])
        assert (rows[COUPLED]["facts"]["variation"] < 1e-5) == (size == 0.0)
    assert drawn[0] == 0 < drawn[1] < drawn[2]
    for name, value in setting.engine.model.state_dict().items():
        assert torch.equal(value, before[name])


def test_what_is_short_or_of_another_policy_gets_no_numbers(setting):
    right = setting.respond()
    assert tree_reuse.accept(setting, right, None)["tokens"] == 96
    short = replace(setting, prompts=setting.prompts[:2]).respond()
    with pytest.raises(Wrong, match="need 96 tokens, got 64"):
        tree_reuse.accept(setting, short, None)
    off = replace(right, logp=right.logp - 1.0)
    with pytest.raises(Wrong, match="standard errors off"):
        tree_reuse.accept(setting, off, setting.drafters[COUPLED])
    assert tree_reuse.accept(setting, off, setting.drafters[LENIENT])["standard_score"] < -6


def test_the_table_names_the_moves(setting):
    move = tree_reuse.measure_move(CASE, setting, 0.1, Plan(CPU, 1))
    text = tree_reuse.table({"case": tree_reuse.asdict(CASE), "moves": [move]})
    assert "3 x 4 responses of 8 tokens, 4 at a time, weights moved by 0.1 S" in text
    assert COUPLED in text and FLOOR in text
