"""A training put together: anew, or from the last checkpoint of its run directory."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from rollfuse.config import Config
from rollfuse.kernels import checks
from rollfuse.kernels.dispatch import backend
from rollfuse.policy import (
    Policy,
    SmallModel,
    WarmStart,
    load_policy,
    need_same_head,
    need_training_extra,
    small_policy,
    warm_start,
)
from rollfuse.report import write_report
from rollfuse.reuse import Reuse, new_reuse
from rollfuse.rollout.engine import Engine
from rollfuse.rollout.tasks import Problem, Task, built_in_task, questions_task
from rollfuse.run import (
    Progress,
    RunDirectory,
    checkpoints,
    last_state,
    need_free,
    restore,
)
from rollfuse.update import score


@dataclass(slots=True)
class Session:
    """Everything a running training consists of."""

    config: Config
    task: Task
    policy: Policy
    reference: Policy | None
    engine: Engine
    optimizer: torch.optim.AdamW
    progress: Progress
    run: RunDirectory
    reuse: Reuse | None
    # False from the first change of the weights to the end of the step: half a step cannot be
    # gone on from.
    is_between_steps: bool = True


def start(config: Config, out: str | Path) -> Session:
    """A new training: what can be wrong is found before the warm start and before `out` is made."""
    need_training_extra(is_text=config.data is not None)
    need_free(out)
    task = load_task(config)
    limit = config.max_new_tokens or task.max_new_tokens
    config = replace(
        config, max_new_tokens=limit, lr=config.learning_rate, threads=config.cpu_threads
    )
    policy = _first_policy(config, task)
    _need_usable(policy, task, config)
    if config.model is None:
        plan = WarmStart(
            problems=config.warm_problems,
            steps=config.warm_steps,
            batch_size=config.warm_batch_size,
            lr=config.warm_lr,
        )
        warm_start(policy, task, plan, seed=config.seed)
    reference = None
    if config.reference:
        reference = _frozen(Policy(deepcopy(policy.model), policy.tokenizer), config)
    engine, optimizer = _engine(policy, config), _optimizer(policy, config)
    run = RunDirectory.create(out, config)
    if reference is not None and config.model is None:
        reference.save(run.path / "reference")
    reuse = new_reuse(config)
    session = Session(config, task, policy, reference, engine, optimizer, Progress(), run, reuse)
    save(session)
    return session


def reopen(out: str | Path, *, steps: int | None) -> Session:
    """The training in `out` as its last checkpoint left it."""
    config, checkpoint = last_state(out)
    need_training_extra(is_text=config.data is not None)
    if steps is not None:
        done = int(checkpoint.name.rpartition("-")[2])
        checks.need(steps >= done, "--steps", f"at least the {done} steps done", steps)
        config = replace(config, steps=steps)
    _set_threads(config)
    task = load_task(config)
    policy = load_policy(checkpoint)
    policy.model.to(_device(config))
    reference = None
    if config.reference:
        reference = _frozen(load_policy(config.model or Path(out) / "reference"), config)
    engine, optimizer = _engine(policy, config), _optimizer(policy, config)
    reuse = new_reuse(config)
    progress = restore(checkpoint, optimizer, reuse)
    run = RunDirectory.reopen(out, config)
    return Session(config, task, policy, reference, engine, optimizer, progress, run, reuse)


def save(session: Session) -> None:
    """Write a checkpoint of the finished steps, unless there is one."""
    assert session.is_between_steps
    drafts = None if session.reuse is None else session.reuse.state()
    session.run.save(session.policy, session.optimizer, session.progress, drafts)


def report(session: Session) -> None:
    """Write the report page anew."""
    run = session.run
    metrics, samples = run.records("metrics"), run.records("samples")
    write_report(run.path / "report.html", session.config, metrics, samples)


def rescue(session: Session) -> str:
    """Save the last finished step when an exception ends the run; says where it can go on.

    Half a step is not saved: the run goes on from the checkpoint before it.
    """
    run, step = session.run, session.progress.step
    said = f"stopped after step {step}"
    if not session.is_between_steps:
        said = f"stopped inside step {step + 1}, when some of its updates were done"
    actions = [lambda: report(session), run.close]
    if session.is_between_steps:
        actions.insert(0, lambda: save(session))
    for act in actions:
        try:
            act()
        # Whatever fails here must not hide the exception that ended the run.
        except Exception as error:
            said += f"; then {type(error).__name__}: {error}"
    latest = max((checkpoint.name for checkpoint in checkpoints(run.path)), default="no checkpoint")
    return f"{said}; go on from {latest} with --resume {run.path}"


def load_task(config: Config) -> Task:
    """The problems the config names: a file's, or a built-in task's."""
    if config.data is None:
        task = built_in_task(config.task, heldout=config.heldout)
    else:
        try:
            task = questions_task(config.data, heldout=config.heldout)
        except OSError as error:
            got = f"{config.data} ({error.strerror})"
            raise ValueError(f"--data: need a JSON-lines file, got {got}") from error
    if config.problems is None:
        return task
    there = len(task.train)
    needed = f"at most the {there} problems there are to train on"
    checks.need(config.problems <= there, "--problems", needed, config.problems)
    return replace(task, train=task.train[: config.problems])


def _first_policy(config: Config, task: Task) -> Policy:
    _set_threads(config)
    if config.model is not None:
        policy = load_policy(config.model)
    else:
        shape = SmallModel(
            layers=config.layers,
            hidden=config.hidden,
            intermediate=config.intermediate,
            heads=config.heads,
            kv_heads=config.kv_heads,
        )
        policy = small_policy(task, shape, seed=config.seed)
    policy.model.to(_device(config))
    return policy


def _need_usable(policy: Policy, task: Task, config: Config) -> None:
    """Raise ValueError or TypeError unless every prompt fits, and the model samples and trains."""
    problems = [*task.train, *task.heldout]
    if config.model is None:
        # A character is a token of the small model, whose tasks have 100,000 prompts.
        problems = sorted(problems, key=lambda problem: len(problem.prompt))
        problems = [problems[0], problems[-1]]
    prompts = policy.encode_all(problems, is_chat=task.is_chat)
    need_room(policy, problems, prompts, config)
    extremes = [min(prompts, key=len), max(prompts, key=len)]
    need_same_head(policy, extremes[0])
    # A token for each, and its score by the training forward: what either refuses, it refuses now.
    engine = Engine(policy.model, max_new_tokens=1, stop_tokens=policy.stop_ids)
    score(policy, engine.generate(extremes, 1, seed=0), replace(config, micro_sequences=2))


def need_room(
    policy: Policy, problems: Sequence[Problem], prompts: Sequence[Sequence[int]], config: Config
) -> None:
    """Raise ValueError naming the first problem whose prompt cannot be answered by the model."""
    shape = policy.model.config.get_text_config(decoder=True)
    positions = getattr(shape, "max_position_embeddings", None) or sys.maxsize
    assert config.max_new_tokens is not None
    room = positions - config.max_new_tokens
    needed = (
        f"1 to {room} tokens (the model's {positions} positions less "
        f"--max-new-tokens = {config.max_new_tokens})"
    )
    vocabulary = policy.model.get_input_embeddings().weight.shape[0]
    for problem, ids in zip(problems, prompts, strict=True):
        name = f"prompt {problem.prompt[:60]!r}"
        checks.need(1 <= len(ids) <= room, name, needed, len(ids))
        got = max(ids)
        checks.need(got < vocabulary, name, f"ids below the model's vocabulary {vocabulary}", got)


def _engine(policy: Policy, config: Config) -> Engine:
    assert config.max_new_tokens is not None
    return Engine(
        policy.model,
        max_new_tokens=config.max_new_tokens,
        stop_tokens=policy.stop_ids,
        max_batch=config.decode_sequences,
    )


def _optimizer(policy: Policy, config: Config) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        policy.model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )


def _frozen(policy: Policy, config: Config) -> Policy:
    """The policy as a reference that is never trained."""
    policy.model.to(_device(config)).requires_grad_(False)
    return policy


def _device(config: Config) -> torch.device:
    chosen = "cuda" if backend.name in ("cuda", "rocm") else "cpu"
    name = config.device or chosen
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device: need a device such as cpu or cuda, got {name!r}") from error
    usable = device.type == "cpu" or (device.type == "cuda" and chosen == "cuda")
    if usable and device.type == "cuda" and device.index is not None:
        count = torch.cuda.device_count()
        checks.need(device.index < count, "--device", f"one of {count} devices", name)
    checks.need(usable, "--device", f"cpu or one of the backend ({backend.name})", name)
    return device


def _set_threads(config: Config) -> None:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
