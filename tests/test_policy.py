"""linear_policy_loss and policy_loss against plain PyTorch in float64."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from check import assert_close, assert_no_worse
from head_cases import (
    HALF_SLACK,
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

from rollfuse import (
    Head,
    Plan,
    TokenBatch,
    explain,
    linear_logp_entropy,
    linear_policy_loss,
    logp_entropy,
    policy_loss,
    token_local,
)
from rollfuse.kernels import checks, gemm, plan
from rollfuse.kernels.dispatch import backend

pytestmark = pytest.mark.kernels

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("softcap", [None, 8.0])
@pytest.mark.parametrize("n_pairs", [None, 40])
def test_fused(dtype, softcap, n_pairs):
    problem = make_problem(dtype=dtype, softcap=softcap, n_pairs=n_pairs)
    assert_matches(problem, smooth_local, Plan("fused"), slack=HALF_SLACK)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n_pairs", [None, 40])
@pytest.mark.parametrize("objective", [coupled, without_entropy])
def test_hold(dtype, n_pairs, objective, monkeypatch):
    """All rows held, in chunks of odd size.

    A BLAS sums products of so few rows in longer chains than those of all: up to 4 times the error.
    """
    monkeypatch.setitem(plan._CHUNK_ROWS, "cpu", 9)
    problem = make_problem(dtype=dtype, n_pairs=n_pairs, vocabulary=4100, sharpness=2.0)
    slack = 4.0 if dtype == torch.float32 else HALF_SLACK
    assert_matches(problem, objective, Plan("hold"), slack=slack)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n_pairs", [None, 60])
def test_hold_what_fits_and_leave_out_what_has_no_derivative(dtype, n_pairs, monkeypatch):
    """Some rows held, some recomputed, and of both those whose derivatives are 0 left out."""
    monkeypatch.setitem(plan._CHUNK_ROWS, "cpu", 8)
    problem = make_problem(n_rows=40, dtype=dtype, n_pairs=n_pairs, sharpness=2.0)
    arguments = (problem.hidden, problem.head, problem.batch, top_entropy)
    whole = explain(*arguments, Plan("hold"))
    nothing = explain(*arguments, Plan("recompute"))
    assert whole.held_slots == whole.slots
    request = Plan("hold", (whole.peak_bytes + nothing.peak_bytes) // 2)
    report = explain(*arguments, request)
    assert 8 < report.held_slots < report.slots - 8 and report.peak_bytes <= request.budget_bytes
    assert nothing.flops > report.flops > whole.flops
    seen = rows_of_products(monkeypatch, "accumulate_weight_gradient")
    slack = 4.0 if dtype == torch.float32 else HALF_SLACK  # as in test_hold
    assert_matches(problem, top_entropy, request, slack=slack)
    assert sum(seen) < 0.8 * report.slots


def test_the_plan_tells_which_logits_are_made_twice(monkeypatch):
    monkeypatch.setitem(plan._CHUNK_ROWS, "cpu", 8)
    problem = make_problem(n_rows=40)
    arguments = (problem.hidden, problem.head, problem.batch, coupled)
    roomy = explain(*arguments, Plan("hold")).peak_bytes
    few = explain(*arguments, Plan("recompute")).peak_bytes
    for budget in (few + 100, (few + roomy) // 2, roomy):
        report = explain(*arguments, Plan("hold", budget))
        seen = rows_of_products(monkeypatch, "project")
        result = linear_policy_loss(*arguments, plan=Plan("hold", budget))
        gradients(result.loss, problem)
        assert sum(seen) == report.slots + (report.slots - report.held_slots)
    for budget in range(few, roomy + 1, 97):
        assert explain(*arguments, Plan("hold", budget)).peak_bytes <= budget
    with torch.no_grad():
        assert explain(*arguments, Plan("hold")).held_slots == 0


def top_entropy(logp, entropy, batch):
    """Coupled through the quantile; the pairs below it have no derivative."""
    above = entropy.detach() >= entropy.detach().median()
    return torch.where(above, smooth(logp, entropy, batch), 0.0)


def rows_of_products(monkeypatch, name):
    """The number of rows that enter each product `name` of the head, as they are made."""
    seen, real = [], getattr(gemm, name)

    def counting(rows, *arguments, **options):
        seen.append(len(rows))
        return real(rows, *arguments, **options)

    monkeypatch.setattr(gemm, name, counting)
    return seen


def test_no_pair_with_a_derivative(monkeypatch):
    """Every pair outside the objective's support: zero gradients, and no product made."""
    problem = make_problem()
    seen = rows_of_products(monkeypatch, "accumulate_weight_gradient")
    for kind in ("hold", "recompute"):
        result = linear_policy_loss(
            problem.hidden, problem.head, problem.batch,
            lambda logp, entropy, batch: 0.0 * logp.detach() + (logp * 0.0), plan=Plan(kind),
        )  # fmt: skip
        for found in gradients(result.loss, problem):
            assert not found.any()
    assert seen == []


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("few", [False, True])
def test_flat_rows_under_an_entropy_are_not_taken_from_exponentials(dtype, few):
    """Logits of a deviation of 0.03 nats: bfloat16 exponentials would be off by several percent.

    Flat over all columns, or over a few that a bias leaves.
    """
    problem = make_problem(dtype=dtype, sharpness=0.03, bias=few, scale=1.0, frozen="bias")
    if few:
        problem.bias[:] = torch.where(torch.arange(301) % 8 == 0, 0.0, -60.0)
        problem.batch.targets[:] = problem.batch.targets // 8 * 8

    def bonus(logp, entropy, batch):
        return -entropy * (1.0 + 0.1 * entropy.detach().mean())

    assert_matches(problem, bonus, Plan("hold"), slack=HALF_SLACK)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("objective", [coupled, top_entropy])
def test_hold_serves_a_kept_graph_twice(dtype, objective):
    problem = make_problem(dtype=dtype)
    result = linear_policy_loss(
        problem.hidden, problem.head, problem.batch, objective, plan=Plan("hold")
    )
    first = torch.autograd.grad(result.loss, problem.leaves, retain_graph=True)
    second = torch.autograd.grad(result.loss, problem.leaves)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_hold_refuses_a_softcap_under_half_operands():
    problem = make_problem(dtype=torch.bfloat16, softcap=20.0)
    arguments = (problem.hidden, problem.head, problem.batch, coupled)
    with pytest.raises(ValueError, match="half operands under a softcap"):
        linear_policy_loss(*arguments, plan=Plan("hold"))
    report = explain(*arguments)
    assert report.kind == "recompute" and "softcap" in report.reason
    assert_matches(make_problem(softcap=20.0), coupled, Plan("hold"))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n_pairs", [None, 40])
def test_recompute(dtype, n_pairs):
    problem = make_problem(dtype=dtype, n_pairs=n_pairs, softcap=20.0)
    assert_matches(problem, coupled, Plan("recompute"), slack=HALF_SLACK)


@pytest.mark.parametrize("objective", [coupled, without_entropy])
@pytest.mark.parametrize("n_pairs", [None, 40])
def test_unit(objective, n_pairs):
    problem = make_problem(frozen="weight,bias", n_pairs=n_pairs)
    assert_matches(problem, objective, Plan("unit"))
    assert (
        linear_policy_loss(problem.hidden, problem.head, problem.batch, objective).diagnostics.kind
        == "unit"
    )


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias", "hidden,bias", "weight,bias"])
@pytest.mark.parametrize("kind", ["fused", "hold", "recompute"])
def test_frozen_parts(frozen, kind):
    problem = make_problem(frozen=frozen)
    objective = smooth_local if kind == "fused" else coupled
    result = linear_policy_loss(
        problem.hidden, problem.head, problem.batch, objective, plan=Plan(kind)
    )
    exact = problem.cast(torch.float64)
    truth = gradients(reference_loss(exact, objective)[0], exact)
    for ours, true in zip(gradients(result.loss, problem), truth, strict=True):
        assert_no_worse(frozen, ours, ours, true, floor=1e-5, slack=0.0)


# Sizes around the chunk and slab borders: a single row, one more than a chunk, an odd vocabulary
# past the kernels' largest block.
@pytest.mark.parametrize("n_rows,vocabulary", [(1, 5), (17, 2049), (33, 1), (50, 4100)])
def test_shapes_and_chunks(n_rows, vocabulary, monkeypatch):
    monkeypatch.setitem(plan._CHUNK_ROWS, "cpu", 16)
    problem = make_problem(n_rows=n_rows, vocabulary=vocabulary, sharpness=2.0)
    if vocabulary > 1:
        assert_matches(problem, smooth_local, Plan())
        assert_matches(problem, coupled, Plan())
    else:
        result = linear_policy_loss(problem.hidden, problem.head, problem.batch, smooth_local)
        assert all(not g.any() for g in gradients(result.loss, problem))
        assert (result.logp[result.computed] == 0).all()


def test_float64_gradients_by_finite_differences():
    problem = make_problem(n_rows=5, width=3, vocabulary=7, dtype=torch.float64, softcap=4.0)
    plans = [(smooth_local, Plan("fused")), (coupled, Plan("recompute")), (coupled, Plan("hold"))]
    for objective, request in plans:

        def loss(hidden, weight, bias, objective=objective, plan=request):
            head = Head(weight, bias, problem.scale, problem.softcap)
            return linear_policy_loss(hidden, head, problem.batch, objective, plan=plan).loss

        assert torch.autograd.gradcheck(loss, problem.leaves, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("n_pairs", [None, 40])
def test_from_logits(dtype, overwrite, n_pairs):
    problem = make_problem(n_pairs=n_pairs)
    if overwrite and n_pairs:  # a row at several temperatures is refused
        problem = dataclasses.replace(
            problem, batch=dataclasses.replace(problem.batch, temperature=torch.full((40,), 0.8))
        )
    start = torch.randn(24, 301).to(dtype)
    results = []
    for kind in ("ours", "plain", "truth"):
        logits = start.to(torch.float64 if kind == "truth" else dtype).requires_grad_()
        identity = Problem(
            logits, torch.eye(301, dtype=logits.dtype), None, 1.0, None, problem.batch
        )
        if kind == "ours":
            result = policy_loss(
                logits * 1.0, problem.batch, smooth_local, overwrite_logits=overwrite
            )
            loss = result.loss
        else:
            loss = reference_loss(identity, smooth)[0]
        results.append((loss, torch.autograd.grad(loss, logits)[0]))
    (ours, g), (plain, g_plain), (true, g_true) = results
    assert_no_worse("loss", ours, plain, true, floor=1e-6)
    floor = {torch.bfloat16: 2e-3, torch.float16: 4e-4}.get(dtype, 1e-6)
    assert_no_worse("dlogits", g, g_plain, g_true, slack=HALF_SLACK, floor=floor)
    touched = problem.batch.rows if n_pairs else torch.arange(24)
    idle = torch.ones(24, dtype=torch.bool)
    idle[touched[problem.batch.weights != 0]] = False
    assert not g[idle].any()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("objective", [smooth_local, coupled])
def test_from_logits_the_upstream_factor_counts(objective, overwrite):
    batch = make_problem().batch
    source = torch.randn(24, 301, requires_grad=True)

    def loss():
        return policy_loss(source * 1.0, batch, objective, overwrite_logits=overwrite).loss

    (once,) = torch.autograd.grad(loss(), source)
    assert once.any()
    (thrice,) = torch.autograd.grad(3.0 * loss(), source)
    torch.testing.assert_close(thrice, 3.0 * once)


@pytest.mark.parametrize("n_pairs", [None, 40])
@pytest.mark.parametrize("overwrite", [False, True])
def test_from_logits_in_several_chunks(n_pairs, overwrite, monkeypatch):
    """Shared rows and selected pairs, whatever number of rows a chunk has."""
    problem = make_problem(n_pairs=n_pairs)
    batch = dataclasses.replace(problem.batch, temperature=0.8)
    source = torch.randn(24, 301, requires_grad=True)
    found = []
    for rows in (24, 5, 1):
        monkeypatch.setitem(plan._CACHE_BYTES, "cpu", rows * 301 * 4)
        logits = source * 1.0
        result = policy_loss(logits, batch, smooth_local, overwrite_logits=overwrite)
        assert (result.diagnostics.n_chunks > 1) == (rows < 24)
        found.append((result.loss, result.logp, *torch.autograd.grad(result.loss, source)))
    for one, other in itertools.product(found[:1], found[1:]):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_small_float16_gradients_wait_for_the_loss_scale():
    """Of logits they are as small as a weight: rounded before the upstream factor they are 0."""
    source = torch.randn(24, 301, dtype=torch.float16, requires_grad=True)
    problem = make_problem()
    small = dataclasses.replace(problem.batch, weights=problem.batch.weights * 2.0**-24)
    for overwrite in (False, True):
        found = []
        for batch, factor in ((small, 2.0**24), (problem.batch, 1.0)):
            loss = policy_loss(source * 1.0, batch, smooth_local, overwrite_logits=overwrite).loss
            found.append(torch.autograd.grad(loss * factor, source)[0])
        assert found[1].any()
        torch.testing.assert_close(*found)


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_from_logits_a_kept_graph_is_walked_twice(factor):
    batch = make_problem().batch
    source = torch.randn(24, 301, requires_grad=True)
    logits = source * 1.0
    loss = factor * policy_loss(logits, batch, smooth_local).loss
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    kept = first.clone()
    first.zero_()  # what was handed out belongs to the caller
    (second,) = torch.autograd.grad(loss, logits)
    assert torch.equal(second, kept)


def test_logits_that_cannot_be_overwritten_are_refused():
    problem = make_problem(n_pairs=40)
    source = torch.randn(24, 301, requires_grad=True)
    with pytest.raises(ValueError, match="one temperature and support a row, got several"):
        policy_loss(source * 1.0, problem.batch, smooth_local, overwrite_logits=True)
    shifted = (torch.randn(4, 7, 301, requires_grad=True) * 1.0)[:, :-1]
    plain = make_problem()
    for logits in (shifted, (torch.randn(301, 24, requires_grad=True) * 1.0).t()):
        with pytest.raises(ValueError, match="rows in memory, got ones that had to be copied"):
            policy_loss(logits, plain.batch, smooth_local, overwrite_logits=True)
        policy_loss(logits, plain.batch, smooth_local).loss.backward()


@pytest.mark.parametrize(
    ("objective", "dtype"), [(smooth_local, torch.float16), (coupled, torch.float32)]
)
def test_overwritten_logits_serve_one_backward(objective, dtype):
    problem = make_problem()
    source = torch.randn(24, 301, dtype=dtype, requires_grad=True)
    loss = policy_loss(source * 1.0, problem.batch, objective, overwrite_logits=True).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_logits_whose_rows_share_memory_are_not_overwritten():
    """Repeated by expand, or windows of one vector: a row's gradient would fall into others."""
    problem = make_problem()
    one = torch.randn(1, 301, requires_grad=True)
    vector = torch.randn(324, requires_grad=True)
    for logits in (
        (one * 1.0).expand(24, 301),
        (one * 1.0).expand(4, 6, 301),
        (vector * 1.0).as_strided((24, 301), (1, 1)),
    ):
        for objective in (smooth_local, smooth):
            with pytest.raises(ValueError, match="rows of their own in memory, got rows that over"):
                policy_loss(logits, problem.batch, objective, overwrite_logits=True)
            policy_loss(logits, problem.batch, objective).loss.backward(retain_graph=True)
    wider = (torch.randn(24, 320, requires_grad=True) * 1.0)[:, :301]
    policy_loss(wider, problem.batch, smooth_local, overwrite_logits=True).loss.backward()


@pytest.mark.parametrize("vocabulary", [1, 301, 5000])
def test_a_nan_among_the_logits_reaches_the_loss(vocabulary):
    batch = TokenBatch(torch.zeros(2).long(), torch.ones(2), torch.ones(2), torch.ones(2))
    for where in (slice(None), 0, vocabulary - 1):
        source = torch.randn(2, vocabulary)
        source[1, where] = torch.nan
        source.requires_grad_()
        result = policy_loss(source * 1.0, batch, smooth_local)
        result.loss.backward()
        assert result.loss.isnan()
        assert result.logp.isnan().tolist() == result.entropy.isnan().tolist() == [False, True]
        assert source.grad[0].isfinite().all() and source.grad[1].isnan().all()


@pytest.mark.parametrize("what", ["weights", "advantages"])
@pytest.mark.parametrize("n_pairs", [None, 40])
def test_scores_of_a_batch_without_any_gradient(what, n_pairs):
    problem = make_problem(n_pairs=n_pairs)
    nothing = torch.zeros(len(problem.batch))
    batch = dataclasses.replace(problem.batch, **{what: nothing})
    objective = token_local(active=lambda batch: batch.advantages != 0)(
        lambda logp, entropy, batch: -batch.advantages * logp
    )
    result = linear_policy_loss(
        problem.hidden, problem.head, batch, objective, plan=Plan(dropped="score")
    )
    scored = linear_policy_loss(problem.hidden, problem.head, problem.batch, coupled).logp
    live = problem.batch.weights != 0
    assert result.computed.all()
    torch.testing.assert_close(result.logp[live], scored[live])
    assert not any(g.any() for g in gradients(result.loss, problem))


def test_inactive_rows_are_never_computed(monkeypatch):
    problem = make_problem()
    active = token_local(active=lambda batch: batch.advantages > 0)(
        lambda logp, entropy, batch: -batch.advantages.clamp_min(0) * logp
    )
    seen = []
    right = gemm.project
    monkeypatch.setattr(
        gemm, "project", lambda x, *rest: (seen.append(x.shape[0]), right(x, *rest))[1]
    )
    result = linear_policy_loss(problem.hidden, problem.head, problem.batch, active)
    expected = (problem.batch.advantages > 0) & (problem.batch.weights != 0)
    assert sum(seen) == int(expected.sum()) == result.diagnostics.active_pairs
    assert torch.equal(result.computed, expected)
    grads = gradients(result.loss, problem)
    exact = problem.cast(torch.float64)
    truth = gradients(reference_loss(exact, active)[0], exact)
    for ours, true in zip(grads, truth, strict=True):
        assert_no_worse("gradient", ours, ours, true, floor=1e-5, slack=0.0)
    scored = linear_policy_loss(
        problem.hidden, problem.head, problem.batch, active, plan=Plan(dropped="score")
    )
    logp, entropy = reference_loss(exact, active)[1:]
    assert scored.computed.all()
    assert_close("logp", scored.logp, logp.detach(), atol=2e-5)
    assert_close("entropy", scored.entropy, entropy.detach(), atol=2e-5)


@pytest.mark.parametrize("objective", [smooth_local, coupled])
def test_nothing_active(objective):
    problem = make_problem()
    batch = TokenBatch(
        targets=problem.batch.targets,
        weights=torch.zeros(24),
        advantages=problem.batch.advantages,
        logp_old=problem.batch.logp_old,
    )
    if objective is coupled:
        objective = lambda logp, entropy, batch: logp * logp.sum()  # noqa: E731
    result = linear_policy_loss(problem.hidden, problem.head, batch, objective)
    assert result.loss == 0 and not result.computed.any()
    assert all(not g.any() for g in gradients(result.loss, problem))


@pytest.mark.parametrize("objective", [smooth_local, lambda logp, entropy, batch: logp])
def test_empty_batch(objective):
    problem = make_problem()
    none = torch.empty(0)
    batch = TokenBatch(
        targets=none.long(), weights=none, rows=none.long(), advantages=none, logp_old=none
    )
    result = linear_policy_loss(problem.hidden, problem.head, batch, objective)
    assert result.loss == 0 and result.logp.shape == (0,)
    assert all(not g.any() for g in gradients(result.loss, problem))
    result = policy_loss(torch.randn(3, 5, requires_grad=True), batch, objective)
    assert result.loss == 0


def test_tied_embeddings_and_a_shared_graph():
    """The weight is embedding and head at once, and hidden depends on it."""
    problem = make_problem(bias=False, n_rows=24)
    ids = torch.randint(301, (24,))
    grads = []
    for dtype in (torch.float32, torch.float64):
        weight = problem.weight.detach().to(dtype).requires_grad_()
        hidden = torch.tanh(weight[ids])
        tied = Problem(hidden, weight, None, 1.3, None, problem.batch)
        if dtype == torch.float32:
            loss = linear_policy_loss(hidden, tied.head, tied.batch, smooth_local).loss
        else:
            loss = reference_loss(tied, smooth)[0]
        grads.append(torch.autograd.grad(loss, weight)[0])
    assert_no_worse("tied weight", grads[0], grads[0], grads[1], floor=1e-5, slack=0.0)


def test_upstream_factor_retained_graph_and_accumulation():
    problem = make_problem()
    once = gradients(
        linear_policy_loss(problem.hidden, problem.head, problem.batch, smooth_local).loss, problem
    )
    result = linear_policy_loss(problem.hidden, problem.head, problem.batch, smooth_local)
    scaled = result.loss * 512.0
    for _ in range(2):  # a kept graph can be walked twice
        kept = torch.autograd.grad(scaled, problem.leaves, retain_graph=True)
        for a, b in zip(kept, once, strict=True):
            torch.testing.assert_close(a, b * 512.0, rtol=1e-6, atol=0)
    for a, b in zip(torch.autograd.grad(scaled, problem.leaves), once, strict=True):
        torch.testing.assert_close(a, b * 512.0, rtol=1e-6, atol=0)
    for _ in range(2):  # .grad accumulates
        linear_policy_loss(
            problem.hidden, problem.head, problem.batch, smooth_local
        ).loss.backward()
    for leaf, b in zip(problem.leaves, once, strict=True):
        torch.testing.assert_close(leaf.grad, 2 * b)


def test_float16_gradients_survive_a_small_loss():
    """dX of 1e-9 is 0 in float16; under a loss scale of 2^16 it must come out."""
    problem = make_problem(dtype=torch.float16, bias=False)
    batch = TokenBatch(
        targets=problem.batch.targets,
        weights=problem.batch.weights * 1e-6,
        advantages=problem.batch.advantages,
        logp_old=problem.batch.logp_old,
        temperature=problem.batch.temperature,
    )
    small = Problem(problem.hidden, problem.weight, None, 1.3, None, batch)
    loss = linear_policy_loss(small.hidden, small.head, batch, smooth_local).loss
    ours = gradients(loss * 2.0**16, small)
    exact = small.cast(torch.float64)
    truth = gradients(reference_loss(exact, smooth)[0] * 2.0**16, exact)
    for a, b in zip(ours, truth, strict=True):
        assert_no_worse("scaled", a, a, b, slack=0.0, floor=2e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_operands_as_on_a_gpu(dtype, monkeypatch):
    """The half-precision route of a GPU, with its products emulated: dz narrowed in place."""

    def mm(a, b, *, out_dtype, out):
        return out.copy_(a.float() @ b.float())

    def addmm(into, a, b, *, out_dtype, out):
        return out.copy_(into + a.float() @ b.float())

    monkeypatch.setattr(gemm, "multiplies_into_float32", lambda device, d: d == dtype)
    monkeypatch.setattr(gemm, "half_mm", mm)
    monkeypatch.setattr(gemm, "half_addmm", addmm)
    monkeypatch.setitem(plan._CHUNK_ROWS, "cpu", 9)
    problem = make_problem(dtype=dtype, vocabulary=2500)
    assert_matches(problem, smooth_local, Plan("fused"), slack=HALF_SLACK)
    assert_matches(problem, coupled, Plan("recompute"), slack=HALF_SLACK)
    assert_matches(problem, coupled, Plan("hold"), slack=HALF_SLACK)


def test_mixed_and_autocast_dtypes():
    problem = make_problem(bias=False)
    weight16 = problem.weight.detach().bfloat16().requires_grad_()
    mixed = Problem(problem.hidden, weight16, None, 1.3, None, problem.batch)
    loss = linear_policy_loss(mixed.hidden, mixed.head, mixed.batch, smooth_local).loss
    ours = gradients(loss, mixed)
    exact = mixed.cast(torch.float64)
    truth = gradients(reference_loss(exact, smooth)[0], exact)
    assert ours[0].dtype == torch.float32 and ours[1].dtype == torch.bfloat16
    assert_no_worse("dhidden", ours[0], ours[0], truth[0], slack=0.0, floor=1e-5)
    assert_no_worse("dweight", ours[1], ours[1], truth[1], slack=0.0, floor=2.5e-3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = linear_policy_loss(problem.hidden, problem.head, problem.batch, smooth_local)
    rounded = Problem(
        problem.hidden.detach().bfloat16(), problem.weight.detach().bfloat16(), None, 1.3, None,
        problem.batch,
    ).cast(torch.float64)  # fmt: skip
    loss, logp, _ = reference_loss(rounded, smooth)
    computed = result.computed
    assert result.logp.dtype == torch.float32
    assert_close("autocast logp", result.logp[computed], logp[computed], atol=1e-5)
    assert all(g.dtype == torch.float32 for g in gradients(result.loss, problem))


def test_padded_hidden_is_flattened():
    hidden = torch.randn(3, 5, 8, requires_grad=True)
    weight = torch.randn(30, 8)
    mask = torch.rand(3, 5) > 0.4
    mask[:, 0] = False
    batch = TokenBatch.from_padded(
        torch.randint(30, (3, 5)), mask, advantages=torch.randn(3),
        reduction=lambda mask, cu_seqlens, denominator: mask / mask.sum(),
    )  # fmt: skip
    objective = lambda logp, entropy, batch: -batch.advantages * logp  # noqa: E731
    result = linear_policy_loss(hidden, weight, batch, objective)
    (g,) = torch.autograd.grad(result.loss, hidden)
    assert g.shape == hidden.shape
    logp = (hidden @ weight.t()).log_softmax(-1)
    picked = logp.reshape(15, 30)[batch.rows].gather(1, batch.targets[:, None]).squeeze(1)
    (want,) = torch.autograd.grad((-batch.weights * batch.advantages * picked).sum(), hidden)
    torch.testing.assert_close(g, want, rtol=1e-4, atol=1e-6)


def test_explain_is_what_runs():
    problem = make_problem(vocabulary=3000)
    for objective, request in itertools.product(
        (smooth_local, coupled), (Plan(), Plan("recompute"), Plan("hold"))
    ):
        report = explain(problem.hidden, problem.head, problem.batch, objective, request)
        result = linear_policy_loss(
            problem.hidden, problem.head, problem.batch, objective, plan=request
        )
        assert report == result.diagnostics
    report = explain(problem.hidden, problem.head, problem.batch, smooth_local)
    active = int((problem.batch.weights != 0).sum())
    assert report.flops == 6 * active * 16 * 3000
    budget = report.peak_bytes - 3 * 3000 * 4
    tight = explain(problem.hidden, problem.head, problem.batch, smooth_local, Plan(None, budget))
    assert tight.chunk_rows < report.chunk_rows and tight.peak_bytes <= budget


def test_bad_arguments_say_what_was_needed():
    problem = make_problem()
    hidden, head, batch = problem.hidden, problem.head, problem.batch
    cases = [
        (ValueError, "one of fused", lambda: Plan("whole")),
        (ValueError, "skip, score", lambda: Plan(dropped="maybe")),
        (ValueError, "at least", lambda: linear_policy_loss(
            hidden, head, batch, smooth_local, plan=Plan(budget_bytes=1000))),
        (ValueError, "token-local", lambda: linear_policy_loss(
            hidden, head, batch, coupled, plan=Plan("fused"))),
        (ValueError, "without gradient", lambda: linear_policy_loss(
            hidden, head, batch, coupled, plan=Plan("unit"))),
        (ValueError, "one a pair", lambda: linear_policy_loss(hidden[:5], head, batch, coupled)),
        (ValueError, "16", lambda: linear_policy_loss(hidden[:, :4], head, batch, coupled)),
        (TypeError, "float32", lambda: linear_policy_loss(hidden.long(), head, batch, coupled)),
        (ValueError, r"in \[0, 10\)", lambda: linear_policy_loss(
            hidden, problem.weight[:10], batch, coupled)),
        (ValueError, "device", lambda: linear_policy_loss(
            hidden.to("meta"), head, batch, coupled)),
        (ValueError, "values, one a pair", lambda: linear_policy_loss(
            hidden, head, batch, lambda logp, entropy, batch: logp.sum())),
        (ValueError, "another tensor", lambda: linear_policy_loss(
            hidden, head, batch, lambda logp, entropy, batch: logp * problem.weight.sum())),
        (ValueError, "another tensor", lambda: linear_policy_loss(
            hidden, head, batch, token_local()(
                lambda logp, entropy, batch: logp * problem.weight.sum()))),
        (ValueError, "> 0", lambda: Head(problem.weight, scale=0.0)),
        (TypeError, "need a Plan, such as", lambda: linear_policy_loss(
            hidden, head, batch, coupled, plan="fused")),
        (TypeError, "need a TokenBatch", lambda: linear_policy_loss(hidden, head, {}, coupled)),
        (TypeError, "such as grpo", lambda: explain(hidden, head, batch, "grpo")),
        (ValueError, "> 0", lambda: Head(problem.weight, softcap=-1.0)),
        (ValueError, "one a token id", lambda: Head(problem.weight, torch.zeros(3))),
    ]  # fmt: skip
    for kind, text, call in cases:
        with pytest.raises(kind, match=text):
            call()
    rows = torch.full((24,), 24)
    shifted = TokenBatch(targets=batch.targets, weights=batch.weights, rows=rows)
    with pytest.raises(ValueError, match="24"):
        linear_policy_loss(hidden, head, shifted, coupled)


def test_second_derivatives_are_refused():
    problem = make_problem()
    for objective in (smooth_local, coupled):
        result = linear_policy_loss(problem.hidden, problem.head, problem.batch, objective)
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(result.loss, problem.hidden, create_graph=True)
    logits = torch.randn(24, 301, requires_grad=True)
    result = policy_loss(logits, problem.batch, smooth_local)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(result.loss, logits, create_graph=True)


def test_gradients_handed_out_stay_as_they_are():
    problem = make_problem()
    result = linear_policy_loss(problem.hidden, problem.head, problem.batch, smooth_local)
    first = torch.autograd.grad(result.loss, problem.leaves, retain_graph=True)
    copies = [g.clone() for g in first]
    second = torch.autograd.grad(result.loss * 512.0, problem.leaves)
    for handed, copy, scaled in zip(first, copies, second, strict=True):
        assert torch.equal(handed, copy)
        torch.testing.assert_close(scaled, copy * 512.0, rtol=1e-6, atol=0)


def test_overwriting_a_leaf_is_refused():
    problem = make_problem()
    logits = torch.randn(24, 301, requires_grad=True)
    for leaf in (logits, logits.view(24, 301)):
        with pytest.raises(ValueError, match="a leaf"):
            policy_loss(leaf, problem.batch, smooth_local, overwrite_logits=True)


def test_a_capture_in_a_cuda_graph_is_refused(monkeypatch):
    """Meta tensors stand for a device's; what a graph replayed would be this batch's rows."""
    hidden, weight = torch.randn(6, 16, device="meta"), torch.randn(9, 16, device="meta")
    ones = torch.ones(6)
    batch = TokenBatch(torch.zeros(6).long(), ones, ones, ones).to("meta")
    logits = hidden @ weight.t()
    calls = {
        "hidden": [
            lambda: linear_policy_loss(hidden, weight, batch, smooth_local),
            lambda: linear_logp_entropy(hidden, weight, batch.targets),
            lambda: explain(hidden, weight, batch, smooth_local),
        ],
        "logits": [
            lambda: policy_loss(logits, batch, smooth_local),
            lambda: logp_entropy(logits, batch.targets),
        ],
    }
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for name, same in calls.items():
        for call in same:
            with pytest.raises(RuntimeError, match=f"CUDA graph capture: .* from {name} of rollf"):
                call()
    # On the CPU nothing is captured, and nobody asks a device.
    problem = make_problem()
    loss = linear_policy_loss(problem.hidden, problem.head, problem.batch, coupled).loss
    loss.backward(retain_graph=True)
    monkeypatch.setattr(checks, "refuse_capture", refused)
    with pytest.raises(RuntimeError, match="the backward of log-probs"):
        loss.backward()


def refused(device, what):
    raise RuntimeError(what)


def test_a_changed_batch_forgets_its_host_copy():
    batch = make_problem().batch.to("meta")
    assert batch.host is not None
    assert dataclasses.replace(batch, advantages=None).host is None


def test_scoring_counts_in_the_plan_and_in_the_budget():
    problem = make_problem(n_rows=200, vocabulary=5000, bias=False)
    few = token_local(active=lambda batch: torch.arange(200) < 3)(
        lambda logp, entropy, batch: logp * (torch.arange(len(logp)) < 3)
    )
    arguments = (problem.hidden, problem.head, problem.batch, few)
    skip, score = (explain(*arguments, Plan(dropped=d)) for d in ("skip", "score"))
    assert skip.flops == 3 * 2 * 3 * 16 * 5000 and score.flops == skip.flops + 2 * 197 * 16 * 5000
    tight = Plan(budget_bytes=skip.peak_bytes, dropped="score")
    with pytest.raises(ValueError, match="at least"):
        linear_policy_loss(*arguments, plan=tight)


@pytest.mark.skipif(backend.name == "interpret", reason="Dynamo cannot trace the interpreter")
def test_shared_rows_under_torch_compile():
    """A graph break at the op is fine, wrong numbers are not."""
    problem = make_problem(n_pairs=40)

    @torch.compile(backend="eager")
    def compiled(hidden):
        loss = linear_policy_loss(hidden * 1.0, problem.head, problem.batch, smooth_local).loss
        return loss * 2.0

    want = linear_policy_loss(problem.hidden, problem.head, problem.batch, smooth_local).loss
    torch.testing.assert_close(compiled(problem.hidden), want * 2.0)


def test_strided_bias_and_bfloat16_temperature():
    problem = make_problem(n_pairs=40, frozen="hidden,weight,bias")
    strided = torch.stack([problem.bias, torch.full((301,), 9.0)], 1)[:, 0]
    batch = dataclasses.replace(problem.batch, temperature=torch.ones(40, dtype=torch.bfloat16))
    plain = dataclasses.replace(problem, batch=batch)
    head = Head(problem.weight, strided, 1.3)
    found = linear_policy_loss(problem.hidden, head, batch, smooth_local)
    _, logp, _ = reference_loss(plain.cast(torch.float64), smooth)
    assert_close("logp", found.logp[found.computed], logp[found.computed], atol=2e-5)
