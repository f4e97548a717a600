"""The tolerances: the bugs this field keeps making are planted and must be noticed.

In every plan of the head, from logits, under a support and on ranks that split the vocabulary.
"""

from functools import partial

import pytest
import shard_cases
import torch
from check import assert_no_worse, relative_error
from head_cases import (
    Problem,
    assert_matches,
    coupled,
    gradients,
    make_problem,
    reference_loss,
    smooth,
    smooth_local,
    without_entropy,
)
from ranks import on_ranks
from test_support import reference as reference_under_support
from test_support import with_support

from rollfuse import Plan, linear_policy_loss, policy_loss
from rollfuse.kernels import from_logits, fused, gemm, head_pass, logits_pass
from rollfuse.kernels.head import BareHead

KINDS = [("fused", smooth_local), ("hold", coupled), ("recompute", coupled)]


def change_coefficients(patch, change):
    """`change` what rows get, of a head's logits and of those that exist."""
    right = head_pass.row_coefficients
    for module in (head_pass, logits_pass):
        patch.setattr(module, "row_coefficients", partial(change, right))


def change_given_logits(patch, change):
    """`change` the view of logits that exist."""
    right = logits_pass.view_of_logits
    for module in (from_logits, fused):
        patch.setattr(module, "view_of_logits", lambda *arguments: change(right(*arguments)))


def no_softmax(patch):
    """The gradient of the normaliser is dropped: columns nobody targets get none."""

    def wrong(right, *arguments):
        found = right(*arguments)
        return found._replace(alpha=torch.zeros_like(found.alpha))

    change_coefficients(patch, wrong)


def three_percent_short(patch):
    change_coefficients(patch, lambda right, *rest: right(*rest).times(torch.tensor(0.97)))


def target_three_percent_short(patch):
    def wrong(right, *arguments):
        found = right(*arguments)
        return found._replace(value=0.97 * found.value)

    change_coefficients(patch, wrong)


def no_temperature(patch):
    right = BareHead.transform

    def wrong(self, temperature, *rest, **options):
        return right(self, torch.ones_like(temperature), *rest, **options)

    patch.setattr(BareHead, "transform", wrong)

    def without(view):
        factor = torch.ones_like(view.transform.factor)
        return view._replace(transform=view.transform._replace(factor=factor))

    change_given_logits(patch, without)


def temperature_lost_in_the_gradient(patch):
    def wrong(right, stats, transform, *rest):
        return right(stats, transform._replace(factor=torch.ones_like(transform.factor)), *rest)

    change_coefficients(patch, wrong)


def logits_in_bfloat16(patch):
    right = gemm.project

    def wrong(x, weight, operand, out):
        right(x, weight, operand, out)
        out.copy_(out.bfloat16())

    patch.setattr(gemm, "project", wrong)
    change_given_logits(
        patch, lambda view: view._replace(logits=view.logits.bfloat16().to(view.logits.dtype))
    )


def entropy_with_the_wrong_sign(patch):
    def wrong(right, stats, transform, targets, dlogp, dentropy):
        return right(stats, transform, targets, dlogp, None if dentropy is None else -dentropy)

    change_coefficients(patch, wrong)


def entropy_without_gradient(patch):
    change_coefficients(patch, lambda right, s, t, p, d, _: right(s, t, p, d, None))


MUTATIONS = [
    no_softmax,
    three_percent_short,
    target_three_percent_short,
    no_temperature,
    temperature_lost_in_the_gradient,
    logits_in_bfloat16,
    entropy_with_the_wrong_sign,
    entropy_without_gradient,
]
OF_ENTROPY = [entropy_with_the_wrong_sign, entropy_without_gradient]


def check_from_logits(objective):
    """policy_loss against PyTorch in float64."""
    problem = make_problem()
    source = torch.randn(24, 301).requires_grad_()
    loss = policy_loss(source * 1.0, problem.batch, objective).loss
    (ours,) = torch.autograd.grad(loss, source)
    plain = smooth if objective is smooth_local else objective
    found = []
    for dtype in (torch.float32, torch.float64):
        leaf = source.detach().to(dtype).requires_grad_()
        whole = Problem(leaf, torch.eye(301, dtype=dtype), None, 1.0, None, problem.batch)
        value = reference_loss(whole, plain)[0]
        found.append((value, torch.autograd.grad(value, leaf)[0]))
    (value, g_plain), (true, g_true) = found
    assert_no_worse("loss", loss, value, true, floor=1e-6)
    assert_no_worse("dlogits", ours, g_plain, g_true, floor=1e-6)


def check_under_support(kind, objective):
    problem = with_support(make_problem(softcap=9.0))
    exact = problem.cast(torch.float64)
    plain = smooth if objective is smooth_local else objective
    plan = Plan(kind)
    loss = linear_policy_loss(
        problem.hidden, problem.head, problem.batch, objective, plan=plan
    ).loss
    value, true = (reference_under_support(p, plain)[0] for p in (problem, exact))
    assert_no_worse("loss", loss, value, true, floor=1e-6)
    found = (gradients(loss, problem), gradients(value, problem), gradients(true, exact))
    for ours, theirs, wanted in zip(*found, strict=True):
        assert_no_worse(kind, ours, theirs, wanted, floor=1e-6)


def check_unit(objective):
    assert_matches(make_problem(softcap=12.0, frozen="weight,bias"), objective, Plan("unit"))


CHECKS = {
    "token-local logits": partial(check_from_logits, smooth_local),
    "coupled logits": partial(check_from_logits, coupled),
    "support, fused": partial(check_under_support, "fused", smooth_local),
    "support, hold": partial(check_under_support, "hold", coupled),
    "support, recompute": partial(check_under_support, "recompute", coupled),
    "unit": partial(check_unit, without_entropy),
    "unit of an entropy": partial(check_unit, coupled),
}


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_it_is_noticed_beside_the_trainable_head(mutation, name, monkeypatch):
    if name == "unit" and mutation in OF_ENTROPY:
        return  # its objective has no entropy
    CHECKS[name]()
    mutation(monkeypatch)
    with pytest.raises(AssertionError):
        CHECKS[name]()


SHARDED = [{"kind": "fused"}, {"kind": "hold", "lora": True}, {"kind": "recompute"}]


def run_planted():
    """Each case of SHARDED on this rank: as it is, then with each bug."""
    found = [[shard_cases.run(case, split=True) for case in SHARDED]]
    for mutation in MUTATIONS:
        with pytest.MonkeyPatch.context() as patch:
            mutation(patch)
            found.append([shard_cases.run(case, split=True) for case in SHARDED])
    return found


def test_it_is_noticed_on_ranks_that_split_the_vocabulary(tmp_path):
    """Against one process, within what test_shard.py allows."""
    first, _ = on_ranks(run_planted, 2, tmp_path)
    alone = [shard_cases.run(case, split=False) for case in SHARDED]
    for name, cases in zip(["no bug", *(m.__name__ for m in MUTATIONS)], first, strict=True):
        for case, ours, want in zip(SHARDED, cases, alone, strict=True):
            worst = max(
                relative_error(ours[value].nan_to_num(), want[value].nan_to_num())
                for value in ("loss", "logp", "entropy", "hidden")
            )
            assert (worst < 3e-6) == (name == "no bug"), (name, case, worst)


@pytest.mark.parametrize(("kind", "objective"), KINDS)
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_a_planted_bug_is_noticed(mutation, kind, objective, monkeypatch):
    problem = make_problem(softcap=12.0, vocabulary=700)
    assert_matches(problem, objective, Plan(kind))
    mutation(monkeypatch)
    with pytest.raises(AssertionError):
        assert_matches(problem, objective, Plan(kind))


@pytest.mark.parametrize("mutation", [no_softmax, three_percent_short, entropy_with_the_wrong_sign])
def test_it_is_noticed_in_half_precision(mutation, monkeypatch):
    problem = make_problem(dtype=torch.bfloat16)
    assert_matches(problem, smooth_local, Plan("fused"))
    mutation(monkeypatch)
    with pytest.raises(AssertionError):
        assert_matches(problem, smooth_local, Plan("fused"))
