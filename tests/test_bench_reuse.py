import json

import pytest
import torch

from rollfuse.bench import reuse, table

pytest.importorskip("transformers", reason="needs transformers: the extra [grpo]")


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def record(step, **values):
    known = {"reward": 0.5, "tokens": 100.0, "seconds": 2.0, "generation_seconds": 1.0}
    return {"step": step, **known, **values}


def test_facts_of_a_run() -> None:
    records = [
        {"step": 0, "heldout_accuracy": 0.1},
        record(1, drawn_tokens=100.0),
        record(2, drawn_tokens=40.0, accepted_run=3.0, reward=0.7),
        record(3, drawn_tokens=20.0, accepted_run=5.0, reward=0.9),
        {"step": 3, "heldout_accuracy": 0.4},
    ]
    found = reuse.facts_of(records, 1)
    assert found["tokens"] == 300 and found["tokens drawn"] == 160
    assert found["tokens drawn after the first epoch"] == 60
    assert found["reward of the last epoch"] == 0.9
    assert (found["held-out before"], found["held-out after"]) == (0.1, 0.4)
    assert found["accepted_run"] == 4.0 and "run_most" not in found
    assert found["seconds of steps"] == 6.0


def test_summary_pairs_runs_of_a_seed() -> None:
    def one(kind, seed, seconds):
        facts = dict.fromkeys(("seconds of generation", "tokens drawn"), 1.0)
        return {"reuse": kind, "seed": seed, "facts": {**facts, "seconds of steps": seconds}}

    runs = [one("none", s, t) for s, t in ((0, 1.0), (1, 10.0), (2, 100.0))]
    runs += [one("coupled", s, t) for s, t in ((0, 2.0), (1, 5.0), (2, 10.0))]
    found = reuse.summary(runs)
    assert found["coupled"]["seconds of steps, x none"] == 0.5
    assert found["none"]["seconds of steps, x none"] == 1.0


def test_runs_every_kind_from_the_same_start(tmp_path, monkeypatch, capsys) -> None:
    original = reuse.config_of

    def small(options, kind, seed):
        from dataclasses import replace

        return replace(
            original(options, kind, seed), layers=1, hidden=16, intermediate=32, heads=2,
            kv_heads=1, heldout=8, warm_steps=2,
        )  # fmt: skip

    monkeypatch.setattr(reuse, "config_of", small)
    path = tmp_path / "reuse.json"
    flags = ["--problems", "64", "--epochs", "2", "--seeds", "3", "4", "--json", str(path)]
    assert reuse.main([*flags, "--kinds", "none", "coupled"]) == 0
    result = json.loads(path.read_text())
    assert [(r["reuse"], r["seed"]) for r in result["runs"]] == [
        ("none", 3), ("none", 4), ("coupled", 3), ("coupled", 4),
    ]  # fmt: skip
    for seed in (0, 1):
        plain, coupled = result["runs"][seed], result["runs"][2 + seed]
        # The same problems, weights and noise, until there is something to reuse.
        assert plain["rewards"][0] == coupled["rewards"][0]
        assert len(plain["rewards"]) == len(plain["seconds"]) == 2
        assert coupled["facts"]["tokens drawn"] < plain["facts"]["tokens drawn"]
    assert "tokens drawn, x none" in capsys.readouterr().out
    assert reuse.table(result).startswith("median of 2 seeds")
    assert table.main([str(path)]) == 0
    assert reuse.table(result) in capsys.readouterr().out


def test_refusals(capsys) -> None:
    for flags in (["--problems", "65"], ["--problems", "0"], ["--epochs", "0"]):
        with pytest.raises(SystemExit):
            reuse.main(flags)
        assert "need" in capsys.readouterr().err
