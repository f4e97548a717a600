"""linear_logp_entropy: values, gradients through either output, plans, sharing, bad input."""

import pytest
import torch
from check import assert_close, assert_no_worse
from head_cases import gradients, make_problem, reference

from rollfuse import Plan, linear_logp_entropy, linear_policy_loss

pytestmark = pytest.mark.kernels


def call(problem, **options):
    batch = problem.batch
    return linear_logp_entropy(
        problem.hidden, problem.head, batch.targets, rows=batch.rows,
        temperature=batch.temperature, **options,
    )  # fmt: skip


@pytest.mark.parametrize("n_pairs", [None, 40])
@pytest.mark.parametrize("frozen", ["", "weight,bias"])
@pytest.mark.parametrize("of", ["logp", "entropy", "both"])
def test_values_and_gradients(n_pairs, frozen, of):
    problem = make_problem(n_pairs=n_pairs, frozen=frozen, softcap=15.0)
    exact = problem.cast(torch.float64)
    upstream = torch.randn(2, len(problem.batch))
    upstream[0] *= of != "entropy"
    upstream[1] *= of != "logp"
    grads = []
    for p, found in ((problem, call(problem)), (exact, reference(exact))):
        grads.append(gradients((upstream * torch.stack(list(found))).sum(), p))
    plain = gradients((upstream * torch.stack(list(reference(problem)))).sum(), problem)
    found, want = call(problem), reference(exact)
    assert_close("logp", found.logp, want[0], atol=2e-5)
    assert_close("entropy", found.entropy, want[1], atol=2e-5)
    for ours, ref, true in zip(grads[0], plain, grads[1], strict=True):
        assert_no_worse(of, ours, ref, true, floor=5e-7)


def test_confident_logp_keeps_its_digits_and_its_gradient():
    """Margins of 5 to 25 nats: float32 log_softmax returns 0 with gradient 0 beyond 16."""
    margins = torch.arange(5.0, 26.0, 4.0)
    weight = torch.zeros(50, 1)
    weight[20] = 1.0
    hidden = margins.unsqueeze(1).requires_grad_()
    logp = linear_logp_entropy(hidden, weight, torch.full((len(margins),), 20)).logp
    exact_hidden = margins.double().requires_grad_()
    exact = -torch.log1p(49 * torch.exp(-exact_hidden))
    assert ((logp.double() - exact) / exact).abs().max() < 2e-6
    (ours,) = torch.autograd.grad(logp.sum(), hidden)
    (true,) = torch.autograd.grad(exact.sum(), exact_hidden)
    assert ((ours.squeeze(1).double() - true) / true).abs().max() < 5e-6


def test_minus_infinity_in_the_bias():
    problem = make_problem()
    bias = problem.bias.detach().clone()
    bias[::3] = -torch.inf
    problem = make_problem(bias=False).__class__(
        problem.hidden, problem.weight, bias, 1.3, None, problem.batch
    )
    problem.batch.targets[:] = problem.batch.targets // 3 * 3 + 1
    problem.batch.targets.clamp_(max=298)
    found = call(problem)
    z = (problem.hidden.double() @ problem.weight.double().t() + bias.double()) * 1.3
    logp = (z / problem.batch.temperature.double().unsqueeze(1)).log_softmax(1)
    want = logp.gather(1, problem.batch.targets.unsqueeze(1)).squeeze(1)
    assert_close("logp", found.logp, want.detach(), atol=2e-5)
    assert all(
        g.isfinite().all() for g in gradients(found.logp.sum() + found.entropy.sum(), problem)
    )


def test_budget_changes_the_chunks_and_not_the_result():
    problem = make_problem(n_rows=60)
    roomy = call(problem)
    report = linear_policy_loss(
        problem.hidden, problem.head, problem.batch, lambda logp, entropy, batch: logp
    ).diagnostics
    budget = report.peak_bytes - (report.chunk_rows - 17) * 301 * 4
    tight = call(problem, plan=Plan(budget_bytes=budget))
    torch.testing.assert_close(tight.logp, roomy.logp, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="at least"):
        call(problem, plan=Plan(budget_bytes=10_000))


def test_without_gradient_nothing_is_kept():
    problem = make_problem(frozen="hidden,weight,bias")
    assert not call(problem).logp.requires_grad
    live = make_problem()
    with torch.no_grad():
        assert not call(live).logp.requires_grad


def test_a_changed_input_is_noticed():
    problem = make_problem()
    loss = call(problem).logp.sum()
    with torch.no_grad():
        problem.weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_bad_arguments():
    problem = make_problem()
    hidden, head, targets = problem.hidden, problem.head, problem.batch.targets
    cases = [
        (ValueError, "fused", dict(plan=Plan("fused"))),
        (ValueError, "> 0", dict(temperature=0.0)),
        (ValueError, "> 0", dict(temperature=float("nan"))),
        (ValueError, "> 0", dict(temperature=torch.zeros(24))),
        (ValueError, "one a target", dict(temperature=torch.ones(3))),
        (ValueError, "one row a target", dict(rows=torch.zeros(3).long())),
        (TypeError, "int64", dict(rows=torch.zeros(24))),
    ]
    for kind, text, options in cases:
        with pytest.raises(kind, match=text):
            linear_logp_entropy(hidden, head, targets, **options)
    with pytest.raises(ValueError, match=r"\[0, 301\)"):
        linear_logp_entropy(hidden, head, targets + 301)
    with pytest.raises(ValueError, match="token ids"):
        linear_logp_entropy(hidden, head, targets - 400)
