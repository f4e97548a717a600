"""logp_entropy from logits that exist."""

import pytest
import torch
from check import assert_close, assert_no_worse

from rollfuse import logp_entropy

pytestmark = pytest.mark.kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_matches_log_softmax_with_shared_rows_and_temperatures(dtype):
    logits = (torch.randn(6, 2100) * 3).to(dtype).requires_grad_()
    rows = torch.tensor([5, 0, 0, 0, 2, 5])
    targets = torch.tensor([7, 2099, 2099, 4, 0, 8])
    temperature = torch.tensor([1.0, 0.5, 0.5, 0.5, 2.0, 1.5])  # row 5 at two temperatures
    found = logp_entropy(logits, targets, rows=rows, temperature=temperature)
    exact = logits.detach().double().requires_grad_()
    full = (exact[rows] / temperature.double().unsqueeze(1)).log_softmax(1)
    want = full.gather(1, targets.unsqueeze(1)).squeeze(1), -(full.exp() * full).sum(1)
    atol = 1e-12 if dtype == torch.float64 else 4e-6
    assert_close("logp", found.logp, want[0].detach(), atol=atol)
    assert_close("entropy", found.entropy, want[1].detach(), atol=atol)
    upstream = torch.randn(2, 6)
    (ours,) = torch.autograd.grad((upstream * torch.stack(list(found))).sum(), logits)
    (true,) = torch.autograd.grad((upstream * torch.stack(list(want))).sum(), exact)
    floor = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float64: 1e-13}[dtype]
    assert ours.dtype == dtype
    assert_no_worse("dlogits", ours, ours, true, slack=0.0, floor=floor)
    assert not ours[1].any() and not ours[3].any()


def test_the_gradient_of_a_row_sums_to_zero():
    logits = (torch.randn(9, 500) * 10).requires_grad_()
    found = logp_entropy(logits, torch.randint(500, (9,)))
    (g,) = torch.autograd.grad((found.logp * 2 + found.entropy).sum(), logits)
    assert g.sum(1).abs().max() < 1e-5 and g.abs().max() > 0.1


def test_strided_and_batched_logits():
    base = torch.randn(40, 2, 3)
    logits = base.permute(1, 2, 0)  # (2, 3, 40), columns far apart
    targets = torch.randint(40, (6,))
    found = logp_entropy(logits, targets)
    want = logits.reshape(6, 40).log_softmax(1).gather(1, targets.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(found.logp, want)
    columns = torch.randn(40, 6).t().requires_grad_()
    exact = columns.detach().double().requires_grad_()
    (ours,) = torch.autograd.grad(logp_entropy(columns, targets).logp.sum(), columns)
    picked = exact.log_softmax(1)[torch.arange(6), targets]
    (true,) = torch.autograd.grad(picked.sum(), exact)
    assert_no_worse("strided gradient", ours, ours, true, slack=0.0, floor=1e-6)
    wide = torch.randn(6, 80)[:, :40]  # rows further apart than they are long
    torch.testing.assert_close(
        logp_entropy(wide, targets).logp, wide.log_softmax(1)[torch.arange(6), targets]
    )


def test_bad_arguments():
    logits, targets = torch.randn(4, 10), torch.randint(10, (4,))
    for kind, text, arguments in [
        (ValueError, r"\[0, 10\)", (logits, targets + 10)),
        (ValueError, "one a pair", (logits, targets[:2])),
        (TypeError, "int64", (logits, targets.float())),
        (TypeError, "float32", (logits.long(), targets)),
        (ValueError, r"\(R, V\)", (logits[0], targets)),
    ]:
        with pytest.raises(kind, match=text):
            logp_entropy(*arguments)


def test_autocast_changes_nothing():
    logits = torch.randn(5, 400) * 3
    targets = torch.randint(400, (5,))
    plain = logp_entropy(logits, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = logp_entropy(logits, targets)
    assert torch.equal(plain.logp, inside.logp) and torch.equal(plain.entropy, inside.entropy)
