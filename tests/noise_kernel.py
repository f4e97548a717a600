"""A Triton kernel that writes the noise out, for test_noise.py; the package only has helpers."""

import triton
import triton.language as tl

from rollfuse.kernels._triton.noise import (
    draw_key,
    draw_words,
    gumbels,
    noise_words,
    row_key,
    uniforms,
)


@triton.jit
def noise_kernel(  # noqa: PLR0913
    streams, positions, words_out, uniforms_out, gumbels_out, n_cols,
    PURPOSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    key = row_key(tl.load(streams + row), tl.load(positions + row), PURPOSE)
    cols = tl.arange(0, BLOCK)
    words = noise_words(key, cols)
    out, mask = row * n_cols + cols, cols < n_cols
    tl.store(words_out + out, words.to(tl.int32, bitcast=True), mask)
    tl.store(uniforms_out + out, uniforms(words), mask)
    tl.store(gumbels_out + out, gumbels(words), mask)


@triton.jit
def draw_kernel(
    streams, positions, words_out, n_cols,
    PURPOSE: tl.constexpr, IS_VLLM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    key = draw_key(tl.load(streams + row), tl.load(positions + row), PURPOSE, IS_VLLM)
    cols = tl.arange(0, BLOCK)
    words = draw_words(key, cols, IS_VLLM)
    tl.store(words_out + row * n_cols + cols, words.to(tl.int32, bitcast=True), cols < n_cols)
