"""`rollfuse grpo` on the problems of `bench loop`, with a CPU clock around its parts.

What is timed is `rollfuse.loop.train` as users run it, with its metrics, samples and progress
line; measuring and checkpoints, which TRL does without here, are off the clock.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from rollfuse import loop, update
from rollfuse.bench.race import Clock, Race, Run
from rollfuse.config import Config
from rollfuse.rollout.engine import Engine


def config_of(race: Race) -> Config:
    """The race as a config of `rollfuse grpo`."""
    return Config(
        task=race.task.name,
        model=str(race.model),
        seed=race.seed,
        steps=race.steps,
        prompts_per_step=race.prompts,
        group_size=race.samples,
        loss="grpo",
        eps_low=race.clip,
        eps_high=race.clip,
        lr=race.learning_rate,
        lr_warmup=0,
        grad_clip=race.max_grad_norm,
        reference=False,
        eval_every=race.steps,
        checkpoint_every=race.steps,
        sample_every=race.steps,
        threads=1,
        device="cpu",
    )


def train(race: Race, accuracy: Callable[[Any], float]) -> Run:
    """Train from the warm start.

    Args:
        accuracy: model -> held-out exact match; called off the clock.
    """
    run = Run("rollfuse", Clock(), race.seed)
    with tempfile.TemporaryDirectory() as folder, _observed(run, race, accuracy):
        with contextlib.redirect_stdout(io.StringIO()):
            loop.train(config_of(race), Path(folder) / "run")
    return run


@contextlib.contextmanager
def _observed(run: Run, race: Race, accuracy: Callable[[Any], float]) -> Iterator[None]:
    """Put the clock around the loop's parts, which do otherwise what they always do."""
    clock = run.clock
    grade = loop._grade

    def graded(session: Any, problems: Sequence[Any], rollout: Any) -> torch.Tensor:
        rewards = grade(session, problems, rollout)
        prompts = [problems[group].prompt for group in rollout.prompt_index.tolist()]
        run.count(prompts, rewards.tolist(), race.samples)
        return rewards

    def measure(session: Any, line: Any) -> None:
        """Called before each step and after the last."""
        step = session.progress.step
        if step == 0:
            run.start(session.policy.model, lambda: accuracy(session.policy.model))
        else:
            run.finish_step(step, race, lambda: accuracy(session.policy.model))

    with (
        mock.patch.object(loop, "_grade", graded),
        mock.patch.object(loop, "_measure", measure),
        mock.patch.object(loop, "save", lambda session: None),
        mock.patch.object(loop, "accumulate", clock.timing("loss forward", update.accumulate)),
        mock.patch.object(Engine, "generate", clock.timing("generation", Engine.generate)),
        mock.patch.object(
            torch.autograd, "backward", clock.timing("backward", torch.autograd.backward)
        ),
    ):
        yield
