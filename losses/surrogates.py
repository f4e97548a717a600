"""Surrogates: the loss of one token, from what its log-prob was and what it is.

Pure functions of (P,) tensors, differentiable by autograd. Advantages are constants.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Above this log-ratio (a ratio of 4.9e8) the ratio stands still: no overflow, and no gradient.
MAX_LOG_RATIO = 20.0


def log_ratio(logp: Tensor, logp_old: Tensor) -> Tensor:
    """logp - logp_old in nats, and 0 where both are -inf.

    Args:
        logp: (P,) float, nats.
        logp_old: (P,) float, nats, under the other policy.

    Returns:
        (P,), differentiable in both; where both are -inf its gradient is 0.
    """
    return torch.where((logp == logp_old) & logp.isinf(), 0.0, logp - logp_old)


def importance_ratio(logp: Tensor, logp_old: Tensor) -> Tensor:
    """r = exp(logp - logp_old), defined for every log-prob up to 0, -inf included.

    A log-ratio above MAX_LOG_RATIO is held there and has gradient 0, so neither r nor its gradient
    is ever infinite or NaN. A token the policy now forbids (logp = -inf) has r = 0 and gradient 0;
    one that both policies forbid has r = 1 and gradient 0.

    Args:
        logp: (P,) float, nats.
        logp_old: (P,) float, nats, under the policy at the start of the step.

    Returns:
        (P,), differentiable in both.
    """
    return log_ratio(logp, logp_old).clamp(max=MAX_LOG_RATIO).exp()


def clipped_surrogate(
    ratio: Tensor,
    advantages: Tensor,
    eps_low: Tensor | float,
    eps_high: Tensor | float,
    dual_clip: Tensor | float | None = None,
) -> Tensor:
    """PPO's clipped loss of each token.

    max(-A r, -A clip(r, 1 - eps_low, 1 + eps_high)), which is
        A > 0:  -A min(r, 1 + eps_high)
        A < 0:  -A max(r, 1 - eps_low), and with dual clip -A min(max(r, 1 - eps_low), dual_clip).
    The gradient is -A inside these bounds, the bounds themselves included, and exactly 0 outside.

    Args:
        ratio: (P,) float, finite, of the policy to the one at the start of the step.
        advantages: (P,) float.
        eps_low: in [0, 1), number or 0-d tensor.
        eps_high: >= 0, number or 0-d tensor.
        dual_clip: > 1, number or 0-d tensor: bounds what a negative advantage can cost when the
            ratio is large. None: no bound.

    Returns:
        (P,), differentiable in `ratio`.

    Source: Schulman et al., PPO, arXiv 1707.06347, equation 7; dual clip from Ye et al., Mastering
    complex control in MOBA games, arXiv 1912.09729; two bounds from DAPO, arXiv 2503.14476.
    """
    above = ratio.clamp(max=1.0 + eps_high)
    below = ratio.clamp(min=1.0 - eps_low)
    if dual_clip is not None:
        below = below.clamp(max=dual_clip)
    return -advantages * torch.where(advantages > 0, above, below)


def reinforce_surrogate(logp: Tensor, advantages: Tensor) -> Tensor:
    """-A logp: the score function's loss, whose gradient is -A everywhere.

    Exactly 0 where A = 0, even for logp = -inf; there another A gives an infinite loss of the
    right sign and the gradient -A.

    Args:
        logp: (P,) float, nats.
        advantages: (P,) float.

    Returns:
        (P,), differentiable in `logp`.

    Source: Williams, Simple statistical gradient-following algorithms, Machine Learning 8, 1992.
    """
    return torch.where(advantages != 0, -advantages * logp, 0.0)


def truncated_weight(logp_old: Tensor, logp_behaviour: Tensor, cap: Tensor | float) -> Tensor:
    """min(exp(logp_old - logp_behaviour), cap): what corrects a sampler that is not the trainer.

    A behaviour of -inf or NaN cannot have drawn the token: its weight is 0.

    Args:
        logp_old: (P,) float, nats, of the trainer's policy at the start of the step.
        logp_behaviour: (P,) float, nats, of the distribution the token was drawn from.
        cap: > 0, number or 0-d tensor.

    Returns:
        (P,), a constant: no gradient flows through it.

    Source: Ionides, Truncated importance sampling, J. Comput. Graph. Stat. 17(2), 2008.
    """
    weight = importance_ratio(logp_old, logp_behaviour).clamp(max=cap)
    return torch.where(logp_behaviour > -torch.inf, weight, 0.0).detach()
