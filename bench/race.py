"""What both trainers of `bench loop` share: the setup, the CPU clock and the record of a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from rollfuse.rollout.tasks import Problem, Task

PHASES = ("generation", "loss forward", "backward")  # what is left is "rest"


@dataclass(frozen=True, slots=True)
class Race:
    """One setup for both: same warm start, same problems in the same order, same optimiser."""

    task: Task
    prompts: int = 32  # a step
    samples: int = 8  # a prompt
    max_new_tokens: int = 6
    learning_rate: float = 3e-4
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
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

    def start(self) -> None:
        assert self._since is None
        self._since = time.process_time()

    def stop(self) -> None:
        assert self._since is not None
        self.total += time.process_time() - self._since
        self._since = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.process_time()
        yield
        self.phases[name] += time.process_time() - start

    def split(self) -> dict[str, float]:
        """Seconds by phase, `rest` included."""
        return {**self.phases, "rest": self.total - sum(self.phases.values())}


@dataclass(slots=True)
class Run:
    """What one trainer did: completions, CPU time, accuracy over time."""

    name: str
    clock: Clock
    completions: int = 0
    groups: int = 0
    flat_groups: int = 0  # groups whose rewards are all equal
    rewards: list[float] = field(default_factory=list)  # mean reward of each step
    points: list[dict[str, float]] = field(default_factory=list)

    def start(self, accuracy: Callable[[], float]) -> None:
        self._point(0, accuracy)
        self.clock.start()

    def stop(self) -> None:
        self.clock.stop()

    def count(self, rewards: Sequence[float], samples: int) -> None:
        """Note the rewards of one step, a group's samples side by side."""
        self.completions += len(rewards)
        self.rewards.append(sum(rewards) / len(rewards))
        for start in range(0, len(rewards), samples):
            group = rewards[start : start + samples]
            self.groups += 1
            self.flat_groups += min(group) == max(group)

    def finish_step(self, step: int, race: Race, accuracy: Callable[[], float]) -> None:
        if step % race.measure_every == 0:
            self.clock.stop()
            self._point(step, accuracy)
            self.clock.start()

    def _point(self, step: int, accuracy: Callable[[], float]) -> None:
        self.points.append({"step": step, "cpu_seconds": self.clock.total, "accuracy": accuracy()})

    def as_dict(self) -> dict[str, object]:
        return {
            "name": self.name,
            "completions": self.completions,
            "cpu_seconds": self.clock.total,
            "completions_per_cpu_second": self.completions / self.clock.total,
            "cpu_seconds_by_phase": self.clock.split(),
            "flat_groups": self.flat_groups / max(self.groups, 1),
            "rewards": self.rewards,
            "points": self.points,
        }


@torch.no_grad()
def exact_match(
    model: Any, tokenizer: Any, task: Task, problems: Sequence[Problem], max_new_tokens: int
) -> float:
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
        max_new_tokens=max_new_tokens,
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
