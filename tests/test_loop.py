"""The GRPO loop: gradients, resuming, interruptions, refusals, and that it learns."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_qwen3
from torch import Tensor

import rollfuse
from rollfuse import Head, LogpEntropy, Plan, linear_logp_entropy, loop, session, update
from rollfuse.__main__ import main
from rollfuse.config import Config
from rollfuse.policy import Policy, SmallModel, character_tokenizer, load_policy, small_policy
from rollfuse.rollout import tasks
from rollfuse.rollout.engine import Engine
from rollfuse.rollout.packing import hidden_rows
from rollfuse.rollout.tasks import (
    Problem,
    Task,
    arithmetic_task,
    grade_math,
    questions_task,
    sort_task,
)
from rollfuse.run import RunDirectory, checkpoints
from rollfuse.update import Minibatch, accumulate, clip_fraction, score

TWENTY = Path(__file__).parent / "data" / "gsm8k_twenty.jsonl"
TINY = Config(
    layers=1,
    hidden=16,
    intermediate=32,
    heads=2,
    kv_heads=1,
    heldout=8,
    warm_steps=30,
    warm_problems=80,
    warm_batch_size=16,
    warm_lr=1e-2,
    steps=6,
    prompts_per_step=6,
    group_size=4,
    max_new_tokens=6,
    lr=1e-3,
    eval_every=3,
    checkpoint_every=3,
    sample_every=2,
    threads=1,
)


def first_digit_task(name: str, *, heldout: int) -> Task:
    """Say the first of three digits: learned in seconds, and soon some answers are right."""
    problems = [Problem(f"{i:03d}>", f"{i:03d}"[0]) for i in range(1000)]
    train, held = tasks.split_heldout(problems, heldout)
    return Task(name, train, held, tasks.grade_exact, 2, "0123456789>")


@pytest.fixture(scope="module", autouse=True)
def easy_task() -> Iterator[None]:
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "built_in_task", first_digit_task)
        yield
    torch.set_num_threads(threads)


def some_minibatch(n_prompts: int = 5) -> tuple[Policy, Minibatch]:
    """Responses of several lengths with advantages of both signs, a group without spread."""
    task = arithmetic_task()
    policy = small_policy(task, SmallModel(1, 16, 32, 2, 1), seed=0)
    engine = Engine(policy.model, max_new_tokens=6, stop_tokens=range(8))
    prompts = [policy.encode(problem) for problem in task.train[:n_prompts]]
    rollout = engine.generate(prompts, 4, seed=1)
    advantages = torch.linspace(-1.5, 1.5, len(rollout))[torch.randperm(len(rollout))]
    advantages[4:8] = 0.0
    # An old policy somewhat away from this one, so that some ratios are clipped.
    logp_old = rollout.logp + 0.4 * torch.randn(len(rollout.logp))
    logp_ref = rollout.logp - 0.1
    assert len(set(rollout.lengths.tolist())) > 2
    return policy, Minibatch(rollout, advantages, logp_old, logp_ref)


def gradients(policy: Policy, minibatch: Minibatch, config: Config) -> tuple[float, list[Tensor]]:
    policy.model.zero_grad()
    loss = accumulate(policy, minibatch, config).loss
    return loss, [p.grad.clone() for p in policy.model.parameters() if p.grad is not None]


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo", "rloo"])
@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_accumulation_equals_one_big_batch(loss: str, kl_coef: float) -> None:
    policy, minibatch = some_minibatch()
    config = replace(TINY, loss=loss, kl_coef=kl_coef)
    whole_loss, whole = gradients(policy, minibatch, replace(config, micro_sequences=100))
    parts_loss, parts = gradients(policy, minibatch, replace(config, micro_sequences=3))
    assert parts_loss == pytest.approx(whole_loss, rel=1e-5, abs=1e-6)
    for one, other in zip(whole, parts, strict=True):
        assert (one - other).norm() <= 1e-5 * one.norm()
    assert whole[0].norm() > 1e-3


def plain_loss(policy: Policy, minibatch: Minibatch, config: Config) -> Tensor:
    """GRPO written once more from the paper, a sequence at a time on the model's own logits."""
    rollout, total = minibatch.rollout, torch.zeros(())
    for b, response in enumerate(rollout.responses()):
        prompt = rollout.prompts[int(rollout.prompt_index[b])]
        logits = policy.model(torch.cat([prompt, response])[None]).logits[0]
        logp = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, response[:, None])[:, 0]
        start, end = rollout.cu_seqlens[b : b + 2]
        ratio = (logp - minibatch.logp_old[start:end]).exp()
        a = minibatch.advantages[b]
        surrogate = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
        d = minibatch.logp_ref[start:end] - logp
        total = total + (surrogate + config.kl_coef * (d.exp() - 1 - d)).mean()
    return total / len(rollout)


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_the_update_is_grpo(kl_coef: float) -> None:
    policy, minibatch = some_minibatch()
    config = replace(TINY, kl_coef=kl_coef)
    loss, found = gradients(policy, minibatch, config)
    policy.model.zero_grad()
    expected = plain_loss(policy, minibatch, config)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
    wanted = [p.grad for p in policy.model.parameters() if p.grad is not None]
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm()


def test_groups_without_spread_do_not_enter_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, minibatch = some_minibatch()
    seen: list[Tensor] = []

    def watched(model: object, packed: object) -> Tensor:
        seen.append(packed.sequences)
        return hidden_rows(model, packed)

    monkeypatch.setattr(update, "hidden_rows", watched)
    gradients(policy, minibatch, TINY)
    active = (minibatch.advantages != 0).nonzero().squeeze(1)
    assert torch.equal(torch.cat(seen), active) and len(active) == 16
    seen.clear()
    gradients(policy, minibatch, replace(TINY, kl_coef=0.1))
    assert len(torch.cat(seen)) == 20  # the KL term needs everybody
    seen.clear()
    idle = minibatch._replace(advantages=torch.zeros(20))
    assert gradients(policy, idle, TINY) == (0.0, [])
    assert not seen


def test_scores_are_the_samplers_log_probs() -> None:
    policy, minibatch = some_minibatch()
    found = score(policy, minibatch.rollout, replace(TINY, micro_sequences=3))
    assert torch.allclose(found, minibatch.rollout.logp, atol=1e-5)


def test_the_clip_fraction_counts_what_is_clipped() -> None:
    policy, minibatch = some_minibatch()
    found = accumulate(policy, minibatch, TINY)
    clipped = 0
    for logp, old, a in zip(found.logp, found.logp_old, found.advantages, strict=True):
        ratio = (logp - old).exp()
        clipped += bool(a > 0 and ratio > 1.2) or bool(a < 0 and ratio < 0.8)
    assert 0 < clipped < len(found.logp)
    assert clip_fraction(found, TINY) == pytest.approx(clipped / len(found.logp))


def weights(run: Path) -> dict[str, Tensor]:
    return dict(load_policy(checkpoints(run)[-1]).model.state_dict())


def timeless(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in m.items() if "second" not in k} for m in lines]


@pytest.mark.parametrize("changes", [{}, {"minibatches": 2, "kl_coef": 0.05, "rescore": True}])
def test_resuming_is_bitwise(tmp_path: Path, changes: dict[str, object]) -> None:
    config = replace(TINY, **changes)
    straight = loop.train(config, tmp_path / "straight")
    loop.train(replace(config, steps=3), tmp_path / "parts")
    torch.manual_seed(123)
    parts = loop.resume(tmp_path / "parts", steps=6)
    found = weights(parts)
    for name, value in weights(straight).items():
        assert torch.equal(value, found[name]), name
    assert timeless(straight) == timeless(parts)
    # Otherwise nothing would have moved, and the optimiser's state would not matter.
    active = [m["active_sequences"] for m in timeless(parts) if "loss" in m]
    assert max(active[:3]) > 0 and max(active[3:]) > 0
    assert len(timeless(straight)) == 6 + 3  # steps and measurements
    samples = [(run / "samples.jsonl").read_text() for run in (straight, parts)]
    assert samples[0] == samples[1]


def one_at_a_time(
    hidden: Tensor, head: Head, targets: Tensor, *, rows: Tensor, temperature: float, plan: Plan
) -> LogpEntropy:
    parts = [
        linear_logp_entropy(hidden, head, some, rows=of_them, temperature=temperature, plan=plan)
        for some, of_them in zip(targets.split(1), rows.split(1), strict=True)
    ]
    return LogpEntropy(*(torch.cat(values) for values in zip(*parts, strict=True)))


@pytest.mark.parametrize("invariant", [True, False])
def test_scorer_and_trainer_agree_to_the_bit(
    invariant: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same hidden rows the scorer takes one at a time, the trainer all.

    Every sequence counts, because the model's own forward depends on what else is in the batch.
    """
    monkeypatch.setattr(update, "linear_logp_entropy", one_at_a_time)
    config = replace(TINY, rescore=True, invariant=invariant, entropy_coef=0.01, steps=3)
    found = [m for m in timeless(loop.train(config, tmp_path / "run")) if "loss" in m]
    assert len(found) == 3
    for m in found:
        assert (m["scorer_trainer_diff"] == 0.0) == invariant
    # Another forward, token by token, which on a model this small may round alike.
    assert max(m["sampler_trainer_diff"] for m in found) > 0.0


def interrupt_in(monkeypatch: pytest.MonkeyPatch, module: object, name: str, call: int) -> None:
    """Send SIGTERM to this process inside the `call`-th call of a function of the loop."""
    original, count = getattr(module, name), [0]

    def interrupted(*args: object, **kwargs: object) -> object:
        count[0] += 1
        if count[0] == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, interrupted)


@pytest.fixture(scope="module")
def straight_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps of TINY without an interruption."""
    return loop.train(TINY, tmp_path_factory.mktemp("straight") / "run")


@pytest.mark.parametrize(
    ("name", "call", "done"),
    [("_grade", 5, 4), ("accumulate", 5, 4), ("_update", 5, 5), ("heldout_accuracy", 2, 3)],
)
def test_an_interruption_loses_at_most_the_running_step(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    straight_run: Path,
    name: str,
    call: int,
    done: int,
) -> None:
    with monkeypatch.context() as patch:
        interrupt_in(patch, loop, name, call)
        with pytest.raises(KeyboardInterrupt):
            loop.train(TINY, tmp_path / "cut")
    assert checkpoints(tmp_path / "cut")[-1].name == f"step-{done:06d}"
    assert (tmp_path / "cut" / "report.html").exists()
    loop.resume(tmp_path / "cut")
    assert_same_run(straight_run, tmp_path / "cut")


def fail_in(
    monkeypatch: pytest.MonkeyPatch, owner: object, name: str, call: int, error: BaseException
) -> None:
    """Raise `error` instead of the `call`-th call of a function."""
    original, count = getattr(owner, name), [0]

    def failing(*args: object, **kwargs: object) -> object:
        count[0] += 1
        if count[0] == call:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)


def assert_same_run(one: Path, other: Path) -> None:
    found = weights(other)
    for key, value in weights(one).items():
        assert torch.equal(value, found[key]), key
    assert timeless(one) == timeless(other)


@pytest.mark.parametrize(
    ("failure", "done"),
    [
        ((loop, "_grade", 5, ImportError("no grader")), 4),
        ((loop, "accumulate", 6, RuntimeError("out of memory")), 5),
        ((loop, "_finite_gradient_norm", 2, FloatingPointError("nan")), 1),
        ((loop, "heldout_accuracy", 2, ValueError("bad")), 3),
        ((RunDirectory, "log_samples", 5, OSError("disk full")), 5),
        ((RunDirectory, "save", 3, OSError("disk full")), 6),  # a second attempt has room
    ],
)
def test_an_exception_loses_at_most_the_running_step(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    straight_run: Path,
    failure: tuple[object, str, int, BaseException],
    done: int,
) -> None:
    with monkeypatch.context() as patch:
        fail_in(patch, *failure)
        with pytest.raises(type(failure[-1])) as caught:
            loop.train(TINY, tmp_path / "cut")
    assert caught.value is failure[-1]
    assert checkpoints(tmp_path / "cut")[-1].name == f"step-{done:06d}"
    assert (tmp_path / "cut" / "report.html").exists()
    said = f"stopped after step {done}; go on from step-{done:06d} with --resume"
    assert said in capsys.readouterr().out
    loop.resume(tmp_path / "cut")
    assert_same_run(straight_run, tmp_path / "cut")


def test_half_a_step_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(TINY, minibatches=2)
    straight = loop.train(config, tmp_path / "straight")
    for call, done, said in (
        (9, 4, "stopped after step 4; go on from step-000004 with"),  # step 5, first half
        (10, 3, "stopped inside step 5, when some of its updates were done; go on from step-0"),
    ):
        with monkeypatch.context() as patch:
            fail_in(patch, loop, "accumulate", call, RuntimeError("out of memory"))
            with pytest.raises(RuntimeError, match="out of memory"):
                loop.train(config, tmp_path / f"cut-{call}")
        assert checkpoints(tmp_path / f"cut-{call}")[-1].name == f"step-{done:06d}"
        assert said in capsys.readouterr().out
        loop.resume(tmp_path / f"cut-{call}")
        assert_same_run(straight, tmp_path / f"cut-{call}")


def test_an_optimiser_that_dies_has_moved_some_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fail_in(patch, torch.optim.AdamW, "step", TINY.warm_steps + 2, RuntimeError("memory"))
        with pytest.raises(RuntimeError, match="memory"):
            loop.train(TINY, tmp_path / "cut")
    assert [c.name for c in checkpoints(tmp_path / "cut")] == ["step-000000"]


def test_a_failing_rescue_does_not_hide_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("disk full")

    error = FloatingPointError("nan")
    fail_in(monkeypatch, loop, "accumulate", 3, error)
    start = session.start

    def started(config: Config, out: Path) -> session.Session:
        found = start(config, out)
        monkeypatch.setattr(RunDirectory, "save", full)
        monkeypatch.setattr(RunDirectory, "close", full)
        return found

    monkeypatch.setattr(loop, "start", started)
    with pytest.raises(FloatingPointError) as caught:
        loop.train(TINY, tmp_path / "cut")
    assert caught.value is error
    said = capsys.readouterr().out
    assert "stopped after step 2; then OSError: disk full; then OSError: disk full; go on" in said
    assert "go on from step-000000 with --resume" in said


def test_a_kill_that_cannot_be_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a checkpoint each step SIGKILL too costs the running step alone."""
    options = (
        "--heldout 8 --prompts-per-step 4 --group-size 4 --steps 200 --eval-every 100 "
        "--checkpoint-every 1"
    ).split()
    # The child knows nothing of this module's task.
    monkeypatch.setattr(session, "built_in_task", tasks.built_in_task)
    run, log = tmp_path / "killed", tmp_path / "killed" / "metrics.jsonl"
    command = [sys.executable, "-m", "rollfuse", "grpo", *options, "--out", str(run)]
    root = str(Path(rollfuse.__file__).parents[1])
    process = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": f"{root}:{os.environ.get('PYTHONPATH', '')}"}
    )
    while not log.exists() or log.read_text().count('"reward"') < 5:
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    whole, _, _ = log.read_text().rpartition("\n")
    last = max(int(json.loads(line)["step"]) for line in whole.splitlines())
    done = int(checkpoints(run)[-1].name.removeprefix("step-"))
    assert 3 <= last - 1 <= done < 200
    end = done + 2
    assert main(["grpo", "--resume", str(run), "--steps", str(end)]) == 0
    straight = tmp_path / "straight"
    assert main(["grpo", *options, "--steps", str(end), "--out", str(straight)]) == 0
    assert_same_run(straight, run)
    assert max(m["active_sequences"] for m in timeless(run) if "loss" in m) > 0


def test_a_gradient_that_is_not_finite_stops_before_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = [0]

    def poisoned(policy: Policy, minibatch: Minibatch, config: Config) -> update.Accumulated:
        found = accumulate(policy, minibatch, config)
        count[0] += 1
        if count[0] == 2:
            weight = next(policy.model.parameters())
            weight.grad = torch.full_like(weight, float("nan"))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(loop, "accumulate", poisoned)
        with pytest.raises(FloatingPointError, match="step 2: need a finite loss and gradient"):
            loop.train(TINY, tmp_path / "run")
    assert checkpoints(tmp_path / "run")[-1].name == "step-000001"
    loop.train(replace(TINY, steps=1), tmp_path / "one")
    found = weights(tmp_path / "one")
    for key, value in weights(tmp_path / "run").items():
        assert torch.equal(value, found[key]), key


def test_everything_promised_is_written(straight_run: Path) -> None:
    run = straight_run
    assert {p.name for p in run.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "samples.jsonl",
        "tensorboard",
        "checkpoints",
        "reference",
        "report.html",
    }
    records = timeless(run)
    assert [m["step"] for m in records if "heldout_accuracy" in m] == [0, 3, 6]
    last = records[-2]
    for name in ("reward", "loss", "entropy", "length", "clip_fraction", "sampler_trainer_diff"):
        assert name in last
    assert [m["step"] for m in records if "kl" in m] == [1, 4]
    assert next(m["kl"] for m in records if "kl" in m) == pytest.approx(0.0, abs=1e-6)
    assert all(m["sampler_trainer_diff"] < 1e-5 for m in records if "loss" in m)
    for line in (run / "samples.jsonl").read_text().splitlines():
        sample = json.loads(line)
        lengths = {len(sample[name]) for name in ("ids", "tokens", "logp", "entropy")}
        assert len(lengths) == 1 and min(sample["entropy"]) >= 0.0
    assert 'class="tree"' in (run / "report.html").read_text()
    config = Config.from_json(run / "config.json")
    assert (config.lr, config.max_new_tokens) == (1e-3, 6)


def test_prompts_of_an_epoch_are_all_different() -> None:
    train = sort_task().train[:20]
    drawn = [loop.draw_problems(train, seen, TINY) for seen in range(0, 60, 6)]
    flat = [problem.prompt for step in drawn for problem in step]
    for epoch in range(3):
        assert set(flat[20 * epoch : 20 * epoch + 20]) == {problem.prompt for problem in train}
    assert flat[:20] != flat[20:40]
    assert loop.draw_problems(train, 0, replace(TINY, seed=1)) != drawn[0]
    assert len(loop.draw_problems(train[:4], 3, TINY)) == 6  # more than an epoch


def test_shuffled_advantages_are_the_same_ones_elsewhere(tmp_path: Path) -> None:
    parts = session.start(TINY, tmp_path / "run")
    problems = loop.draw_problems(parts.task.train, 0, TINY)
    prompts = [parts.policy.encode(problem) for problem in problems]
    rollout = parts.engine.generate(prompts, 4, seed=0)
    rewards = torch.arange(24.0).square()
    honest = loop._step_batch(parts, rollout, rewards).advantages
    parts.config = replace(parts.config, shuffle_advantages=True)
    shuffled = loop._step_batch(parts, rollout, rewards).advantages
    assert torch.equal(honest.sort().values, shuffled.sort().values)
    assert not torch.equal(honest, shuffled)


def test_the_warm_start_is_saved_before_the_first_step(tmp_path: Path) -> None:
    parts = session.start(TINY, tmp_path / "run")
    found = weights(tmp_path / "run")
    for name, value in parts.policy.model.state_dict().items():
        assert torch.equal(value, found[name]), name
    assert checkpoints(tmp_path / "run")[-1].name == "step-000000"


def test_the_learning_rate_rises_to_its_value(tmp_path: Path) -> None:
    run = loop.train(replace(TINY, lr_warmup=4, minibatches=2, steps=3), tmp_path / "run")
    rates = [m["lr"] for m in timeless(run) if "lr" in m]
    assert rates == pytest.approx([0.5e-3, 1e-3, 1e-3])  # after two updates a step


def test_every_response_has_noise_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    generate = Engine.generate

    def watched(engine: Engine, *args: object, **options: object) -> object:
        if options.get("streams") is not None:
            drawn.extend(options["streams"].tolist())
        return generate(engine, *args, **options)

    monkeypatch.setattr(Engine, "generate", watched)
    loop.train(replace(TINY, steps=2), tmp_path / "run")
    loop.resume(tmp_path / "run", steps=3)
    assert len(drawn) == len(set(drawn)) == 3 * 6 * 4


def test_it_learns_and_a_learning_rate_of_zero_does_not(tmp_path: Path) -> None:
    config = replace(
        TINY,
        hidden=32,
        heldout=64,
        steps=80,
        prompts_per_step=16,
        group_size=8,
        lr=3e-3,
        warm_steps=20,
    )
    config = replace(config, eval_every=80)
    learned = timeless(loop.train(config, tmp_path / "learned"))
    idle = timeless(loop.train(replace(config, lr=0.0, steps=2), tmp_path / "idle"))
    assert idle[0] == learned[0] and learned[0]["heldout_accuracy"] < 0.5
    assert idle[-1]["heldout_accuracy"] == idle[0]["heldout_accuracy"]
    assert learned[-1]["heldout_accuracy"] > 0.75


def text_policy(folder: Path, *, template: bool) -> None:
    """A tiny random Qwen3 that reads the twenty problems, saved as any model is."""
    text = "".join(sorted(set(TWENTY.read_text()) | set("\n|QuestionAnswer:")))
    tokenizer = character_tokenizer("".join(dict.fromkeys(text)))
    if template:
        tokenizer.chat_template = (
            "{% for m in messages %}|{{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}|Answer:{% endif %}"
        )
    model = tiny_qwen3(
        vocab_size=len(tokenizer),
        max_position_embeddings=1024,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.05,
    )
    Policy(model, tokenizer).save(folder)


@pytest.mark.parametrize("template", [False, True])
def test_real_questions_go_through_a_full_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: bool
) -> None:
    def graded(problem: Problem, response: str, finished: bool) -> float:
        # Random weights never answer right: a second reward gives their groups some spread.
        return grade_math(problem, response, finished) + len(set(response)) / 100

    monkeypatch.setattr(tasks, "grade_math", graded)
    text_policy(tmp_path / "model", template=template)
    config = Config(
        model=str(tmp_path / "model"),
        data=str(TWENTY),
        steps=1,
        prompts_per_step=3,
        group_size=4,
        max_new_tokens=12,
        loss="dr_grpo",
        kl_coef=0.01,
        lr=1e-3,
        threads=1,
    )
    run = loop.train(config, tmp_path / "run")
    before, after = load_policy(tmp_path / "model"), load_policy(checkpoints(run)[-1])
    assert any(
        not torch.equal(one, two)
        for one, two in zip(before.model.parameters(), after.model.parameters(), strict=True)
    )
    assert (after.tokenizer.chat_template is not None) == template
    records = timeless(run)
    assert records[1]["active_sequences"] > 0.5 and records[1]["sampler_trainer_diff"] < 1e-5
    assert not (run / "reference").exists()  # the model directory is the reference


def questions_config(folder: Path, **changes: object) -> Config:
    text_policy(folder, template=False)
    values = dict(model=str(folder), data=str(TWENTY), steps=1, prompts_per_step=3, group_size=4)
    return Config(**{**values, "threads": 1, **changes})


@pytest.mark.parametrize("part", ["train", "heldout"])
def test_a_prompt_that_is_too_long_is_named_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    config = questions_config(tmp_path / "model", max_new_tokens=200)
    task = questions_task(TWENTY)
    longer = Problem("Long " * 200, "1")
    # The first problem is not enough to look at, nor are the training problems.
    problems = [*getattr(task, part), longer]
    monkeypatch.setattr(session, "load_task", lambda _: replace(task, **{part: problems}))
    with pytest.raises(ValueError) as caught:
        session.start(config, tmp_path / "run")
    n_tokens = len("Question: \nAnswer:") + 1000
    assert str(caught.value) == (
        f"prompt {'Long ' * 12!r}: need 1 to 824 tokens (the model's 1024 positions less "
        f"--max-new-tokens = 200), got {n_tokens}"
    )
    assert not (tmp_path / "run").exists()
    fits = [*getattr(task, part), Problem("x" * (824 - len("Question: \nAnswer:")), "1")]
    monkeypatch.setattr(session, "load_task", lambda _: replace(task, **{part: fits}))
    session.start(config, tmp_path / "run").run.close()


def test_the_small_model_has_room_for_its_prompts_alone(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"need 1 to 2 tokens \(the model's 256 positions less"):
        session.start(replace(TINY, max_new_tokens=254), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    session.start(replace(TINY, max_new_tokens=252), tmp_path / "run").run.close()


def test_a_token_outside_the_model_is_named(tmp_path: Path) -> None:
    config = questions_config(tmp_path / "model")
    policy = load_policy(tmp_path / "model")
    policy.model.resize_token_embeddings(len(policy.tokenizer) - 8)
    policy.save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"prompt '.*: need ids below the model's vocabulary"):
        session.start(replace(config, max_new_tokens=8), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_the_training_forward_refuses_it_refuses_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object) -> Tensor:
        raise TypeError("model: need another one")

    monkeypatch.setattr(update, "hidden_rows", refuses)
    with pytest.raises(TypeError, match="need another one"):
        session.start(TINY, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_questions_fit_the_reader() -> None:
    task = questions_task(TWENTY)
    assert len(task.train) == 18 and task.max_new_tokens == 256
