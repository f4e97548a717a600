"""Random problems for the head's tests, and plain PyTorch to compare with, in any dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from check import assert_close, assert_no_worse, assert_rows_no_worse
from torch import Tensor

from rollfuse import Head, Plan, TokenBatch, linear_policy_loss, token_local
from rollfuse.kernels.dispatch import backend

# The interpreter truncates where a GPU rounds when it narrows float32: twice the error.
HALF_SLACK = 2.5 if backend.name == "interpret" else 1.5


@dataclass(frozen=True)
class Problem:
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None
    batch: TokenBatch

    @property
    def head(self) -> Head:
        return Head(self.weight, self.bias, self.scale, self.softcap)

    @property
    def leaves(self) -> list[Tensor]:
        every = (self.hidden, self.weight, self.bias)
        return [t for t in every if t is not None and t.requires_grad]

    def cast(self, dtype: torch.dtype) -> Problem:
        """The same numbers as new leaves in another dtype."""

        def leaf(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.detach().to(dtype).requires_grad_(t.requires_grad)

        return replace(
            self, hidden=leaf(self.hidden), weight=leaf(self.weight), bias=leaf(self.bias)
        )


def make_problem(  # noqa: PLR0913  (each test says what it varies)
    *,
    n_rows: int = 24,
    n_pairs: int | None = None,
    width: int = 16,
    vocabulary: int = 301,
    dtype: torch.dtype = torch.float32,
    sharpness: float = 1.0,
    bias: bool = True,
    scale: float = 1.3,
    softcap: float | None = None,
    frozen: str = "",
) -> Problem:
    """Pairs share rows where `n_pairs` is given; a few weights are 0; temperatures differ."""
    hidden = torch.randn(n_rows, width)
    weight = torch.randn(vocabulary, width) * sharpness / width**0.5
    rows = None if n_pairs is None else torch.randint(n_rows, (n_pairs,))
    n = n_rows if n_pairs is None else n_pairs
    targets = torch.randint(vocabulary, (n,))
    temperature = 0.6 + torch.rand(n)
    if rows is not None:  # a row's pairs: equal targets, equal and different temperatures
        rows[1], targets[1], temperature[1] = rows[0], targets[0], temperature[0]
        rows[2], temperature[2] = rows[0], temperature[0]
        rows[3] = rows[0]
    weights = torch.rand(n) / n
    weights[4::7] = 0.0
    batch = TokenBatch(
        targets=targets,
        weights=weights,
        advantages=torch.randn(n),
        logp_old=-torch.rand(n) * 8,
        rows=rows,
        temperature=temperature,
    )
    made_bias = torch.randn(vocabulary) * 0.3 if bias else None
    leaves = {"hidden": hidden, "weight": weight, "bias": made_bias}
    ready = {
        name: None if t is None else t.to(dtype).requires_grad_(name not in frozen.split(","))
        for name, t in leaves.items()
    }
    return Problem(scale=scale, softcap=softcap, batch=batch, **ready)


def reference(problem: Problem) -> tuple[Tensor, Tensor]:
    """(logp, entropy) of every pair by plain PyTorch: float32 softmax over the dtype's product."""
    z = torch.nn.functional.linear(problem.hidden, problem.weight, problem.bias)
    z = (z if z.dtype == torch.float64 else z.float()) * problem.scale
    if problem.softcap is not None:
        z = problem.softcap * torch.tanh(z / problem.softcap)
    batch = problem.batch
    z = z if batch.rows is None else z[batch.rows]
    logp = (z / batch.temperature.unsqueeze(1)).log_softmax(1)
    entropy = -(logp.exp() * logp).sum(1)
    return logp.gather(1, batch.targets.unsqueeze(1)).squeeze(1), entropy


def smooth(logp: Tensor, entropy: Tensor, batch: TokenBatch) -> Tensor:
    """A token-local objective without kinks whose gradient needs every term."""
    ratio = torch.exp(0.3 * (logp - batch.logp_old))
    return -batch.advantages * ratio - 0.4 * entropy + 0.05 * logp * entropy


smooth_local = token_local()(smooth)


def coupled(logp: Tensor, entropy: Tensor, batch: TokenBatch) -> Tensor:
    """Every pair's value depends on all pairs."""
    return smooth(logp, entropy, batch) * torch.exp(0.2 * (logp - batch.logp_old).mean())


def without_entropy(logp: Tensor, entropy: Tensor, batch: TokenBatch) -> Tensor:
    return -batch.advantages * torch.exp(0.3 * (logp - batch.logp_old)) * (1 + logp.mean())


def reference_loss(problem: Problem, objective: Callable[..., Tensor]) -> tuple[Tensor, ...]:
    """(loss, logp, entropy) with the objective on the pairs of nonzero weight, in their order."""
    logp, entropy = reference(problem)
    keep = problem.batch.weights.nonzero().squeeze(1)
    batch = problem.batch.keep(keep)
    loss = (batch.weights * objective(logp[keep], entropy[keep], batch)).sum()
    return loss, logp, entropy


def gradients(loss: Tensor, problem: Problem) -> list[Tensor]:
    return list(torch.autograd.grad(loss, problem.leaves))


def assert_matches(problem: Problem, objective, request: Plan, *, slack: float = 1.5) -> None:
    """Loss, vectors and every gradient are no worse than plain PyTorch in the problem's dtype."""
    result = linear_policy_loss(
        problem.hidden, problem.head, problem.batch, objective, plan=request
    )
    found = [result.loss, *gradients(result.loss, problem)]
    exact = problem.cast(torch.float64)
    loss, logp, entropy = reference_loss(exact, objective)
    truth = [loss, *gradients(loss, exact)]
    plain_loss = reference_loss(problem, objective)[0]
    plain = [plain_loss, *gradients(plain_loss, problem)]
    half = problem.hidden.dtype in (torch.bfloat16, torch.float16)
    # Rounding a result to bf16 alone costs up to 2^-9 of it, to fp16 2^-12.
    floor = {torch.bfloat16: 2e-3, torch.float16: 4e-4}.get(problem.hidden.dtype, 5e-7)
    if half and request.kind == "hold":
        floor = 2e-3  # the exponentials are held in bfloat16
    names = ["loss", "dhidden", "dweight", "dbias"]
    for name, ours, ref, true in zip(names, found, plain, truth, strict=False):
        assert ours.dtype == ref.dtype, name
        allowed = floor if name != "loss" else 1e-5
        assert_no_worse(name, ours, ref, true, slack=slack, floor=allowed)
    if not half:
        assert_rows_no_worse("dhidden rows", found[1], plain[1], truth[1], slack=2.0, floor=2e-6)
    computed = result.computed
    assert torch.equal(computed, problem.batch.weights != 0)
    assert result.logp[~computed].isnan().all()
    assert_close("logp", result.logp[computed], logp[computed].detach(), atol=2e-5)
    assert_close("entropy", result.entropy[computed], entropy[computed].detach(), atol=2e-5)
