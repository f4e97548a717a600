"""Surrogates: hand-worked losses and slopes, both sides of every bound, and the far ends."""

import math

import pytest
import torch

from rollfuse.losses.surrogates import (
    MAX_LOG_RATIO,
    clipped_surrogate,
    importance_ratio,
    log_ratio,
    reinforce_surrogate,
    truncated_weight,
)

INF = math.inf


def _slope(function, *values):
    """Value and derivative in the first argument, float64."""
    tensors = [torch.tensor([v], dtype=torch.float64) for v in values]
    tensors[0].requires_grad_()
    out = function(*tensors)
    (grad,) = torch.autograd.grad(out.sum(), tensors[0])
    return out.item(), grad.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "dual_clip", "value", "slope"),
    [
        # A > 0 stops above 1.28 only.
        (1.0, 2.0, None, -2.0, -2.0),
        (0.3, 2.0, None, -0.6, -2.0),
        (1.27, 2.0, None, -2.54, -2.0),
        (1.29, 2.0, None, -2.56, 0.0),
        (9.0, 2.0, 3.0, -2.56, 0.0),
        # A < 0 stops below 0.8 and, with dual clip, above 3.
        (1.0, -2.0, None, 2.0, 2.0),
        (0.81, -2.0, None, 1.62, 2.0),
        (0.79, -2.0, None, 1.6, 0.0),
        (9.0, -2.0, None, 18.0, 2.0),
        (2.9, -2.0, 3.0, 5.8, 2.0),
        (3.1, -2.0, 3.0, 6.0, 0.0),
        (0.79, -2.0, 3.0, 1.6, 0.0),
        # A = 0 has no loss at all.
        (0.1, 0.0, 3.0, 0.0, 0.0),
        (9.0, 0.0, None, 0.0, 0.0),
    ],
)
def test_clipped_surrogate_by_hand(ratio, advantage, dual_clip, value, slope):
    def loss(r, a):
        return clipped_surrogate(r, a, 0.2, 0.28, dual_clip)

    assert _slope(loss, ratio, advantage) == pytest.approx((value, slope), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(
    ("ratio", "advantage", "slope"),
    [(1.25, 1.0, -1.0), (0.75, -1.0, 1.0), (2.0, -1.0, 1.0)],
)
def test_the_bounds_themselves_keep_their_gradient(ratio, advantage, slope):
    # All of these are exact in binary: 1 +- 0.25 and 2.
    def loss(r, a):
        return clipped_surrogate(r, a, 0.25, 0.25, 2.0)

    assert _slope(loss, ratio, advantage)[1] == slope
    outside = math.nextafter(ratio, INF if ratio > 1 else 0.0)
    assert _slope(loss, outside, advantage)[1] == 0.0


def test_clipped_surrogate_is_the_papers_max_of_two_terms():
    generator = torch.Generator().manual_seed(0)
    ratio = torch.rand(500, generator=generator, dtype=torch.float64) * 5
    advantages = torch.randn(500, generator=generator, dtype=torch.float64)
    clipped = ratio.clamp(0.8, 1.28)
    paper = -torch.minimum(ratio * advantages, clipped * advantages)
    torch.testing.assert_close(clipped_surrogate(ratio, advantages, 0.2, 0.28), paper)
    dual = torch.where(advantages < 0, torch.minimum(paper, -3.0 * advantages), paper)
    torch.testing.assert_close(clipped_surrogate(ratio, advantages, 0.2, 0.28, 3.0), dual)


def test_hyper_parameters_may_be_0d_tensors():
    ratio, advantages = torch.tensor([0.1, 1.9, 5.0]), torch.tensor([-1.0, 1.0, -1.0])
    numbers = (0.25, 0.5, 3.0)
    tensors = [torch.tensor(v) for v in numbers]
    expected = torch.tensor([0.75, -1.5, 3.0])
    assert torch.equal(clipped_surrogate(ratio, advantages, *numbers), expected)
    assert torch.equal(clipped_surrogate(ratio, advantages, *tensors), expected)


@pytest.mark.parametrize(
    ("logp", "old", "ratio", "slope"),
    [
        (math.log(0.3), math.log(0.2), 1.5, 1.5),
        (-1.0, -1.0, 1.0, 1.0),
        (-1.0, -1.0 - MAX_LOG_RATIO, math.exp(MAX_LOG_RATIO), math.exp(MAX_LOG_RATIO)),
        (-1.0, -900.0, math.exp(MAX_LOG_RATIO), 0.0),
        (-900.0, -1.0, 0.0, 0.0),
        (-INF, -1.0, 0.0, 0.0),
        (-1.0, -INF, math.exp(MAX_LOG_RATIO), 0.0),
        (-INF, -INF, 1.0, 0.0),
    ],
)
def test_importance_ratio_by_hand_and_at_the_far_ends(logp, old, ratio, slope):
    assert _slope(importance_ratio, logp, old) == pytest.approx((ratio, slope), rel=1e-12)


@pytest.mark.parametrize("advantage", [2.0, 0.0, -2.0])
@pytest.mark.parametrize("dual_clip", [None, 3.0])
@pytest.mark.parametrize("old", [-900.0, -INF])
def test_a_ratio_that_would_overflow_has_no_gradient(advantage, dual_clip, old):
    def loss(logp, logp_old):
        a = torch.tensor([advantage], dtype=torch.float32)
        ratio = importance_ratio(logp.float(), logp_old.float())
        return clipped_surrogate(ratio, a, 0.2, 0.2, dual_clip)

    value, slope = _slope(loss, -1.0, old)
    assert math.isfinite(value) and slope == 0.0


def test_log_ratio_by_hand():
    assert _slope(log_ratio, -1.0, -3.0) == (2.0, 1.0)
    assert _slope(log_ratio, -INF, -3.0) == (-INF, 1.0)
    assert _slope(log_ratio, -INF, -INF) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("logp", "advantage", "value", "slope"),
    [
        (-1.5, 2.0, 3.0, -2.0),
        (-1.5, -2.0, -3.0, 2.0),
        (-1.5, 0.0, 0.0, 0.0),
        (-INF, 0.0, 0.0, 0.0),
        (-INF, 2.0, INF, -2.0),
        (-INF, -2.0, -INF, 2.0),
    ],
)
def test_reinforce_surrogate_by_hand(logp, advantage, value, slope):
    assert _slope(reinforce_surrogate, logp, advantage) == (value, slope)


def test_truncated_weight_by_hand():
    old = torch.tensor([-1.0, -1.0, -1.0, -1.0, -INF, -1.0, -INF], dtype=torch.float64)
    behaviour = torch.tensor(
        [-1.0, -1.0 + math.log(2), -1.0 - math.log(1.5), -9.0, -1.0, -INF, -INF],
        dtype=torch.float64,
    )
    expected = torch.tensor([1.0, 0.5, 1.5, 2.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(truncated_weight(old, behaviour, 2.0), expected, rtol=1e-12, atol=0)
    assert truncated_weight(old[:1], torch.tensor([math.nan]), 2.0).item() == 0.0


def test_truncated_weight_is_a_constant():
    logp = torch.tensor([-1.0], requires_grad=True)
    assert not truncated_weight(logp, torch.tensor([-2.0]), 5.0).requires_grad
