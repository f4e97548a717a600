"""Linear recurrences in a number of steps that is the logarithm of their length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor


def recurrence(values: Tensor, factors: Tensor) -> Tensor:
    """(N,) y_t = x_t + factor_t * y_{t-1}, differentiable in the values x, any number of times.

    A factor of 0 carries nothing, infinities and NaN neither. `factors` (N,), of the dtype of
    `values` (N,), are constants, and the first must be 0.
    """
    apply = cast(Callable[..., Tensor], _Recurrence.apply)
    return apply(values, factors)


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, factors: Tensor) -> Tensor:
        ctx.save_for_backward(factors)
        return _solve(values, factors)

    @staticmethod
    def backward(ctx: Any, dsums: Tensor) -> Any:
        (factors,) = ctx.saved_tensors
        # The same recurrence from the end, where factor_t carries from t to t - 1.
        return recurrence(dsums.flip(0), factors.roll(-1).flip(0)).flip(0), None


def _solve(values: Tensor, factors: Tensor) -> Tensor:
    """Every second y from pairs of values, which are half as many, then those between."""
    n_values = len(values)
    if n_values < 2:
        return values.clone()
    x, factor = (
        torch.nn.functional.pad(one, (0, n_values % 2)).reshape(-1, 2) for one in (values, factors)
    )
    pairs = x[:, 1] + _carried(factor[:, 1], x[:, 0])
    # What one factor of 0 stops must not pass as 0 times an infinity either.
    linked = torch.where((factor != 0).all(1), factor[:, 1] * factor[:, 0], 0.0)
    odd = _solve(pairs, linked)
    even = x[:, 0] + _carried(factor[:, 0], torch.nn.functional.pad(odd[:-1], (1, 0)))
    return torch.stack([even, odd], 1).reshape(-1)[:n_values]


def _carried(factor: Tensor, value: Tensor) -> Tensor:
    return torch.where(factor != 0, factor * value, 0.0)
