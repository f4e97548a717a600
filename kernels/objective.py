"""Objectives: functions (logp, entropy, batch) -> (P,), and what the ops may assume of them.

A plain callable is taken as *coupled*: any pair's value may depend on every pair. `token_local`
declares more, and `check_objective` verifies the declaration by probing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rollfuse.kernels import checks
from rollfuse.kernels.batch import TokenBatch

# (logp (P,), entropy (P,), batch) -> (P,), unreduced; nats in, loss units out
Objective = Callable[[Tensor, Tensor, TokenBatch], Tensor]
# batch -> (P,) bool: which pairs can have a gradient at all, known before the pass
Active = Callable[[TokenBatch], Tensor]


@dataclass(frozen=True, slots=True)
class TokenLocal:
    """An objective whose value at a pair depends on that pair alone; made by `token_local`."""

    function: Objective
    active: Active | None = None
    uses_entropy: bool = True

    def __call__(self, logp: Tensor, entropy: Tensor, batch: TokenBatch) -> Tensor:
        return self.function(logp, entropy, batch)


def token_local(
    *, active: Active | None = None, uses_entropy: bool = True
) -> Callable[[Objective], TokenLocal]:
    """Declare an objective token-local: its gradients can be made in a single pass.

    Args:
        active: batch -> (P,) bool, False where the objective is 0 without gradient whatever logp
            and entropy are (a zero advantage without KL or entropy bonus). None: nowhere.
        uses_entropy: False states that no gradient flows to the entropy. A claim for readers and
            for `check_objective`: the ops see for themselves whether one does.

    `check_objective` tests all three claims.
    """

    def declare(function: Objective) -> TokenLocal:
        return TokenLocal(function, active, uses_entropy)

    return declare


class Evaluation(NamedTuple):
    """What an objective gives the op for some pairs; dtype of logp."""

    loss: Tensor  # ()
    dlogp: Tensor  # (P,)
    dentropy: Tensor | None  # (P,), None where the objective has no gradient to the entropy


def active_pairs(objective: Objective, batch: TokenBatch) -> Tensor:
    """(P,) bool: pairs that can have a gradient, as far as it is known before the pass."""
    active = batch.weights != 0
    if isinstance(objective, TokenLocal) and objective.active is not None:
        claimed = objective.active(batch)
        checks.need_tensor(claimed, "active(batch)")
        checks.need_shape(claimed, (len(batch),), "active(batch)", "one bool a pair")
        if claimed.dtype != torch.bool:
            raise TypeError(f"active(batch): need bool, got {claimed.dtype}")
        active = active & claimed
    return active


def weighted_loss(objective: Objective, logp: Tensor, entropy: Tensor, batch: TokenBatch) -> Tensor:
    """sum(weights * objective), differentiable in logp and entropy alone.

    Raises:
        ValueError: the values have the wrong shape, or need a gradient to anything else (the ops
            could not deliver it).
    """
    values = objective(logp, entropy, batch)
    if not isinstance(values, Tensor) or values.shape != logp.shape:
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"objective: need {tuple(logp.shape)} values, one a pair, got {got}")
    # A weight of 0 drops the pair, even one whose value is infinite.
    loss = torch.where(batch.weights != 0, batch.weights.to(values.dtype) * values, 0.0).sum()
    # Traced by torch.compile there is no graph to look through, and none is cut off either.
    if loss.requires_grad and not torch.compiler.is_compiling():
        refuse_foreign_gradient(loss, (logp, entropy))
    return loss


def evaluate(objective: Objective, logp: Tensor, entropy: Tensor, batch: TokenBatch) -> Evaluation:
    """Loss of the pairs and its derivatives by autograd on the (P,) vectors."""
    with torch.enable_grad():
        logp = logp.detach().requires_grad_()
        entropy = entropy.detach().requires_grad_()
        loss = weighted_loss(objective, logp, entropy, batch)
        if not loss.requires_grad:
            return Evaluation(loss, torch.zeros_like(logp), None)
        dlogp, dentropy = torch.autograd.grad(loss, (logp, entropy), allow_unused=True)
    return Evaluation(loss.detach(), torch.zeros_like(logp) if dlogp is None else dlogp, dentropy)


def refuse_foreign_gradient(loss: Tensor, allowed: tuple[Tensor, ...]) -> None:
    """Raise if `loss` depends, past the `allowed` tensors, on a leaf that needs a gradient."""
    seen = {tensor.grad_fn for tensor in allowed}
    todo = [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and all(leaf is not tensor for tensor in allowed):
            raise ValueError(
                "objective: need gradients to logp and entropy only, got one to another tensor of "
                f"shape {tuple(leaf.shape)}; detach it, or add its loss outside the op"
            )
        todo.extend(parent for parent, _ in node.next_functions)


def check_objective(objective: Objective, batch: TokenBatch, *, seed: int = 0) -> None:
    """Verify an objective's declarations on `batch` by probing; raises ValueError naming the claim.

    Checks that the values have one entry a pair and are differentiable in logp and entropy alone
    and, for a token-local objective: that each pair's value and gradient stay the same when other
    pairs change or leave, that no pair it calls inactive has a gradient, and that `uses_entropy`
    holds. Probing can refute a claim, not prove it: use a batch with ties, zero and signed
    advantages, and ratios on both sides of the clip. float64 internally; batch is left alone.
    """
    n = len(batch)
    checks.need(n >= 2, "batch", "at least 2 pairs to probe", n)
    generator = torch.Generator().manual_seed(seed)

    def draw() -> tuple[Tensor, Tensor]:
        anchor = batch.logp_old if batch.logp_old is not None else torch.full((n,), -1.0)
        noise = torch.randn(n, generator=generator, dtype=torch.float64)
        logp = (anchor.detach().double().cpu() + 0.5 * noise).clamp(max=-1e-3).to(batch.device)
        entropy = torch.rand(n, generator=generator, dtype=torch.float64).to(batch.device) * 3.0
        return logp, entropy

    logp, entropy = draw()
    full = _pairwise(objective, logp, entropy, batch)
    if not isinstance(objective, TokenLocal):
        return
    if not objective.uses_entropy and bool((full[2] != 0).any()):
        raise ValueError("objective: declared uses_entropy=False, but has a gradient to entropy")
    if objective.active is not None:
        idle = ~active_pairs(objective, batch)
        idle &= batch.weights != 0
        if bool(((full[1] != 0) | (full[2] != 0))[idle].any()):
            raise ValueError("objective: a pair declared inactive has a gradient")
        if bool((full[0] != 0)[idle].any()):
            raise ValueError("objective: a pair declared inactive has a value other than 0")
    other_logp, other_entropy = draw()
    for start in range(min(n, 3)):
        keep = torch.arange(start, n, 3, device=batch.device)
        alone = _pairwise(objective, logp[keep], entropy[keep], batch.select(keep))
        mixed_logp, mixed_entropy = other_logp.clone(), other_entropy.clone()
        mixed_logp[keep], mixed_entropy[keep] = logp[keep], entropy[keep]
        mixed = _pairwise(objective, mixed_logp, mixed_entropy, batch)
        for whole, part, changed in zip(full, alone, mixed, strict=True):
            if not torch.allclose(whole[keep], part, rtol=1e-9, atol=1e-12, equal_nan=True):
                raise ValueError(
                    "objective: declared token-local, but a pair changes when others leave the "
                    "batch"
                )
            if not torch.allclose(
                whole[keep], changed[keep], rtol=1e-9, atol=1e-12, equal_nan=True
            ):
                raise ValueError(
                    "objective: declared token-local, but a pair changes when others' logp or "
                    "entropy change"
                )


def _pairwise(
    objective: Objective, logp: Tensor, entropy: Tensor, batch: TokenBatch
) -> tuple[Tensor, Tensor, Tensor]:
    """Values of the pairs and the gradients of their sum to logp and entropy."""
    logp = logp.detach().requires_grad_()
    entropy = entropy.detach().requires_grad_()
    with torch.enable_grad():
        values = objective(logp, entropy, batch)
        checks.need_shape(values, tuple(logp.shape), "objective", "one value a pair")
        if not values.requires_grad:
            return values.detach(), torch.zeros_like(logp), torch.zeros_like(logp)
        refuse_foreign_gradient(values, (logp, entropy))
        grads = torch.autograd.grad(values.sum(), (logp, entropy), allow_unused=True)
    dlogp, dentropy = (torch.zeros_like(logp) if g is None else g for g in grads)
    return values.detach(), dlogp, dentropy
