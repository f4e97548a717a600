"""Replaying the support a sampler cut: values and gradients of the truncated distribution."""

from dataclasses import replace

import pytest
import torch
from check import assert_close, assert_no_worse
from head_cases import coupled, gradients, make_problem, smooth, smooth_local

from rollfuse import Plan, TokenBatch, linear_policy_loss, logp_entropy, policy_loss
from rollfuse.kernels.rows import Transform
from rollfuse.kernels.statistics import row_statistics

pytestmark = pytest.mark.kernels


def scores(problem):
    """(P, V) logits at the pairs' temperatures."""
    z = torch.nn.functional.linear(problem.hidden, problem.weight, problem.bias) * problem.scale
    if problem.softcap is not None:
        z = problem.softcap * torch.tanh(z / problem.softcap)
    batch = problem.batch
    z = z if batch.rows is None else z[batch.rows]
    return z / batch.temperature.to(z.dtype)[:, None]


def with_support(problem):
    """Borders half way between two tokens, the first to the 30th; and two special ones."""
    with torch.no_grad():
        best = scores(problem.cast(torch.float64)).topk(31).values
    k = torch.arange(len(best)) % 30
    border = (best.gather(1, k[:, None]) + best.gather(1, k[:, None] + 1)).squeeze(1) / 2
    support = (best[:, 0] - border).float()
    support[0], support[1] = 0.0, torch.inf  # the most likely token alone; everything
    return replace(problem, batch=replace(problem.batch, support=support))


def truncated(z, targets, support):
    """(logp, entropy) of rows z (P, V) over the tokens in the support and the target itself."""
    border = support * (1 + 1e-5) + 1e-6  # a token on it stays, however it was rounded
    stays = z >= z.max(1, keepdim=True).values - border[:, None]
    stays |= torch.nn.functional.one_hot(targets, z.shape[1]).bool()
    logp = torch.where(stays, z, -1e4).log_softmax(1)  # -inf times 0 would spoil the gradient
    entropy = -(logp.exp() * logp).sum(1)
    return logp.gather(1, targets[:, None]).squeeze(1), entropy


def reference(problem, objective):
    batch, z = problem.batch, scores(problem)
    logp, entropy = truncated(z, batch.targets, batch.support.to(z.dtype))
    keep = batch.weights.nonzero().squeeze(1)
    part = batch.keep(keep)
    loss = (part.weights * objective(logp[keep], entropy[keep], part)).sum()
    return loss, logp, entropy


@pytest.mark.parametrize("n_pairs", [None, 40])
@pytest.mark.parametrize("softcap", [None, 9.0])
@pytest.mark.parametrize(
    ("kind", "objective"), [("fused", smooth_local), ("hold", coupled), ("recompute", coupled)]
)
def test_values_and_gradients(n_pairs, softcap, kind, objective):
    problem = with_support(make_problem(n_pairs=n_pairs, softcap=softcap, vocabulary=2100))
    exact = problem.cast(torch.float64)
    plain = smooth if objective is smooth_local else objective
    result = linear_policy_loss(
        problem.hidden, problem.head, problem.batch, objective, plan=Plan(kind)
    )
    loss, logp, entropy = reference(exact, plain)
    live = result.computed
    assert_close("logp", result.logp[live], logp[live], atol=2e-5)
    assert_close("entropy", result.entropy[live], entropy[live], atol=2e-5)
    ours, want = gradients(result.loss, problem), gradients(loss, exact)
    for a, b, c in zip(ours, gradients(reference(problem, plain)[0], problem), want, strict=True):
        assert_no_worse(kind, a, b, c, floor=1e-6)


def test_unit_gradients():
    problem = with_support(make_problem(frozen="weight,bias"))

    def linear(logp, entropy, batch):
        return -batch.advantages * logp * (1 + logp.mean())

    result = linear_policy_loss(
        problem.hidden, problem.head, problem.batch, linear, plan=Plan("unit")
    )
    exact = problem.cast(torch.float64)
    (ours,), (want,) = (
        gradients(loss, p)
        for loss, p in ((result.loss, problem), (reference(exact, linear)[0], exact))
    )
    assert_no_worse("unit", ours, want.float(), want, floor=1e-6)


@pytest.mark.parametrize("objective", [smooth_local, coupled])
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_logits(objective, overwrite, dtype):
    problem = with_support(make_problem(vocabulary=1500, bias=False, scale=1.0))
    batch = problem.batch
    source = (problem.hidden @ problem.weight.t()).detach().to(dtype).requires_grad_()
    result = policy_loss(source * 1.0, batch, objective, overwrite_logits=overwrite)
    (ours,) = torch.autograd.grad(result.loss, source)
    exact = source.detach().double().requires_grad_()
    logp, entropy = truncated(
        exact / batch.temperature.double()[:, None], batch.targets, batch.support.double()
    )
    live = result.computed
    plain = smooth if objective is smooth_local else objective
    part = batch.keep(live.nonzero().squeeze(1))
    loss = (part.weights * plain(logp[live], entropy[live], part)).sum()
    (want,) = torch.autograd.grad(loss, exact)
    assert_close("logp", result.logp[live], logp[live], atol=2e-5)
    assert_close("entropy", result.entropy[live], entropy[live], atol=2e-5)
    floor = 1e-6 if dtype == torch.float32 else 4e-3
    assert_no_worse("dlogits", ours, want.float(), want, floor=floor)


def test_no_cut_is_no_support():
    problem = make_problem()
    uncut = replace(problem.batch, support=torch.full((len(problem.batch),), torch.inf))
    for objective in (smooth_local, coupled):
        a = linear_policy_loss(problem.hidden, problem.head, problem.batch, objective)
        b = linear_policy_loss(problem.hidden, problem.head, uncut, objective)
        torch.testing.assert_close(a.loss, b.loss)
        torch.testing.assert_close(a.logp, b.logp, equal_nan=True)


def test_rows_cut_to_nothing_but_the_target():
    inf = torch.inf
    z = torch.tensor([[3.0, 1.0, 0.0], [-inf, -inf, -inf], [0.0, -inf, 1.0]])
    batch = TokenBatch(
        torch.tensor([0, 1, 1]), torch.ones(3), advantages=torch.ones(3), support=torch.zeros(3)
    )
    logits = z.requires_grad_()
    result = policy_loss(logits, batch, lambda logp, entropy, batch: logp.exp() + entropy)
    assert result.logp.tolist() == [0.0, -torch.inf, -torch.inf]
    assert result.entropy.tolist() == [0.0, 0.0, 0.0]
    (g,) = torch.autograd.grad(result.loss, logits)
    assert not g.any()


@pytest.mark.parametrize("softcap", [None, 9.0])
def test_a_target_on_the_border_counts_once(softcap):
    """A sampler may store the distance of the last token it kept, which may be the target."""
    problem = make_problem(softcap=softcap, bias=False, n_rows=400)
    z = scores(problem).detach()
    picked = z.gather(1, problem.batch.targets[:, None]).squeeze(1)
    batch = replace(problem.batch, support=z.max(1).values - picked)
    cut = replace(problem, batch=batch)
    result = linear_policy_loss(cut.hidden, cut.head, batch, coupled)
    live = result.computed
    _, logp, entropy = reference(cut.cast(torch.float64), coupled)
    assert_close("logp", result.logp[live], logp[live], atol=5e-5)
    assert_close("entropy", result.entropy[live], entropy[live], atol=5e-5)


def test_statistics_leave_out_what_is_cut():
    z = torch.tensor([[0.0, 2.0, 1.0, -5.0]])
    stats = row_statistics(z, Transform(torch.ones(1), reach=torch.tensor([1.5])))
    assert_close("rest", stats.rest, torch.tensor([-1.0]).exp(), atol=1e-6)
    assert_close("spread", stats.spread, torch.tensor([-1.0]).exp(), atol=1e-6)


def test_ratios_compare_like_with_like():
    """Under the policy that sampled them, min-p tokens have a ratio of 1 only with the replay."""
    logits = torch.randn(200, 50) * 3
    support = torch.full((200,), 1.2)
    stays = logits >= logits.max(1, keepdim=True).values - 1.2
    drawn = torch.where(stays, logits, -torch.inf).softmax(1).multinomial(1).squeeze(1)
    old = torch.where(stays, logits, -torch.inf).log_softmax(1).gather(1, drawn[:, None])
    batch = TokenBatch(
        drawn, torch.ones(200), logp_old=old.squeeze(1), advantages=torch.ones(200), support=support
    )
    ratio = policy_loss(logits, batch, coupled).logp - batch.logp_old
    assert ratio.abs().max() < 1e-5
    assert (logp_entropy(logits, drawn).logp - batch.logp_old).abs().mean() > 0.1


def bad():
    problem = make_problem(dtype=torch.bfloat16)
    batch = replace(problem.batch, support=torch.ones(len(problem.batch)))
    n = len(batch)

    def loss(**options):
        return linear_policy_loss(problem.hidden, problem.head, batch, coupled, **options)

    compiled = torch.compile(lambda h: loss(), backend="eager", fullgraph=True)
    return [
        ("nats >= 0", lambda: replace(batch, support=torch.full((n,), -1.0))),
        ("nats >= 0", lambda: replace(batch, support=torch.full((n,), torch.nan))),
        ("one value a pair", lambda: replace(batch, support=torch.ones(n + 1))),
        ("use 'recompute'", lambda: loss(plan=Plan("hold"))),
        ("None under torch.compile", lambda: compiled(problem.hidden)),
    ]


@pytest.mark.parametrize(("message", "make"), bad())
def test_what_is_refused(message, make):
    with pytest.raises(Exception, match=message):
        make()


def test_half_operands_recompute():
    problem = with_support(make_problem(dtype=torch.bfloat16))
    result = linear_policy_loss(problem.hidden, problem.head, problem.batch, coupled)
    assert result.diagnostics.kind == "recompute"
    loss, logp, _ = reference(problem.cast(torch.float64), coupled)
    live = result.computed
    near = (result.logp[live] - logp[live]).abs()  # a token at the border may fall either way
    assert near.median() < 1e-5
