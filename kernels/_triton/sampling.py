"""The kernel of `rollfuse.kernels.drawing`: a program owns a row and passes over it once.

Under a reach twice: what is within reach is known only with the maximum.
"""

import torch
import triton
import triton.language as tl

from rollfuse.kernels._triton.compile import CompileCase
from rollfuse.kernels._triton.noise import MAX_GUMBEL, draw_key, draw_words, gumbels
from rollfuse.kernels._triton.rows import (
    LAUNCH,
    NUM_STAGES,
    is_out,
    join_block,
    launch_parameters,
    on_device_of,
    prepare,
)
from rollfuse.kernels.noise import NoiseFamily, Purpose
from rollfuse.kernels.rows import RowStatistics, Transform


# Row stride and vocabulary stay specialised: a model has one vocabulary, and whether it is a
# multiple of 16 decides if loads are vectorised.
@triton.jit(do_not_specialize=["pre_scale", "n_streams", "first_token"])
def _draw_kernel(
    logits, factor, bias, reach, streams, positions,  # inputs
    ids, score, top, index, rest, spread,  # outputs
    n_cols, stride_row, stride_col, pre_scale, n_streams, first_token,
    PURPOSE: tl.constexpr, IS_VLLM: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_REACH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride_row
    streams += row * n_streams
    f = tl.load(factor + row)
    position = tl.load(positions + row)
    key = draw_key(tl.load(streams), position, PURPOSE, IS_VLLM)
    lanes = tl.arange(0, BLOCK)
    m = tl.full((), -float("inf"), tl.float32)
    m_col = tl.full((), -1, tl.int32)
    others = tl.zeros((BLOCK,), tl.float32)
    centred = tl.zeros((BLOCK,), tl.float32)
    best = tl.full((), -float("inf"), tl.float32)
    best_id = tl.full((), 0, tl.int32)
    if HAS_REACH:
        furthest = tl.load(reach + row)
        for start in range(0, n_cols, BLOCK):
            cols = start + lanes
            inside = cols < n_cols
            g = tl.load(logits + cols.to(tl.int64) * stride_col, inside, other=-float("inf"))
            g = prepare(g, cols, inside, bias, pre_scale, HAS_BIAS, HAS_SOFTCAP)
            block_top, block_col = tl.max(g, 0, return_indices=True)
            if block_top > m:
                m = block_top
                m_col = start + block_col
    for start in range(0, n_cols, BLOCK):
        cols = start + lanes
        inside = cols < n_cols
        g = tl.load(logits + cols.to(tl.int64) * stride_col, inside, other=-float("inf"))
        g = prepare(g, cols, inside, bias, pre_scale, HAS_BIAS, HAS_SOFTCAP)
        if HAS_REACH:
            g = tl.where(is_out(g, m, furthest), -float("inf"), g)
        m, m_col, others, centred, block_top = join_block(
            m, m_col, others, centred, g, start, cols, lanes, f
        )
        if block_top * f + MAX_GUMBEL > best:
            tokens = first_token + cols
            words = draw_words(key, tokens, IS_VLLM)
            for k in range(1, n_streams):
                other = draw_key(tl.load(streams + k), position, PURPOSE, IS_VLLM)
                words = tl.minimum(words, draw_words(other, tokens, IS_VLLM))
            block_score, block_id = tl.max(g * f + gumbels(words), 0, return_indices=True)
            if block_score > best:
                best = block_score
                best_id = start + block_id
    tl.store(ids + row, first_token + best_id)
    tl.store(score + row, best)
    tl.store(top + row, m)
    tl.store(index + row, m_col)
    tl.store(rest + row, tl.sum(others))
    tl.store(spread + row, tl.sum(centred))


def draw_tokens(
    logits: torch.Tensor,
    transform: Transform,
    noise: tuple[torch.Tensor, torch.Tensor, NoiseFamily],
    first_token: int,
) -> tuple[torch.Tensor, torch.Tensor, RowStatistics]:
    """Ids (S,) int64, the first column being `first_token`; their z plus noise (S,); statistics.

    noise: streams (S, K), positions (S,), the family.
    """
    streams, positions, family = noise
    n_rows, n_cols = logits.shape
    ids = streams.new_empty(n_rows)
    score, top, rest, spread = (logits.new_empty(n_rows, dtype=torch.float32) for _ in range(4))
    stats = RowStatistics(top=top, top_column=torch.empty_like(ids), rest=rest, spread=spread)
    if n_rows == 0:
        return ids, score, stats
    block, num_warps = launch_parameters(n_cols)
    with on_device_of(logits):
        _draw_kernel[(n_rows,)](
            logits, transform.factor, transform.bias, transform.reach,
            streams.contiguous(), positions.to(torch.int64).contiguous(),
            ids, score, stats.top, stats.top_column, stats.rest, stats.spread,
            n_cols, logits.stride(0), logits.stride(1), transform.pre_scale or 0.0,
            streams.shape[1], first_token,
            PURPOSE=int(Purpose.SAMPLE), IS_VLLM=family is NoiseFamily.VLLM,
            HAS_BIAS=transform.bias is not None, HAS_SOFTCAP=transform.pre_scale is not None,
            HAS_REACH=transform.reach is not None, BLOCK=block,
            num_warps=num_warps, num_stages=NUM_STAGES,
        )  # fmt: skip
    return ids, score, stats


def compile_cases() -> list[CompileCase]:
    """Every dtype, block and combination of options; the largest block plain, cut and full."""
    cases = []
    for dtype in ("fp32", "bf16", "fp16"):
        for block, num_warps in LAUNCH:
            for options in range(16):
                flags = [bool(options & bit) for bit in (1, 2, 4, 8)]
                if dtype != "fp32" and (flags[0] or flags[1]):
                    continue  # a head's logits are a float32 workspace
                covering = (block, num_warps) == LAUNCH[-1] and options in (0, 4, 8, 15)
                covering |= dtype == "fp32" and options == 7
                cases.append(_case(dtype, block, num_warps, flags, covering))
    return cases


def _case(dtype: str, block: int, num_warps: int, flags: list[bool], covering: bool) -> CompileCase:
    has_bias, has_softcap, has_reach, is_vllm = flags
    signature = {
        "logits": f"*{dtype}", "factor": "*fp32", "bias": "*fp32", "reach": "*fp32",
        "streams": "*i64", "positions": "*i64",
        "ids": "*i64", "score": "*fp32", "top": "*fp32", "index": "*i64",
        "rest": "*fp32", "spread": "*fp32",
        "n_cols": "i32", "stride_row": "i32", "pre_scale": "fp32",
        "n_streams": "i32", "first_token": "i32",
    }  # fmt: skip
    constexprs: dict[str, object] = {
        "stride_col": 1, "PURPOSE": int(Purpose.SAMPLE), "IS_VLLM": is_vllm,
        "HAS_BIAS": has_bias, "HAS_SOFTCAP": has_softcap, "HAS_REACH": has_reach, "BLOCK": block,
    }  # fmt: skip
    name = (
        f"draw {dtype} block {block} bias {has_bias} softcap {has_softcap} reach {has_reach} "
        f"vllm {is_vllm}"
    )
    return CompileCase(name, _draw_kernel, signature, constexprs, num_warps, NUM_STAGES, covering)
