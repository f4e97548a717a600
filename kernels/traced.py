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
        ValueError: the plan asks for anything but `recompute`, or the head has a group or a
            main_grad.
    """
    if plan.kind not in (None, "recompute"):
        raise ValueError(f"plan: need 'recompute' or None under torch.compile, got {plan.kind!r}")
    if plan.invariant:
        raise ValueError("invariant: need False under torch.compile, got True")
    _refuse_what_is_not_traced(head)
    found: tuple[Tensor, Tensor] = registered.linear_scores(
        hidden, *head.parameters, targets, rows, _of_pairs(temperature, targets), selected,
        head.scale, head.softcap, 1.0 if head.lora is None else head.lora.scale, head.vocab,
        operand_dtype(hidden, head), plan.budget_bytes,
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
    if batch.support is not None:
        raise ValueError("batch.support: need None under torch.compile, got a tensor")
    if everything or not isinstance(objective, TokenLocal):
        return torch.ones_like(batch.weights, dtype=torch.bool), None
    active = active_pairs(objective, batch)
    return active, active


def _refuse_what_is_not_traced(head: Head) -> None:
    """A registered op writes to none of its inputs, and its collectives would be invisible."""
    for name in ("group", "main_grad"):
        if getattr(head, name) is not None:
            raise ValueError(
                f"{name}: need None under torch.compile, got one; call the op outside of the "
                "compiled region (torch.compiler.disable)"
            )


def _of_pairs(temperature: Tensor | float, targets: Tensor) -> Tensor:
    if isinstance(temperature, Tensor):
        return temperature
    return torch.full(targets.shape, temperature, dtype=torch.float64, device=targets.device)
