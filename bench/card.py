"""Checks of every kernel on the device at hand, against plain PyTorch in float64.

The shapes are small and awkward: one block is never full, and R, D and V are odd enough to leave a
tail in every loop. What passes here may be measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from rollfuse import (
    Head,
    Lora,
    Plan,
    TokenBatch,
    grpo,
    linear_logp_entropy,
    linear_policy_loss,
    logp_entropy,
    policy_loss,
)
from rollfuse.bench import check
from rollfuse.bench.cases import Outcome
from rollfuse.kernels.objective import weighted_loss
from rollfuse.kernels.plan import Kind

ROWS, PAIRS, WIDTH, VOCABULARY = 70, 101, 72, 5003

DTYPES = ("float32", "bfloat16", "float16")
KINDS: tuple[Kind, ...] = (
    "fused",
    "hold",
    "recompute",
)  # for a trainable head; "unit" is for a frozen one


class Result(NamedTuple):
    """One check: what was checked, and what is wrong with it (None: nothing)."""

    name: str
    problem: str | None


@dataclass(frozen=True, slots=True)
class Problem:
    """Operands in the dtype under test; `hidden` and `weight` need a gradient."""

    hidden: Tensor  # (R, D)
    weight: Tensor  # (V, D)
    head: Head
    batch: TokenBatch  # P pairs on R rows, temperatures of their own, some weights 0
    dtype: str


def make_problem(dtype: str, device: torch.device, *, plain: bool) -> Problem:
    """A problem with a bare head, or (not `plain`) one with bias, scale and softcap."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    kind = getattr(torch, dtype)
    weight = (normal(VOCABULARY, WIDTH) * 0.3).to(device, kind).requires_grad_()
    hidden = normal(ROWS, WIDTH).to(device, kind).requires_grad_()
    head = Head(weight)
    if not plain:
        bias = normal(VOCABULARY).to(device, kind)
        head = Head(weight, bias, scale=0.7, softcap=20.0)
    rows = torch.cat(
        [torch.arange(ROWS), torch.randint(ROWS, (PAIRS - ROWS,), generator=generator)]
    )
    batch = TokenBatch(
        targets=torch.randint(VOCABULARY, (PAIRS,), generator=generator).to(device),
        weights=(torch.rand(PAIRS, generator=generator) * (torch.arange(PAIRS) % 5 > 0)).to(device),
        advantages=normal(PAIRS).to(device),
        logp_old=(normal(PAIRS) * 0.5 - 8.0).to(device),
        rows=rows.sort().values.to(device),
        temperature=(0.7 + torch.rand(PAIRS, generator=generator)).to(device),
    )
    return Problem(hidden, weight, head, batch, dtype)


_OBJECTIVE = grpo(entropy_coef=0.02)


def exact(problem: Problem) -> Problem:
    """The same operands as float64 leaves, whose gradients nothing rounds."""
    hidden = problem.hidden.detach().double().requires_grad_()
    weight = problem.weight.detach().double().requires_grad_()
    bias = None if problem.head.bias is None else problem.head.bias.double()
    head = replace(problem.head, weight=weight, bias=bias)
    return replace(problem, hidden=hidden, weight=weight, head=head)


def plain_logits(problem: Problem) -> Tensor:
    """(R, V) float64 logits by the definition of `Head`, before the temperature."""
    head = problem.head
    logits = problem.hidden.double() @ problem.weight.double().T
    if head.bias is not None:
        logits = logits + head.bias.double()
    logits = logits * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def plain_scores(logits: Tensor, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """logp and entropy of the pairs, (P,) float64 each, from (R, V) logits."""
    assert batch.rows is not None and isinstance(batch.temperature, Tensor)
    z = logits[batch.rows] / batch.temperature.double().unsqueeze(1)
    if batch.support is not None:
        stays = z >= z.max(1, keepdim=True).values - batch.support.double().unsqueeze(1)
        stays |= torch.nn.functional.one_hot(batch.targets, VOCABULARY).bool()
        z = torch.where(stays, z, -1e4)  # -inf would spoil the product below
    log_p = z.log_softmax(1)
    return log_p.gather(1, batch.targets.unsqueeze(1)).squeeze(1), -(log_p.exp() * log_p).sum(1)


def with_support(problem: Problem) -> Problem:
    """Cut off after one of the first 50 tokens, where the gap to the next is widest."""
    batch = problem.batch
    assert batch.rows is not None and isinstance(batch.temperature, Tensor)
    with torch.no_grad():
        z = plain_logits(problem)[batch.rows] / batch.temperature.double().unsqueeze(1)
        best = z.topk(50, 1).values
        gap, last = (best[:, 4:-1] - best[:, 5:]).max(1)
        lowest = best.gather(1, last.unsqueeze(1) + 4).squeeze(1)
        support = best[:, 0] - lowest + gap / 2
    return replace(problem, batch=replace(batch, support=support.float()))


def with_adapter(problem: Problem) -> tuple[Problem, Tensor]:
    """The problem beside a float32 adapter, and what that adds to the weight, float64."""
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(8, WIDTH, generator=generator).to(problem.hidden.device)
    b = torch.randn(VOCABULARY, 8, generator=generator).to(problem.hidden.device) * 0.1
    head = replace(problem.head, lora=Lora(a, b, 0.5))
    return replace(problem, head=head), 0.5 * b.double() @ a.double()


def _outcome(loss: Tensor, scores: tuple[Tensor, Tensor], leaves: tuple[Tensor, Tensor]) -> Outcome:
    dhidden, dweight = torch.autograd.grad(loss, leaves)
    return Outcome(loss.detach(), scores[0].detach(), scores[1].detach(), dhidden, dweight)


def _true(problem: Problem) -> Outcome:
    doubles = exact(problem)
    return _plain_step(doubles, plain_logits(doubles))


def _plain_step(doubles: Problem, logits: Tensor) -> Outcome:
    scores = plain_scores(logits, doubles.batch)
    loss = weighted_loss(_OBJECTIVE, *scores, doubles.batch)
    return _outcome(loss, scores, (doubles.hidden, doubles.weight))


def _true_adapted(problem: Problem, added: Tensor) -> Outcome:
    doubles = exact(problem)
    weight = doubles.weight + added
    head = replace(doubles.head, weight=weight)
    return _plain_step(doubles, plain_logits(replace(doubles, weight=weight, head=head)))


def _fused(problem: Problem, plan: Plan) -> Outcome:
    out = linear_policy_loss(problem.hidden, problem.head, problem.batch, _OBJECTIVE, plan=plan)
    found = _outcome(out.loss, (out.logp, out.entropy), (problem.hidden, problem.weight))
    return found._replace(scored=out.computed)


def _unit(problem: Problem) -> Outcome:
    """The plan for a frozen head: a gradient to the hidden states alone."""
    frozen = problem.head.weight.detach()
    head = Head(frozen, problem.head.bias, problem.head.scale, problem.head.softcap)
    objective = grpo()  # a unit gradient serves the log-prob alone
    out = linear_policy_loss(problem.hidden, head, problem.batch, objective, plan=Plan("unit"))
    (dhidden,) = torch.autograd.grad(out.loss, problem.hidden)
    return Outcome(out.loss.detach(), out.logp, None, dhidden, None, out.computed)


def _true_unit(problem: Problem) -> Outcome:
    doubles = exact(problem)
    scores = plain_scores(plain_logits(doubles), doubles.batch)
    loss = weighted_loss(grpo(), *scores, doubles.batch)
    (dhidden,) = torch.autograd.grad(loss, doubles.hidden)
    return Outcome(loss.detach(), scores[0].detach(), None, dhidden, None)


def _scored(problem: Problem) -> Outcome:
    batch = problem.batch
    found = linear_logp_entropy(
        problem.hidden, problem.head, batch.targets, rows=batch.rows, temperature=batch.temperature
    )
    loss = weighted_loss(_OBJECTIVE, found.logp, found.entropy, batch)
    return _outcome(loss, (found.logp, found.entropy), (problem.hidden, problem.weight))


def _from_logits(problem: Problem, *, overwrite: bool) -> Outcome:
    """From logits in the dtype under test; their gradient goes on to the operands."""
    logits = plain_logits(problem).to(problem.hidden.dtype)
    out = policy_loss(logits, problem.batch, _OBJECTIVE, overwrite_logits=overwrite)
    found = _outcome(out.loss, (out.logp, out.entropy), (problem.hidden, problem.weight))
    return found._replace(scored=out.computed)


def _one_temperature_a_row(problem: Problem) -> Problem:
    rows, temperature = problem.batch.rows, problem.batch.temperature
    assert rows is not None and isinstance(temperature, Tensor)
    of_rows = temperature.new_ones(ROWS).scatter(0, rows, temperature)
    return replace(problem, batch=replace(problem.batch, temperature=of_rows[rows]))


def _rounded_logits(problem: Problem) -> Outcome:
    """The truth of `_from_logits`: float64 on the same rounded logits."""
    doubles = exact(problem)
    logits = plain_logits(doubles)
    # Added rather than cast, which would round the gradient as well.
    rounding = logits.detach().to(problem.hidden.dtype).double() - logits.detach()
    return _plain_step(doubles, logits + rounding)


def run_checks(device: torch.device) -> Iterator[Result]:
    """Every op, plan and dtype on `device`; yields a result as each is done."""
    for dtype in DTYPES:
        for plain in (True, False):
            problem = make_problem(dtype, device, plain=plain)
            head = "head" if plain else "head with bias, scale, softcap"
            true = _true(problem)
            steps: dict[str, Callable[[], Outcome]] = {
                f"linear_policy_loss {kind}": partial(_fused, problem, Plan(kind))
                for kind in KINDS
                # Held exponentials do not serve a softcap.
                if kind != "hold" or plain or dtype == "float32"
            }
            steps["linear_logp_entropy"] = partial(_scored, problem)
            for name, step in steps.items():
                yield _compare(f"{name}, {head}, {dtype}", step(), true, dtype)
            unit_name = f"linear_policy_loss unit, {head}, {dtype}"
            yield _compare(unit_name, _unit(problem), _true_unit(problem), dtype)
            for overwrite in (False, True):
                # A row at several temperatures cannot be overwritten.
                given = _one_temperature_a_row(problem) if overwrite else problem
                name = f"policy_loss{' in place' if overwrite else ''}, {head}, {dtype}"
                found = _from_logits(given, overwrite=overwrite)
                yield _compare(name, found, _rounded_logits(given), dtype)
            yield _check_scores(problem, f"logp_entropy, {head}, {dtype}")
            yield from _check_heads(problem, f"{head}, {dtype}")


def _check_heads(problem: Problem, name: str) -> Iterator[Result]:
    """A cut support, an adapter, and the bits of a row alone."""
    cut = with_support(problem)
    true = _true(cut)
    adapted, added = with_adapter(problem)
    merged = _true_adapted(problem, added)
    kinds: tuple[Kind, ...] = ("fused", "recompute")
    for kind in kinds:
        found = _fused(cut, Plan(kind))
        yield _compare(f"support, {kind}, {name}", found, true, problem.dtype)
        found = _fused(adapted, Plan(kind))
        yield _compare(f"adapter, {kind}, {name}", found, merged, problem.dtype)
    yield _check_invariance(problem, f"invariant rows, {name}")


def _check_invariance(problem: Problem, name: str) -> Result:
    """A row alone must have the bits it has in the batch: values and gradient."""

    width = WIDTH // 16 * 16  # only such widths are served alike
    head = replace(problem.head, weight=problem.head.weight[:, :width])

    def run(hidden: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        hidden = hidden[:, :width].detach().requires_grad_()
        plan = Plan("recompute", invariant=True)
        found = linear_logp_entropy(hidden, head, targets, plan=plan)
        (gradient,) = torch.autograd.grad((found.logp + found.entropy).sum(), hidden)
        return found.logp, found.entropy, gradient

    targets = problem.batch.targets[:ROWS]
    whole = run(problem.hidden, targets)
    for row in (0, 7, ROWS - 1):
        alone = run(problem.hidden[row : row + 1], targets[row : row + 1])
        for part, of_all in zip(alone, whole, strict=True):
            if not torch.equal(part[0], of_all[row]):
                return Result(name, f"row {row} has other bits alone than in the batch")
    return Result(name, None)


def _compare(name: str, got: Outcome, true: Outcome, dtype: str) -> Result:
    return Result(name, check.complaint(check.errors(got, true), check.PROMISE[dtype]))


def _check_scores(problem: Problem, name: str) -> Result:
    """`logp_entropy` without gradients, on the rounded logits: float32 accuracy in every dtype."""
    batch = problem.batch
    with torch.no_grad():
        logits = plain_logits(problem).to(problem.hidden.dtype)
        got = logp_entropy(logits, batch.targets, rows=batch.rows, temperature=batch.temperature)
        true = plain_scores(logits.double(), batch)
    worst = max(float((g.double() - t).abs().max()) for g, t in zip(got, true, strict=True))
    return Result(name, None if worst <= 1e-4 else f"off by {worst:.1e} (limit 1e-04)")
