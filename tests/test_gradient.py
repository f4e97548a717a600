"""The gradient of logits: single writers, sums by target, and storage taken over in place."""

import pytest
import torch
from check import assert_no_worse

from rollfuse.kernels.gradient import (
    Targets,
    row_coefficients,
    row_gradient,
    row_gradient_from_exponentials,
)
from rollfuse.kernels.held import n_held_blocks
from rollfuse.kernels.rows import Transform
from rollfuse.kernels.statistics import (
    Exponentials,
    row_statistics,
    target_logp,
    target_pre,
    target_shift,
)

pytestmark = pytest.mark.kernels


def coefficients_of(logits, slot, column, dlogp, dentropy):
    transform = Transform(torch.ones(logits.shape[0]))
    stats = row_statistics(logits, transform)
    pre = target_pre(logits, transform, slot, column)
    shifted = target_shift(pre, stats, transform, slot)
    logp = target_logp(stats, shifted, slot, column)
    one_per_slot = len(set(slot.tolist())) == len(slot)
    targets = Targets(slot, column, pre, logp, one_per_slot)
    return transform, stats, row_coefficients(stats, transform, targets, dlogp, dentropy)


def test_a_confident_row_with_one_target_many_times():
    """Leaves that share a token: 1 - p of 1e-9 must not drown in the sum of their derivatives."""
    logits = torch.zeros(1, 100)
    logits[0, 7] = 25.0
    slot, column = torch.zeros(5).long(), torch.full((5,), 7)
    dlogp = torch.tensor([0.3, -1.1, 0.7, 2.0, 0.1])
    args = coefficients_of(logits, slot, column, dlogp, None)
    found = row_gradient(logits, *args, torch.empty_like(logits))
    exact = logits.double().requires_grad_()
    # 1 - p of the target as the sum of the others: log_softmax loses it even in float64.
    others = (exact[0].logsumexp(0) - exact[0]).neg().exp().detach()
    want = -others * dlogp.double().sum()
    want[7] = others[torch.arange(100) != 7].sum() * dlogp.double().sum()
    assert_no_worse("row", found[0], found[0], want, slack=0.0, floor=1e-5)
    assert abs(found[0, 7] / want[7] - 1) < 1e-5


def test_rows_without_slot_are_left_alone():
    logits = torch.randn(4, 50)
    rows = torch.tensor([3, 1])
    transform = Transform(torch.ones(2))
    stats = row_statistics(logits, transform, rows)
    slot, column = torch.arange(2), torch.tensor([4, 5])
    pre = target_pre(logits, transform, rows, column)
    shifted = target_shift(pre, stats, transform, slot)
    targets = Targets(slot, column, pre, target_logp(stats, shifted, slot, column), True)
    coefficients = row_coefficients(stats, transform, targets, torch.ones(2), None)
    out = torch.full_like(logits, 7.0)
    row_gradient(logits, transform, stats, coefficients, out, rows)
    assert (out[[0, 2]] == 7.0).all()
    want = -logits[rows].softmax(1)
    want[slot, column] += 1
    torch.testing.assert_close(out[rows], want)


def test_dead_rows_get_no_gradient():
    logits = torch.zeros(2, 30)
    logits[0] = -torch.inf
    args = coefficients_of(
        logits, torch.arange(2), torch.tensor([3, 3]), torch.ones(2), torch.ones(2)
    )
    found = row_gradient(logits, *args, torch.empty_like(logits))
    assert not found[0].any() and found[1].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_gradient_takes_the_first_half_of_its_own_row(dtype):
    """Written over the float32 logits it is made from, past several blocks of the kernel."""
    logits = torch.randn(3, 5001) * 2
    slot, column = torch.arange(3), torch.tensor([0, 5000, 2500])
    dlogp, dentropy = torch.randn(3), torch.randn(3)
    args = coefficients_of(logits, slot, column, dlogp, dentropy)
    want = row_gradient(logits, *args, torch.empty_like(logits))
    workspace = logits.clone()
    out = workspace.view(dtype)[:, :5001]
    row_gradient(workspace, *args, out)
    step = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-10
    assert ((out.float() - want).abs() <= want.abs() * step + 1e-7).all()


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("rows", [None, [4, 0, 2]])
def test_from_exponentials_as_from_logits(entropy, rows):
    """In another order than they were kept in, past several blocks, with far columns among them."""
    logits = torch.randn(5, 5001) * 4
    logits[:, ::3] = -torch.inf
    logits[2, 4000] = 90.0
    transform = Transform(torch.rand(5) + 0.5)
    blocks = n_held_blocks(5001, logits.device)
    keep = Exponentials(torch.empty(5, 5001, dtype=torch.bfloat16), torch.empty(5, blocks))
    row_statistics(logits, transform, keep=keep)
    order = torch.arange(5) if rows is None else torch.tensor(rows)
    part, transform = logits[order], Transform(transform.factor[order])
    stats = row_statistics(part, transform)
    slot = torch.arange(len(order))
    column = slot * 300 + 1
    pre = target_pre(part, transform, slot, column)
    shifted = target_shift(pre, stats, transform, slot)
    targets = Targets(slot, column, pre, target_logp(stats, shifted, slot, column), True)
    dentropy = torch.randn(len(order)) if entropy else None
    coefficients = row_coefficients(stats, transform, targets, torch.randn(len(order)), dentropy)
    want = row_gradient(part, transform, stats, coefficients, torch.empty_like(part))
    keep = keep._replace(rows=None if rows is None else order)
    found = row_gradient_from_exponentials(
        keep, transform, stats, coefficients, torch.full_like(part, torch.nan)
    )
    # The error of an exponential is 2^-9 of it, and as much in nats where the entropy asks for it.
    for one, other in zip(found, want, strict=True):
        assert (one - other).norm() <= 4e-3 * other.norm()
    assert torch.equal(found[slot, column], want[slot, column])
