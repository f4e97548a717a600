"""`--reuse` in the loop: what it remembers, measures, saves and shows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_loop import TINY, assert_same_run, first_digit_task, interrupt_in, timeless

from rollfuse import Draft, Target, loop, new_streams, report, session, verify
from rollfuse.config import Config
from rollfuse.reuse import describe_reuse, expected_run, new_reuse
from rollfuse.rollout.decoding import Totals
from rollfuse.rollout.drafter import News, Request
from rollfuse.rollout.engine import Engine
from rollfuse.rollout.fallback import Fallback
from rollfuse.rollout.past_rollouts import PastRollouts
from rollfuse.rollout.record import Rollout, Source
from rollfuse.rollout.suffix_drafts import SuffixDrafts
from rollfuse.run import checkpoints

KINDS = ("coupled", "lenient", "suffix")
# Two steps an epoch, three epochs.
AGAIN = replace(TINY, problems=12, steps=6)


@pytest.fixture(autouse=True)
def easy_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "built_in_task", first_digit_task)


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_is_bitwise(tmp_path: Path, kind: str) -> None:
    config = replace(AGAIN, reuse=kind, refresh=0.2)
    straight = loop.train(config, tmp_path / "straight")
    loop.train(replace(config, steps=3), tmp_path / "parts")
    assert (checkpoints(tmp_path / "parts")[-1] / "drafts.safetensors").is_file()
    torch.manual_seed(123)
    assert_same_run(straight, loop.resume(tmp_path / "parts", steps=6))
    steps = [m for m in timeless(straight) if "loss" in m]
    assert max(m["reused"] for m in steps[2:]) > 0.2, "nothing was reused, nothing was remembered"


@pytest.mark.parametrize("name", ["_grade", "accumulate"])
def test_an_interruption_loses_at_most_the_running_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    config = replace(AGAIN, reuse="coupled")
    straight = loop.train(config, tmp_path / "straight")
    with monkeypatch.context() as patch:
        interrupt_in(patch, loop, name, 5)
        with pytest.raises(KeyboardInterrupt):
            loop.train(config, tmp_path / "cut")
    loop.resume(tmp_path / "cut")
    assert_same_run(straight, tmp_path / "cut")


def test_suffix_reuse_draws_the_tokens_of_a_plain_run(tmp_path: Path) -> None:
    plain = timeless(loop.train(AGAIN, tmp_path / "plain"))
    found = timeless(loop.train(replace(AGAIN, reuse="suffix"), tmp_path / "suffix"))
    for one, other in zip(plain, found, strict=True):
        for key in ("reward", "tokens", "heldout_accuracy"):
            assert one.get(key) == other.get(key)


@pytest.mark.parametrize("kind", ["coupled", "lenient"])
def test_what_a_still_policy_answered_it_answers_again(tmp_path: Path, kind: str) -> None:
    config = replace(AGAIN, reuse=kind, lr=0.0, lenience=0.0, sample_every=1)
    run = loop.train(config, tmp_path / "run")
    steps = [m for m in timeless(run) if "loss" in m]
    for m in steps[:2]:
        assert m["reused"] == 0.0 and m["drawn_tokens"] == m["tokens"]
        assert "accepted_run" not in m
    # With the same weights the same text; rounding may part a few, another batch computes them.
    for m in steps[2:]:
        assert m["reused"] > 0.95
        assert m["match_rate"] > 0.95 and m["match_most"] > 0.999
        assert m["total_variation"] < 1e-3
        assert m["drawn_tokens"] == pytest.approx(m["tokens"] * (1 - m["reused"]))
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    sources = {s for sample in samples if sample["step"] > 2 for s in sample["source"]}
    kept = Source.VERIFIED if kind == "coupled" else Source.LENIENT
    assert kept in sources and sources <= {kept, Source.SAMPLED}


def test_the_cap_starts_responses_afresh(tmp_path: Path) -> None:
    config = replace(AGAIN, reuse="coupled", lr=0.0, reuse_cap=1)
    steps = [m for m in timeless(loop.train(config, tmp_path / "run")) if "loss" in m]
    assert [m["reused"] > 0.9 for m in steps] == [False, False, True, True, False, False]


def test_the_report_shows_where_tokens_came_from(tmp_path: Path) -> None:
    page = (loop.train(replace(AGAIN, reuse="coupled"), tmp_path / "a") / "report.html").read_text()
    for words in ("Reused tokens", "Accepted run", "Match rate", "1 - TV", "class=r"):
        assert words in page
    page = (loop.train(TINY, tmp_path / "b") / "report.html").read_text()
    assert "Reused tokens" not in page and "class=r" not in page


def test_expected_run_is_the_sum_of_powers() -> None:
    lengths = np.array([0, 1, 2, 7])
    for rate in (0.0, 0.3, 0.99, 1.0):
        expected = [sum(rate**t for t in range(1, n + 1)) for n in lengths]
        assert np.allclose(expected_run(rate, lengths), expected)


def test_none_has_no_drafter_and_a_run_can_begin_to_reuse(tmp_path: Path) -> None:
    assert new_reuse(TINY) is None
    loop.train(replace(AGAIN, steps=2), tmp_path / "run")
    assert not (checkpoints(tmp_path / "run")[-1] / "drafts.safetensors").exists()
    path = tmp_path / "run" / "config.json"
    path.write_text(replace(AGAIN, reuse="coupled", steps=2).to_json())
    steps = timeless(loop.resume(tmp_path / "run", steps=6))
    assert max(m.get("reused", 0.0) for m in steps) > 0.0


def test_a_drafter_that_does_not_pay_is_left_alone() -> None:
    reuse = new_reuse(Config(reuse="coupled"))
    assert reuse is not None and isinstance(reuse.drafter, Fallback)
    lenient = new_reuse(Config(reuse="lenient"))
    assert lenient is not None and lenient.drafter is lenient.memory


def test_a_step_in_two_epochs_hands_no_response_out_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven problems, six a step: some prompts are drawn twice in a step."""
    generate, doubles = Engine.generate, []

    def watched(
        engine: Engine, prompts: object, n: int, *args: object, **options: object
    ) -> object:
        made = generate(engine, prompts, n, *args, **options)
        if options.get("drafter") is not None:
            texts = [prompt.tolist() for prompt in made.prompts]
            keys = [str(texts[p]) for p in made.prompt_index.tolist()]
            first = made.token_streams[made.cu_seqlens[:-1]].tolist()
            pairs = list(zip(keys, first, strict=True))
            doubles.append(len(pairs) - len(set(pairs)))
        return made

    monkeypatch.setattr(Engine, "generate", watched)
    loop.train(replace(AGAIN, problems=7, reuse="coupled", steps=12), tmp_path / "run")
    assert doubles == [0] * 12


def test_the_metrics_are_what_their_names_say() -> None:
    reuse = new_reuse(Config(reuse="coupled"))
    assert reuse is not None and isinstance(reuse.memory, PastRollouts)
    rollout = Rollout(
        prompts=(torch.tensor([1]),), prompt_index=torch.zeros(2).long(),
        tokens=torch.arange(5), cu_seqlens=torch.tensor([0, 2, 5]), logp=-torch.ones(5),
        entropy=torch.ones(5), version=torch.zeros(5).long(),
        source=torch.tensor([1, 1, 1, 0, 0], dtype=torch.uint8), streams=torch.tensor([1, 2]),
        finish=torch.zeros(2, dtype=torch.uint8),
    )  # fmt: skip
    reuse.memory.store.add(rollout)
    request = Request([np.array([1])], np.array([0, 0]), np.array([8, 9]), 4, 10)
    reuse.memory.start(request)
    reuse.memory.propose([0, 1])
    two, three = np.array([0, 1]), np.array([2, 7, 8])
    reuse.memory.advance([News(0, two, 2, 2), News(1, three, 1, 3)])
    totals = Totals(passes=4, drafted=5, accepted=3, compared=4, variation=0.8)
    found = describe_reuse(reuse, rollout, totals)
    assert found["reused"] == pytest.approx(0.6) and found["drawn_tokens"] == 2
    assert found["passes"] == 4 and found["accepted"] == pytest.approx(0.6)
    assert found["accepted_run"] == 1.5 and found["match_rate"] == pytest.approx(3 / 4)
    assert found["total_variation"] == pytest.approx(0.2)
    assert found["match_most"] == pytest.approx(0.8)
    assert found["match_least"] == pytest.approx(0.8 / 1.2)
    assert found["run_most"] == pytest.approx(((0.8 + 0.64) + (0.8 + 0.64 + 0.512)) / 2)
    assert found["run_least"] < found["run_most"]


def test_options_reach_the_drafters() -> None:
    reuse = new_reuse(Config(reuse="coupled", reuse_cap=3, refresh=0.25))
    assert reuse is not None and isinstance(reuse.memory, PastRollouts)
    assert (reuse.memory.cap, reuse.memory.refresh) == (3, 0.25)
    suffix = new_reuse(Config(reuse="suffix"))
    assert suffix is not None and isinstance(suffix.memory, SuffixDrafts)
    assert suffix.memory.rollouts == 2
    # One token: kept by a lenience of e^x iff log u <= log p - log q + x.
    draft = Draft(
        torch.zeros(4000).long(), torch.arange(4001), torch.zeros(4000).long(),
        new_streams(0, 4000), logp=torch.full((4000,), 0.8).log(),
    )  # fmt: skip
    target = Target(torch.tensor([[0.2, 0.8]]).log().expand(4000, 2))
    for lenience in (0.0, 1.0):
        reuse = new_reuse(Config(reuse="lenient", lenience=lenience))
        assert reuse is not None
        share = float(verify(reuse.drafter.rule, draft, target).n_accepted.float().mean())
        assert share == pytest.approx(0.25 * np.exp(lenience), abs=0.03)


def test_what_is_saved_is_the_last_finished_step() -> None:
    reuse = new_reuse(Config(reuse="coupled"))
    assert reuse is not None and isinstance(reuse.drafter, Fallback)
    at_rest = reuse.state()
    reuse.drafter.shares[0].add(3, 50)
    reuse.drafter._step = 9
    assert all(torch.equal(value, at_rest[name]) for name, value in reuse.state().items())
    reuse._remember()
    other = new_reuse(Config(reuse="coupled"))
    assert other is not None and isinstance(other.drafter, Fallback)
    other.load(reuse.state())
    assert other.drafter.shares == reuse.drafter.shares and other.drafter._step == 9
    assert all(torch.equal(value, other.state()[n]) for n, value in reuse.state().items())


def test_reused_tokens_are_underlined() -> None:
    sample = {"step": 1, "prompt": "p", "answer": "a", "reward": 1.0, "logp": [0.0] * 3}
    sample |= {
        "tokens": ["x", "y", "z"],
        "source": [Source.VERIFIED, Source.SAMPLED, Source.LENIENT],
    }
    row = report._response(sample)
    assert [">x<" in part for part in row.split("class=r")[1:]][:1] == [True]
    assert row.count("class=r") == 2
    assert "class=r>y<" not in row and "class=r>z<" in row


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reuse": "all"}, "--reuse: need one of none, coupled, lenient, suffix, got 'all'"),
        ({"lenience": -0.1}, "--lenience: need 0 or more"),
        ({"reuse_break_even": 1.5}, r"--reuse-break-even: need a share in \[0, 1\]"),
        ({"reuse_cap": 0}, "--reuse-cap: need at least 1"),
        ({"refresh": 1.5}, r"--refresh: need a share in \[0, 1\]"),
        ({"problems": 0}, "--problems: need at least 1"),
    ],
)
def test_bad_options_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**changes)


def test_more_problems_than_there_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--problems: need at most the 992 problems there are"):
        loop.train(replace(TINY, problems=993), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["coupled", "suffix"])
def test_the_break_even_is_the_runs(kind):
    reuse = new_reuse(Config(reuse=kind, reuse_break_even=0.75))
    assert isinstance(reuse.drafter, Fallback) and reuse.drafter.break_even == 0.75
