"""The GRPO loop: sample, grade, compare within groups, update. Read it top to bottom.

What it leaves out, and why. One process and one device: sharding belongs to a trainer, and this
loop shows what one needs. Generation and training take turns on the same weights: nothing is stale,
so nothing has to be corrected (what `--reuse lenient` takes over is counted as the policy's own, as
its paper does). No critic: a group is its own baseline. No reward model: rewards
come from `task.grade`. No autocast, no gradient checkpointing, no decay of the learning rate: a
line each, where they are needed.

What keeps it honest and cheap. A group whose rewards are all equal teaches nothing and never enters
the model. The loss is divided by the whole update's denominator, so that micro-batches add up to
one big batch. A loss or gradient that is not finite stops the run before it touches the weights.
Everything a step draws is a function of the seed and the counters in `Progress`, so a run that was
stopped goes on as if it had not been.

What stops it loses at most the running step: a signal or an exception leaves a checkpoint of the
last finished one. Only what nobody can catch (SIGKILL, power loss), and an exception between two
updates of one step (`--minibatches`), go back to the last periodic checkpoint. Every fiftieth step
that costs the demo 2 % of its time; with `--checkpoint-every 1` nothing goes further back than to
the running step, at about the price of a second step for each.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from rollfuse.config import Config
from rollfuse.kernels.noise import new_streams
from rollfuse.kernels.sampling import Sampling
from rollfuse.losses.kl import k3
from rollfuse.policy import Policy
from rollfuse.progress import ProgressLine
from rollfuse.reuse import describe_reuse
from rollfuse.rollout.engine import Engine
from rollfuse.rollout.record import Finish, Rollout
from rollfuse.rollout.tasks import Problem, Task
from rollfuse.run import Interrupts, objects_set_aside
from rollfuse.session import Session, reopen, report, rescue, save, start
from rollfuse.update import RECIPES, Minibatch, accumulate, describe, score

# Held-out accuracy is measured greedily: at this temperature the sampler's noise decides only
# between tokens whose log-probs differ by about a thousandth of a nat.
GREEDY = Sampling(temperature=1e-4)
_SHOWN_PROMPTS, _SHOWN_RESPONSES = 4, 4
# Sequences decoded together while measuring.
_EVAL_BATCH = 512

Metrics = dict[str, float]


def train(config: Config, out: str | Path) -> Path:
    """Train a policy by GRPO, leaving everything in the new directory `out`; returns it.

    Raises:
        ValueError: the config, data, model or `out` is wrong; nothing has been written then.
        ImportError: the extra `grpo` is not installed.
        FloatingPointError: a loss or gradient is not finite; that update was not applied.
        KeyboardInterrupt: by SIGINT, SIGTERM or SIGHUP.
    """
    return go_on(start(config, out))


def resume(out: str | Path, *, steps: int | None = None) -> Path:
    """Go on with the run in `out` from its last checkpoint, to `steps` if that is given.

    On the same machine with the same number of threads the result is bitwise that of a run that
    was never stopped.

    Raises:
        ValueError: `out` holds no run with a checkpoint. Otherwise as `train`.
    """
    return go_on(reopen(out, steps=steps))


def go_on(session: Session) -> Path:
    """Take the steps that are left; returns the run directory.

    Any exception passes through, after a checkpoint of the last finished step.
    """
    config, progress, run = session.config, session.progress, session.run
    line = ProgressLine(config.steps, done=progress.step)
    with Interrupts() as interrupts, line, objects_set_aside():
        try:
            while progress.step < config.steps:
                _measure(session, line)
                metrics, samples = _step(session, interrupts)
                run.log(metrics)
                run.log_samples(samples)
                if progress.step % config.checkpoint_every == 0:
                    save(session)
                line.step(metrics)
                interrupts.release()
            _measure(session, line)
            save(session)
            run.close()
        except BaseException:
            interrupts.hold()
            line.say(rescue(session))
            raise
    line.say(f"report: {run.path / 'report.html'}")
    return run.path


# -- one step ---------------------------------------------------------------------------------


def _step(session: Session, interrupts: Interrupts) -> tuple[Metrics, list[dict[str, object]]]:
    """One step. From the first change of the weights on, interrupts wait for its end."""
    config, progress = session.config, session.progress
    started = time.perf_counter()
    problems = draw_problems(session.task.train, progress.prompts_seen, config)
    n_streams = config.prompts_per_step * config.group_size
    streams = new_streams(config.seed, n_streams, first=progress.streams_drawn)
    rollout = session.engine.generate(
        session.policy.encode_all(problems, is_chat=session.task.is_chat),
        config.group_size,
        Sampling(temperature=config.temperature),
        streams=streams,
        version=progress.updates,
        drafter=None if session.reuse is None else session.reuse.drafter,
    )
    generated = time.perf_counter()
    rewards = _grade(session, problems, rollout)
    step_batch = _step_batch(session, rollout, rewards)
    metrics: Metrics = {"step": progress.step + 1, **_describe(rollout, rewards, step_batch)}
    if session.reuse is not None:
        metrics |= describe_reuse(session.reuse, rollout, session.engine.totals)
    updates = []
    groups = torch.arange(config.prompts_per_step).tensor_split(config.minibatches)
    for chosen in groups:
        minibatch = step_batch.select(torch.isin(rollout.prompt_index, chosen))
        found = accumulate(session.policy, minibatch, config)
        norm = _finite_gradient_norm(session, found.loss)
        interrupts.hold()
        _update(session, bool(len(found.logp)))
        updates.append((found, norm))
    if session.reuse is not None:
        session.reuse.record(rollout)
    progress.step += 1
    progress.prompts_seen += config.prompts_per_step
    progress.streams_drawn += n_streams
    session.is_between_steps = True
    metrics |= describe(updates, config)
    metrics["lr"] = float(session.optimizer.param_groups[0]["lr"])
    ended = time.perf_counter()
    metrics |= {
        "seconds": ended - started,
        "generation_seconds": generated - started,
        "tokens_per_second": len(rollout.tokens) / (ended - started),
    }
    due = progress.step == 1 or progress.step % config.sample_every == 0
    return metrics, _samples(session, problems, rollout, rewards) if due else []


def draw_problems(train: Sequence[Problem], seen: int, config: Config) -> list[Problem]:
    """The step's prompts: every problem once in the epoch's own order, then the next epoch."""
    drawn: list[Problem] = []
    while len(drawn) < config.prompts_per_step:
        epoch, start = divmod(seen + len(drawn), len(train))
        order = _epoch_order(len(train), config.seed, epoch)
        missing = config.prompts_per_step - len(drawn)
        drawn += [train[i] for i in order[start : start + missing]]
    return drawn


@lru_cache(maxsize=2)
def _epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    order = list(range(n))
    random.Random(f"{seed} {epoch}").shuffle(order)
    return order


def _grade(session: Session, problems: Sequence[Problem], rollout: Rollout) -> Tensor:
    """(B,) float32 rewards."""
    texts = [session.policy.decode(ids.tolist()) for ids in rollout.responses()]
    finished = (rollout.finish != Finish.LENGTH).tolist()
    groups = rollout.prompt_index.tolist()
    graded = zip(groups, texts, finished, strict=True)
    return torch.tensor([session.task.grade(problems[g], text, end) for g, text, end in graded])


def _step_batch(session: Session, rollout: Rollout, rewards: Tensor) -> Minibatch:
    config, policy, reference = session.config, session.policy, session.reference
    advantages = RECIPES[config.loss].advantages(rewards, rollout.prompt_index)
    if config.shuffle_advantages:
        generator = torch.Generator().manual_seed(config.seed + session.progress.step)
        advantages = advantages[torch.randperm(len(advantages), generator=generator)]
    # Sampler and trainer share weights and head: the sampler's log-probs are the old ones.
    old = score(policy, rollout, config) if config.rescore else None
    is_due = config.kl_coef > 0 or session.progress.step % config.eval_every == 0
    ref = None
    if reference is not None and is_due:
        ref = score(reference, rollout, config)
    return Minibatch(rollout, advantages, old, ref)


def _finite_gradient_norm(session: Session, loss: float) -> float:
    """Clip the gradient; returns its norm before. Stops a run that has gone wrong."""
    parameters = session.policy.model.parameters()
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, session.config.grad_clip))
    if not (abs(loss) < float("inf") and norm < float("inf")):
        session.optimizer.zero_grad()
        raise FloatingPointError(
            f"step {session.progress.step + 1}: need a finite loss and gradient, got loss {loss} "
            f"and gradient norm {norm}; this update was not applied"
        )
    return norm


def _update(session: Session, has_gradient: bool) -> None:
    progress, config = session.progress, session.config
    session.is_between_steps = False
    warm = min(1.0, (progress.updates + 1) / max(1, config.lr_warmup))
    for group in session.optimizer.param_groups:
        group["lr"] = config.learning_rate * warm
    # Without any gradient a step of AdamW would still move the weights by its momentum.
    if has_gradient:
        session.optimizer.step()
    session.optimizer.zero_grad()
    progress.updates += 1


# -- what is written down ---------------------------------------------------------------------


def _describe(rollout: Rollout, rewards: Tensor, step_batch: Minibatch) -> Metrics:
    metrics = {
        "reward": float(rewards.mean()),
        "entropy": float(rollout.entropy.mean()),
        "length": float(rollout.lengths.float().mean()),
        "tokens": float(len(rollout.tokens)),
        "active_sequences": float((step_batch.advantages != 0).float().mean()),
    }
    if step_batch.logp_ref is not None:
        old = rollout.logp if step_batch.logp_old is None else step_batch.logp_old
        metrics["kl"] = float(k3(old.float(), step_batch.logp_ref).mean())
    return metrics


def _samples(
    session: Session, problems: Sequence[Problem], rollout: Rollout, rewards: Tensor
) -> list[dict[str, object]]:
    """Responses to read: the first few of the first few prompts."""
    size, policy = session.config.group_size, session.policy
    shown = []
    for p in range(min(_SHOWN_PROMPTS, len(problems))):
        for b in range(p * size, p * size + min(_SHOWN_RESPONSES, size)):
            start, end = rollout.cu_seqlens[b : b + 2].tolist()
            ids = rollout.tokens[start:end].tolist()
            shown.append(
                {
                    "step": session.progress.step,
                    "prompt": problems[p].prompt,
                    "answer": problems[p].answer,
                    "reward": float(rewards[b]),
                    "ids": ids,
                    "tokens": [policy.tokenizer.decode([i]) for i in ids],
                    "logp": rollout.logp[start:end].tolist(),
                    "entropy": rollout.entropy[start:end].tolist(),
                    "source": rollout.source[start:end].tolist(),
                }
            )
    return shown


def _measure(session: Session, line: ProgressLine) -> None:
    """Held-out accuracy where it is due and not yet measured, and a fresh report."""
    step, config, run = session.progress.step, session.config, session.run
    if step % config.eval_every and step != config.steps:
        return
    known = [m["step"] for m in run.records("metrics") if "heldout_accuracy" in m]
    if step not in known:
        accuracy = heldout_accuracy(session.policy, session.engine, session.task)
        run.log({"step": step, "heldout_accuracy": accuracy})
        line.measured(step, accuracy)
    report(session)


def heldout_accuracy(policy: Policy, engine: Engine, task: Task) -> float:
    """Mean reward of greedy responses to the held-out problems."""
    total = 0.0
    for first in range(0, len(task.heldout), _EVAL_BATCH):
        problems = task.heldout[first : first + _EVAL_BATCH]
        prompts = policy.encode_all(problems, is_chat=task.is_chat)
        rollout = engine.generate(prompts, 1, GREEDY, seed=0)
        for b, problem in enumerate(problems):
            finished = bool(rollout.finish[b] != Finish.LENGTH)
            total += task.grade(problem, policy.decode(rollout.response(b).tolist()), finished)
    return total / len(task.heldout)
