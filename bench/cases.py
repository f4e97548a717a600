"""The cases of `bench head`: their grid, inputs, float64 truth, FLOPs and bytes, each written once.

Legend: T tokens, D hidden width, V vocabulary. Every provider computes the same thing: a policy
loss (token mean, entropy bonus) of T tokens from `hidden` (T, D) and `weight` (V, D), and its
gradients to both. The loss is GRPO's, or that of a variant whose tokens depend on each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from rollfuse import TokenBatch, grpo, gspo
from rollfuse.kernels.objective import Objective, evaluate

Variant = Literal["dense", "masked", "zero_advantage", "gspo", "top_entropy"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
# What `bench head` measures unless told otherwise: GRPO, whose tokens do not depend on each other.
TOKEN_LOCAL: tuple[Variant, ...] = ("dense", "masked", "zero_advantage")

TOKENS = (128, 2048, 8192)
HIDDEN = (256, 1024)
VOCAB = (8192, 32768, 151936)

ENTROPY_COEF = 0.01
N_SEQUENCES = 32
N_ZERO_SEQUENCES = 13  # 40.6 % of the sequences, and so of the rows


@dataclass(frozen=True, slots=True)
class Case:
    """One problem size.

    `dense`: every row counts. `masked`: the first half of each sequence is a prompt. In
    `zero_advantage` 13 of 32 sequences have advantage 0, and the entropy bonus is off: with it
    those rows would have a gradient. `gspo`: every row counts, and so does every sequence's ratio,
    which is inside the band. `top_entropy`: GRPO on the fifth of the rows with the largest entropy.
    """

    tokens: int
    hidden: int
    vocab: int
    dtype: str = "float32"
    variant: Variant = "dense"
    frozen_head: bool = False

    @property
    def name(self) -> str:
        head = " frozen" if self.frozen_head else ""
        return f"{self.tokens}x{self.hidden}x{self.vocab} {self.dtype} {self.variant}{head}"

    @property
    def entropy_coef(self) -> float:
        return 0.0 if self.variant == "zero_advantage" else ENTROPY_COEF

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def sequence_length(self) -> int:
        return self.tokens // N_SEQUENCES

    @property
    def prompt_length(self) -> int:
        """How many tokens of each sequence do not count."""
        return self.sequence_length // 2 if self.variant == "masked" else 0

    @property
    def active_tokens(self) -> int:
        return self.tokens - N_SEQUENCES * self.prompt_length

    def flops(self) -> int:
        """FLOPs of the GEMMs when every row counts: logits, dX and, with a trainable head, dW."""
        return (4 if self.frozen_head else 6) * self.tokens * self.hidden * self.vocab

    def bytes(self) -> int:
        """The least memory traffic: operands read once, their gradients written once."""
        size = self.torch_dtype.itemsize
        weights = (1 if self.frozen_head else 2) * self.vocab * self.hidden
        return size * (2 * self.tokens * self.hidden + weights)

    def operand_bytes(self) -> int:
        """Bytes of the inputs and the returned gradients, which `peak` does not count."""
        return self.bytes()


HEADLINE = Case(2048, 1024, 32768)


def grid(
    tokens: tuple[int, ...] = TOKENS,
    hidden: tuple[int, ...] = HIDDEN,
    vocab: tuple[int, ...] = VOCAB,
) -> Iterator[Case]:
    """The dense float32 cases, smallest first."""
    sizes = [Case(t, d, v) for t in tokens for d in hidden for v in vocab]
    yield from sorted(sizes, key=lambda case: case.flops())


def variants(case: Case, wanted: tuple[Variant, ...]) -> Iterator[Case]:
    for variant in wanted:
        yield replace(case, variant=variant)


@dataclass(frozen=True, slots=True)
class Inputs:
    """What every provider gets; `hidden` and (unless frozen) `weight` need a gradient."""

    case: Case
    hidden: Tensor  # (T, D)
    weight: Tensor  # (V, D)
    batch: TokenBatch  # T pairs, identity rows; weights 0 where masked
    objective: Objective  # with the case's entropy bonus
    objective_without_entropy: Objective
    active: Tensor  # (A,) int64, rows with a weight

    def leaves(self) -> tuple[Tensor, ...]:
        return (self.hidden,) if self.case.frozen_head else (self.hidden, self.weight)


def make_inputs(case: Case, device: torch.device, *, seed: int = 0) -> Inputs:
    """Rows from flat to confident, ratios on both sides of the clip and away from its corners.

    Raises:
        ValueError: the tokens do not split into 32 sequences of equal length.
    """
    if case.tokens % N_SEQUENCES or case.tokens < 2 * N_SEQUENCES:
        raise ValueError(f"tokens: need a multiple of {N_SEQUENCES} >= 64, got {case.tokens}")
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    weight = normal(case.vocab, case.hidden) / math.sqrt(case.hidden)
    targets = torch.randint(case.vocab, (case.tokens,), generator=generator).to(device)
    margin = torch.linspace(0.0, 12.0, case.tokens, device=device)
    margin = margin[torch.randperm(case.tokens, generator=generator).to(device)]
    hidden = normal(case.tokens, case.hidden)
    hidden += margin.unsqueeze(1) * weight[targets]
    hidden, weight = hidden.to(case.torch_dtype), weight.to(case.torch_dtype)

    # A step of +-0.3 nats is clipped at 0.2, one of +-0.05 is not, in every dtype.
    steps = torch.tensor([-0.3, -0.05, 0.05, 0.3], device=device)
    logp_old = _logp(hidden, weight, targets) + steps[torch.arange(case.tokens) % 4]
    advantages = normal(N_SEQUENCES)
    mask = torch.ones(N_SEQUENCES, case.sequence_length, dtype=torch.bool, device=device)
    mask[:, : case.prompt_length] = False
    if case.variant == "zero_advantage":
        advantages[:N_ZERO_SEQUENCES] = 0.0
    flat = mask.reshape(-1)
    batch = TokenBatch(
        targets=targets,
        weights=flat / flat.sum(),
        advantages=advantages.repeat_interleave(case.sequence_length),
        logp_old=logp_old,
        cu_seqlens=torch.arange(N_SEQUENCES + 1, device=device) * case.sequence_length,
    )
    return Inputs(
        case=case,
        hidden=hidden.requires_grad_(),
        weight=weight.requires_grad_(not case.frozen_head),
        batch=batch,
        objective=_objective(case.variant, case.entropy_coef),
        objective_without_entropy=_objective(case.variant, 0.0),
        active=flat.nonzero().squeeze(1),
    )


def _objective(variant: Variant, entropy_coef: float) -> Objective:
    if variant == "gspo":
        # A band of 3e-4 would tell rounding from rounding in half dtypes.
        return gspo(0.2, 0.2, entropy_coef=entropy_coef)
    of_token = grpo(entropy_coef=entropy_coef)
    if variant != "top_entropy":
        return of_token

    def of_uncertain_tokens(logp: Tensor, entropy: Tensor, batch: TokenBatch) -> Tensor:
        # Half way between two entropies: rounding does not move a row across.
        border = torch.quantile(entropy.detach(), 0.8, interpolation="midpoint")
        return torch.where(entropy.detach() > border, of_token(logp, entropy, batch), 0.0)

    return of_uncertain_tokens


def _logp(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """(T,) float32 log-probabilities of the targets, a few rows at a time."""
    parts = []
    for start in range(0, hidden.shape[0], 128):
        rows = slice(start, start + 128)
        logits = (hidden[rows] @ weight.T).float()
        picked = logits.gather(1, targets[rows].unsqueeze(1)).squeeze(1)
        parts.append(picked - logits.logsumexp(1))
    return torch.cat(parts)


class Outcome(NamedTuple):
    """What one step of a provider returns; logp and entropy belong to the active rows."""

    loss: Tensor  # ()
    logp: Tensor | None  # (A,)
    entropy: Tensor | None  # (A,)
    dhidden: Tensor  # (T, D)
    dweight: Tensor | None  # (V, D), None with a frozen head
    scored: Tensor | None = None  # (A,) bool, which logp and entropy were computed; None: all


def truth(inputs: Inputs, objective: Objective, *, rows_at_once: int = 256) -> Outcome:
    """The same step in float64 on the same operands, by the plain formulas."""
    return _by_formulas(inputs, objective, torch.float64, rows_at_once)


def over_fp32_gemm(inputs: Inputs, objective: Objective, *, rows_at_once: int = 256) -> Outcome:
    """The least error to be had with float32 GEMMs: all that lies between them is float64.

    The operands are widened, which is exact. The logits' gradient is rounded to float32 for its two
    products, and their results to the operands' dtype, as everybody's are.
    """
    found = _by_formulas(inputs, objective, torch.float32, rows_at_once)
    dtype = inputs.case.torch_dtype
    dweight = None if found.dweight is None else found.dweight.to(dtype)
    return found._replace(dhidden=found.dhidden.to(dtype), dweight=dweight)


def _by_formulas(
    inputs: Inputs, objective: Objective, products: torch.dtype, rows_at_once: int
) -> Outcome:
    """The step with its three products in the dtype `products` and the rest in float64.

    In two passes over the rows, because an objective may look at all of them together.
    """
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach().to(products)
    active, targets = inputs.active, inputs.batch.targets
    slices = [active[i : i + rows_at_once] for i in range(0, len(active), rows_at_once)]

    def log_probabilities(rows: Tensor) -> Tensor:
        return torch.log_softmax((hidden[rows].to(products) @ weight.T).double(), 1)

    logps, entropies = [], []
    for rows in slices:
        scores = exact_scores(log_probabilities(rows), targets[rows])
        logps.append(scores[0])
        entropies.append(scores[1])
    logp, entropy = torch.cat(logps), torch.cat(entropies)
    found = evaluate(objective, logp, entropy, inputs.batch.keep(active))
    dhidden = torch.zeros_like(hidden, dtype=products)
    dweight = None if inputs.case.frozen_head else torch.zeros_like(weight)
    for i, rows in enumerate(slices):
        some = slice(i * rows_at_once, i * rows_at_once + len(rows))
        derivatives = found.dlogp[some], None if found.dentropy is None else found.dentropy[some]
        log_p = log_probabilities(rows)
        dlogits = exact_dlogits(log_p, targets[rows], entropy[some], *derivatives).to(products)
        dhidden[rows] = dlogits @ weight
        if dweight is not None:
            dweight.addmm_(dlogits.T, hidden[rows].to(products))
    return Outcome(found.loss, logp, entropy, dhidden, dweight)


def exact_scores(log_p: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """logp and entropy (rows,) by the plain formulas, of log-probabilities (rows, V) in float64."""
    logp = log_p.gather(1, targets.unsqueeze(1)).squeeze(1)
    return logp, -(log_p.exp() * log_p).sum(1)


def exact_dlogits(
    log_p: Tensor, targets: Tensor, entropy: Tensor, dlogp: Tensor, dentropy: Tensor | None
) -> Tensor:
    """(rows, V) the logits' gradient, likewise, from that of logp and of entropy (rows,)."""
    p = log_p.exp()
    dlogits = -dlogp.unsqueeze(1) * p
    dlogits[torch.arange(len(targets)), targets] += dlogp
    if dentropy is not None:
        dlogits -= dentropy.unsqueeze(1) * p * (log_p + entropy.unsqueeze(1))
    return dlogits
