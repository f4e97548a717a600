"""One update of the policy: which sequences enter the model, the loss and its gradient.

Legend: B sequences of the rollout, T its tokens, P pairs trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from rollfuse.config import Config
from rollfuse.kernels.batch import Reduction
from rollfuse.kernels.linear import linear_logp_entropy
from rollfuse.kernels.objective import TokenLocal
from rollfuse.kernels.plan import Plan
from rollfuse.kernels.policy import linear_policy_loss
from rollfuse.losses.advantages import grpo_advantages, rloo_advantages
from rollfuse.losses.kl import k3
from rollfuse.losses.objectives import dapo, dr_grpo, grpo, reinforce
from rollfuse.losses.reductions import (
    constant_length,
    sequence_mean,
    sequence_sum,
    token_mean,
)
from rollfuse.rollout.packing import Packed, hidden_rows, pack_rollout, token_batch
from rollfuse.rollout.record import Rollout

if TYPE_CHECKING:
    from rollfuse.policy import Policy


class Recipe(NamedTuple):
    """What the papers behind `--loss` differ in."""

    objective: Callable[..., TokenLocal]
    reduction: Reduction
    advantages: Callable[[Tensor, Tensor], Tensor]
    # (sequences, tokens trained on, longest response) -> the update's denominator
    denominator: Callable[[int, int, int], float]


def _unscaled(rewards: Tensor, groups: Tensor) -> Tensor:
    return grpo_advantages(rewards, groups, scale_by_std=False)


# What `--loss` accepts.
RECIPES = {
    "grpo": Recipe(grpo, sequence_mean, grpo_advantages, lambda b, t, longest: b),
    "dr_grpo": Recipe(dr_grpo, constant_length, _unscaled, lambda b, t, longest: b * longest),
    "dapo": Recipe(dapo, token_mean, grpo_advantages, lambda b, t, longest: t),
    "rloo": Recipe(reinforce, sequence_sum, rloo_advantages, lambda b, t, longest: b),
}


class Minibatch(NamedTuple):
    """Sequences of one update with what grading made of them; (B,) and (T,) as in Rollout."""

    rollout: Rollout
    advantages: Tensor  # (B,)
    logp_old: Tensor | None  # (T,), None: the sampler's
    logp_ref: Tensor | None  # (T,)

    def select(self, rows: Tensor) -> Minibatch:
        """The sequences `rows` (B,) bool."""
        of_token = rows.repeat_interleave(self.rollout.lengths)
        old, ref = self.logp_old, self.logp_ref
        return Minibatch(
            self.rollout.select(rows),
            self.advantages[rows],
            None if old is None else old[of_token],
            None if ref is None else ref[of_token],
        )


class Accumulated(NamedTuple):
    """What the micro-batches of an update added up to; the gradients are in the parameters."""

    loss: float
    logp: Tensor  # (P,) nats, of the trained tokens under the weights before the update
    logp_old: Tensor  # (P,)
    logp_behaviour: Tensor  # (P,)
    advantages: Tensor  # (P,)


def accumulate(policy: Policy, minibatch: Minibatch, config: Config) -> Accumulated:
    """Add the gradients of one update's loss to the parameters, a micro-batch at a time.

    Sequences that cannot have a gradient do not go through the model.
    """
    recipe, rollout = RECIPES[config.loss], minibatch.rollout
    keep = torch.ones(len(rollout), dtype=torch.bool)
    if config.kl_coef == 0 and config.entropy_coef == 0:
        keep = minibatch.advantages != 0
    assert config.max_new_tokens is not None
    n_tokens = int(rollout.lengths[keep].sum())
    denominator = recipe.denominator(len(rollout), n_tokens, config.max_new_tokens)
    objective, plan, loss = _objective(config), Plan(invariant=config.invariant), 0.0
    parts: list[tuple[Tensor, ...]] = [(torch.empty(0),) * 4]
    for packed in _micro_batches(rollout, keep, config.micro_sequences):
        batch = token_batch(
            packed,
            rollout,
            advantages=minibatch.advantages,
            reduction=recipe.reduction,
            denominator=denominator,
            logp_old=minibatch.logp_old,
            logp_ref=minibatch.logp_ref,
        )
        hidden = hidden_rows(policy.model, packed)
        batch_there = batch.to(hidden.device)
        result = linear_policy_loss(hidden, policy.head, batch_there, objective, plan=plan)
        torch.autograd.backward(result.loss)
        loss += result.loss.item()
        assert batch.logp_old is not None and batch.logp_behaviour is not None
        assert batch.advantages is not None
        parts.append((result.logp.cpu(), batch.logp_old, batch.logp_behaviour, batch.advantages))
    return Accumulated(loss, *(torch.cat(part) for part in zip(*parts, strict=True)))


@torch.no_grad()
def score(policy: Policy, rollout: Rollout, config: Config) -> Tensor:
    """(T,) float32, nats: log-probs of the rollout's tokens under `policy`, at its temperature."""
    logp = torch.empty(len(rollout.tokens))
    everyone = torch.ones(len(rollout), dtype=torch.bool)
    for packed in _micro_batches(rollout, everyone, config.micro_sequences):
        hidden = hidden_rows(policy.model, packed)
        found = linear_logp_entropy(
            hidden,
            policy.head,
            packed.targets.to(hidden.device),
            rows=packed.rows.to(hidden.device),
            temperature=rollout.temperature,
            plan=Plan(invariant=config.invariant),
        )
        logp[packed.tokens] = found.logp.float().cpu()
    return logp


def describe(updates: Sequence[tuple[Accumulated, float]], config: Config) -> dict[str, float]:
    """A step's metrics from its updates and their gradient norms."""
    found = [update for update, _ in updates]
    return {
        "loss": sum(update.loss for update in found) / len(found),
        "gradient_norm": sum(norm for _, norm in updates) / len(updates),
        "clip_fraction": sum(clip_fraction(update, config) for update in found) / len(found),
        # Only before the first update are the trainer's weights the sampler's.
        **_differences(found[0], config),
    }


def _differences(found: Accumulated, config: Config) -> dict[str, float]:
    """How far the trainer's log-probs are from the sampler's and, rescored, from the scorer's.

    Mean and largest absolute difference, nats.
    """
    if not len(found.logp):
        return {"sampler_trainer_diff": 0.0}
    difference = float((found.logp - found.logp_behaviour).abs().mean())
    if not config.rescore:
        return {"sampler_trainer_diff": difference}
    largest = float((found.logp - found.logp_old).abs().max())
    return {"sampler_trainer_diff": difference, "scorer_trainer_diff": largest}


def clip_fraction(found: Accumulated, config: Config) -> float:
    """Share of the trained tokens whose ratio is outside the band where that clips."""
    if config.loss == "rloo" or not len(found.logp):
        return 0.0
    ratio = (found.logp - found.logp_old).exp()
    high = (found.advantages > 0) & (ratio > 1 + config.eps_high)
    low = (found.advantages < 0) & (ratio < 1 - config.eps_low)
    return float((high | low).float().mean())


def _objective(config: Config) -> TokenLocal:
    kl_term = k3 if config.kl_coef > 0 else None
    band = () if config.loss == "rloo" else (config.eps_low, config.eps_high)
    return RECIPES[config.loss].objective(
        *band,
        kl=kl_term,
        kl_coef=config.kl_coef,
        entropy_coef=config.entropy_coef,
        tis_cap=config.tis_cap,
    )


def _micro_batches(rollout: Rollout, keep: Tensor, size: int) -> Iterator[Packed]:
    """The kept sequences packed, `size` at a time; neighbours share their prompts."""
    for rows in torch.split(keep.nonzero().squeeze(1), size):
        if len(rows):
            micro = torch.zeros(len(rollout), dtype=torch.bool)
            micro[rows] = True
            yield pack_rollout(rollout, micro)
