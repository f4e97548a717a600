"""How the ops describe rows of logits, for the PyTorch path and the Triton kernels alike.

A logit g becomes z = factor * pre(g) with pre(g) = g + bias, or tanh(pre_scale * (g + bias)) under
a softcap: one monotone map a row, so the maximum is found before it and distances to the maximum
are subtracted before they are scaled. Legend: R logits rows, S slots (a row at one temperature),
P pairs, V vocabulary.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# Stands for -inf after the shift: its exponential is 0 and its products stay finite.
FLOOR = -1e30


class LogpEntropy(NamedTuple):
    """Both (P,), float32 (float64 for float64 inputs), in nats."""

    logp: Tensor
    entropy: Tensor


class Transform(NamedTuple):
    """From a logit g to the z of the softmax: z = factor * pre(g)."""

    factor: Tensor  # (S,) > 0, scale / temperature, or softcap / temperature
    bias: Tensor | None = None  # (V,)
    pre_scale: float | None = None  # scale / softcap under a softcap
    reach: Tensor | None = None  # (S,) how far pre(g) may be below the maximum; past it p is 0
    invariant: bool = False  # an element's exponential has the same bits wherever it lies

    def cut(self, support: Tensor) -> Transform:
        """With no probability further than `support` (S,) nats below the maximum."""
        reach = widened(support) / self.factor
        return Transform(self.factor, self.bias, self.pre_scale, reach, self.invariant)

    def rows(self, start: int, stop: int) -> Transform:
        # Written out: torch.compile of torch 2.11 cannot trace `_replace`.
        reach = None if self.reach is None else self.reach[start:stop]
        factor = self.factor[start:stop]
        return Transform(factor, self.bias, self.pre_scale, reach, self.invariant)


class RowStatistics(NamedTuple):
    """Per slot; float32, or float64 for float64 logits."""

    top: Tensor  # (S,) largest pre(g); -inf where the whole row is; may pass over a NaN
    top_column: Tensor  # (S,) int64, its column
    rest: Tensor  # (S,) sum of exp(z - z_top) over all other columns; NaN if there is one
    spread: Tensor  # (S,) sum of exp(z - z_top) * (z_top - z)

    def rows(self, start: int, stop: int) -> RowStatistics:
        return RowStatistics(*(field[start:stop] for field in self))


def widened(support: Tensor) -> Tensor:
    """A little more than was asked for: a token on the border stays however its logit was rounded.

    Samplers cut where losses cut that replay them: both take this.
    """
    return support * (1.0 + 1e-5) + 1e-6


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, statistics and gradients inside the ops: float32, or float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class RowCoefficients(NamedTuple):
    """What the gradient pass needs."""

    alpha: Tensor  # (S,)
    beta: Tensor | None  # (S,), None without an entropy gradient
    slot: Tensor  # (P,) int64
    column: Tensor  # (P,) int64
    value: Tensor  # (P,) the whole gradient of the target's logit; equal where targets are
    beyond: bool = False  # a column may be V, past the row

    def bound(self) -> Tensor:
        """() at least the largest |gradient|: exp(x) |x| is at most 1 / e below the maximum."""
        largest = torch.maximum(self.alpha.abs().max(), self.value.abs().max())
        return largest if self.beta is None else largest + self.beta.abs().max() / math.e

    def times(self, scale: Tensor) -> RowCoefficients:
        """Those of a gradient `scale` times as large."""
        beta = None if self.beta is None else self.beta * scale
        alpha, value = self.alpha * scale, self.value * scale
        return RowCoefficients(alpha, beta, self.slot, self.column, value, self.beyond)
