"""The three products of the head, with float32 results whatever the operands are.

Operands in float32 (float64) go straight to the BLAS. Half operands are exact in float32: a device
that multiplies them at full rate into float32 does so, elsewhere they are widened, the weight a
slab of the vocabulary at a time. Legend: c rows of a chunk, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from rollfuse.kernels.rows import compute_dtype

# A widened slab of the weight is about this many elements: 32 MiB of float32.
SLAB_ELEMENTS = 1 << 23

# MKL sums the rows of a product alike, wherever they stand among 128, where the widths of hidden
# states and adapters are multiples of this; the vocabulary may be any. Measured in float32 and
# float64 over widths of 1 to 1024, ranks of 1 to 128 and vocabularies of 1 to 9999: products of 5
# to 11 columns (float64: of an odd number), or over an odd width, differ from row to row.
INVARIANT_MULTIPLE = 16


# Half operands, float32 result: only some devices have them, so tests put emulations here.
half_mm, half_addmm = torch.mm, torch.addmm


@cache
def multiplies_into_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `torch.mm(half, half, out_dtype=float32)` works on this device; found by trying."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    a = torch.ones(16, 16, device=device, dtype=dtype)
    into = torch.zeros(16, 16, device=device, dtype=torch.float32)
    try:
        torch.addmm(into, a, a, out_dtype=torch.float32, out=into)
        torch.mm(a, a, out_dtype=torch.float32, out=into)
    except (RuntimeError, TypeError):  # not built for this type, or an older torch
        return False
    return bool((into == 16.0).all())


def gradient_dtype(device: torch.device, operand: torch.dtype) -> torch.dtype:
    """The dtype the logits' gradient must have to be an operand of the gradient products."""
    return operand if multiplies_into_float32(device, operand) else compute_dtype(operand)


def project(x: Tensor, weight: Tensor, operand: torch.dtype, out: Tensor) -> None:
    """out (c, V) = x (c, D) weight' (D, V), both operands rounded to `operand` first."""
    x = x.to(operand)
    if multiplies_into_float32(x.device, operand):
        half_mm(x, weight.to(operand).t(), out_dtype=torch.float32, out=out)
        return
    wide = x.to(out.dtype)
    for start, slab in _slabs(weight, operand, out.dtype):
        torch.mm(wide, slab.t(), out=out[:, start : start + slab.shape[0]])


def add_projection(x: Tensor, weight: Tensor, operand: torch.dtype, out: Tensor) -> None:
    """out (c, V) += x (c, D) weight' (D, V), both operands rounded to `operand` first."""
    x = x.to(operand)
    if multiplies_into_float32(x.device, operand):
        half_addmm(out, x, weight.to(operand).t(), out_dtype=torch.float32, out=out)
        return
    wide = x.to(out.dtype)
    for start, slab in _slabs(weight, operand, out.dtype):
        out[:, start : start + slab.shape[0]].addmm_(wide, slab.t())


def project_gradient(dz: Tensor, weight: Tensor, operand: torch.dtype, out: Tensor) -> None:
    """out (c, D) = dz (c, V) weight (V, D)."""
    if dz.dtype == operand and multiplies_into_float32(dz.device, operand):
        half_mm(dz, weight.to(operand), out_dtype=torch.float32, out=out)
        return
    for start, slab in _slabs(weight, operand, dz.dtype):
        if start == 0:
            torch.mm(dz[:, : slab.shape[0]], slab, out=out)
        else:
            out.addmm_(dz[:, start : start + slab.shape[0]], slab)


def accumulate_weight_gradient(
    dz: Tensor, x: Tensor, operand: torch.dtype, into: Tensor, *, first: bool
) -> None:
    """into (V, D) += dz' (V, c) x (c, D); `first` overwrites what was there."""
    x = x.to(operand)
    if dz.dtype == operand and multiplies_into_float32(dz.device, operand):
        if first:
            half_mm(dz.t(), x, out_dtype=torch.float32, out=into)
        else:
            half_addmm(into, dz.t(), x, out_dtype=torch.float32, out=into)
        return
    x = x.to(into.dtype)
    if first:
        torch.mm(dz.t(), x, out=into)
    else:
        into.addmm_(dz.t(), x)


def write_weight_gradient(dz: Tensor, x: Tensor, operand: torch.dtype, out: Tensor) -> None:
    """out (V, D), narrow, = dz' (V, c) x (c, D), in wide slabs that are rounded once."""
    slab_rows = max(1, SLAB_ELEMENTS // max(x.shape[1], 1))
    wide = compute_dtype(operand)
    if dz.dtype == wide:
        x = x.to(operand).to(wide)
    for start in range(0, len(out), slab_rows):
        part = out[start : start + slab_rows]
        slab = torch.empty_like(part, dtype=wide)
        columns = dz[:, start : start + len(part)]
        accumulate_weight_gradient(columns, x, x.dtype, slab, first=True)
        part.copy_(slab)


def row_stride(vocabulary: int, device: torch.device) -> int:
    """Elements from one row of logits to the next in a workspace.

    On a CPU an odd multiple of 16: rows a large power of two apart fall into the same few cache
    sets, which costs the products over them 4 to 7 %.
    """
    if device.type != "cpu":
        return vocabulary
    return (-(-vocabulary // 16) | 1) * 16


def slab_bytes(vocabulary: int, width: int, weight: torch.dtype, operand: torch.dtype) -> int:
    """Bytes of the widened slab of a (V, D) weight; 0 where none is needed."""
    wide = compute_dtype(operand)
    if weight == operand == wide:
        return 0
    slab_rows = min(vocabulary, max(1, SLAB_ELEMENTS // max(width, 1)))
    return slab_rows * width * wide.itemsize


def _slabs(weight: Tensor, operand: torch.dtype, wide: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """(start, rows of the weight from start on), rounded to `operand` and widened."""
    if weight.dtype == operand == wide:
        yield 0, weight
        return
    slab_rows = max(1, SLAB_ELEMENTS // max(weight.shape[1], 1))
    for start in range(0, weight.shape[0], slab_rows):
        yield start, weight[start : start + slab_rows].to(operand).to(wide)
