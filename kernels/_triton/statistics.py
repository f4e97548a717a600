"""The kernel of `rollfuse.kernels.statistics`: a program owns a slot and reads its row once."""

import torch
import triton
import triton.language as tl

from rollfuse.kernels._triton.compile import CompileCase
from rollfuse.kernels._triton.rows import (
    LAUNCH,
    NUM_STAGES,
    is_out,
    join_block,
    launch_parameters,
    on_device_of,
    prepare,
    shift,
)
from rollfuse.kernels.rows import RowStatistics, Transform


# The vocabulary and the row stride stay specialised: a model has one, and whether it is a multiple
# of 16 decides if loads are vectorised.
@triton.jit(do_not_specialize=["pre_scale"])
def _statistics_kernel(
    logits, rows, factor, bias, reach,  # inputs
    top, index, rest, spread, exps, tops,  # outputs; the last two only under KEEP
    n_cols, stride_row, pre_scale,
    HAS_ROWS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_REACH: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + slot) if HAS_ROWS else slot
    logits += row * stride_row
    f = tl.load(factor + slot)
    lanes = tl.arange(0, BLOCK)
    m = tl.full((), -float("inf"), tl.float32)
    m_col = tl.full((), -1, tl.int32)
    others = tl.zeros((BLOCK,), tl.float32)
    centred = tl.zeros((BLOCK,), tl.float32)
    if HAS_REACH:
        # What is within reach is known only with the maximum: that is a pass of its own.
        for start in range(0, n_cols, BLOCK):
            cols = start + lanes
            inside = cols < n_cols
            g = tl.load(logits + cols, inside, other=-float("inf"))
            g = prepare(g, cols, inside, bias, pre_scale, HAS_BIAS, HAS_SOFTCAP)
            block_top, block_col = tl.max(g, 0, return_indices=True)
            if block_top > m:
                m = block_top
                m_col = start + block_col
    for start in range(0, n_cols, BLOCK):
        cols = start + lanes
        inside = cols < n_cols
        g = tl.load(logits + cols, inside, other=-float("inf"))
        g = prepare(g, cols, inside, bias, pre_scale, HAS_BIAS, HAS_SOFTCAP)
        if HAS_REACH:
            g = tl.where(is_out(g, m, tl.load(reach + slot)), -float("inf"), g)
        m, m_col, others, centred, block_top = join_block(
            m, m_col, others, centred, g, start, cols, lanes, f
        )
        if KEEP:
            e = tl.exp(shift(g, block_top, f))
            tl.store(exps + slot * n_cols + cols, e, inside)
            tl.store(tops + slot * tl.cdiv(n_cols, BLOCK) + start // BLOCK, block_top)
    tl.store(top + slot, m)
    tl.store(index + slot, m_col)
    tl.store(rest + slot, tl.sum(others))
    tl.store(spread + slot, tl.sum(centred))


def row_statistics(
    logits: torch.Tensor,
    transform: Transform,
    rows: torch.Tensor | None,
    keep: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None,
) -> RowStatistics:
    """`keep`: (S, V) bfloat16 and (S, blocks) float32, contiguous, for a later gradient."""
    n_slots, n_cols = transform.factor.shape[0], logits.shape[1]
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    new = logits.new_empty
    stats = RowStatistics(
        new(n_slots, dtype=torch.float32), new(n_slots, dtype=torch.int64),
        new(n_slots, dtype=torch.float32), new(n_slots, dtype=torch.float32),
    )  # fmt: skip
    if n_slots == 0:
        return stats
    block, num_warps = launch_parameters(n_cols)
    exps, tops = (None, None) if keep is None else keep[:2]
    with on_device_of(logits):
        _statistics_kernel[(n_slots,)](
            logits, rows, transform.factor, transform.bias, transform.reach,
            stats.top, stats.top_column, stats.rest, stats.spread, exps, tops,
            n_cols, logits.stride(0), transform.pre_scale or 0.0,
            HAS_ROWS=rows is not None, HAS_BIAS=transform.bias is not None,
            HAS_SOFTCAP=transform.pre_scale is not None,
            HAS_REACH=transform.reach is not None, KEEP=keep is not None, BLOCK=block,
            num_warps=num_warps, num_stages=NUM_STAGES,
        )  # fmt: skip
    return stats


def compile_cases() -> list[CompileCase]:
    """Every input dtype, block and combination of options; plain and full at the largest block."""
    cases = []
    for dtype in ("fp32", "bf16", "fp16"):
        for block, num_warps in LAUNCH:
            for options in range(32):
                flags = [bool(options & bit) for bit in (1, 2, 4, 8, 16)]
                if flags[3] and (dtype != "fp32" or flags[0] or flags[2] or flags[4]):
                    continue  # exponentials are kept of a workspace's whole rows, uncapped
                covering = options in (0, 7, 10, 23) and (block, num_warps) == LAUNCH[-1]
                cases.append(_case(dtype, block, num_warps, flags, covering))
    return cases


def _case(dtype: str, block: int, num_warps: int, flags: list[bool], covering: bool) -> CompileCase:
    has_rows, has_bias, has_softcap, keep, has_reach = flags
    signature = {
        "logits": f"*{dtype}", "rows": "*i64", "factor": "*fp32", "bias": "*fp32",
        "reach": "*fp32", "top": "*fp32", "index": "*i64", "rest": "*fp32", "spread": "*fp32",
        "exps": "*bf16", "tops": "*fp32", "n_cols": "i32", "stride_row": "i32", "pre_scale": "fp32",
    }  # fmt: skip
    constexprs: dict[str, object] = {
        "HAS_ROWS": has_rows, "HAS_BIAS": has_bias, "HAS_SOFTCAP": has_softcap,
        "HAS_REACH": has_reach, "KEEP": keep, "BLOCK": block,
    }  # fmt: skip
    name = (
        f"statistics {dtype} block {block} rows {has_rows} bias {has_bias} softcap {has_softcap} "
        f"reach {has_reach} keep {keep}"
    )
    return CompileCase(
        name, _statistics_kernel, signature, constexprs, num_warps, NUM_STAGES, covering
    )
