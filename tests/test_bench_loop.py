import json
import time

import pytest
import torch

from rollfuse.bench import loop
from rollfuse.bench.race import Clock, Race, Run, exact_match, need_same_race
from rollfuse.policy import SmallModel, character_tokenizer
from rollfuse.rollout.tasks import Problem, Task, arithmetic_task, grade_exact

pytest.importorskip("transformers", reason="needs transformers: the extra [grpo]")


def _burn(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_a_phase_inside_another_is_counted_once() -> None:
    clock = Clock()
    inner = clock.timing("backward", _burn)
    clock.start()
    with clock.phase("loss forward"):
        _burn(0.03)
        inner(0.06)
    _burn(0.02)
    clock.stop()
    _burn(0.05)  # off the clock
    split = clock.split()
    assert split["loss forward"] == pytest.approx(0.03, abs=0.015)
    assert split["backward"] == pytest.approx(0.06, abs=0.015)
    assert split["rest"] == pytest.approx(0.02, abs=0.015)
    assert sum(split.values()) == pytest.approx(clock.total)


def test_a_run_counts_groups_without_spread() -> None:
    run = Run("x", Clock())
    run.count(list("aabbcc"), [1.0, 1.0, 0.0, 1.0, 0.0, 0.0], samples=2)
    assert (run.completions, run.groups, run.flat_groups) == (6, 3, 2)
    assert run.rewards == [0.5]


def test_accuracy_is_measured_where_due_and_stops_the_clock(tmp_path) -> None:
    race = Race(arithmetic_task(), tmp_path, steps=5, measure_every=2)
    run = Run("x", Clock())
    run.start(torch.nn.Linear(1, 1), lambda: 0.0)
    for step in range(1, 6):
        run.finish_step(step, race, lambda: _burn(0.02) or 0.5)
    assert [point["step"] for point in run.points] == [0, 2, 4, 5]
    assert run.clock.total < 0.02
    with pytest.raises(AssertionError):
        run.clock.stop()  # the last step did


class Parrot(torch.nn.Module):
    """Answers what it was told to, whatever it is asked."""

    def __init__(self, responses: list[list[int]]) -> None:
        super().__init__()
        self.responses = torch.tensor(responses)

    def generate(self, ids, *, attention_mask, max_new_tokens, do_sample, **ends):
        assert not self.training and not do_sample and max_new_tokens == 3
        # The end of every prompt must stand next to its response.
        assert attention_mask.tolist() == [[1, 1, 1, 1, 1], [0, 1, 1, 1, 1], [0, 1, 1, 1, 1]]
        return torch.cat([ids, self.responses], 1)


def test_exact_match_wants_answer_and_end() -> None:
    problems = [Problem("1+12=", "13"), Problem("1+2=", "3"), Problem("2+2=", "4")]
    task = Task("sums", problems, problems, grade_exact, 3, "0123456789+=")
    tokenizer = character_tokenizer("0123456789+=")
    end = tokenizer.eos_token_id
    # Right; right, and what follows the end does not matter; right digit without an end.
    model = Parrot([[1, 3, end], [3, end, 7], [4, 4, 4]])
    assert exact_match(model, tokenizer, task, problems) == pytest.approx(2 / 3)
    assert model.training
    model = Parrot([[1, 3, 0], [end, 3, end], [end, 4, 4]])
    assert exact_match(model, tokenizer, task, problems) == 0.0


def test_summary_and_table() -> None:
    runs = []
    for name, seconds in (("rollfuse", 1.0), ("trl", 4.0)):
        run = Run(name, Clock())
        run.clock.total, run.clock.phases["generation"] = seconds, 0.25 * seconds
        run.count(["1+1="] * 1000, [1.0, 0.0] * 500, samples=2)
        run.points += [
            {"step": 0, "cpu_seconds": 0.0, "accuracy": 0.25},
            {"step": 9, "cpu_seconds": seconds, "accuracy": 0.75},
        ]
        runs.append(run)
    found = loop.summary(runs)
    assert found["trl"]["completions per CPU second"] == 250.0
    assert found["rollfuse"]["generation, CPU ms a completion"] == pytest.approx(0.25)
    assert found["rollfuse"]["rest, CPU ms a completion"] == pytest.approx(0.75)
    assert found["trl"]["accuracy after"] == 0.75
    assert "rollfuse makes 4.00 x the completions of trl" in loop.table(found)


def test_another_order_or_another_warm_start_is_no_race() -> None:
    model = torch.nn.Linear(2, 2)
    ours, trl, shuffled, colder = runs = [Run(name, Clock()) for name in ("a", "b", "c", "d")]
    for run in runs:
        if run is colder:
            with torch.no_grad():
                model.weight[0, 0] += 1e-6
        run.start(model, lambda: 0.0)
        run.clock.stop()
        steps = ["xxyy", "zzww"] if run is not shuffled else ["xxyy", "wwzz"]
        for prompts in steps:
            run.count(list(prompts), [0.0] * 4, samples=2)
    need_same_race(ours, trl)
    with pytest.raises(RuntimeError, match="step 2: need the same prompts in the same order"):
        need_same_race(ours, shuffled)
    with pytest.raises(RuntimeError, match="need one warm start for a and d"):
        need_same_race(ours, colder)


def test_both_trainers_run_the_same_race(tmp_path, monkeypatch) -> None:
    for module in ("trl", "datasets"):
        pytest.importorskip(module, reason=f"needs {module}: the extra [rivals]")
    monkeypatch.setattr(loop, "SHAPE", SmallModel(1, 16, 32, 2, 1))
    # Before each seed's runs are compared: what each trainer graded, step by step.
    raced: list[Run] = []
    monkeypatch.setattr(loop, "need_same_race", lambda *runs: raced.extend(runs))
    threads, path = torch.get_num_threads(), tmp_path / "loop.json"
    try:
        arguments = ["--steps", "3", "--seeds", "0", "--warm-steps", "2", "--json", str(path)]
        assert loop.main([*arguments, "--plot", str(tmp_path / "loop.png")]) == 0
    finally:
        torch.set_num_threads(threads)
    mine, theirs = raced
    assert (mine.name, theirs.name) == ("rollfuse", "trl")
    assert [len(prompts) for prompts in mine.prompts] == [32 * 8] * 3
    assert len({prompt for prompts in mine.prompts for prompt in prompts}) == 3 * 32
    for step in range(3):
        assert mine.prompts[step] == theirs.prompts[step], step
    assert mine.warm == theirs.warm != ""
    result = json.loads(path.read_text())
    ours, trl = sorted(result["runs"], key=lambda run: run["name"])
    assert (ours["name"], trl["name"]) == ("rollfuse", "trl")
    for run in (ours, trl):
        assert run["completions"] == 3 * 32 * 8
        assert set(run["cpu_seconds_by_phase"]) == {
            "generation",
            "loss forward",
            "backward",
            "rest",
        }
        assert run["cpu_seconds_by_phase"]["generation"] > 0.0
        assert run["cpu_seconds_by_phase"]["rest"] >= 0.0
        assert [point["step"] for point in run["points"]] == [0, 3]
    # The same weights before the first step, measured by the same function.
    assert ours["points"][0]["accuracy"] == trl["points"][0]["accuracy"]
    assert trl["cpu_seconds_by_phase"]["backward"] > 0.0
    assert (tmp_path / "loop.png").read_bytes().startswith(b"\x89PNG")


def test_tokenizer_of_both_is_the_same() -> None:
    task = arithmetic_task()
    assert task.alphabet is not None
    tokenizer = character_tokenizer(task.alphabet)
    ids = tokenizer("17-58=")["input_ids"]
    assert "".join(tokenizer.convert_ids_to_tokens(ids)) == "17-58="
