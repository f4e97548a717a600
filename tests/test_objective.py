"""token_local, evaluate and check_objective: what is declared, delivered and refused."""

import math
from dataclasses import replace

import pytest
import torch

from rollfuse.kernels.batch import TokenBatch
from rollfuse.kernels.objective import (
    active_pairs,
    check_objective,
    evaluate,
    token_local,
    weighted_loss,
)


def _batch(n=12):
    generator = torch.Generator().manual_seed(0)
    return TokenBatch(
        targets=torch.arange(n),
        weights=1.0 + torch.rand(n, generator=generator),
        advantages=torch.tensor([0.0, 1.0, -1.0, 0.5] * (n // 4)),
        logp_old=-0.5 - torch.rand(n, generator=generator),
        cu_seqlens=torch.tensor([0, n // 3, n]),
    )


def _signed(batch):
    return batch.advantages != 0


@token_local(active=_signed, uses_entropy=False)
def _honest(logp, entropy, batch):
    return -batch.advantages * logp.exp()


def test_a_declared_objective_is_still_the_function():
    batch = _batch()
    logp = torch.linspace(-2, -1, 12)
    assert torch.equal(_honest(logp, logp, batch), -batch.advantages * logp.exp())
    assert (_honest.active, _honest.uses_entropy) == (_signed, False)

    @token_local()
    def modest(logp, entropy, batch):
        return logp

    assert (modest.active, modest.uses_entropy) == (None, True)


def test_evaluate_by_hand():
    batch = TokenBatch(targets=torch.arange(3), weights=torch.tensor([1.0, 0.5, 0.0]))

    def objective(logp, entropy, batch):
        return logp.square() - 2 * entropy

    logp, entropy = torch.tensor([-1.0, -3.0, -5.0]), torch.tensor([1.0, 2.0, 3.0])
    result = evaluate(objective, logp, entropy, batch)
    assert result.loss.item() == (1 - 2) + 0.5 * (9 - 4)
    assert result.dlogp.tolist() == [-2.0, -3.0, 0.0]
    assert result.dentropy.tolist() == [-2.0, -1.0, 0.0]
    assert not result.loss.requires_grad and not result.dlogp.requires_grad


def test_evaluate_works_under_no_grad_and_leaves_its_inputs_alone():
    logp, entropy = torch.full((12,), -1.0, requires_grad=True), torch.ones(12)
    with torch.no_grad():
        result = evaluate(_honest, logp, entropy, _batch())
    assert result.dlogp.any() and logp.grad is None and not entropy.requires_grad


def test_evaluate_without_gradients():
    zeros = torch.zeros(12)
    only_logp = evaluate(_honest, zeros - 1, zeros, _batch())
    assert only_logp.dentropy is None
    only_entropy = evaluate(lambda logp, entropy, batch: entropy, zeros - 1, zeros, _batch())
    assert torch.equal(only_entropy.dlogp, zeros) and only_entropy.dentropy.all()
    constant = evaluate(lambda logp, entropy, batch: batch.advantages, zeros, zeros, _batch())
    assert torch.equal(constant.dlogp, zeros) and constant.dentropy is None
    assert constant.loss == (_batch().weights * _batch().advantages).sum()


def test_a_weight_of_zero_drops_even_an_infinite_value():
    batch = TokenBatch(targets=torch.arange(2), weights=torch.tensor([0.0, 2.0]))
    logp = torch.tensor([-math.inf, -1.5])
    assert weighted_loss(lambda logp, entropy, batch: logp, logp, logp, batch).item() == -3.0


def test_active_pairs_joins_the_claim_with_the_weights():
    batch = replace(_batch(4), weights=torch.tensor([1.0, 0.0, -1.0, 1.0]))
    assert active_pairs(_honest, batch).tolist() == [False, False, True, True]
    everyone = token_local()(lambda logp, entropy, batch: logp)
    for objective in (everyone, everyone.function):
        assert active_pairs(objective, batch).tolist() == [True, False, True, True]


def test_an_active_claim_of_the_wrong_shape():
    lying = token_local(active=lambda batch: torch.tensor(True))(lambda logp, e, batch: logp)
    with pytest.raises(ValueError, match=r"active\(batch\): need shape \(12,\)"):
        active_pairs(lying, _batch())


@pytest.mark.parametrize("wrong", [lambda logp: logp.sum(), lambda logp: logp[1:], lambda _: 0.0])
def test_values_of_the_wrong_shape(wrong):
    def objective(logp, entropy, batch):
        return wrong(logp)

    zeros = torch.zeros(12)
    with pytest.raises(ValueError, match=r"objective: need \(12,\) values, one a pair"):
        evaluate(objective, zeros, zeros, _batch())


def test_a_gradient_to_another_tensor_is_refused():
    parameter = torch.ones((), requires_grad=True)

    def direct(logp, entropy, batch):
        return parameter * logp

    def through_others(logp, entropy, batch):
        return logp + (parameter.exp() * 2).expand(logp.shape)

    def alone(logp, entropy, batch):
        return parameter.expand(logp.shape)

    zeros = torch.zeros(12)
    for objective in (direct, through_others, alone):
        with pytest.raises(ValueError, match="gradients to logp and entropy only.*shape"):
            evaluate(objective, zeros, zeros, _batch())
        with pytest.raises(ValueError, match="gradients to logp and entropy only"):
            check_objective(objective, _batch())
        with pytest.raises(ValueError, match="gradients to logp and entropy only"):
            check_objective(token_local()(objective), _batch())
    detached = evaluate(
        lambda logp, entropy, batch: parameter.detach() * logp, zeros, zeros, _batch()
    )
    assert detached.dlogp.all()


# -- check_objective ------------------------------------------------------------------------


def test_honest_objectives_pass():
    check_objective(_honest, _batch())
    check_objective(token_local()(lambda logp, entropy, batch: logp * entropy), _batch())
    check_objective(token_local()(lambda logp, entropy, batch: batch.advantages), _batch())


def test_a_plain_callable_may_couple_pairs():
    check_objective(lambda logp, entropy, batch: logp - logp.mean(), _batch())


def test_too_few_pairs_to_probe():
    with pytest.raises(ValueError, match="batch: need at least 2 pairs to probe, got 1"):
        check_objective(_honest, _batch().select(torch.tensor([0])))


def test_values_must_be_one_a_pair():
    with pytest.raises(ValueError, match="objective: need shape"):
        check_objective(lambda logp, entropy, batch: logp.sum(), _batch())


def _coupled_functions():
    def mean(logp, entropy, batch):
        return logp - logp.mean()

    def detached_mean(logp, entropy, batch):
        return logp * logp.exp().mean().detach()

    def neighbour(logp, entropy, batch):
        return logp + 0.1 * logp.roll(1)

    def quantile_mask(logp, entropy, batch):
        return torch.where(entropy >= entropy.quantile(0.8), logp, 0.0)

    def count(logp, entropy, batch):
        return logp / len(batch)

    def faint(logp, entropy, batch):
        return logp + 1e-6 * entropy.mean()

    def cumulative(logp, entropy, batch):
        return logp.cumsum(0)

    return [mean, detached_mean, neighbour, quantile_mask, count, faint, cumulative]


@pytest.mark.parametrize("function", _coupled_functions(), ids=lambda f: f.__name__)
def test_a_coupled_function_declared_token_local_is_refused(function):
    check_objective(function, _batch())
    with pytest.raises(ValueError, match="declared token-local, but a pair changes"):
        check_objective(token_local()(function), _batch())


def test_coupling_that_only_shows_when_the_others_stay_is_refused():
    @token_local()
    def whole_batch_only(logp, entropy, batch):
        # In the parts, the constant happens to be that of the whole batch as probed first.
        if len(batch) == 12:
            seen.append(logp.detach().sum())
        return logp + seen[-1] - seen[0]

    seen = []
    with pytest.raises(ValueError, match="when others' logp or entropy change"):
        check_objective(whole_batch_only, _batch())


def _wrong_claims():
    def positive_only(batch):
        return batch.advantages > 0

    def never(batch):
        return torch.zeros(len(batch), dtype=torch.bool)

    def first_left_out(batch):
        return batch.targets > 1

    return [positive_only, never, first_left_out]


@pytest.mark.parametrize("claim", _wrong_claims(), ids=lambda f: f.__name__)
def test_a_wrong_active_claim_is_refused(claim):
    with pytest.raises(ValueError, match="a pair declared inactive has a gradient"):
        check_objective(token_local(active=claim)(_honest.function), _batch())


def test_inactive_pairs_with_a_gradient_to_entropy_are_refused():
    @token_local(active=_signed)
    def with_bonus(logp, entropy, batch):
        return -batch.advantages * logp - 0.01 * entropy

    with pytest.raises(ValueError, match="a pair declared inactive has a gradient"):
        check_objective(with_bonus, _batch())


def test_a_false_claim_about_entropy_is_refused():
    @token_local(uses_entropy=False)
    def with_bonus(logp, entropy, batch):
        return logp - 1e-9 * entropy

    with pytest.raises(ValueError, match="declared uses_entropy=False"):
        check_objective(with_bonus, _batch())
    honest = token_local(uses_entropy=False)(lambda logp, e, batch: logp - e.detach())
    check_objective(honest, _batch())


def test_pairs_of_weight_zero_may_be_called_inactive():
    claim = token_local(active=lambda batch: batch.targets > 1)(_honest.function)
    weights = _batch().weights.clone()
    weights[:2] = 0.0
    check_objective(claim, replace(_batch(), weights=weights))


def test_sequence_borders_are_gone_where_a_token_local_objective_is_called():
    @token_local()
    def by_sequence(logp, entropy, batch):
        return logp / batch.cu_seqlens[-1]

    with pytest.raises(TypeError, match="not subscriptable"):
        check_objective(by_sequence, _batch())


def test_the_batch_is_left_alone():
    batch, copy = _batch(), _batch()
    check_objective(_honest, batch)
    for name in ("targets", "weights", "advantages", "logp_old"):
        assert torch.equal(getattr(batch, name), getattr(copy, name))
