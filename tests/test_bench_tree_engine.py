"""`bench tree engine`: what a group of samples must be to get numbers."""

from __future__ import annotations

import multiprocessing
import threading
from dataclasses import replace
from functools import partial

import pytest
import torch

from rollfuse.bench import tree_engine, tree_planning
from rollfuse.bench.apart import Apart
from rollfuse.bench.choice import Wrong
from rollfuse.bench.continuous_batching import continuous_steps
from rollfuse.bench.generation import FLOOR, Generated, counting, floor_step
from rollfuse.bench.generation_rivals import NAMES, engine_steps
from rollfuse.bench.race import fingerprint
from rollfuse.bench.tree_planning import Watch, planning_share

CPU = torch.device("cpu")
MODEL = tree_engine.Case(
    branches=3, prompt=9, response=5, hidden=32, layers=2, heads=2, kv_heads=1, width=16,
    intermediate=48, vocabulary=64,
)  # fmt: skip


def rows_by_name(result):
    return {row["provider"]: row for row in result["rows"]}


@pytest.fixture(scope="module")
def setting():
    pytest.importorskip("transformers", reason="needs transformers: the extra [grpo]")
    return tree_engine.make_setting(MODEL, CPU)


@pytest.mark.filterwarnings("ignore")  # rivals' deprecations
def test_everybody_makes_all_tokens():
    pytest.importorskip("trl", reason="needs TRL: the extra [rivals]")
    result = tree_engine.measure_case(MODEL, CPU, 1)
    rows = rows_by_name(result)
    assert list(rows) == [FLOOR, *NAMES]
    for name, row in rows.items():
        assert row["status"] == "ok", (name, row["status"])
        assert row["note"].startswith("timed: "), name
        assert row["facts"]["tokens"] == 15, name
        # Requests that come one after the other may need a pass more.
        assert row["facts"]["passes"] == 5 or "continuous" in name and row["facts"]["passes"] <= 7
        assert row["facts"]["tokens_per_second"] > 0
        assert name == FLOOR or row["facts"]["kv_bytes"] > 0
        over = row["seconds"]["median"] / rows[FLOOR]["seconds"]["median"]
        assert row["facts"]["over_floor"]["median"] == pytest.approx(over)
    token = 2 * 2 * 16 * 4  # bytes in both layers
    assert rows["TRL generation"]["facts"]["kv_bytes"] == 3 * 13 * token
    # The prompt once, then three texts a pass; or less, where two still agree.
    assert rows[FLOOR]["facts"]["pushed"] == 9 + 4 * 3
    assert rows["rollfuse"]["facts"]["pushed"] <= 9 + 4 * 3
    assert rows["transformers generate"]["facts"]["pushed"] == 3 * (9 + 4)


def _samples(setting):
    return engine_steps(replace(setting, seed=0))[""]()


def _greedy(setting, prompt):
    """Nearly: the likeliest tokens, each response's own."""
    found = []
    for i in range(setting.n):
        text = list(prompt)
        for _ in range(setting.response):
            logits = setting.model(torch.tensor([text])).logits[0, -1]
            text.append(int(logits.argsort(descending=True)[i]))
        found.append(text[len(prompt) :])
    return found


def test_what_is_no_group_of_samples_is_refused(setting):
    right = _samples(setting)
    facts = tree_engine.accept(setting, right)
    assert facts["tokens"] == 15 and facts["kv_bytes"] == right.kv_bytes
    assert abs(facts["standard_score"]) < 6
    one, two, three = right.responses
    for wrong in ([one, two], [one, two, three[:4]], [one, two, two]):
        with pytest.raises(Wrong):
            tree_engine.accept(setting, right._replace(responses=wrong))


def test_greedy_tokens_are_no_samples(setting):
    longer = replace(setting, response=64)
    longer.model.config.max_position_embeddings = 128
    with torch.no_grad(), pytest.raises(Wrong, match="standard errors"):
        prompt = longer.next_prompt()
        tree_engine.accept(longer, Generated(prompt, _greedy(longer, prompt), 0))


def test_no_prompt_comes_twice(setting):
    fresh = replace(setting, seed=0)
    first, second = fresh.next_prompt(), fresh.next_prompt()
    assert len(first) == len(second) == 9 and first != second


def test_passes_are_counted(setting):
    with counting(setting.model) as counted, torch.no_grad():
        setting.model(torch.tensor([[1, 2, 3]]))
        setting.model(torch.tensor([[1], [2]]))
    setting.model(torch.tensor([[1]]))
    assert (counted.passes, counted.pushed) == (2, 5)


def test_the_floor_has_no_context(setting):
    shapes, kept = [], []

    def seen(module, given, options, made):
        shapes.append((tuple(given[0].shape), tuple(made.logits.shape)))
        kept.append(made.past_key_values)

    hook = setting.model.register_forward_hook(seen, with_kwargs=True)
    floor_step(setting)()
    hook.remove()
    # The prompt up to its last row's logits, then rows that see themselves alone.
    assert shapes == [((1, 9), (1, 1, 64)), *[((3, 1), (3, 1, 64))] * 4]
    assert kept == [None] * 5


def test_without_rivals_nothing_is_timed():
    pytest.importorskip("transformers", reason="needs transformers: the extra [grpo]")
    assert tree_engine.measure_case(MODEL, CPU, 1, [])["rows"] == []


def test_another_process_makes_the_same_model(setting):
    apart = Apart(partial(dict, model=setting.recipe))
    assert fingerprint(apart("model")) == fingerprint(setting.model)
    apart.close()


def test_continuous_batching_has_a_process_of_its_own(setting):
    apart = replace(setting, apart=[])
    before, running = threading.active_count(), set(multiprocessing.active_children())
    steps = continuous_steps(apart)
    try:
        for step in steps.values():
            first, second = step(), step()
            for made, seconds in (first, second):
                tree_engine.accept(apart, made)
                # Requests that come one after the other may need a pass more.
                assert seconds > 0.0 and 5 <= made.counted.passes <= 7
            assert first.result.prompt != second.result.prompt
        assert threading.active_count() == before
        assert len(set(multiprocessing.active_children()) - running) == 1
    finally:
        apart.stop()
    assert not set(multiprocessing.active_children()) - running and not apart.apart


def test_planning_is_part_of_a_step(setting, monkeypatch):
    calls = []
    timing = Watch.timing

    def noticed(self, function):
        def called(*given, **options):
            calls.append(function.__name__)
            return function(*given, **options)

        return timing(self, called)

    monkeypatch.setattr(Watch, "timing", noticed)
    found = planning_share(setting.model, branches=3, prompt=9, steps=2)
    assert 0.0 < found["planning_seconds"] < found["step_seconds"]
    assert found["share"] == pytest.approx(found["planning_seconds"] / found["step_seconds"])
    # Once a step each, the blocks once a layer.
    assert sorted(calls) == sorted(["append", "plan", "commit", "_blocks_of", "_blocks_of"] * 2)
    assert not hasattr(tree_planning.TreeCache.plan, "__wrapped__")
