"""Fallback: several drafters in order of trust, each asked only while its guesses pay.

Checking a token costs less than drawing one, but not nothing: a drafter whose guesses seldom stay
makes a rollout slower. Each one's share of checked tokens that stayed is measured as it goes; below
`break_even` it is asked only now and then, to notice when that changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rollfuse.kernels import checks
from rollfuse.kernels.verification import Rule, coupled
from rollfuse.rollout.drafter import Chunk, Drafter, News, Request
from rollfuse.rollout.record import Source

# How many checked tokens the measured share looks back at, and how many it starts from.
_MEMORY = 2048.0
_START = 256.0


@dataclass(slots=True)
class Share:
    """How much of what a drafter guessed has stayed, lately."""

    stayed: float = _START
    checked: float = _START

    def add(self, stayed: int, checked: int) -> None:
        self.stayed, self.checked = self.stayed + stayed, self.checked + checked
        if self.checked > _MEMORY:
            self.stayed *= _MEMORY / self.checked
            self.checked = _MEMORY

    @property
    def value(self) -> float:
        return self.stayed / self.checked


@dataclass(slots=True)
class Fallback:
    """A `Drafter`: each sequence's guess is that of the first drafter that pays and has one.

    Args:
        drafters: in order of trust; all of them under the rule `coupled`. One that takes over older
            noise (`PastRollouts`) comes first: if it were asked only where others have no guess,
            what that noise has drawn would decide whether it is used again.
        break_even: the share of checked tokens that must stay; about the cost of checking a token
            over that of drawing one (1/6 at short contexts on a GPU, less at long ones).
        probe: a drafter that does not pay is asked all the same in every so-manieth rollout, and
            otherwise in every so-manieth step.

    Raises:
        ValueError: no drafter, one of another rule, or a value out of its range; in a `generate`, a
            guess that names its noise from another than the first.
    """

    drafters: Sequence[Drafter]
    break_even: float = 1 / 6
    probe: int = 16
    rule: Rule = field(init=False, default=coupled)
    source: Source = field(init=False, default=Source.VERIFIED)
    shares: list[Share] = field(init=False)
    _rollout: int = field(init=False, default=0)
    _step: int = field(init=False, default=0)
    _owner: dict[int, int] = field(init=False, default_factory=dict)  # who guessed for a sequence

    def __post_init__(self) -> None:
        checks.need(len(self.drafters) >= 1, "drafters", "at least one", "none")
        for i, drafter in enumerate(self.drafters):
            checks.need(drafter.rule is coupled, f"drafters[{i}]", "the rule coupled", drafter.rule)
        checks.need(0 <= self.break_even <= 1, "break_even", "a share in [0, 1]", self.break_even)
        checks.need(self.probe >= 1, "probe", "a count >= 1", self.probe)
        self.shares = [Share() for _ in self.drafters]

    def state(self) -> dict[str, Tensor]:
        """What was measured, for a checkpoint."""
        rows = [(share.stayed, share.checked) for share in self.shares]
        counts = torch.tensor([self._rollout, self._step])
        return {"shares": torch.tensor(rows, dtype=torch.float64), "counts": counts}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.shares = [Share(*row) for row in state["shares"].tolist()]
        self._rollout, self._step = state["counts"].tolist()

    def start(self, request: Request) -> None:
        self._owner = {}
        self._rollout += 1
        for drafter in self.drafters:
            drafter.start(request)

    def propose(self, sequences: Sequence[int]) -> list[Chunk | None]:
        self._step += 1
        is_due = self._rollout % self.probe == 0 or self._step % self.probe == 0
        found: dict[int, Chunk] = {}
        for s in sequences:
            self._owner.pop(s, None)
        for i, (drafter, share) in enumerate(zip(self.drafters, self.shares, strict=True)):
            left = [s for s in sequences if s not in found]
            if left and (is_due or share.value >= self.break_even):
                chunks = zip(left, drafter.propose(left), strict=True)
                mine = {s: chunk for s, chunk in chunks if chunk is not None}
                if i and any(chunk.streams is not None for chunk in mine.values()):
                    got = f"{type(drafter).__name__} as drafters[{i}]"
                    raise ValueError(f"drafters: need the one of older noise first, got {got}")
                self._owner |= dict.fromkeys(mine, i)
                found |= mine
        return [found.get(s) for s in sequences]

    def advance(self, news: Sequence[News]) -> None:
        owners = [self._owner.pop(new.sequence, None) for new in news]
        for i, (drafter, share) in enumerate(zip(self.drafters, self.shares, strict=True)):
            mine = [new for new, o in zip(news, owners, strict=True) if o == i]
            # A text that ended inside a guess has proved it as far as it went.
            checked = sum(
                new.stayed if new.stayed == len(new.tokens) else new.checked for new in mine
            )
            share.add(sum(new.stayed for new in mine), checked)
            drafter.advance(
                [
                    new if o == i or not new.checked else new._replace(stayed=0, checked=0)
                    for new, o in zip(news, owners, strict=True)
                ]
            )

    def finish(self, sequences: Sequence[int]) -> None:
        for drafter in self.drafters:
            drafter.finish(sequences)
