"""The kernel of `rollfuse.kernels.gradient`: a program owns a slot, reads and writes its row once.

dz_j = exp(z_j - z_top) * (alpha + beta (z_j - z_top)); target columns are replaced afterwards.
"""

import torch
import triton
import triton.language as tl

from rollfuse.kernels._triton.compile import CompileCase
from rollfuse.kernels._triton.rows import (
    FLOOR,
    LAUNCH,
    NUM_STAGES,
    is_out,
    launch_parameters,
    on_device_of,
    prepare,
    shift,
)
from rollfuse.kernels.rows import RowCoefficients, RowStatistics, Transform


@triton.jit(do_not_specialize=["pre_scale"])
def _gradient_kernel(
    logits, rows, factor, bias, reach, top, alpha, beta,  # inputs
    out,  # output, may be the logits' own storage
    n_cols, stride_row, stride_out, pre_scale,
    HAS_ROWS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_REACH: tl.constexpr, HAS_BETA: tl.constexpr, NARROWED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + slot) if HAS_ROWS else slot
    logits += row * stride_row
    out += row * stride_out
    f = tl.load(factor + slot)
    m = tl.load(top + slot)
    a = tl.load(alpha + slot)
    for start in range(0, n_cols, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < n_cols
        g = tl.load(logits + cols, inside, other=-float("inf"))
        pre = prepare(g, cols, inside, bias, pre_scale, HAS_BIAS, HAS_SOFTCAP)
        shifted = shift(pre, m, f)
        slope = a
        if HAS_BETA:
            slope += tl.load(beta + slot) * shifted
        dz = tl.exp(shifted) * slope
        if HAS_REACH:
            dz = tl.where(is_out(pre, m, tl.load(reach + slot)), 0.0, dz)
        if HAS_SOFTCAP:
            dz *= (1.0 - pre * pre) * pre_scale
        if NARROWED:
            # Narrow results lie over wide logits that other threads of this program may still have
            # to load: the bytes written here belong to this block or to an earlier one.
            tl.debug_barrier()
        tl.store(out + cols, dz.to(out.dtype.element_ty), inside)


@triton.jit
def _from_exponentials_kernel(
    exps, tops, rows, factor, top, alpha, beta,  # inputs
    out,  # output
    n_cols, stride_out,
    HAS_ROWS: tl.constexpr, HAS_BETA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + slot) if HAS_ROWS else slot
    exps += row * n_cols
    tops += row * tl.cdiv(n_cols, BLOCK)
    out += slot * stride_out
    f = tl.load(factor + slot)
    m = tl.load(top + slot)
    a = tl.load(alpha + slot)
    for start in range(0, n_cols, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < n_cols
        e = tl.load(exps + cols, inside, other=0.0).to(tl.float32)
        gap = shift(tl.load(tops + start // BLOCK), m, f)
        slope = a
        if HAS_BETA:
            slope += tl.load(beta + slot) * (gap + tl.where(e > 0.0, tl.log(e), FLOOR))
        dz = tl.exp(gap) * e * slope
        tl.store(out + cols, dz.to(out.dtype.element_ty), inside)


def fill_from_exponentials(
    keep: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    transform: Transform,
    stats: RowStatistics,
    coefficients: RowCoefficients,
    out: torch.Tensor,
) -> None:
    """`fill_gradient` of slots kept as exponentials (.., V) and block maxima, in some order."""
    (exps, tops, rows), beta = keep, coefficients.beta
    n_slots, n_cols = stats.top.shape[0], exps.shape[1]
    if n_slots == 0:
        return
    block, num_warps = launch_parameters(n_cols)
    with on_device_of(out):
        _from_exponentials_kernel[(n_slots,)](
            exps, tops, rows, transform.factor, stats.top, coefficients.alpha, beta,
            out,
            n_cols, out.stride(0),
            HAS_ROWS=rows is not None, HAS_BETA=beta is not None, BLOCK=block,
            num_warps=num_warps, num_stages=NUM_STAGES,
        )  # fmt: skip


def fill_gradient(  # one launch: inputs, vectors, output, map
    logits: torch.Tensor,
    transform: Transform,
    stats: RowStatistics,
    coefficients: RowCoefficients,
    out: torch.Tensor,
    rows: torch.Tensor | None,
) -> None:
    """Write the slots' gradients into their rows of `out`, whose columns are contiguous."""
    n_slots, n_cols = stats.top.shape[0], logits.shape[1]
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    if n_slots == 0:
        return
    block, num_warps = launch_parameters(n_cols)
    beta = coefficients.beta
    with on_device_of(logits):
        _gradient_kernel[(n_slots,)](
            logits, rows, transform.factor, transform.bias, transform.reach,
            stats.top, coefficients.alpha, beta,
            out,
            n_cols, logits.stride(0), out.stride(0), transform.pre_scale or 0.0,
            HAS_ROWS=rows is not None, HAS_BIAS=transform.bias is not None,
            HAS_SOFTCAP=transform.pre_scale is not None,
            HAS_REACH=transform.reach is not None, HAS_BETA=beta is not None,
            NARROWED=out.dtype != logits.dtype, BLOCK=block,
            num_warps=num_warps, num_stages=NUM_STAGES,
        )  # fmt: skip


def compile_cases() -> list[CompileCase]:
    """Every dtype pair the ops use and every option; plain and full at the largest block."""
    cases = []
    pairs = [
        ("fp32", "fp32"),
        ("fp32", "bf16"),
        ("fp32", "fp16"),
        ("bf16", "bf16"),
        ("fp16", "fp16"),
    ]
    for pair in pairs:
        for block, num_warps in LAUNCH:
            for options in range(32):
                flags = [bool(options & bit) for bit in (1, 2, 4, 8, 16)]
                covering = options in (0, 15, 31) and (block, num_warps) == LAUNCH[-1]
                cases.append(_case(pair, block, num_warps, flags, covering))
    for dtype in ("bf16", "fp16", "fp32"):
        for block, num_warps in LAUNCH:
            for options in range(4):
                flags = [bool(options & bit) for bit in (1, 2)]
                last = (block, num_warps) == LAUNCH[-1]
                covering = last and dtype != "fp16" and options in (0, 3)
                cases.append(_exponentials_case(dtype, block, num_warps, flags, covering))
    return cases


def _exponentials_case(
    dtype: str, block: int, num_warps: int, flags: list[bool], covering: bool
) -> CompileCase:
    has_rows, has_beta = flags
    signature = {
        "exps": "*bf16", "tops": "*fp32", "rows": "*i64", "factor": "*fp32", "top": "*fp32",
        "alpha": "*fp32", "beta": "*fp32", "out": f"*{dtype}", "n_cols": "i32", "stride_out": "i32",
    }  # fmt: skip
    return CompileCase(
        f"gradient of exponentials ->{dtype} block {block} rows {has_rows} entropy {has_beta}",
        _from_exponentials_kernel,
        signature,
        {"HAS_ROWS": has_rows, "HAS_BETA": has_beta, "BLOCK": block},
        num_warps,
        NUM_STAGES,
        covering,
    )


def _case(
    pair: tuple[str, str], block: int, num_warps: int, flags: list[bool], covering: bool
) -> CompileCase:
    has_rows, has_bias, has_softcap, has_beta, has_reach = flags
    signature = {
        "logits": f"*{pair[0]}", "rows": "*i64", "factor": "*fp32", "bias": "*fp32",
        "reach": "*fp32", "top": "*fp32", "alpha": "*fp32", "beta": "*fp32",
        "out": f"*{pair[1]}",
        "n_cols": "i32", "stride_row": "i32", "stride_out": "i32", "pre_scale": "fp32",
    }  # fmt: skip
    constexprs: dict[str, object] = {
        "HAS_ROWS": has_rows, "HAS_BIAS": has_bias, "HAS_SOFTCAP": has_softcap,
        "HAS_REACH": has_reach, "HAS_BETA": has_beta, "NARROWED": pair[0] != pair[1],
        "BLOCK": block,
    }  # fmt: skip
    name = (
        f"gradient {pair[0]}->{pair[1]} block {block} rows {has_rows} bias {has_bias} "
        f"softcap {has_softcap} reach {has_reach} entropy {has_beta}"
    )
    return CompileCase(
        name, _gradient_kernel, signature, constexprs, num_warps, NUM_STAGES, covering
    )
