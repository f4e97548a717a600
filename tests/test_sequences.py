"""Sequence sums and means, and GSPO, which is made of them: by hand and by finite differences."""

import math

import pytest
import torch

from rollfuse import TokenBatch, check_objective, gspo
from rollfuse.kernels.objective import evaluate
from rollfuse.losses.sequences import sequence_means, sequence_sums

BORDERS = torch.tensor([0, 3, 3, 4])  # the second sequence is empty


def test_sums_and_means_by_hand():
    values = torch.tensor([1.0, 2.0, 6.0, -5.0])
    assert sequence_sums(values, BORDERS).tolist() == [9.0, 0.0, -5.0]
    assert sequence_means(values, BORDERS).tolist() == [3.0, 0.0, -5.0]


def test_a_long_mean_keeps_its_digits():
    """100,000 log-ratios of one sign: float32 sums would be off by more than a narrow band."""
    values = torch.full((100_000,), 1e-4) + torch.rand(100_000) * 1e-5
    borders = torch.tensor([0, len(values)])
    exact = values.double().mean()
    assert abs(sequence_means(values, borders).double() - exact) < 1e-10


def batch_of(log_ratios, advantages, borders):
    """A batch whose log-probs are -1 and whose ratios are as asked for."""
    old = -1.0 - torch.tensor(log_ratios, dtype=torch.float64)
    lengths = torch.tensor(borders).diff()
    return TokenBatch(
        targets=torch.zeros(len(log_ratios), dtype=torch.int64),
        weights=torch.ones(len(log_ratios)),
        advantages=torch.tensor(advantages).repeat_interleave(lengths),
        logp_old=old,
        cu_seqlens=torch.tensor(borders),
    )


def test_gspo_by_hand():
    """Means 0.2 (clipped at 0.1 for A > 0), 0.2 (A < 0: never clipped above) and 0.05."""
    ratios = [0.4, 0.0, 0.1, 0.3, 0.05]
    batch = batch_of(ratios, [2.0, -1.0, 3.0], [0, 2, 4, 5])
    logp, entropy = torch.full((5,), -1.0, dtype=torch.float64), torch.zeros(5).double()
    found = evaluate(gspo(0.1, 0.1), logp, entropy, batch)
    high, low = math.exp(0.2), math.exp(0.05)
    # The loss sums over tokens what each repeats of its sequence.
    assert found.loss == pytest.approx(2 * -2.0 * 1.1 + 2 * high - 3.0 * low, rel=1e-6)
    # d/dlogp of a token: its share of the mean, times the tokens that repeat the ratio.
    want = [0.0, 0.0, high, high, -3.0 * low]
    assert found.dlogp.tolist() == pytest.approx(want, rel=1e-6)


def test_gspo_of_single_tokens_is_grpo():
    from rollfuse import grpo

    ratios = [0.4, -0.4, 0.01, -0.01, 3.0, 0.0]
    batch = batch_of(ratios, [1.0, -1.0, 2.0, -2.0, -1.0, 0.0], list(range(7)))
    logp, entropy = torch.full((6,), -1.0, dtype=torch.float64), torch.zeros(6).double()
    ours = evaluate(gspo(0.2, 0.25), logp, entropy, batch)
    tokens = evaluate(grpo(0.2, 0.25), logp, entropy, batch)
    torch.testing.assert_close(ours.dlogp, tokens.dlogp)
    torch.testing.assert_close(ours.loss, tokens.loss)


def test_gspo_gradient_by_finite_differences():
    batch = batch_of([0.1, -0.2, 0.05, 0.3, -0.1, 0.02, 0.0], [1.0, -2.0, 0.5], [0, 3, 5, 7])
    entropy = torch.zeros(7).double()
    objective = gspo(0.5, 0.5)

    def loss(logp):
        return objective(logp, entropy, batch).sum()

    logp = (torch.full((7,), -1.0) + 0.01 * torch.randn(7)).double().requires_grad_()
    assert torch.autograd.gradcheck(loss, logp)


def test_gspo_and_tokens_the_policy_forbids():
    """A ratio of 0 for the sequence: finite, without gradient. Far ratios stay finite as well."""
    batch = batch_of([0.0, 0.0, 0.1], [1.0, -1.0], [0, 2, 3])
    logp = torch.tensor([-math.inf, -1.0, 300.0]).double()
    found = evaluate(gspo(), logp, torch.zeros(3).double(), batch)
    assert found.dlogp.isfinite().all() and found.dlogp[:2].abs().sum() == 0


def test_gspo_of_a_token_gained_and_a_token_lost():
    """Log-ratios of -inf and inf in one sequence: a ratio of 0, not of NaN."""
    batch = batch_of([0.0, math.inf], [-1.0], [0, 2])
    found = evaluate(
        gspo(), torch.tensor([-math.inf, -1.0]).double(), torch.zeros(2).double(), batch
    )
    assert found.loss.isfinite() and not found.dlogp.any()


def test_gspo_names_what_is_missing_and_what_is_wrong():
    batch = batch_of([0.0, 0.0], [1.0], [0, 2])
    with pytest.raises(ValueError, match="eps_low"):
        gspo(eps_low=1.5)
    without = batch.select(torch.arange(2))
    with pytest.raises(ValueError, match="cu_seqlens"):
        gspo()(torch.zeros(2), torch.zeros(2), without)
    check_objective(gspo(), batch)
