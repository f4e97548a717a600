"""Errors of a step against float64, and whether its numbers may be shown."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rollfuse.bench.cases import Outcome

# The largest relative Frobenius error of a gradient that still counts as correct. It must pass
# honest rounding in every library (bf16 logits and accumulators included) and nothing beyond it.
_LIMIT = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 2e-2, "float64": 1e-10}
# Log-probabilities: nats. Rounding logits of size 16 to bfloat16 costs 0.06.
_LIMIT_LOGP = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.25, "float64": 1e-10}
# A single row may be off by more than the whole.
_ROW_FACTOR = 10.0

Errors = dict[str, float]


def errors(got: Outcome, true: Outcome) -> Errors:
    """Errors by name.

    `loss`: relative. `logp`, `entropy`: maximum, in nats. `dhidden`, `dweight`: relative, in the
    Frobenius norm; with `_row`: the largest error of a row over that row's norm, or over the root
    mean square of all row norms where that is larger.
    A quantity the provider does not return has no entry.
    """
    found = {"loss": _scalar_error(got.loss, true.loss)}
    for name in ("logp", "entropy"):
        value, exact = getattr(got, name), getattr(true, name)
        if value is not None:
            off = (value.double() - exact).abs()
            found[name] = _largest(off if got.scored is None else off[got.scored])
    for name in ("dhidden", "dweight"):
        value, exact = getattr(got, name), getattr(true, name)
        if exact is None:
            continue
        if value is None:
            raise ValueError(f"{name}: need a gradient, got None")
        found[name], found[name + "_row"] = _gradient_errors(value, exact)
    return found


def complaint(found: Errors, dtype: str) -> str | None:
    """Which error is beyond what rounding explains, or None. NaN is beyond."""
    for name, error in found.items():
        limit = _LIMIT[dtype]
        if name in ("logp", "entropy", "loss"):
            limit = _LIMIT_LOGP[dtype]
        elif name.endswith("_row"):
            limit *= _ROW_FACTOR
        if not error <= limit:
            return f"{name} is off by {error:.1e} (limit {limit:.0e})"
    return None


def in_units_of(found: Errors, reference: Errors) -> Errors:
    """Each error as a multiple of the reference's error in the same dtype."""
    shared = [name for name in found if reference.get(name, 0.0) > 0.0]
    return {name: found[name] / reference[name] for name in shared}


def _scalar_error(got: Tensor, true: Tensor) -> float:
    return abs(float(got) - float(true)) / max(1.0, abs(float(true)))


def _largest(values: Tensor) -> float:
    """Maximum of non-negative values; NaN if one is NaN."""
    return float(values.max()) if values.numel() else 0.0


def _gradient_errors(got: Tensor, true: Tensor) -> tuple[float, float]:
    """Relative Frobenius error, and the largest error of a row over its norm or the RMS."""
    squares_true, squares_off = [], []
    for start in range(0, len(true), 4096):
        part, exact = got[start : start + 4096], true[start : start + 4096]
        squares_off.append((part.double() - exact).square().sum(1))
        squares_true.append(exact.square().sum(1))
    off, norm = torch.cat(squares_off), torch.cat(squares_true)
    total = float(norm.sum())
    if total == 0.0:
        return (0.0, 0.0) if float(off.sum()) == 0.0 else (math.inf, math.inf)
    worst = _largest(off / norm.clamp(min=total / len(norm)))
    return math.sqrt(float(off.sum()) / total), math.sqrt(worst)
