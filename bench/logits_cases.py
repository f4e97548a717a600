"""The cases of `bench logits`: sizes, inputs, what a step returns, and its errors against float64.

Legend: T tokens, V vocabulary. Every provider computes a policy loss (GRPO, token mean, entropy
bonus) of T tokens from logits (T, V) that exist, and its gradient to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rollfuse import TokenBatch
from rollfuse.bench import cases, check
from rollfuse.bench.choice import Wrong
from rollfuse.kernels.objective import Evaluation, Objective, evaluate

TOKENS = (128, 2048, 8192)
VOCAB = (32768, 151936)

_WIDTH = 64  # of the product that makes the logits
_BLOCK = 1 << 23  # elements of float64 at once


@dataclass(frozen=True, slots=True)
class Case:
    """One problem size."""

    tokens: int
    vocab: int
    dtype: str = "float32"

    @property
    def of_head(self) -> cases.Case:
        """The case of `bench head` whose logits they are."""
        return cases.Case(self.tokens, _WIDTH, self.vocab, self.dtype)

    @property
    def logits_bytes(self) -> int:
        return self.tokens * self.vocab * self.of_head.torch_dtype.itemsize

    def bytes(self) -> int:
        """The least traffic: the logits read once, their gradient written once."""
        return 2 * self.logits_bytes


class Outcome(NamedTuple):
    """What a step returns."""

    loss: Tensor  # ()
    logp: Tensor | None  # (T,)
    entropy: Tensor | None  # (T,); None: the step has no entropy, and ran without the bonus
    dlogits: Tensor  # (T, V), or a view of that many rows; may lie where the logits lay
    ours: bool = False  # held to what we promise


@dataclass(slots=True)
class Inputs:
    """What every provider gets.

    A step may write over `logits`. `restore`, off the clock, makes them what they were.
    """

    case: Case
    logits: Tensor  # (T, V), requires a gradient and is no leaf, as a model's logits
    saved: Tensor  # (T, V), the same numbers
    batch: TokenBatch  # T pairs, identity rows
    objective: Objective
    objective_without_entropy: Objective
    others: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # more such pairs

    def restore(self) -> None:
        with torch.no_grad():
            for logits, saved in ((self.logits, self.saved), *self.others):
                logits.copy_(saved)

    def blocks(self) -> Iterator[slice]:
        """Rows of so many at once that float64 copies of them are small."""
        size = max(1, _BLOCK // self.case.vocab)
        for start in range(0, self.case.tokens, size):
            yield slice(start, start + size)


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """The logits of `bench head`'s dense case with a hidden width of 64, and its batch.

    Raises:
        ValueError: the tokens do not split into 32 sequences of equal length.
    """
    of_head = cases.make_inputs(case.of_head, device)
    saved = of_head.hidden.detach() @ of_head.weight.detach().T
    return Inputs(
        case=case,
        logits=computed(saved),
        saved=saved,
        batch=of_head.batch,
        objective=of_head.objective,
        objective_without_entropy=of_head.objective_without_entropy,
    )


def computed(values: Tensor) -> Tensor:
    """A copy that requires a gradient and is no leaf."""
    return values.detach().requires_grad_().clone()


def floor_steps(inputs: Inputs) -> dict[str, Callable[[], object]]:
    """The logits read once and as many bytes written once, elsewhere or in place.

    No loss with its gradient can do with less, so the faster one is the floor.
    """
    logits, saved = inputs.logits.detach(), inputs.saved
    return {"copy": lambda: logits.copy_(saved), "scaled in place": lambda: logits.mul_(1.0)}


class Judge:
    """Errors of results against the same step in float64 on the same logits."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        targets = inputs.batch.targets
        found = [cases.exact_scores(self._log_p(rows), targets[rows]) for rows in inputs.blocks()]
        self._logp, self._entropy = (torch.cat(parts) for parts in zip(*found, strict=True))
        # By whether the objective has an entropy term.
        self._truths: dict[bool, Evaluation] = {
            has_entropy: evaluate(objective, self._logp, self._entropy, inputs.batch)
            for has_entropy, objective in (
                (True, inputs.objective),
                (False, inputs.objective_without_entropy),
            )
        }

    def _log_p(self, rows: slice) -> Tensor:
        return torch.log_softmax(self.inputs.saved[rows].double(), 1)

    def accept(self, got: Outcome) -> dict[str, Any]:
        """The errors by name; of the gradient, those of the worst block of rows.

        Raises:
            Wrong: an error is beyond its limit.
        """
        case, targets = self.inputs.case, self.inputs.batch.targets
        limits = (check.PROMISE if got.ours else check.ROUNDING)[case.dtype]
        true = self._truths[got.entropy is not None]
        dlogits = got.dlogits.reshape(case.tokens, case.vocab)
        worst = check.value_errors(got[:3], (true.loss, self._logp, self._entropy))
        _raise_if_wrong(worst, limits)
        for rows in self.inputs.blocks():
            dentropy = None if true.dentropy is None else true.dentropy[rows]
            derivatives = self._entropy[rows], true.dlogp[rows], dentropy
            exact = cases.exact_dlogits(self._log_p(rows), targets[rows], *derivatives)
            errors = check.tensor_errors("dlogits", dlogits[rows], exact)
            _raise_if_wrong(errors, limits)
            worst |= {name: max(error, worst.get(name, 0.0)) for name, error in errors.items()}
        return dict(worst)


def _raise_if_wrong(errors: check.Errors, limits: check.Limits) -> None:
    complaint = check.complaint(errors, limits)
    if complaint is not None:
        raise Wrong(complaint)
