"""Invariant plans: a row's bits do not depend on the batch it comes in, nor on how that is cut."""

from dataclasses import replace

import pytest
import torch
from head_cases import coupled, make_problem, smooth_local

from rollfuse import (
    Head,
    Lora,
    Plan,
    Sampling,
    TokenBatch,
    grpo,
    linear_logp_entropy,
    linear_policy_loss,
    new_streams,
    sample_tokens,
)
from rollfuse.kernels import gemm
from rollfuse.kernels import plan as plans
from rollfuse.kernels.dispatch import backend
from rollfuse.kernels.gemm import row_stride

pytestmark = pytest.mark.kernels

INTERPRETED = backend.name == "interpret"
# (D, V): one block of columns, several, and a vocabulary of which a block holds few rows.
# The interpreter, which walks a row at a time, takes the first.
SHAPES = [(16, 301), (96, 9999), (64, 50257)][: 1 if INTERPRETED else 3]
# Rows of a chunk; rows of two chunks and a part of a third, and of one and a part of another.
CHUNK, ROWS, FEWER = (16, 40, 20) if INTERPRETED else (128, 300, 150)


@pytest.fixture(autouse=True)
def chunks_of_few_rows(monkeypatch):
    """In the interpreter, where every call fills up a chunk."""
    if INTERPRETED:
        monkeypatch.setattr(plans, "_INVARIANT_ROWS", {"cpu": CHUNK})


def picked(n_rows):
    """Rows out of `n_rows`: one, the last, a few, more than a chunk's, all in another order."""
    few, many = [3, n_rows * 2 // 3, 5], list(range(n_rows * 3 // 10, n_rows))
    return [7], [n_rows - 1], few, many, torch.randperm(n_rows).tolist()


def values_and_gradient(hidden, head, targets, upstream, plan, rows=None):
    hidden = hidden.detach().requires_grad_()
    found = linear_logp_entropy(hidden, head, targets, rows=rows, temperature=0.8, plan=plan)
    (g,) = torch.autograd.grad((upstream * torch.stack(list(found))).sum(), hidden)
    return found.logp.detach(), found.entropy.detach(), g


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def make(width, vocabulary, dtype=torch.float32, n_rows=ROWS):
    hidden = torch.randn(n_rows, width).to(dtype)
    weight = (torch.randn(vocabulary, width) * 2 / width**0.5).to(dtype).requires_grad_()
    bias = torch.randn(vocabulary)
    bias[-30:] += 6.0  # where a vectorised loop over a row ends there is something to see
    bias = bias.to(dtype)
    lora = Lora(torch.randn(2, width).to(dtype), torch.randn(vocabulary, 2).to(dtype), 0.1)
    targets = torch.randint(vocabulary, (n_rows,))
    return hidden, Head(weight, bias, lora=lora), targets, torch.randn(2, n_rows)


@pytest.mark.parametrize(("width", "vocabulary"), SHAPES)
@pytest.mark.parametrize("kind", ["recompute", "hold"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_threads", [1, 2])
def test_a_row_has_the_same_bits_in_any_batch(width, vocabulary, kind, dtype, n_threads, threads):
    threads(n_threads)
    if dtype == torch.bfloat16 and kind == "hold":
        return  # refused, see below
    hidden, head, targets, upstream = make(width, vocabulary, dtype)
    plan = Plan(kind, invariant=True)
    whole = values_and_gradient(hidden, head, targets, upstream, plan)
    for pick in picked(ROWS):
        part = values_and_gradient(hidden[pick], head, targets[pick], upstream[:, pick], plan)
        for a, b in zip(part, whole, strict=True):
            assert torch.equal(a, b[pick])


RANKS = [1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 13, 15, 16, 17, 23, 25, 31, 33]
WIDTHS = [16, 32, 48, 80, 112, 144, 240]
VOCABULARIES = [2, 3, 5, 7, 9, 11, 15, 17, 31, 33, 65, 129, 301, 1999]
ADAPTED = [(256, 301, rank) for rank in RANKS]
ADAPTED += [(width, 2001, 6) for width in WIDTHS]
ADAPTED += [(64, vocabulary, 5) for vocabulary in VOCABULARIES]
# The products are the same in the interpreter.
ADAPTED = [(32, 31, 6)] if INTERPRETED else ADAPTED


@pytest.mark.parametrize(("width", "vocabulary", "rank"), ADAPTED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_whatever_the_rank_the_width_and_the_vocabulary(
    width, vocabulary, rank, dtype, monkeypatch
):
    # A widened weight comes in slabs of an odd number of rows.
    monkeypatch.setattr(gemm, "SLAB_ELEMENTS", 777 * width)
    n_rows = ROWS * 2 // 3
    hidden, targets = torch.randn(n_rows, width).to(dtype), torch.randint(vocabulary, (n_rows,))
    weight = (torch.randn(vocabulary, width) * 2 / width**0.5).to(dtype).requires_grad_()
    a, b = torch.randn(rank, width) / width**0.5, torch.randn(vocabulary, rank)
    adapted = Head(weight, lora=Lora(a.to(dtype), b.to(dtype), 0.7))
    upstream = torch.randn(2, n_rows)
    for head in (adapted, Head(weight)):
        plan = Plan("recompute", invariant=True)
        whole = values_and_gradient(hidden, head, targets, upstream, plan)
        for pick in picked(n_rows):
            part = values_and_gradient(hidden[pick], head, targets[pick], upstream[:, pick], plan)
            for one, other in zip(part, whole, strict=True):
                assert torch.equal(one, other[pick])


def test_any_number_of_rows():
    hidden, head, targets, upstream = make(48, 301)
    plan = Plan("recompute", invariant=True)
    whole = values_and_gradient(hidden, head, targets, upstream, plan)
    for n_rows in (1, CHUNK, CHUNK + 1) if INTERPRETED else range(1, ROWS):
        part = values_and_gradient(
            hidden[-n_rows:], head, targets[-n_rows:], upstream[:, -n_rows:], plan
        )
        for one, other in zip(part, whole, strict=True):
            assert torch.equal(one, other[-n_rows:])


@pytest.mark.parametrize("rank", [1, 7, 16, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rank_that_is_filled_up_has_the_same_gradients(rank, dtype):
    problem = make_problem(n_rows=FEWER, dtype=dtype)
    a, b = torch.randn(rank, 16).to(dtype), torch.randn(301, rank).to(dtype)
    lora = Lora(a.requires_grad_(), b.requires_grad_(), 0.3)
    head = replace(problem.head, lora=lora)
    leaves = [*problem.leaves, lora.a, lora.b]
    found = []
    for invariant in (True, False):
        plan = Plan("fused", invariant=invariant)
        loss = linear_policy_loss(problem.hidden, head, problem.batch, smooth_local, plan=plan).loss
        found.append(torch.autograd.grad(loss, leaves))
    for one, other in zip(*found, strict=True):
        assert one.shape == other.shape and one.is_contiguous()
        error = (one - other).norm() / other.norm()
        assert error < (1e-5 if dtype == torch.float32 else 4e-3)


def test_plans_budgets_and_held_rows_do_not_change_a_bit(monkeypatch):
    hidden, head, targets, upstream = make(*SHAPES[-1])
    want = values_and_gradient(hidden, head, targets, upstream, Plan("recompute", invariant=True))
    row_bytes = 4 * row_stride(SHAPES[-1][1], torch.device("cpu"))
    monkeypatch.setitem(plans._HELD_BYTES, "cpu", ROWS * 2 // 3 * row_bytes)
    for plan in (Plan(invariant=True), Plan("hold", invariant=True),
                 Plan("recompute", 1 << 26, invariant=True)):  # fmt: skip
        for a, b in zip(
            values_and_gradient(hidden, head, targets, upstream, plan), want, strict=True
        ):
            assert torch.equal(a, b)


def test_several_pairs_of_a_row():
    hidden, head, targets, upstream = make(16, 301, n_rows=40)
    rows = torch.randint(40, (90,))
    targets, upstream = torch.randint(301, (90,)), torch.randn(2, 90)
    plan = Plan(invariant=True)
    logp, entropy, g = values_and_gradient(hidden, head, targets, upstream, plan, rows)
    for row in range(0, 40, 7):
        mine = rows == row
        alone = values_and_gradient(
            hidden[row : row + 1], head, targets[mine], upstream[:, mine], plan,
            torch.zeros(int(mine.sum()), dtype=torch.long),
        )  # fmt: skip
        assert torch.equal(alone[0], logp[mine])
        assert torch.equal(alone[1], entropy[mine])
        assert torch.equal(alone[2][0], g[row])


@pytest.mark.parametrize(("objective", "kind"), [(smooth_local, "fused"), (coupled, "hold")])
def test_policy_losses_agree_with_the_scorer_to_the_bit(objective, kind):
    """Whatever pairs are left out, whichever plan makes the gradients."""
    problem = make_problem(n_rows=FEWER, bias=True)
    scored = linear_logp_entropy(
        problem.hidden, problem.head, problem.batch.targets,
        temperature=problem.batch.temperature, plan=Plan(invariant=True),
    )  # fmt: skip
    result = linear_policy_loss(
        problem.hidden, problem.head, problem.batch, objective, plan=Plan(kind, invariant=True)
    )
    plain = linear_policy_loss(problem.hidden, problem.head, problem.batch, objective)
    live = result.computed
    assert 0 < live.sum() < len(live)
    assert torch.equal(result.logp[live], scored.logp[live])
    assert torch.equal(result.entropy[live], scored.entropy[live])
    torch.testing.assert_close(result.loss, plain.loss, rtol=1e-5, atol=1e-6)
    for a, b in zip(
        torch.autograd.grad(result.loss, problem.leaves),
        torch.autograd.grad(plain.loss, problem.leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert result.diagnostics.chunk_rows == result.diagnostics.slot_multiple == CHUNK
    both = linear_policy_loss(
        problem.hidden, problem.head, problem.batch, objective,
        plan=Plan(kind, dropped="score", invariant=True),
    )  # fmt: skip
    assert torch.equal(both.logp, scored.logp)


def test_sampler_scorer_and_trainer_agree_where_they_share_the_op():
    """The sampler draws from logits, a row at a time, and scores what it drew with the head's op.

    Its own log-probs come from other products: the same within rounding, not to the bit.
    """
    hidden, head, _, _ = make(16, 301, n_rows=40)
    hidden = hidden * 3.0
    streams, plan = new_streams(7, 40), Plan(invariant=True)
    drawn, asked = [], []
    with torch.no_grad():
        for row in range(40):
            state, place = hidden[row : row + 1], torch.tensor([row])
            logits = torch.nn.functional.linear(state, head.weight, head.bias)
            logits = logits + 0.1 * state @ head.lora.a.t() @ head.lora.b.t()
            drawn.append(sample_tokens(logits, streams[row : row + 1], place, Sampling(0.8)))
            asked.append(
                linear_logp_entropy(state, head, drawn[-1].ids, temperature=0.8, plan=plan)
            )
    ids = torch.cat([one.ids for one in drawn])
    sampler = torch.cat([found.logp for found in asked])
    scorer = linear_logp_entropy(hidden, head, ids, temperature=0.8, plan=plan).logp
    batch = TokenBatch(
        ids, torch.ones(40), torch.randn(40), logp_old=sampler, temperature=0.8
    ).select(torch.randperm(40)[:33])
    trainer = linear_policy_loss(hidden, head, batch, grpo(), plan=plan).logp
    assert torch.equal(sampler, scorer) and torch.equal(trainer, sampler[batch.rows])
    torch.testing.assert_close(
        torch.cat([one.logp for one in drawn]), sampler, rtol=1e-5, atol=1e-5
    )


def test_a_full_chunk_hands_over_what_a_filled_up_one_does():
    """Rows that fill a chunk, and one: both round the gradient once, times the upstream."""
    problem = make_problem(n_rows=CHUNK, dtype=torch.bfloat16)
    batch = replace(problem.batch, weights=torch.full((CHUNK,), 0.01))

    def gradient(hidden, batch):
        loss = linear_policy_loss(
            hidden, problem.head, batch, smooth_local, plan=Plan("fused", invariant=True)
        ).loss
        return torch.autograd.grad(loss * 3.0, hidden)[0]

    whole = gradient(problem.hidden, batch)
    for row in (0, CHUNK * 3 // 5):
        alone = problem.hidden.detach()[row : row + 1].requires_grad_()
        part = replace(batch.select(torch.tensor([row])), rows=None)
        assert torch.equal(gradient(alone, part)[0], whole[row])


def test_run_to_run_every_gradient_has_the_same_bits(monkeypatch):
    n_rows, n_pairs = (70, 90) if INTERPRETED else (1100, 1300)
    if INTERPRETED:
        monkeypatch.setattr(plans, "_CHUNK_ROWS", {"cpu": 64})
    for kind, objective in (("fused", smooth_local), ("hold", coupled), ("recompute", coupled)):
        problem = make_problem(n_rows=n_rows, n_pairs=n_pairs)
        found = []
        for _ in range(2):
            loss = linear_policy_loss(
                problem.hidden, problem.head, problem.batch, objective, plan=Plan(kind)
            ).loss
            found.append(torch.autograd.grad(loss, problem.leaves))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_cannot_be_invariant_is_refused():
    hidden, head, targets, _ = make(16, 301, torch.bfloat16)
    with pytest.raises(ValueError, match="invariant=True; use 'recompute'"):
        linear_logp_entropy(hidden, head, targets, plan=Plan("hold", invariant=True))
    with pytest.raises(ValueError, match=f"at least .* in chunks of {CHUNK} rows"):
        linear_logp_entropy(
            hidden, head, targets, plan=Plan("recompute", 700 * CHUNK, invariant=True)
        )
    for width in (4, 15, 17, 40):
        narrow = torch.randn(3, width)
        with pytest.raises(ValueError, match=f"whose width is a multiple of 16, got {width}"):
            linear_logp_entropy(
                narrow, Head(torch.randn(301, width)), targets[:3], plan=Plan(invariant=True)
            )
    compiled = torch.compile(
        lambda h: linear_logp_entropy(h, head, targets, plan=Plan(invariant=True)).logp,
        backend="eager",
        fullgraph=True,
    )
    with pytest.raises(Exception, match="invariant: need False under torch.compile"):
        compiled(hidden)


def test_an_empty_batch():
    head = Head(torch.randn(9, 16, requires_grad=True))
    batch = TokenBatch(torch.empty(0).long(), weights=torch.empty(0))
    result = linear_policy_loss(
        torch.empty(0, 16), head, batch, smooth_local, plan=Plan(invariant=True)
    )
    assert result.loss == 0
