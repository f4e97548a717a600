"""The kernel of `rollfuse.kernels.sampling`: a program owns a row and passes over it once."""

import torch
import triton
import triton.language as tl

from rollfuse.kernels._triton.compile import CompileCase
from rollfuse.kernels._triton.noise import MAX_GUMBEL, gumbels, noise_words, row_key
from rollfuse.kernels._triton.rows import (
    LAUNCH,
    NUM_STAGES,
    join_block,
    launch_parameters,
    on_device_of,
)
from rollfuse.kernels.noise import Purpose
from rollfuse.kernels.rows import RowStatistics


# Row stride and vocabulary stay specialised: a model has one vocabulary, and whether it is a
# multiple of 16 decides if loads are vectorised. A shared temperature has stride 0.
@triton.jit(do_not_specialize=["stride_temperature"])
def _sample_kernel(
    logits, inverse_temperature, streams, positions,  # inputs
    ids, top, index, rest, spread,  # outputs
    n_cols, stride_row, stride_col, stride_temperature,
    PURPOSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride_row
    inverse = tl.load(inverse_temperature + row * stride_temperature)
    key = row_key(tl.load(streams + row), tl.load(positions + row).to(tl.int64), PURPOSE)
    lanes = tl.arange(0, BLOCK)
    m = tl.full((), -float("inf"), tl.float32)
    m_col = tl.full((), -1, tl.int32)
    others = tl.zeros((BLOCK,), tl.float32)
    centred = tl.zeros((BLOCK,), tl.float32)
    best = tl.full((), -float("inf"), tl.float32)
    best_id = tl.full((), 0, tl.int32)
    for start in range(0, n_cols, BLOCK):
        cols = start + lanes
        g = tl.load(logits + cols.to(tl.int64) * stride_col, cols < n_cols, other=-float("inf"))
        g = g.to(tl.float32)
        m, m_col, others, centred, block_top = join_block(
            m, m_col, others, centred, g, start, cols, lanes, inverse
        )
        if block_top * inverse + MAX_GUMBEL > best:
            scores = g * inverse + gumbels(noise_words(key, cols))
            score, block_id = tl.max(scores, 0, return_indices=True)
            if score > best:
                best = score
                best_id = start + block_id
    tl.store(ids + row, best_id)
    tl.store(top + row, m)
    tl.store(index + row, m_col)
    tl.store(rest + row, tl.sum(others))
    tl.store(spread + row, tl.sum(centred))


def draw_tokens(
    logits: torch.Tensor,
    streams: torch.Tensor,
    positions: torch.Tensor,
    inverse_temperature: torch.Tensor,
) -> tuple[torch.Tensor, RowStatistics]:
    """Ids (N,) int64 and the rows' statistics."""
    n_rows, n_cols = logits.shape
    ids = torch.empty_like(streams)
    top, rest, spread = (logits.new_empty(n_rows, dtype=torch.float32) for _ in range(3))
    stats = RowStatistics(top=top, top_column=torch.empty_like(ids), rest=rest, spread=spread)
    if n_rows == 0:
        return ids, stats
    block, num_warps = launch_parameters(n_cols)
    with on_device_of(logits):
        _sample_kernel[(n_rows,)](
            logits, inverse_temperature,
            streams.contiguous(), positions.to(torch.int64).contiguous(),
            ids, stats.top, stats.top_column, stats.rest, stats.spread,
            n_cols, logits.stride(0), logits.stride(1), inverse_temperature.stride(0),
            PURPOSE=int(Purpose.SAMPLE), BLOCK=block,
            num_warps=num_warps, num_stages=NUM_STAGES,
        )  # fmt: skip
    return ids, stats


def compile_cases() -> list[CompileCase]:
    """Every dtype at the largest block, the other blocks in float32."""
    cases = []
    for dtype, (block, num_warps) in [
        *(("fp32", launch) for launch in LAUNCH),
        *((half, LAUNCH[-1]) for half in ("bf16", "fp16")),
    ]:
        signature = {
            "logits": f"*{dtype}", "inverse_temperature": "*fp32",
            "streams": "*i64", "positions": "*i64",
            "ids": "*i64", "top": "*fp32", "index": "*i64",
            "rest": "*fp32", "spread": "*fp32",
            "n_cols": "i32", "stride_row": "i32", "stride_temperature": "i32",
        }  # fmt: skip
        constexprs: dict[str, object] = {
            "stride_col": 1,
            "PURPOSE": int(Purpose.SAMPLE),
            "BLOCK": block,
        }
        name = f"sample {dtype} block {block}"
        cases.append(
            CompileCase(name, _sample_kernel, signature, constexprs, num_warps, NUM_STAGES)
        )
    return cases
