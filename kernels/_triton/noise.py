"""Jit helpers for the noise of `rollfuse.kernels.noise`, which holds the formulas.

Those of vLLM's noise are in `rollfuse.kernels.sampling_noise`.
"""

import triton
import triton.language as tl

from rollfuse.kernels import noise, sampling_noise

PURPOSE_STEP = tl.constexpr(noise.PURPOSE_STEP)
TOKEN_STEP = tl.constexpr(noise.TOKEN_STEP)
MIX64_1 = tl.constexpr(noise.MIX64_1)
MIX64_2 = tl.constexpr(noise.MIX64_2)
MIX_1 = tl.constexpr(noise.MIX_1)
MIX_2 = tl.constexpr(noise.MIX_2)
MURMUR_1 = tl.constexpr(sampling_noise.MURMUR_1)
MURMUR_2 = tl.constexpr(sampling_noise.MURMUR_2)
MURMUR_ADD = tl.constexpr(sampling_noise.MURMUR_ADD)
MURMUR_3 = tl.constexpr(sampling_noise.MURMUR_3)
MURMUR_4 = tl.constexpr(sampling_noise.MURMUR_4)
MURMUR_LENGTH = tl.constexpr(sampling_noise.MURMUR_LENGTH)
BELOW_ONE = tl.constexpr(noise.BELOW_ONE)
# No Gumbel is larger (the largest is 33 log 2 = 22.874): what cannot win with it needs no noise.
MAX_GUMBEL = tl.constexpr(22.9)


@triton.jit
def mix64(x):
    x = (x ^ (x >> 30)) * MIX64_1
    x = (x ^ (x >> 27)) * MIX64_2
    return x ^ (x >> 31)


@triton.jit
def row_key(stream, position, PURPOSE: tl.constexpr):
    """uint64 key of a row from its int64 stream and position."""
    step: tl.constexpr = (PURPOSE_STEP * PURPOSE) & 0xFFFFFFFFFFFFFFFF
    stream = stream.to(tl.uint64, bitcast=True) + step
    return mix64(mix64(stream) ^ position.to(tl.uint64, bitcast=True))


@triton.jit
def noise_words(key, tokens):
    """uint32 words of int32 token ids under one row's key."""
    low = key.to(tl.uint32)
    high = (key >> 32).to(tl.uint32)
    x = (tokens.to(tl.uint32, bitcast=True) * TOKEN_STEP) ^ low
    x = (x ^ (x >> 16)) * MIX_1 + high
    x = (x ^ (x >> 15)) * MIX_2
    return x ^ (x >> 16)


@triton.jit
def uniforms(words):
    """float32 uniforms, bit-equal to the PyTorch path: the same roundings in the same order."""
    u = words.to(tl.int32, bitcast=True).to(tl.float32) * 2.3283064365386963e-10 + 2.0**-33
    return tl.minimum(u - tl.floor(u), BELOW_ONE)


@triton.jit
def gumbels(words):
    """Standard Gumbel noise, -log(-log1p(-u))."""
    u = uniforms(words)
    # log1p(-u) = log(y) * -u / (y - 1) with y = 1 - u as rounded: the rounding cancels (Kahan).
    y = 1.0 - u
    e = tl.where(y == 1.0, u, -tl.log(y) * u / (1.0 - y))
    return -tl.log(e)


@triton.jit
def rotated(x, PLACES: tl.constexpr):
    return (x << PLACES) | (x >> (32 - PLACES))


@triton.jit
def murmur_mixed(state, word):
    """The state of MurmurHash3 after one more word of the input; uint32."""
    state ^= rotated(word * MURMUR_1, 15) * MURMUR_2
    return rotated(state, 13) * 5 + MURMUR_ADD


@triton.jit
def draw_key(stream, position, PURPOSE: tl.constexpr, IS_VLLM: tl.constexpr):
    """The key of a draw at int64 `position` from int64 `stream`, see kernels/sampling_noise.py."""
    if IS_VLLM:
        state = murmur_mixed(tl.full((), 0, tl.uint32), stream.to(tl.uint32))
        state = murmur_mixed(state, (stream >> 32).to(tl.uint32))
        return murmur_mixed(state, (position - 1).to(tl.uint32))
    else:
        return row_key(stream, position, PURPOSE)


@triton.jit
def draw_words(key, tokens, IS_VLLM: tl.constexpr):
    """uint32 words of int32 token ids under a key of `draw_key`."""
    if IS_VLLM:
        x = murmur_mixed(key, tokens.to(tl.uint32, bitcast=True)) ^ MURMUR_LENGTH
        x = (x ^ (x >> 16)) * MURMUR_3
        x = (x ^ (x >> 13)) * MURMUR_4
        return x ^ (x >> 16)
    else:
        return noise_words(key, tokens)
