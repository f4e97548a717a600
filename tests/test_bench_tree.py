"""`bench tree`: who gets numbers, what is counted, what is written."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from rollfuse.bench import entrant, measure, table, tree, tree_bytes
from rollfuse.bench.choice import Unavailable, Wrong
from rollfuse.bench.entrant import Entrant, Plan

CPU = torch.device("cpu")


def measured(entrants, accept=lambda result: {"value": result}, **options):
    return entrant.measure_all(entrants, accept, Plan(CPU, 2, **options))


def test_only_right_configurations_are_timed():
    def accept(result):
        if result != 1:
            raise Wrong(f"need 1, got {result}")
        return {"value": result}

    mixed = Entrant("mixed", lambda: {"bad": lambda: 2, "good": lambda: 1})
    wrong = Entrant("wrong", lambda: {"": lambda: 3}, ours=True)
    found = measured([mixed, wrong], accept)
    first, second = found.entries
    assert (first.status, first.configuration, first.facts) == ("ok", "good", {"value": 1})
    assert first.seconds is not None and "need 1, got 2 [bad]" in first.note
    assert second.status == "wrong: need 1, got 3" and second.seconds is None
    assert set(found.times) == set(found.steps) == {"mixed"}
    assert entrant.is_wrong(entrant.result_of(found.entries))
    assert not entrant.is_wrong(entrant.result_of([first, replace(second, ours=False)]))


def test_who_cannot_run_or_fails_says_why_and_ours_raises():
    def unavailable():
        raise Unavailable("needs a card")

    def failing():
        raise OSError("no such thing")

    found = measured([Entrant("a", unavailable), Entrant("b", lambda: {"": failing})])
    assert [e.status for e in found.entries] == ["skipped: needs a card", "failed: no such thing"]
    with pytest.raises(OSError, match="no such thing"):
        measured([Entrant("c", lambda: {"": failing}, ours=True)])


def test_every_result_is_finished_once():
    made, finished = [], []
    counted = Entrant("counted", lambda: {"": lambda: made.append(len(made)) or len(made)})
    measured([counted], finish=finished.append)
    assert finished == [1, 2, 3]


# -- counted bytes --------------------------------------------------------------------------


def test_bytes_of_a_group_by_hand():
    # A root of 64 keys with two tails of 32: 128 keys of 2 * 8 * 4 bytes. Each of two rows and two
    # heads has two partial results of 8 numbers and a logarithm, 4 bytes each.
    found = tree_bytes.count((2,), 2.0, 2, torch.float32, torch.device("meta"), width=8)
    assert found.is_long and found.plan == "GPU"
    assert found.tree_bytes == found.kv_bytes == 128 * 64
    assert found.partial_bytes == 2 * 2 * 2 * 9 * 4
    assert found.read == 1 + 288 / 8192 and found.moved == 1 + 2 * 288 / 8192


def test_long_nodes_are_read_once_and_little_more():
    shapes = ((16,), (2, 2, 2, 2), (8, 8), (32, 2), (1, 16))
    found = list(tree_bytes.grid(shapes, (0.25, 1.0, 1.25, 4.0)))
    long = [one for one in found if one.is_long]
    assert 0 < len(long) < len(found)
    for one in long:
        assert one.read <= tree_bytes.LIMIT, one
        assert one.moved <= tree_bytes.LIMIT + 0.25 / 128, one
    # The limit is one: trees of short nodes pass it.
    assert max(one.read for one in found if not one.is_long) > tree_bytes.LIMIT


# -- the command ----------------------------------------------------------------------------

COMMANDS = {
    "attention": "--branches 2 --prompt 20 --tail 3 --heads 2 --kv-heads 1 --width 8 "
    "--providers rollfuse",
    "fork": "--branches 2 --text 20 --layers 1 --kv-heads 1 --width 4",
    "engine": "--planning-only --branches 2 --prompt 9 --response 3 --hidden 32 --layers 1 "
    "--heads 2 --kv-heads 1 --width 16 --intermediate 32 --vocabulary 64 --planning 2 3",
    "bytes": "--width 8",
}


@pytest.mark.parametrize("case", COMMANDS)
def test_what_is_written_says_where_from_and_is_shown_again(case, tmp_path, capsys, monkeypatch):
    pytest.importorskip("transformers", reason="needs transformers: the extra [grpo]")
    monkeypatch.setattr(tree_bytes, "SHAPES", ((2,), (2, 2)))
    path = tmp_path / "result.json"
    arguments = [case, *COMMANDS[case].split(), "--repeats", "1", "--json", str(path)]
    assert tree.main(arguments) == 0
    printed = capsys.readouterr().out
    result = json.loads(path.read_text())
    assert {"device", "versions", "commit", "command", "time", "case", "rows"} <= set(result)
    assert result["command"].startswith(f"python -m rollfuse.bench tree {case} ")
    assert result["tree"] == case and result["repeats"] == 1
    assert table.main([str(path)]) == 0
    # But for the heading, whose versions a file sorts.
    assert capsys.readouterr().out.split("commit")[1].strip() == printed.split("commit")[1].strip()
    if case == "engine":
        assert [found["branches"] for found in result["planning"]] == [2, 3]


@pytest.mark.parametrize(
    "arguments", [[], ["attention", "--tail", "0"], ["engine", "--planning", "0"]]
)
def test_bad_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        tree.main(arguments)
    assert "need at least 1" in capsys.readouterr().err or not arguments


def test_the_spread_survives_a_result_file():
    assert json.loads(json.dumps(measure.spread([1.0]), default=measure.plain))["median"] == 1.0
