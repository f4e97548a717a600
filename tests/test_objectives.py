"""Objectives: declarations probed, losses and gradients by hand, what each field does to them."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from rollfuse.kernels.batch import TokenBatch
from rollfuse.kernels.objective import active_pairs, check_objective, evaluate
from rollfuse.losses.kl import k1, k2, k3
from rollfuse.losses.objectives import dapo, dr_grpo, grpo, gspo, nll, reinforce

INF = math.inf
CLIPPED = (grpo, dr_grpo, dapo)
FACTORIES = (*CLIPPED, reinforce)


def _batch(advantages, **fields):
    n = len(advantages)
    fields = {k: torch.tensor(v) if isinstance(v, list) else v for k, v in fields.items()}
    return TokenBatch(
        targets=torch.arange(n),
        weights=fields.pop("weights", torch.ones(n)),
        advantages=torch.tensor(advantages),
        **fields,
    )


def _nasty_batch():
    """Zero and signed advantages with ties, old log-probs that are far, forbidden or unknown."""
    generator = torch.Generator().manual_seed(1)
    pattern = itertools.cycle([0.0, 1.5, -1.5, -0.0, 2.0, -0.3, 1.5])
    n = 60
    logp_old = -0.3 - 2 * torch.rand(n, generator=generator)
    logp_old[[4, 11]] = -INF
    logp_old[[5, 12]] = -300.0
    behaviour = logp_old + 0.5 * torch.randn(n, generator=generator)
    behaviour[[20, 21]] = -INF
    weights = torch.rand(n, generator=generator)
    weights[::9] = 0.0
    return _batch(
        list(itertools.islice(pattern, n)),
        weights=weights,
        logp_old=logp_old,
        logp_behaviour=behaviour.clamp(max=0.0),
        known=torch.rand(n, generator=generator) < 0.8,
        logp_ref=-3 * torch.rand(n, generator=generator),
        cu_seqlens=torch.tensor([0, 25, 25, 60]),
    )


def _every_variant():
    extras = [
        {},
        {"kl": k3, "kl_coef": 0.1},
        {"kl": k2, "kl_coef": 0.0},
        {"entropy_coef": 0.01},
        {"entropy_coef": -0.01},
        {"tis_cap": 2.0},
        {"kl": k1, "kl_coef": 0.1, "entropy_coef": 0.01, "tis_cap": 1.5},
    ]
    for factory, extra in itertools.product(FACTORIES, extras):
        yield pytest.param(factory(**extra), id=f"{factory.__name__}-{'-'.join(extra)}")
    yield pytest.param(grpo(dual_clip=1.5), id="grpo-dual_clip")


@pytest.mark.parametrize("objective", _every_variant())
def test_declarations_hold(objective):
    batch = _nasty_batch()
    check_objective(objective, batch)
    check_objective(objective, replace(batch, known=None, weights=-batch.weights), seed=1)
    check_objective(objective, replace(batch, logp_old=None, known=None), seed=2)
    tens = {"eps_low": 0.1, "eps_high": 0.6}
    if objective.uses_entropy:
        tens["entropy_coef"] = 0.3
    scalars = {name: torch.tensor(value) for name, value in tens.items()}
    check_objective(objective, replace(batch, scalars=scalars), seed=3)


def test_the_nasty_batch_meets_both_sides_of_the_clip():
    batch = _nasty_batch()
    logp = torch.full((len(batch),), -1.0)
    result = evaluate(grpo(), logp, torch.ones(len(batch)), batch)
    signed = (batch.advantages != 0) & (batch.weights != 0)
    for side in (batch.advantages > 0, batch.advantages < 0):
        assert result.dlogp[signed & side].any() and not result.dlogp[signed & side].all()


@pytest.mark.parametrize("factory", FACTORIES)
def test_finite_differences(factory):
    """float64, log-ratios at least 1e-3 from every kink, all terms on."""
    n = 200
    generator = torch.Generator().manual_seed(7)
    draw = {"generator": generator, "dtype": torch.float64}
    batch = _batch(
        torch.randn(n, **draw).tolist(),
        logp_old=-1 - torch.rand(n, **draw),
        logp_ref=-1 - torch.rand(n, **draw),
        weights=torch.rand(n, **draw),
    )
    extra = {} if factory is reinforce else {"eps_low": 0.2, "eps_high": 0.3, "dual_clip": 1.6}
    objective = factory(kl=k3, kl_coef=0.2, entropy_coef=0.3, **extra)
    kinks = torch.tensor([0.8, 1.3, 1.6], dtype=torch.float64).log()
    difference = torch.randn(n, **draw) * 0.5
    near = ((difference[:, None] - kinks).abs() < 1e-3).any(1)
    difference[near] += 4e-3
    logp, entropy = batch.logp_old + difference, torch.rand(n, **draw)
    result = evaluate(objective, logp, entropy, batch)
    h = 1e-6

    def slopes(d_logp, d_entropy):
        up = objective(logp + d_logp, entropy + d_entropy, batch)
        down = objective(logp - d_logp, entropy - d_entropy, batch)
        return batch.weights * (up - down) / (2 * h)

    torch.testing.assert_close(result.dlogp, slopes(h, 0.0), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(result.dentropy, slopes(0.0, h), rtol=1e-6, atol=1e-8)


def _values(objective, logp, batch, entropy=None):
    """Values and dlogp of the unweighted pairs."""
    logp = torch.tensor(logp, dtype=torch.float64, requires_grad=True)
    entropy = torch.ones_like(logp) if entropy is None else torch.tensor(entropy)
    values = objective(logp, entropy, batch)
    (grad,) = torch.autograd.grad(values.sum(), logp, allow_unused=True)
    return values.detach(), grad


def _expect(got, expected, rtol=1e-6):
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=rtol, atol=1e-9)


@pytest.mark.parametrize(("factory", "high"), [(grpo, 1.2), (dr_grpo, 1.2), (dapo, 1.28)])
def test_clipped_objectives_by_hand(factory, high):
    ratios = [1.25, 1.5, 0.5, 0.5, 1.5, 1.5]
    batch = _batch([2.0, 2.0, 2.0, -2.0, -2.0, 0.0], logp_old=[-2.0] * 6)
    values, grad = _values(factory(), [-2 + math.log(r) for r in ratios], batch)
    inside = 1.25 < high
    _expect(values, [-2.5 if inside else -2 * high, -2 * high, -1.0, 1.6, 3.0, 0.0])
    _expect(grad, [-2.5 if inside else 0.0, 0.0, -1.0, 0.0, 3.0, 0.0])


def test_dual_clip_bounds_negative_advantages_only():
    batch = _batch([2.0, -2.0, -2.0], logp_old=[-4.0] * 3)
    logp = [-4 + math.log(r) for r in (3.5, 3.5, 2.5)]
    values, grad = _values(grpo(dual_clip=3.0), logp, batch)
    _expect(values, [-2.4, 6.0, 5.0])
    _expect(grad, [0.0, 0.0, 5.0])


def test_reinforce_by_hand_ignores_logp_old():
    batch = _batch([2.0, -0.5, 0.0], logp_old=[-9.0] * 3)
    values, grad = _values(reinforce(), [-1.0, -3.0, -2.0], batch)
    _expect(values, [2.0, -1.5, 0.0])
    _expect(grad, [-2.0, 0.5, 0.0])


def test_nll_reads_nothing_but_the_log_prob():
    batch = _batch([0.0, 2.0, -1.0], logp_old=[-9.0] * 3)
    values, grad = _values(nll(), [-1.0, -3.0, -INF], replace(batch, advantages=None))
    _expect(values, [1.0, 3.0, INF])
    _expect(grad, [-1.0, -1.0, -1.0])
    check_objective(nll(), _nasty_batch())
    assert active_pairs(nll(), batch).all()  # a zero advantage says nothing here


def test_kl_and_entropy_terms_by_hand():
    batch = _batch([0.0, 1.0], logp_ref=[-1.5, -1.5])
    objective = grpo(kl=k2, kl_coef=0.5, entropy_coef=0.1)
    values, grad = _values(objective, [-1.0, -1.0], batch, entropy=[2.0, 3.0])
    _expect(values, [0.5 * 0.125 - 0.2, -1.0 + 0.5 * 0.125 - 0.3])
    _expect(grad, [0.25, -1.0 + 0.25])
    dentropy = evaluate(objective, torch.tensor([-1.0, -1.0]), torch.ones(2), batch).dentropy
    _expect(dentropy.double(), [-0.1, -0.1])


@pytest.mark.parametrize("factory", CLIPPED)
@pytest.mark.parametrize("fields", [{}, {"logp_old": [-1.0, -0.5, -2.0]}])
def test_at_ratio_1_the_gradient_is_reinforces(factory, fields):
    batch = _batch([2.0, -0.5, 0.0], **fields)
    logp = [-1.0, -0.5, -2.0]
    _, grad = _values(factory(), logp, batch)
    _, expected = _values(reinforce(), logp, batch)
    _expect(grad, [-2.0, 0.5, 0.0], rtol=1e-12)
    assert torch.equal(grad, expected)


@pytest.mark.parametrize("factory", CLIPPED)
def test_unknown_pairs_are_on_policy_whatever_lies_in_their_slots(factory):
    junk = [-9.0, -0.01, -INF]
    batch = _batch(
        [2.0, -0.5, 1.0],
        logp_old=junk,
        logp_behaviour=junk,
        known=[False, False, False],
    )
    values, grad = _values(factory(tis_cap=5.0), [-1.0, -0.5, -2.0], batch)
    _expect(values, [-2.0, 0.5, -1.0])
    _expect(grad, [-2.0, 0.5, -1.0])
    known = replace(batch, known=torch.tensor([True, False, True]))
    _, grad = _values(factory(), [-1.0, -0.5, -2.0], known)
    _expect(grad, [0.0, 0.5, 0.0])


def test_tis_weighs_the_surrogate_alone():
    batch = _batch(
        [2.0, 2.0, 2.0, -1.0],
        logp_old=[-1.0] * 4,
        logp_behaviour=[-1 + math.log(2), -1 - math.log(1.5), -5.0, -1.0],
        logp_ref=[-1.0] * 4,
    )
    at = [-1.0] * 4
    weights = [0.5, 1.5, 2.0, 1.0]
    values, grad = _values(grpo(tis_cap=2.0), at, batch)
    _expect(values, [-1.0, -3.0, -4.0, 1.0])
    _expect(grad, [-1.0, -3.0, -4.0, 1.0])
    _, plain = _values(reinforce(tis_cap=2.0), at, batch)
    _expect(plain, [-2.0 * w for w in weights[:3]] + [1.0])
    both = grpo(tis_cap=2.0, kl=k1, kl_coef=0.5)
    _, grad = _values(both, at, batch)
    _expect(grad, [-0.5, -2.5, -3.5, 1.5])


def test_tis_without_logp_old_weighs_by_the_current_policy():
    batch = _batch([2.0, 2.0], logp_behaviour=[-1 + math.log(2), -1.0])
    values, grad = _values(grpo(tis_cap=2.0), [-1.0, -1.0], batch)
    _expect(values, [-1.0, -2.0])
    _expect(grad, [-1.0, -2.0])


@pytest.mark.parametrize("factory", FACTORIES)
def test_forbidden_and_far_log_probs_have_a_defined_gradient(factory):
    n = 6
    batch = _batch(
        [1.0, -1.0, 0.0, 1.0, -1.0, 0.0],
        logp_old=[-1.0, -INF, -INF, -500.0, -500.0, -500.0],
        logp_behaviour=[-1.0, -1.0, -INF, -INF, -1.0, -500.0],
        logp_ref=[-1.0, -2.0, -1.0, -2.0, -1.0, -2.0],
    )
    logp = torch.tensor([-INF, -INF, -INF, -1.0, -1.0, -1.0])
    for extra in ({}, {"tis_cap": 2.0}, {"kl": k3, "kl_coef": 0.1}, {"entropy_coef": 0.1}):
        for candidate in (batch, replace(batch, logp_old=None)):
            values, _ = _values(factory(**extra), logp.tolist(), candidate)
            # REINFORCE's -inf and the KL's inf have no sum; their gradients have.
            assert not values.isnan().any() or (factory is reinforce and "kl" in extra)
            result = evaluate(factory(**extra), logp, torch.ones(n), candidate)
            assert result.dlogp.isfinite().all()
    if factory is not reinforce:
        result = evaluate(factory(), logp, torch.ones(n), batch)
        assert not result.dlogp.any() and result.loss.isfinite()


def test_active_pairs():
    batch = _batch([0.0, 1.0, -1.0, -0.0, 2.0], weights=[1.0, 1.0, 1.0, 1.0, 0.0])
    signed, weighted = [False, True, True, False, False], [True, True, True, True, False]
    for factory in FACTORIES:
        assert active_pairs(factory(), batch).tolist() == signed
        assert active_pairs(factory(kl=k3), batch).tolist() == signed  # kl_coef is 0
        assert active_pairs(factory(tis_cap=2.0), batch).tolist() == signed
        assert active_pairs(factory(kl=k3, kl_coef=0.1), batch).tolist() == weighted
        assert active_pairs(factory(entropy_coef=0.1), batch).tolist() == weighted
    # What a tensor holds is not read: the KL term may have a gradient.
    scheduled = replace(batch, scalars={"kl_coef": torch.tensor(0.0)})
    assert active_pairs(grpo(kl=k3), scheduled).tolist() == weighted


def test_uses_entropy_is_declared_only_with_a_bonus():
    for factory in FACTORIES:
        assert not factory().uses_entropy and not factory(kl=k3, kl_coef=1.0).uses_entropy
        assert factory(entropy_coef=0.1).uses_entropy


@pytest.mark.parametrize(
    ("name", "made_with", "value"),
    [
        ("eps_low", 0.1, 0.4),
        ("eps_high", 0.1, 0.4),
        ("dual_clip", 1.3, 1.7),
        ("kl_coef", 0.1, 0.7),
        ("kl_coef", 0.0, 0.7),
        ("entropy_coef", 0.1, 0.7),
        ("tis_cap", 1.1, 1.4),
    ],
)
def test_a_scalar_replaces_the_hyper_parameter(name, made_with, value):
    batch = _nasty_batch()
    generator = torch.Generator().manual_seed(4)
    logp = (batch.logp_old.clamp(min=-5) + 0.6 * torch.randn(60, generator=generator)).tolist()
    extra = {"kl": k3} if name == "kl_coef" else {}
    objective, wanted = grpo(**{name: made_with}, **extra), grpo(**{name: value}, **extra)
    scheduled = replace(batch, scalars={name: torch.tensor(value)})
    before, _ = _values(objective, logp, batch)
    got, got_grad = _values(objective, logp, scheduled)
    expected, expected_grad = _values(wanted, logp, batch)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(got_grad, expected_grad, rtol=1e-6, atol=1e-9)
    assert not torch.allclose(before, got, rtol=1e-3)


@pytest.mark.parametrize("name", ["dual_clip", "kl_coef", "entropy_coef", "tis_cap"])
def test_a_scalar_cannot_switch_on_what_was_left_off(name):
    batch = replace(_nasty_batch(), scalars={name: torch.tensor(1.5)})
    with pytest.raises(ValueError, match=rf"scalars\['{name}'\]: need an objective made with"):
        check_objective(grpo(), batch)


@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize(
    ("missing", "extra"),
    [
        ("advantages", {}),
        ("logp_ref", {"kl": k3, "kl_coef": 0.1}),
        ("logp_behaviour", {"tis_cap": 2.0}),
    ],
)
def test_a_missing_field_is_named(factory, missing, extra):
    batch = replace(_nasty_batch(), **{missing: None})
    with pytest.raises(ValueError, match=f"{missing}: need batch.{missing}"):
        check_objective(factory(**extra), batch)
    check_objective(factory(**extra), _nasty_batch())


def test_fields_of_terms_left_out_are_not_needed():
    check_objective(grpo(kl=k3, kl_coef=0.0), replace(_nasty_batch(), logp_ref=None))


@pytest.mark.parametrize(
    ("factory", "keywords", "error", "message"),
    [
        (grpo, {"eps_low": 1.0}, ValueError, r"eps_low: need a value in \[0, 1\), got 1.0"),
        (grpo, {"eps_low": -0.1}, ValueError, "eps_low: need"),
        (grpo, {"eps_low": math.nan}, ValueError, "eps_low: need"),
        (dapo, {"eps_high": -0.1}, ValueError, "eps_high: need a finite value >= 0"),
        (dapo, {"eps_high": INF}, ValueError, "eps_high: need a finite value >= 0"),
        (dr_grpo, {"dual_clip": 1.0}, ValueError, "dual_clip: need a finite value > 1"),
        (dr_grpo, {"dual_clip": math.nan}, ValueError, "dual_clip: need a finite value > 1"),
        *[
            (factory, keywords, error, message)
            for factory in FACTORIES
            for keywords, error, message in (
                ({"kl_coef": 0.1}, ValueError, "kl: need an estimator such as k3"),
                ({"kl": k3, "kl_coef": -0.1}, ValueError, "kl_coef: need a finite value >= 0"),
                ({"kl": k3, "kl_coef": INF}, ValueError, "kl_coef: need a finite value >= 0"),
                (
                    {"kl": "k3", "kl_coef": 0.1},
                    TypeError,
                    "kl: need a function such as k3, got str",
                ),
                ({"entropy_coef": math.nan}, ValueError, "entropy_coef: need a finite value"),
                ({"tis_cap": 0.0}, ValueError, "tis_cap: need a finite value > 0"),
                ({"tis_cap": INF}, ValueError, "tis_cap: need a finite value > 0"),
            )
        ],
    ],
)
def test_bad_hyper_parameters(factory, keywords, error, message):
    with pytest.raises(error, match=message):
        factory(**keywords)


@pytest.mark.parametrize("factory", FACTORIES)
def test_no_tensor_on_a_device_is_read(factory):
    # A meta tensor has no values: reading one, as a host sync would, raises.
    batch = replace(_nasty_batch(), scalars={"kl_coef": torch.tensor(0.1)}).to("meta")
    objective = factory(kl=k3, kl_coef=0.1, entropy_coef=0.1, tis_cap=2.0)
    assert objective.active(batch).shape == (60,)
    result = evaluate(objective, torch.zeros(60, device="meta"), batch.weights, batch)
    assert result.dlogp.shape == (60,)


@pytest.mark.parametrize("factory", FACTORIES)
def test_an_empty_batch(factory):
    result = evaluate(factory(), torch.zeros(0), torch.zeros(0), _batch([], logp_old=[]))
    assert result.loss == 0 and result.dlogp.shape == (0,)


def test_a_sequences_derivatives_are_added_up_exactly():
    """In float32 the sum over a long sequence would put its error into every token's derivative."""
    n = 5000
    logp = (-torch.rand(n) * 3).requires_grad_()
    batch = TokenBatch(
        torch.zeros(n, dtype=torch.long),
        torch.full((n,), 1.0 / n),
        advantages=torch.full((n,), 0.7),
        logp_old=logp.detach() + 0.01 * torch.randn(n),
        cu_seqlens=torch.tensor([0, n]),
    )
    loss = (batch.weights * gspo(0.2, 0.2)(logp, logp, batch)).sum()
    (ours,) = torch.autograd.grad(loss, logp)
    exact = -0.7 / n * (logp.detach().double() - batch.logp_old.double()).mean().exp()
    assert ((ours.double() - exact) / exact).abs().max() < 3e-7
