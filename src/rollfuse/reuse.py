"""What `--reuse` means: who guesses a step's tokens, what it remembers, what is measured of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import exp

import numpy as np
import numpy.typing as npt
from torch import Tensor

from rollfuse.config import Config
from rollfuse.kernels.rejection import lenient
from rollfuse.kernels.verification import Rule, coupled
from rollfuse.rollout.decoding import Totals
from rollfuse.rollout.drafter import Drafter, Ints
from rollfuse.rollout.fallback import Fallback
from rollfuse.rollout.past_rollouts import PastRollouts
from rollfuse.rollout.record import Rollout, Source
from rollfuse.rollout.suffix_drafts import SuffixDrafts

# Epochs whose responses to a prompt the suffix drafts remember.
_EPOCHS = 2


@dataclass(slots=True)
class Reuse:
    """The engine's drafter, and the memory behind it.

    Attributes:
        drafter: for `Engine.generate`.
        memory: what takes in every rollout.
    """

    drafter: Drafter
    memory: PastRollouts | SuffixDrafts
    _measured: dict[str, Tensor] = field(init=False)  # at the end of the last step

    def __post_init__(self) -> None:
        self._remember()

    def record(self, rollout: Rollout) -> None:
        """Take in the rollout of a step that has ended."""
        self.memory.record(rollout)
        self._remember()

    def state(self) -> dict[str, Tensor]:
        """What a run has to keep to go on from its last finished step as if it had not stopped."""
        return self.memory.state() | self._measured

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.memory.load(state)
        if isinstance(self.drafter, Fallback):
            self.drafter.load(state)
        self._remember()

    def _remember(self) -> None:
        self._measured = self.drafter.state() if isinstance(self.drafter, Fallback) else {}


def _past(config: Config, rule: Rule) -> PastRollouts:
    return PastRollouts(rule, cap=config.reuse_cap, refresh=config.refresh)


def _coupled(config: Config) -> Reuse:
    memory = _past(config, coupled)
    return Reuse(Fallback([memory], config.reuse_break_even), memory)


def _lenient(config: Config) -> Reuse:
    memory = _past(config, lenient(exp(config.lenience)))
    return Reuse(memory, memory)


def _suffix(config: Config) -> Reuse:
    memory = SuffixDrafts(rollouts=_EPOCHS)
    return Reuse(Fallback([memory], config.reuse_break_even), memory)


# What `--reuse` accepts, beside none.
KINDS: dict[str, Callable[[Config], Reuse]] = {
    "coupled": _coupled,
    "lenient": _lenient,
    "suffix": _suffix,
}


def new_reuse(config: Config) -> Reuse | None:
    """What the config asks for; None where nothing is reused."""
    return None if config.reuse == "none" else KINDS[config.reuse](config)


def describe_reuse(reuse: Reuse, rollout: Rollout, totals: Totals) -> dict[str, float]:
    """Metrics of a step: where its tokens came from, and what the guesses were worth.

    drawn_tokens: those that were not guessed. reused: share of the others. passes: of the model.
    accepted: share of the guessed tokens that stayed. Of older rollouts also accepted_run (tokens a
    sequence took over), match_rate (chance that a token stays, given those before it) and
    total_variation (of the old and the new policy, by their log-probs of the tokens decided on).

    What the variation allows: match_most, 1 - TV, of any exact rule; match_least,
    (1 - TV) / (1 + TV), what `coupled` has at least; run_most and run_least, the runs these make of
    the older responses if the variation is the same at every token.
    """
    stayed = (rollout.source == Source.VERIFIED) | (rollout.source == Source.LENIENT)
    found = {
        "reused": float(stayed.float().mean()),
        "drawn_tokens": float((~stayed).sum()),
        "passes": float(totals.passes),
    }
    if totals.drafted:
        found["accepted"] = totals.accepted / totals.drafted
    memory = reuse.memory
    if not (isinstance(memory, PastRollouts) and len(memory.runs) and totals.compared):
        return found
    runs, variation = memory.runs, totals.variation / totals.compared
    found["accepted_run"] = float(runs.mean())
    found["match_rate"] = float(runs.sum()) / max(1.0, float(runs.sum() + memory.n_cut))
    found["total_variation"] = variation
    rates = {"most": 1.0 - variation, "least": (1.0 - variation) / (1.0 + variation)}
    for name, rate in rates.items():
        found[f"match_{name}"] = rate
        found[f"run_{name}"] = float(expected_run(rate, memory.lengths).mean())
    return found


def expected_run(rate: float, lengths: Ints) -> npt.NDArray[np.float64]:
    """(n,) how many of so many tokens stay, on average, if each stays at `rate` after those before.

    The sum of rate^t for t from 1 to the length.
    """
    if rate == 1.0:
        return lengths.astype(np.float64)
    return (rate * (1.0 - rate**lengths) / (1.0 - rate)).astype(np.float64)
