"""KL estimators: hand-worked values, the gradients the docstrings promise, and the far ends."""

import math

import pytest
import torch

from rollfuse.losses.kl import k1, k2, k3
from rollfuse.losses.surrogates import MAX_LOG_RATIO

INF = math.inf


def _slope(estimator, logp, logp_ref, dtype=torch.float64):
    logp = torch.tensor([logp], dtype=dtype, requires_grad=True)
    out = estimator(logp, torch.tensor([logp_ref], dtype=dtype))
    (grad,) = torch.autograd.grad(out.sum(), logp)
    return out.item(), grad.item()


@pytest.mark.parametrize(
    ("estimator", "value", "slope"),
    [
        (k1, 0.5, 1.0),
        (k2, 0.125, 0.5),
        (k3, 0.1065306597126334, 0.3934693402873666),  # e^-0.5 - 0.5; 1 - e^-0.5
    ],
)
def test_by_hand(estimator, value, slope):
    assert _slope(estimator, -1.0, -1.5) == pytest.approx((value, slope), rel=1e-14)


def _policies():
    generator = torch.Generator().manual_seed(5)
    logits, logits_ref = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), logits_ref


@pytest.mark.parametrize("estimator", [k1, k3])
def test_unbiased_value(estimator):
    logits, logits_ref = _policies()
    logp, logp_ref = logits.log_softmax(0), logits_ref.log_softmax(0)
    kl = (logp.exp() * (logp - logp_ref)).sum()
    torch.testing.assert_close((logp.exp() * estimator(logp, logp_ref)).sum(), kl)


@pytest.mark.parametrize("estimator", [k1, k2, k3])
def test_the_gradient_is_in_expectation_what_the_docstring_says(estimator):
    logits, logits_ref = _policies()
    logp, logp_ref = logits.log_softmax(0), logits_ref.log_softmax(0)
    # Tokens are drawn from pi: each token's gradient, with pi's probability as its frequency.
    sampled = (logp.exp().detach() * estimator(logp, logp_ref)).sum()
    (mean,) = torch.autograd.grad(sampled, logits, retain_graph=True)
    promised = {
        k1: torch.zeros(()) * logp.sum(),
        k2: (logp.exp() * (logp - logp_ref)).sum(),
        k3: (logp_ref.exp() * (logp_ref - logp)).sum(),
    }[estimator]
    (expected,) = torch.autograd.grad(promised, logits)
    torch.testing.assert_close(mean, expected, rtol=1e-12, atol=1e-14)
    assert estimator is k1 or mean.abs().max() > 0.05


def test_k2_and_k3_are_never_negative_and_zero_at_equality():
    generator = torch.Generator().manual_seed(0)
    logp = -5 * torch.rand(20_000, generator=generator)
    noise = torch.randn(20_000, generator=generator)
    for scale in (1e-7, 1e-4, 1e-2, 1.0, 10.0):
        for estimator in (k2, k3):
            assert (estimator(logp, logp + scale * noise) >= 0).all()
    assert not k2(logp, logp).any() and not k3(logp, logp).any()


@pytest.mark.parametrize("d", [-60.0, -3.0, -1e-2, 1e-3, 0.5, 12.0, 19.9])
def test_k3_in_float32_is_as_exact_as_documented(d):
    # Both log-probs are exact in float32, so that the formula's error is all there is.
    logp_ref = -64.0 if d < 0 else -1.0
    logp = float(torch.tensor(logp_ref - d))
    d = logp_ref - logp
    value, slope = _slope(k3, logp, logp_ref, torch.float32)
    assert abs(value - (math.expm1(d) - d)) <= 3e-7 * max(abs(d), math.exp(d))
    assert abs(slope + math.expm1(d)) <= 3e-7 * max(1.0, math.exp(d))


def test_k3_goes_on_along_its_tangent():
    top = math.expm1(MAX_LOG_RATIO)
    value, slope = _slope(k3, -1.0 - MAX_LOG_RATIO, -1.0)
    assert (value, slope) == pytest.approx((top - MAX_LOG_RATIO, -top), rel=1e-12)
    for beyond in (0.5, 100.0, 5000.0):
        far, far_slope = _slope(k3, -1.0 - MAX_LOG_RATIO - beyond, -1.0)
        assert far == pytest.approx(value + top * beyond, rel=1e-12)
        assert far_slope == pytest.approx(-top, rel=1e-12)
    value, slope = _slope(k3, -1000.0, -1.0, torch.float32)
    assert math.isfinite(value) and slope == pytest.approx(-top, rel=1e-6)


@pytest.mark.parametrize(
    ("estimator", "logp", "logp_ref", "value", "slope"),
    [
        (k1, -INF, -1.0, -INF, 1.0),
        (k2, -INF, -1.0, INF, -INF),
        (k3, -INF, -1.0, INF, -math.expm1(MAX_LOG_RATIO)),
        (k1, -1.0, -INF, INF, 1.0),
        (k2, -1.0, -INF, INF, INF),
        (k3, -1.0, -INF, INF, 1.0),
        (k1, -INF, -INF, 0.0, 0.0),
        (k2, -INF, -INF, 0.0, 0.0),
        (k3, -INF, -INF, 0.0, 0.0),
    ],
)
def test_forbidden_tokens(estimator, logp, logp_ref, value, slope):
    assert _slope(estimator, logp, logp_ref) == pytest.approx((value, slope), rel=1e-12)
