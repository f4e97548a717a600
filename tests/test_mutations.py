"""The head's tolerances: the bugs this field keeps making are planted and must be noticed."""

import pytest
import torch
from head_cases import assert_matches, coupled, make_problem, smooth_local

from rollfuse import Plan
from rollfuse.kernels import gemm, head_pass
from rollfuse.kernels.head import BareHead

KINDS = [("fused", smooth_local), ("hold", coupled), ("recompute", coupled)]


def no_softmax(patch):
    """The gradient of the normaliser is dropped: columns nobody targets get none."""
    right = head_pass.row_coefficients

    def wrong(*arguments):
        found = right(*arguments)
        return found._replace(alpha=torch.zeros_like(found.alpha))

    patch.setattr(head_pass, "row_coefficients", wrong)


def three_percent_short(patch):
    right = head_pass.row_coefficients
    patch.setattr(head_pass, "row_coefficients", lambda *a: right(*a).times(torch.tensor(0.97)))


def target_three_percent_short(patch):
    right = head_pass.row_coefficients

    def wrong(*arguments):
        found = right(*arguments)
        return found._replace(value=0.97 * found.value)

    patch.setattr(head_pass, "row_coefficients", wrong)


def no_temperature(patch):
    right = BareHead.transform

    def wrong(self, temperature, *rest, **options):
        return right(self, torch.ones_like(temperature), *rest, **options)

    patch.setattr(BareHead, "transform", wrong)


def temperature_lost_in_the_gradient(patch):
    right = head_pass.row_coefficients

    def wrong(stats, transform, *rest):
        return right(stats, transform._replace(factor=torch.ones_like(transform.factor)), *rest)

    patch.setattr(head_pass, "row_coefficients", wrong)


def logits_in_bfloat16(patch):
    right = gemm.project

    def wrong(x, weight, operand, out):
        right(x, weight, operand, out)
        out.copy_(out.bfloat16())

    patch.setattr(gemm, "project", wrong)


def entropy_with_the_wrong_sign(patch):
    right = head_pass.row_coefficients

    def wrong(stats, transform, targets, dlogp, dentropy):
        return right(stats, transform, targets, dlogp, None if dentropy is None else -dentropy)

    patch.setattr(head_pass, "row_coefficients", wrong)


def entropy_without_gradient(patch):
    right = head_pass.row_coefficients
    patch.setattr(head_pass, "row_coefficients", lambda s, t, p, d, e: right(s, t, p, d, None))


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
