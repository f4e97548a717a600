"""torch.compile: one graph for every length and hyper-parameter, the same numbers, opcheck."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from head_cases import coupled, gradients, make_problem, smooth_local
from torch._dynamo.testing import CompileCounterWithBackend

from rollfuse import (
    Head,
    Lora,
    Plan,
    TokenBatch,
    grpo,
    gspo,
    k2,
    linear_logp_entropy,
    linear_policy_loss,
    logp_entropy,
    policy_loss,
    token_mean,
)
from rollfuse.kernels import registered


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def weighted(problem):
    """The problem's batch without its pairs of weight 0."""
    keep = problem.batch.weights.nonzero().squeeze(1)
    return dataclasses.replace(problem, batch=problem.batch.select(keep))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_pairs", [None, 40])
@pytest.mark.parametrize("objective", [smooth_local, coupled])
def test_the_same_numbers_in_one_graph(dtype, n_pairs, objective):
    problem = make_problem(dtype=dtype, n_pairs=n_pairs, softcap=20.0)
    if objective is coupled:
        problem = weighted(problem)
    batch, head = problem.batch, problem.head

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(hidden):
        out = linear_policy_loss(hidden * 1.0, head, batch, objective)
        return out.loss * 2.0, out.logp, out.computed

    loss, logp, computed = compiled(problem.hidden)
    want = linear_policy_loss(problem.hidden, head, batch, objective, plan=Plan("recompute"))
    torch.testing.assert_close(loss, want.loss * 2.0)
    torch.testing.assert_close(logp, want.logp, equal_nan=True)
    assert torch.equal(computed, want.computed)
    for ours, true in zip(
        gradients(loss / 2.0, problem), gradients(want.loss, problem), strict=True
    ):
        torch.testing.assert_close(
            ours, true, rtol=2e-2 if dtype != torch.float32 else 1e-5, atol=1e-6
        )


def loss_of(hidden, weight, targets, weights, advantages, logp_old, coefficient):
    batch = TokenBatch(
        targets, weights, advantages, logp_old, scalars={"entropy_coef": coefficient}
    )
    return linear_policy_loss(hidden, Head(weight), batch, grpo(entropy_coef=0.5)).loss


def test_one_graph_for_any_length_and_coefficient():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss_of, fullgraph=True, dynamic=True, backend=counter)
    weight = torch.randn(97, 8, requires_grad=True)
    for n in (6, 11, 64, 3):
        for coefficient in (0.0, 0.3):
            hidden = torch.randn(n, 8, requires_grad=True)
            arguments = (
                hidden, weight, torch.randint(97, (n,)), torch.rand(n), torch.randn(n),
                -torch.rand(n), torch.tensor(coefficient),
            )  # fmt: skip
            ours, want = compiled(*arguments), loss_of(*arguments)
            torch.testing.assert_close(ours, want)
            for one, other in zip(
                torch.autograd.grad(ours, (hidden, weight)),
                torch.autograd.grad(want, (hidden, weight)),
                strict=True,
            ):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    with_work = [g for g in counter.graphs if any(n.op == "call_function" for n in g.graph.nodes)]
    assert len(with_work) == 1


def with_borders(n_pairs):
    """A batch with borders, and the rows of its hidden states."""
    borders = torch.tensor([0, 2, n_pairs])
    values = torch.rand(3, n_pairs)
    return TokenBatch(
        torch.randint(97, (n_pairs,)), values[0], values[1], -values[2], cu_seqlens=borders
    ), n_pairs


def from_padding(length):
    """The same from padded tensors: pairs are fewer than rows."""
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[:, 0] = mask[1, 2] = False
    batch = TokenBatch.from_padded(
        torch.randint(97, (2, length)), mask, reduction=token_mean,
        advantages=torch.randn(2), logp_old=-torch.rand(2, length),
    )  # fmt: skip
    return batch, 2 * length


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("make", [with_borders, from_padding])
@pytest.mark.parametrize("objective", [grpo(), gspo(0.3, 0.3)])
def test_one_graph_for_any_length_of_sequences_with_borders(objective, make, dynamic):
    counter = CompileCounterWithBackend("eager")
    head = Head(torch.randn(97, 8))

    def loss(hidden, batch):
        return linear_policy_loss(hidden, head, batch, objective).loss

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend=counter)
    for n in range(5, 20, 2):
        batch, n_rows = make(n)
        hidden = torch.randn(n_rows, 8)
        torch.testing.assert_close(compiled(hidden, batch), loss(hidden, batch))
    # Without dynamic=True the first length gets a graph of its own, as ever.
    assert counter.frame_count == (1 if dynamic else 2)


FLOATS = (0.5, 0.6, 0.7, 0.8)
A_BATCH = TokenBatch(torch.arange(9), torch.ones(9), torch.ones(9), torch.full((9,), -5.0))
A_WEIGHT, A, B = torch.ones(50, 8), torch.ones(2, 8), torch.ones(50, 2)
OF_A_HEAD = [
    lambda value: Head(A_WEIGHT, scale=value),
    lambda value: Head(A_WEIGHT, softcap=value),
    lambda value: Head(A_WEIGHT, lora=Lora(A, B, value)),
]


def graphs_of(function, arguments):
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for value in arguments:
        compiled(torch.ones(9, 8), value)
    return counter.frame_count


@pytest.mark.parametrize(
    ("batch", "objective"),
    [
        (lambda value: A_BATCH, lambda value: grpo(eps_low=value, entropy_coef=value)),
        (lambda value: dataclasses.replace(A_BATCH, temperature=value), lambda value: grpo()),
        (lambda value: A_BATCH, lambda value: lambda logp, entropy, batch: -value * logp),
    ],
)
def test_floats_of_objectives_and_temperatures_share_a_graph(batch, objective):
    def loss(hidden, given):
        return linear_policy_loss(hidden, A_WEIGHT, *given).loss

    assert graphs_of(loss, [(batch(value), objective(value)) for value in FLOATS]) == 1


@pytest.mark.parametrize("make", OF_A_HEAD)
def test_floats_of_a_head_are_constants_of_the_graph(make):
    """As the README says; if this falls to 1, say so there."""

    def loss(hidden, head):
        return linear_policy_loss(hidden, head, A_BATCH, grpo()).loss

    assert graphs_of(loss, [make(value) for value in FLOATS]) == len(FLOATS)


@pytest.mark.parametrize("n_pairs", [None, 40])
def test_an_adapter_counts_as_much_as_without(n_pairs):
    problem = make_problem(n_pairs=n_pairs)
    lora = Lora(torch.randn(3, 16).requires_grad_(), torch.randn(301, 3).requires_grad_(), 0.3)
    head = dataclasses.replace(problem.head, lora=lora)
    leaves = (*problem.leaves, lora.a, lora.b)

    def loss(hidden):
        out = linear_policy_loss(hidden, head, problem.batch, smooth_local)
        batch = problem.batch
        scored = linear_logp_entropy(hidden, head, batch.targets, rows=batch.rows)
        return out.loss + scored.logp.sum()

    found = [
        (value, *torch.autograd.grad(value, leaves))
        for value in (torch.compile(loss, fullgraph=True, backend="aot_eager")(problem.hidden),
                      loss(problem.hidden))
    ]  # fmt: skip
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_wrong_values_are_flagged_where_nobody_may_look():
    """A batch built inside a graph cannot raise: the result says so."""

    def result_of(hidden, advantages):
        targets = torch.zeros(3, dtype=torch.int64)
        batch = TokenBatch(targets, torch.ones(3), advantages)
        return linear_policy_loss(hidden, Head(torch.ones(5, 2)), batch, grpo())

    compiled = torch.compile(
        lambda hidden, advantages: result_of(hidden, advantages).bad,
        backend="aot_eager", fullgraph=True,
    )  # fmt: skip
    good, bad = torch.ones(3), torch.tensor([1.0, torch.nan, 1.0])
    assert not compiled(torch.ones(3, 2), good)
    assert compiled(torch.ones(3, 2), bad)
    result = result_of(torch.ones(3, 2), good)
    result.check()
    with pytest.raises(ValueError, match="advantages"):
        dataclasses.replace(result, bad=torch.tensor(True)).check()


def test_scores_and_logits_in_one_graph():
    logits = torch.randn(12, 50, requires_grad=True)
    problem = make_problem(n_rows=12, vocabulary=50)
    rows = torch.tensor([0, 0, 3, 5, 5, 11])
    targets = torch.randint(50, (6,))
    temperature = torch.tensor([1.0, 0.5, 1.0, 0.7, 0.7, 1.2])

    def both(logits, hidden):
        found = logp_entropy(logits, targets, rows=rows, temperature=temperature)
        scored = linear_logp_entropy(hidden, problem.head, targets, rows=rows)
        loss = policy_loss(logits, problem.batch, smooth_local).loss
        return found.logp.sum() + 0.3 * found.entropy.sum() + scored.logp.sum() + loss

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    leaves = (logits, *problem.leaves)
    ours, want = compiled(logits, problem.hidden), both(logits, problem.hidden)
    torch.testing.assert_close(ours, want)
    for one, other in zip(
        torch.autograd.grad(ours, leaves), torch.autograd.grad(want, leaves), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_coupled_objectives_need_every_pair():
    """A pair of weight 0 would be seen by the objective: no number, and a flag that says why."""
    problem = make_problem()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(hidden):
        out = linear_policy_loss(hidden, problem.head, problem.batch, coupled)
        return out.loss, out.bad

    loss, bad = compiled(problem.hidden)
    assert loss.isnan() and bad


@pytest.mark.parametrize("frozen", ["hidden", "weight,bias", "bias"])
def test_gspo_and_frozen_parts(frozen):
    problem = weighted(make_problem(frozen=frozen))
    n = len(problem.batch)
    borders = torch.tensor([0, 3, 3, n // 2, n])
    batch = dataclasses.replace(problem.batch, cu_seqlens=borders)
    objective = gspo(0.3, 0.3, entropy_coef=0.1)

    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    def compiled(hidden):
        return linear_policy_loss(hidden, problem.head, batch, objective).loss

    loss = compiled(problem.hidden)
    want = linear_policy_loss(problem.hidden, problem.head, batch, objective).loss
    torch.testing.assert_close(loss, want)
    for one, other in zip(gradients(loss, problem), gradients(want, problem), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_scored_pairs_that_do_not_count_do_not_spread():
    """dropped="score" computes a pair of weight 0, whose KL to a forbidden token is infinite."""
    problem = make_problem()
    ref = torch.where(problem.batch.weights == 0, -torch.inf, -1.0)
    batch = dataclasses.replace(problem.batch, logp_ref=ref)
    objective = grpo(kl=k2, kl_coef=0.1)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(hidden):
        plan = Plan(dropped="score")
        out = linear_policy_loss(hidden, problem.head, batch, objective, plan=plan)
        return out.loss, out.logp

    loss, logp = compiled(problem.hidden)
    assert logp.isfinite().all()
    assert all(found.isfinite().all() for found in gradients(loss, problem))


def test_what_compile_cannot_serve_is_refused():
    problem = make_problem()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def held(hidden):
        plan = Plan("hold")
        return linear_policy_loss(hidden, problem.head, problem.batch, smooth_local, plan=plan).loss

    with pytest.raises(Exception, match="under torch.compile"):
        held(problem.hidden)


@pytest.mark.parametrize("make", [grpo, gspo])
def test_objectives_made_inside(make):
    problem = make_problem()
    n = len(problem.batch)
    borders = torch.tensor([0, n // 2, n])
    batch = dataclasses.replace(problem.batch, cu_seqlens=borders, weights=torch.ones(n))

    def loss(hidden):
        return linear_policy_loss(hidden, problem.head, batch, make()).loss

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(problem.hidden), loss(problem.hidden))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    problem = make_problem(n_pairs=40, dtype=dtype)
    batch = problem.batch
    adapter = (torch.randn(2, 16).requires_grad_(), torch.randn(301, 2).requires_grad_())
    arguments = (
        problem.hidden, problem.weight, problem.bias, *adapter, batch.targets, batch.rows,
        batch.temperature, batch.weights != 0, 1.3, 20.0, 0.5, 301, dtype, None,
    )  # fmt: skip
    torch.library.opcheck(registered.linear_scores, arguments)
    bare = (problem.hidden[:24], problem.weight, None, None, None, batch.targets[:24], None,
            batch.temperature[:24], None, 1.0, None, 1.0, None, dtype, None)  # fmt: skip
    torch.library.opcheck(registered.linear_scores, bare)
    logits = torch.randn(24, 301, dtype=dtype, requires_grad=True)
    torch.library.opcheck(
        registered.logit_scores,
        (logits, batch.targets, batch.rows, batch.temperature, batch.weights != 0),
    )
