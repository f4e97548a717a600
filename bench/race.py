"""What both trainers of `bench loop` share: the setup, the CPU clock and the record of a run."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import torch

from rollfuse.rollout.tasks import Problem, Task

Result = TypeVar("Result")

PHASES = ("generation", "loss forward", "backward")  # what is left is "rest"


@dataclass(frozen=True, slots=True)
class Race:
    """One setup for both: same warm start, same problems in the same order, same optimiser.

    GRPO with the mean over sequences, advantages over the group's standard deviation, no KL, one
    update a step; AdamW without decay at a constant rate.
    """

    task: Task
    model: Path  # directory of the warm start
    steps: int = 100
    prompts: int = 32  # a step
    samples: int = 8  # a prompt
    learning_rate: float = 3e-4
    max_grad_norm: float = 1.0
    clip: float = 0.2
    seed: int = 0
    measure_every: int = 10  # steps


class Clock:
    """CPU seconds of this process, in total and by phase; stops while accuracy is measured."""

    def __init__(self) -> None:
        self.phases = dict.fromkeys(PHASES, 0.0)
        self.total = 0.0
        self._since: float | None = None
        self._inner = 0.0  # seconds of the phases inside the present one

    def start(self) -> None:
        assert self._since is None
        self._since = time.process_time()

    def stop(self) -> None:
        assert self._since is not None
        self.total += time.process_time() - self._since
        self._since = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the seconds inside towards `name`, and no longer towards the phase around it."""
        around, self._inner = self._inner, 0.0
        start = time.process_time()
        yield
        elapsed = time.process_time() - start
        self.phases[name] += elapsed - self._inner
        self._inner = around + elapsed

    def timing(self, name: str, function: Callable[..., Result]) -> Callable[..., Result]:
        """`function` with its calls counted towards the phase `name`."""

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Result:
            with self.phase(name):
                return function(*args, **kwargs)

        return timed

    def split(self) -> dict[str, float]:
        """Seconds by phase, `rest` included."""
        return {**self.phases, "rest": self.total - sum(self.phases.values())}


@dataclass(slots=True)
class Run:
    """What one trainer did: completions, CPU time, accuracy over time."""

    name: str
    clock: Clock
    seed: int = 0
    completions: int = 0
    groups: int = 0
    flat_groups: int = 0  # groups whose rewards are all equal
    rewards: list[float] = field(default_factory=list)  # mean reward of each step
    prompts: list[list[str]] = field(default_factory=list)  # of each step, one a completion
    warm: str = ""  # fingerprint of the weights before the first step
    points: list[dict[str, float]] = field(default_factory=list)

    def start(self, model: torch.nn.Module, accuracy: Callable[[], float]) -> None:
        """Note what the run starts from, and start the clock."""
        self.warm = fingerprint(model)
        self._point(0, accuracy)
        self.clock.start()

    def count(self, prompts: Sequence[str], rewards: Sequence[float], samples: int) -> None:
        """Note prompts and rewards of one step, a group's samples side by side."""
        self.prompts.append(list(prompts))
        self.completions += len(rewards)
        self.rewards.append(sum(rewards) / len(rewards))
        for start in range(0, len(rewards), samples):
            group = rewards[start : start + samples]
            self.groups += 1
            self.flat_groups += min(group) == max(group)

    def finish_step(self, step: int, race: Race, accuracy: Callable[[], float]) -> None:
        """Measure where it is due, off the clock; the last step stops it for good."""
        last = step == race.steps
        if last or step % race.measure_every == 0:
            self.clock.stop()
            self._point(step, accuracy)
            if not last:
                self.clock.start()

    def _point(self, step: int, accuracy: Callable[[], float]) -> None:
        found = accuracy()
        self.points.append({"step": step, "cpu_seconds": self.clock.total, "accuracy": found})

    def as_dict(self) -> dict[str, object]:
        return {
            "name": self.name,
            "seed": self.seed,
            "completions": self.completions,
            "cpu_seconds": self.clock.total,
            "completions_per_cpu_second": self.completions / self.clock.total,
            "cpu_seconds_by_phase": self.clock.split(),
            "flat_groups": self.flat_groups / max(self.groups, 1),
            "rewards": self.rewards,
            "points": self.points,
        }


def need_same_race(one: Run, other: Run) -> None:
    """Raise RuntimeError unless both started from the same weights and saw the same batches."""
    if one.warm != other.warm:
        raise RuntimeError(f"need one warm start for {one.name} and {other.name}, got two")
    for step, (left, right) in enumerate(zip(one.prompts, other.prompts, strict=True), start=1):
        if left != right:
            raise RuntimeError(
                f"step {step}: need the same prompts in the same order for {one.name} and "
                f"{other.name}, got {left[:3]} ... and {right[:3]} ..."
            )


def fingerprint(model: torch.nn.Module) -> str:
    """A hash of all weights by name: equal for bitwise equal models."""
    found = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


@torch.no_grad()
def exact_match(model: Any, tokenizer: Any, task: Task, problems: Sequence[Problem]) -> float:
    """Share of problems that greedy decoding answers exactly and ends by itself.

    The model's mode (train or eval) and config are left as they were.
    """
    was_training = model.training
    model.eval()
    prompts = [tokenizer(p.prompt)["input_ids"] for p in problems]
    width = max(len(ids) for ids in prompts)
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=task.max_new_tokens,
        do_sample=False,
        pad_token_id=pad,
        eos_token_id=end,
    )
    model.train(was_training)
    right = 0.0
    for problem, row in zip(problems, out[:, width:].tolist(), strict=True):
        finished = end in row
        response = row[: row.index(end)] if finished else row
        text = "".join(tokenizer.convert_ids_to_tokens(response))
        right += task.grade(problem, text, finished)
    return right / len(problems)
