"""A training put together: anew, or from the last checkpoint of its run directory."""

from __future__ import annotations

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
from rollfuse.rollout.engine import Engine
from rollfuse.rollout.tasks import Task, built_in_task, questions_task
from rollfuse.run import Progress, RunDirectory, last_checkpoint, need_free, restore


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


def start(config: Config, out: str | Path) -> Session:
    """A new training: what can be wrong is found before anything is computed or written."""
    need_training_extra()
    need_free(out)
    task = load_task(config)
    limit = config.max_new_tokens or task.max_new_tokens
    config = replace(
        config, max_new_tokens=limit, lr=config.learning_rate, threads=config.cpu_threads
    )
    policy = _first_policy(config, task)
    if config.model is None:
        plan = WarmStart(
            config.warm_problems, config.warm_steps, config.warm_batch_size, config.warm_lr
        )
        warm_start(policy, task, plan, seed=config.seed)
    session = _assemble(config, task, policy, RunDirectory.create(out, config))
    if config.model is None and config.reference:
        policy.save(session.run.path / "reference")
    session.reference = _reference(session)
    save(session)
    return session


def reopen(out: str | Path, *, steps: int | None) -> Session:
    """The training in `out` as its last checkpoint left it."""
    need_training_extra()
    run = RunDirectory.reopen(out)
    checkpoint = last_checkpoint(run.path)
    assert checkpoint is not None
    if steps is not None:
        done = int(checkpoint.name.rpartition("-")[2])
        checks.need(steps >= done, "--steps", f"at least the {done} steps done", steps)
        run.reconfigure(replace(run.config, steps=steps))
    _set_threads(run.config)
    policy = load_policy(checkpoint)
    policy.model.to(_device(run.config))
    session = _assemble(run.config, load_task(run.config), policy, run)
    session.progress = restore(checkpoint, session.optimizer)
    session.reference = _reference(session)
    return session


def save(session: Session) -> None:
    """Write a checkpoint of the finished steps, unless there is one."""
    session.run.save(session.policy, session.optimizer, session.progress)


def load_task(config: Config) -> Task:
    """The problems the config names: a file's, or a built-in task's."""
    if config.data is not None:
        return questions_task(config.data, heldout=config.heldout)
    return built_in_task(config.task, heldout=config.heldout)


def _first_policy(config: Config, task: Task) -> Policy:
    _set_threads(config)
    if config.model is not None:
        policy = load_policy(config.model)
    else:
        shape = SmallModel(
            config.layers, config.hidden, config.intermediate, config.heads, config.kv_heads
        )
        policy = small_policy(task, shape, seed=config.seed)
    policy.model.to(_device(config))
    need_same_head(policy, policy.encode(task.heldout[0], is_chat=task.is_chat))
    return policy


def _assemble(config: Config, task: Task, policy: Policy, run: RunDirectory) -> Session:
    assert config.max_new_tokens is not None
    engine = Engine(
        policy.model,
        max_new_tokens=config.max_new_tokens,
        stop_tokens=policy.stop_ids,
        max_batch=config.decode_sequences,
    )
    optimizer = torch.optim.AdamW(
        policy.model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    return Session(config, task, policy, None, engine, optimizer, Progress(), run)


def _reference(session: Session) -> Policy | None:
    """A second copy of the policy the run started from."""
    config = session.config
    if not config.reference:
        return None
    folder = config.model or session.run.path / "reference"
    reference = load_policy(folder)
    reference.model.to(_device(config)).requires_grad_(False)
    return reference


def _device(config: Config) -> torch.device:
    chosen = "cuda" if backend.name in ("cuda", "rocm") else "cpu"
    name = config.device or chosen
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device: need a device such as cpu or cuda, got {name!r}") from error
    usable = device.type == "cpu" or (device.type == "cuda" and chosen == "cuda")
    checks.need(usable, "--device", f"cpu or one of the backend ({backend.name})", name)
    return device


def _set_threads(config: Config) -> None:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
