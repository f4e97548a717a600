"""Estimators of KL(pi || ref) at tokens drawn from pi, in nats.

Value and gradient are different questions. Each docstring says what the gradient of the estimator
is, as autograd gives it through logp alone, and of which quantity it is an unbiased estimate when
the tokens come from the current pi. For tokens of an older policy none of them is unbiased.

Pure functions of (P,) tensors; a token that both policies forbid (-inf twice) gives 0.
Source: Schulman, Approximating KL divergence, 2020, joschu.net/blog/kl-approx.html.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rollfuse.losses.surrogates import MAX_LOG_RATIO, log_ratio


def k1(logp: Tensor, logp_ref: Tensor) -> Tensor:
    """logp - logp_ref: unbiased, of either sign.

    Gradient 1, whatever the reference is: with tokens of pi its mean is zero, so as a loss term it
    adds noise and pulls nowhere. Useful in a reward or as a metric.

    Args:
        logp: (P,) float, nats, under pi.
        logp_ref: (P,) float, nats, under the reference.

    Returns:
        (P,), nats.
    """
    return log_ratio(logp, logp_ref)


def k2(logp: Tensor, logp_ref: Tensor) -> Tensor:
    """(logp - logp_ref)^2 / 2: biased, never negative.

    Gradient logp - logp_ref, unbiased for the gradient of KL(pi || ref). It is infinite where one
    of the two log-probs is -inf.

    Args:
        logp: (P,) float, nats, under pi.
        logp_ref: (P,) float, nats, under the reference.

    Returns:
        (P,), nats.
    """
    return 0.5 * log_ratio(logp, logp_ref).square()


def k3(logp: Tensor, logp_ref: Tensor) -> Tensor:
    """exp(d) - 1 - d with d = logp_ref - logp: unbiased, never negative.

    Gradient 1 - exp(d), unbiased for the gradient of KL(ref || pi), the other direction.

    Up to d = MAX_LOG_RATIO the formula holds and nothing is clamped. Above, where exp would soon
    overflow, it goes on along its tangent: finite for every finite d, convex, and its gradient
    stays at 1 - exp(MAX_LOG_RATIO) = -4.9e8, also for logp = -inf (where the value is inf).
    In float32 the value is off by about 1e-7 of max(|d|, exp(d)), the gradient of max(1, exp(d)).

    Args:
        logp: (P,) float, nats, under pi.
        logp_ref: (P,) float, nats, under the reference.

    Returns:
        (P,), nats.
    """
    d = log_ratio(logp_ref, logp)
    held = d.clamp(max=MAX_LOG_RATIO)
    # relu, not clamp(min=0): at the border the slope must come from `held` alone.
    tangent = math.expm1(MAX_LOG_RATIO) * torch.relu(d - MAX_LOG_RATIO)
    return torch.expm1(held) - held + tangent
