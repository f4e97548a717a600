"""Jit helpers for kernels in which a program owns a row of logits and walks it in blocks."""

import contextlib

import torch
import triton
import triton.language as tl

from rollfuse.kernels import rows

FLOOR = tl.constexpr(rows.FLOOR)

# (largest BLOCK, warps): a small vocabulary is one block, a large one a loop. A block of 4096
# needs so many registers that some targets spill.
LAUNCH = ((256, 1), (1024, 4), (2048, 8))
NUM_STAGES = 2


@triton.jit
def prepare(g, cols, inside, bias, pre_scale, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """pre(g) of a block in float32; -inf outside the row."""
    g = g.to(tl.float32)
    if HAS_BIAS:
        g += tl.load(bias + cols, inside, other=0.0)
    if HAS_SOFTCAP:
        g = tl.where(inside, tanh(g * pre_scale), -float("inf"))
    return g


@triton.jit
def tanh(x):
    """To 1e-7 of 1: the quotient, and near 0, where it cancels, the series to x^7."""
    t = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - t) / (1.0 + t)
    y = x * x
    series = x * (1.0 + y * (-1.0 / 3.0 + y * (2.0 / 15.0 - y * (17.0 / 315.0))))
    return tl.where(tl.abs(x) < 0.1, series, tl.where(x < 0, -large, large))


@triton.jit
def join_block(m, m_col, others, centred, g, start, cols, lanes, factor):
    """Add a block of pre(g) to a row's running statistics.

    m and m_col are the maximum so far and its column; others and centred hold, lane by lane, the
    sums over all columns but that one. Returns the four, and the block's maximum.
    """
    block_top, block_col = tl.max(g, 0, return_indices=True)
    if block_top > m:
        # The old maximum joins the others, in lane 0; while m is -inf there is none.
        gap = tl.where(m == -float("inf"), 0.0, tl.minimum((block_top - m) * factor, -FLOOR))
        joining = tl.where(m == -float("inf"), 0.0, 1.0)
        others += tl.where(lanes == 0, joining, 0.0)
        scale = tl.exp(-gap)
        # Past the range of exp the product would be 0 * 1e30: it is 0.
        centred = tl.where(scale == 0.0, 0.0, (centred + others * gap) * scale)
        others *= scale
        m = block_top
        m_col = start + block_col
    shifted = shift(g, m, factor)
    e = tl.where(cols == m_col, 0.0, tl.exp(shifted))
    return m, m_col, others + e, centred - e * shifted, block_top


@triton.jit
def shift(g, m, factor):
    """z - z_top, with FLOOR for -inf; a comparison, not a maximum, so that NaN spoils the sums."""
    shifted = (g - tl.where(m == -float("inf"), 0.0, m)) * factor
    return tl.where(shifted < FLOOR, FLOOR, shifted)


@triton.jit
def is_out(g, m, reach):
    """Whether pre(g) is further than `reach` below the row's maximum."""
    return g - tl.where(m == -float("inf"), 0.0, m) < -reach


def launch_parameters(n_cols: int, launch: tuple[tuple[int, int], ...] = LAUNCH) -> tuple[int, int]:
    """(BLOCK, warps) for rows of `n_cols` columns."""
    for largest, num_warps in launch:
        if n_cols <= largest:
            return max(16, triton.next_power_of_2(n_cols)), num_warps
    return launch[-1]


def on_device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Launch on the tensor's own device, whichever is current."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
