"""The noise of a draw: of one stream or of several, of this package's family or of vLLM's.

vLLM's V2 model runner hashes four words of 32 bits with MurmurHash3 (x86, 32 bits, seed 0):

    word = murmur3(seed low, seed high, position, token)

The seed is the request's, 64 bits; the position is that of the last input token, one before the
token's own, which is the position here. Uniforms and Gumbels follow from the word as in
`rollfuse.kernels.noise`: theirs differ by an ulp of the uniform, and by up to 2e-6 of a Gumbel
where they take a series for the logarithm.

Source: A. Appleby, MurmurHash3 (2011, public domain); the layout as in vLLM's
vllm/v1/worker/gpu/sample/gumbel.py since its pull request 51367; tests/data/vllm_noise.json has
words and tokens recorded from it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rollfuse.kernels.noise import NoiseFamily, Purpose, fold_, noise_words, row_keys, signed

MURMUR_1 = 0xCC9E2D51
MURMUR_2 = 0x1B873593
MURMUR_ADD = 0xE6546B64
MURMUR_3 = 0x85EBCA6B
MURMUR_4 = 0xC2B2AE35
# Bytes that are hashed: four words.
MURMUR_LENGTH = 16

_SIGN = -(1 << 31)


def draw_keys(streams: Tensor, positions: Tensor, family: NoiseFamily) -> Tensor:
    """(N, K) int64 keys of the draws at `positions` (N,) from `streams` (N, K)."""
    positions = positions.unsqueeze(-1)
    if family is NoiseFamily.ROLLFUSE:
        return row_keys(streams, positions, Purpose.SAMPLE)
    state = torch.zeros((), dtype=torch.int32, device=streams.device)
    for word in (streams, streams >> 32, positions.to(torch.int64) - 1):
        state = _mixed(state, _scrambled(word.to(torch.int32)))
    return state.to(torch.int64)


def smallest_words(keys: Tensor, tokens: Tensor, family: NoiseFamily) -> Tensor:
    """(N, V) int32: for each token the smallest word of a row's K keys, as unsigned bits.

    Gumbels fall with the word, so this is the word of the largest Gumbel of the K.

    Args:
        keys: (N, K), from `draw_keys`.
        tokens: (V,) int32 token ids.
    """
    smallest = _words(keys[:, 0], tokens, family)
    for k in range(1, keys.shape[1]):
        # Unsigned words have the order of signed ones whose sign is turned round.
        other = _words(keys[:, k], tokens, family).bitwise_xor_(_SIGN)
        smallest = torch.minimum(smallest.bitwise_xor_(_SIGN), other, out=other)
        smallest = smallest.bitwise_xor_(_SIGN)
    return smallest


def _words(keys: Tensor, tokens: Tensor, family: NoiseFamily) -> Tensor:
    """(N, V) int32 words of the keys (N,)."""
    if family is NoiseFamily.ROLLFUSE:
        return noise_words(keys, tokens)
    # The token's own part serves all rows.
    x = _mixed(keys.to(torch.int32).unsqueeze(-1), _scrambled(tokens))
    x = fold_(x.bitwise_xor_(MURMUR_LENGTH), 16).mul_(signed(MURMUR_3, 32))
    x = fold_(x, 13).mul_(signed(MURMUR_4, 32))
    return fold_(x, 16)


def _scrambled(word: Tensor) -> Tensor:
    """What a word of the input becomes before it joins the state."""
    return _rotated(word * signed(MURMUR_1, 32), 15).mul_(MURMUR_2)


def _mixed(state: Tensor, scrambled: Tensor) -> Tensor:
    return _rotated(state ^ scrambled, 13).mul_(5).add_(signed(MURMUR_ADD, 32))


def _rotated(x: Tensor, places: int) -> Tensor:
    """Unsigned bits turned left; a signed shift to the right copies the sign in, masked out."""
    low = (x >> (32 - places)).bitwise_and_((1 << places) - 1)
    return low.bitwise_or_(x << places)
