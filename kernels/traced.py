"""What torch.compile traces of a policy loss: the registered ops and how a batch enters them.

The objective itself is traced where it is called, over all pairs of the batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rollfuse.kernels import registered
from rollfuse.kernels.batch import TokenBatch
from rollfuse.kernels.head import Head, operand_dtype
from rollfuse.kernels.objective import Objective, TokenLocal, active_pairs
from rollfuse.kernels.plan import Plan


class TracedScores(NamedTuple):
    """(P,) each; logp and entropy are finite placeholders where not computed."""

    logp: Tensor
    entropy: Tensor
    computed: Tensor


def linear_scores(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    rows: Tensor | None,
    temperature: Tensor | float,
    selected: Tensor | None = None,
    plan: Plan = Plan(),
) -> tuple[Tensor, Tensor]:
    """(logp (P,), entropy (P,)) by the registered op.

    Raises:
        ValueError: the plan asks for anything but `recompute`.
    """
    if plan.kind not in (None, "recompute"):
        raise ValueError(f"plan: need 'recompute' or None under torch.compile, got {plan.kind!r}")
    found: tuple[Tensor, Tensor] = registered.linear_scores(
        hidden, head.weight, head.bias, targets, rows, _of_pairs(temperature, targets), selected,
        head.scale, head.softcap, operand_dtype(hidden, head), plan.budget_bytes,
    )  # fmt: skip
    return found


def logit_scores(
    logits: Tensor,
    targets: Tensor,
    rows: Tensor | None,
    temperature: Tensor | float,
    selected: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(logp (P,), entropy (P,)) by the registered op."""
    found: tuple[Tensor, Tensor] = registered.logit_scores(
        logits, targets, rows, _of_pairs(temperature, targets), selected
    )
    return found


def linear_batch_scores(
    hidden: Tensor, head: Head, batch: TokenBatch, objective: Objective, plan: Plan
) -> TracedScores:
    """What an objective needs of a batch, from hidden states."""
    computed, selected = _selection(batch, objective, everything=plan.dropped == "score")
    found = linear_scores(
        hidden, head, batch.targets, batch.rows, batch.temperature, selected, plan
    )
    return TracedScores(*found, computed)


def logit_batch_scores(logits: Tensor, batch: TokenBatch, objective: Objective) -> TracedScores:
    """What an objective needs of a batch, from logits."""
    computed, selected = _selection(batch, objective, everything=False)
    found = logit_scores(logits, batch.targets, batch.rows, batch.temperature, selected)
    return TracedScores(*found, computed)


def _selection(
    batch: TokenBatch, objective: Objective, *, everything: bool
) -> tuple[Tensor, Tensor | None]:
    """(computed (P,), selected (P,) or None for all)."""
    if everything or not isinstance(objective, TokenLocal):
        return torch.ones_like(batch.weights, dtype=torch.bool), None
    active = active_pairs(objective, batch)
    return active, active


def _of_pairs(temperature: Tensor | float, targets: Tensor) -> Tensor:
    if isinstance(temperature, Tensor):
        return temperature
    return torch.full(targets.shape, temperature, dtype=torch.float64, device=targets.device)
