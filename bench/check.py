"""Errors of a step against float64, and whether its numbers may be shown."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rollfuse.bench.cases import Outcome


class Limits(NamedTuple):
    """The largest errors that pass, by `errors`' names.

    A gradient's figures are beyond the rounding of the true gradient to the dtype it is returned
    in, which nobody can avoid: 1.7e-3 of the whole in bfloat16, and up to 2^-8 = 3.9e-3 of a row.
    """

    gradient: float  # relative, Frobenius
    row: float  # the same for the worst row
    nats: float  # logp, entropy; loss (relative)
    over_gemm: float = math.inf  # gradient, as a multiple of that of `cases.over_fp32_gemm`


# What we promise. Half operands: logits and sums are float32, but on a GPU the logits' gradient is
# an operand and so rounded once. That costs as much as rounding the result does, for a row of which
# one entry is nearly all the same 2^-8, and makes multiples of a float32 GEMM mean nothing.
# Nats: float32 logits of size 16 are good to 1e-5; tensor cores sum less carefully than a BLAS.
PROMISE = {
    "float32": Limits(gradient=1e-5, row=1e-5, nats=5e-5, over_gemm=1.5),
    "float16": Limits(gradient=2e-3, row=2e-3, nats=1e-3),
    "bfloat16": Limits(gradient=2e-3, row=4e-3, nats=1e-3),
}
# Honest rounding in every library, logits and accumulators in the operands' dtype included, and
# nothing beyond it. Rounding logits of size 16 to bfloat16 costs 0.06 nats.
ROUNDING = {
    "float32": Limits(gradient=1e-4, row=1e-3, nats=1e-3),
    "float16": Limits(gradient=1e-2, row=1e-1, nats=0.05),
    "bfloat16": Limits(gradient=2e-2, row=2e-1, nats=0.25),
}

Errors = dict[str, float]
Values = tuple[Tensor, Tensor | None, Tensor | None]  # loss, logp, entropy


def errors(got: Outcome, true: Outcome) -> Errors:
    """Errors by name.

    `loss`: relative where it is above 1. `logp`, `entropy`: maximum, in nats. `dhidden`,
    `dweight`: relative, in the Frobenius norm; with `_row`: the largest error of a row over that
    row's norm, or over the root mean square of all row norms where that is larger; with `_rounding`
    and `_row_rounding`: what rounding the true gradient to the dtype of the returned one costs in
    these two.
    A quantity the provider does not return has no entry.
    """
    found = value_errors(got[:3], true[:3], got.scored)
    for name in ("dhidden", "dweight"):
        value, exact = getattr(got, name), getattr(true, name)
        if exact is None:
            continue
        if value is None:
            raise ValueError(f"{name}: need a gradient, got None")
        found |= tensor_errors(name, value, exact)
    return found


def value_errors(got: Values, true: Values, scored: Tensor | None = None) -> Errors:
    """The entries of `errors` on loss, logp and entropy; `scored`: which of these two count."""
    found = {"loss": _scalar_error(got[0], true[0])}
    for name, value, exact in zip(("logp", "entropy"), got[1:], true[1:], strict=True):
        if value is not None:
            assert exact is not None
            off = (value.double() - exact).abs()
            found[name] = _largest(off if scored is None else off[scored])
    return found


def tensor_errors(name: str, got: Tensor, true: Tensor) -> Errors:
    """The four entries of `errors` on a tensor (rows, width): `name`, `_row`, and of rounding."""
    whole, row = _relative_errors(got, true)
    rounding, row_rounding = _relative_errors(true, true, got.dtype)
    return {
        name: whole,
        f"{name}_row": row,
        f"{name}_rounding": rounding,
        f"{name}_row_rounding": row_rounding,
    }


def complaint(found: Errors, limits: Limits, over_gemm: Errors | None = None) -> str | None:
    """Which error is beyond its limit, or None. NaN is beyond.

    Args:
        over_gemm: the same errors as multiples of those of `cases.over_fp32_gemm`; None: unknown.
    """
    for name, error in found.items():
        if name.endswith("_rounding"):
            continue
        limit = _limit(name, found, limits)
        if not error <= limit:
            return f"{name} is off by {error:.1e} (limit {limit:.1e})"
    for name in ("dhidden", "dweight"):
        multiple = (over_gemm or {}).get(name, 0.0)
        if not multiple <= limits.over_gemm:
            return f"{name} is off by {multiple:.2f} x an fp32 GEMM (limit {limits.over_gemm})"
    return None


def _limit(name: str, found: Errors, limits: Limits) -> float:
    if name in ("logp", "entropy", "loss"):
        return limits.nats
    rounding = found[name + "_rounding"]
    # Independent errors add up in squares, but in one row they may happen to have the same sign.
    return limits.row + rounding if name.endswith("_row") else math.hypot(limits.gradient, rounding)


def in_units_of(found: Errors, reference: Errors) -> Errors:
    """Each error as a multiple of the reference's error in the same dtype."""
    shared = [name for name in found if reference.get(name, 0.0) > 0.0]
    return {name: found[name] / reference[name] for name in shared}


def _scalar_error(got: Tensor, true: Tensor) -> float:
    return abs(float(got) - float(true)) / max(1.0, abs(float(true)))


def _largest(values: Tensor) -> float:
    """Maximum of non-negative values; NaN if one is NaN."""
    return float(values.max()) if values.numel() else 0.0


def _relative_errors(
    got: Tensor, true: Tensor, dtype: torch.dtype = torch.float64
) -> tuple[float, float]:
    """Relative Frobenius error, and the largest error of a row over its norm or the RMS.

    `got` is rounded to `dtype` first.
    """
    squares_true, squares_off = [], []
    for start in range(0, len(true), 4096):
        part, exact = got[start : start + 4096], true[start : start + 4096]
        squares_off.append((part.to(dtype).double() - exact).square().sum(1))
        squares_true.append(exact.square().sum(1))
    off, norm = torch.cat(squares_off), torch.cat(squares_true)
    total = float(norm.sum())
    if total == 0.0:
        return (0.0, 0.0) if float(off.sum()) == 0.0 else (math.inf, math.inf)
    worst = _largest(off / norm.clamp(min=total / len(norm)))
    return math.sqrt(float(off.sum()) / total), math.sqrt(worst)
