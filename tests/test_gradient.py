"""The gradient of logits: single writers, sums by target, and storage taken over in place."""

import pytest
import torch
from check import assert_no_worse

from rollfuse.kernels.gradient import Targets, row_coefficients, row_gradient
from rollfuse.kernels.rows import Transform
from rollfuse.kernels.statistics import row_statistics, target_logp, target_shift

pytestmark = pytest.mark.kernels


def coefficients_of(logits, slot, column, dlogp, dentropy):
    transform = Transform(torch.ones(logits.shape[0]))
    stats = row_statistics(logits, transform)
    pre, shifted = target_shift(logits, stats, transform, (slot, slot, column))
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
    pre, shifted = target_shift(logits, stats, transform, (rows, slot, column))
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
