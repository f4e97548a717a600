"""Noise as a function of (stream, position, purpose, token id), the same on every backend.

    key   = mix64(mix64(stream + PURPOSE_STEP * purpose) ^ position)      64 bits, per row
    x     = token * TOKEN_STEP ^ key_low                                  32 bits, per token
    x     = (x ^ x >> 16) * MIX_1 + key_high
    x     = (x ^ x >> 15) * MIX_2
    word  = x ^ x >> 16

All arithmetic is unsigned and wraps. mix64 is a bijection, so two streams never share a key at one
position, nor two positions in one stream. The two halves of the key enter on either side of a
multiplication: with one of them alone, rows would be shifted or permuted copies of one another.

Source: mix64 is the finaliser of Steele, Lea, Flood, "Fast splittable pseudorandom number
generators" (2014), with Stafford's constants; the 32-bit mix is C. Wellons' lowbias32 (2018);
differs in the keys.
"""

from __future__ import annotations

from enum import Enum, IntEnum

import torch
from torch import Tensor

from rollfuse.kernels import checks

PURPOSE_STEP = 0xD1B54A32D192ED03
TOKEN_STEP = 0x9E3779B9
MIX64_1 = 0xBF58476D1CE4E5B9
MIX64_2 = 0x94D049BB133111EB
MIX_1 = 0x7FEB352D
MIX_2 = 0x846CA68B

# The largest float32 below 1: uniforms stop here so that every Gumbel is finite.
BELOW_ONE = 1.0 - 2.0**-24


class Purpose(IntEnum):
    """What a word is for: one (stream, position) serves each purpose with noise of its own.

    A value once given is never reused, because recorded rollouts are re-verified by it. New
    purposes take the next free number. There is no 0: mix64(0) is 0, and stream 0 would have
    all-zero bits for token 0 at position 0.
    """

    SAMPLE = 1
    FORK = 2
    SEED = 3
    ACCEPT = 4  # uniforms that decide whether a draft's token is accepted
    RESIDUAL = 5  # what is drawn in the place of a rejected token
    RENEW = 6  # the stream that takes over where a text left its draft
    REFRESH = 7  # uniforms that decide which sequences start without their older responses


class NoiseFamily(Enum):
    """Whose noise tokens are drawn with; see `rollfuse.kernels.sampling_noise`.

    ROLLFUSE is this module's. VLLM is that of vLLM's V2 model runner: a stream is the seed of a
    request, and what stock vLLM drew with a seed is drawn here again, or verified.
    """

    ROLLFUSE = "rollfuse"
    VLLM = "vllm"


def row_keys(streams: Tensor, positions: Tensor, purpose: Purpose) -> Tensor:
    """64-bit keys of rows.

    Args:
        streams: int64, any value; unsigned bits.
        positions: int64 or int32, broadcastable with `streams`; unsigned bits.
        purpose: what the noise is for.

    Returns:
        int64, the broadcast shape; the bits of an unsigned word.

    Raises:
        TypeError: a dtype is another one.
    """
    checks.need_tensor(streams, "streams")
    if streams.dtype != torch.int64:
        raise TypeError(f"streams: need int64, got {streams.dtype}")
    checks.need_int(positions, "positions")
    return _mix64(_mix64(streams + signed(PURPOSE_STEP * purpose, 64)) ^ positions)


def noise_words(keys: Tensor, tokens: Tensor) -> Tensor:
    """32 random bits for each row and token.

    Args:
        keys: (R,), int64, from `row_keys`.
        tokens: (K,) for the same tokens in every row or (R, K), int64 or int32 token ids.

    Returns:
        (R, K), int32; the bits of an unsigned word.
    """
    low = keys.to(torch.int32).unsqueeze(-1)
    high = (keys >> 32).to(torch.int32).unsqueeze(-1)
    # x ^ x >> 16 distributes over the xor with the key: its token part serves all rows.
    x = fold(tokens.to(torch.int32) * signed(TOKEN_STEP, 32), 16) ^ fold(low, 16)
    x = x.mul_(MIX_1).add_(high)
    x = fold_(x, 15).mul_(signed(MIX_2, 32))
    return fold_(x, 16)


def uniforms(words: Tensor) -> Tensor:
    """Uniforms in (0, 1) from words: (word + 0.5) * 2**-32, rounded to float32 and kept below 1.

    Args:
        words: int32, from `noise_words`.

    Returns:
        The same shape, float32, in [2**-33, 1 - 2**-24]; bit-equal on every backend.
    """
    # A signed word is 2**32 less than the unsigned one in the upper half: add 1 there.
    u = words.to(torch.float32).mul_(2.0**-32).add_(2.0**-33)
    return u.sub_(u.floor()).clamp_(max=BELOW_ONE)


def gumbels(words: Tensor) -> Tensor:
    """Standard Gumbel noise from words: -log(-log1p(-u)), in [-2.82, 22.88].

    Large noise comes from small u, where float32 is dense: the upper tail, which decides what is
    drawn, has the full 32 bits. (The usual -log(-log(u)) has 24 there and stops at 16.6.)

    Args:
        words: int32, from `noise_words`.

    Returns:
        The same shape, float32; equal across backends to a few ulp of the logarithms.
    """
    return uniforms(words).neg_().log1p_().neg_().log_().neg_()


def new_streams(seed: int, n: int, *, first: int = 0) -> Tensor:
    """Streams number `first` ... `first + n - 1` of a seed: distinct, and unlike other seeds'.

    Args:
        seed: any 64-bit integer, signed or unsigned.
        n: how many.
        first: number of the first one; a run that has drawn k streams goes on with `first=k`.

    Returns:
        (n,), int64, on the CPU.

    Raises:
        ValueError: `n` or `first` is negative or the seed has more than 64 bits.
    """
    checks.need(-(2**63) <= seed < 2**64, "seed", "an integer of 64 bits", seed)
    numbers = _numbers(n, first, torch.device("cpu"))
    return row_keys(torch.full_like(numbers, signed(seed, 64)), numbers, Purpose.SEED)


def fork_streams(streams: Tensor, n: int, *, first: int = 0) -> Tensor:
    """Fresh streams for `n` children of every stream; the parents' own stay usable.

    Children of one parent are distinct by construction, children of different parents like any
    random 64-bit integers. A parent that forks again counts on: `first` is the number of children
    it has had.

    Args:
        streams: (B,), int64.
        n: children per stream.
        first: number of the first child.

    Returns:
        (B, n), int64, on the device of `streams`.

    Raises:
        ValueError: `n` or `first` is negative.
        TypeError: `streams` is not int64.
    """
    checks.need_tensor(streams, "streams")
    checks.need(streams.dim() == 1, "streams", "shape (B,)", tuple(streams.shape))
    numbers = _numbers(n, first, streams.device)
    return row_keys(streams.unsqueeze(-1), numbers, Purpose.FORK)


def renewed_streams(streams: Tensor, positions: Tensor) -> Tensor:
    """Streams that go on for `streams` from `positions` on, with noise that nothing has used.

    A text that was drawn again with the noise of an older one, and came out different from some
    position on, goes on with this: the old noise has been seen by whoever trained on the old text.

    Args:
        streams: int64.
        positions: int64 or int32, broadcastable with `streams`: where the new noise begins.

    Returns:
        int64, the broadcast shape.
    """
    return row_keys(streams, positions, Purpose.RENEW)


def need_distinct_streams(streams: Tensor, groups: Tensor | None = None) -> None:
    """Raise if two members of a group have one stream: they would be the same sample.

    Reads the values: a host sync if they lie on a device.

    Args:
        streams: (B,), int64.
        groups: (B,), int64 group ids; None: all of them are one group.

    Raises:
        ValueError: naming the stream, the group and both members.
    """
    checks.need_tensor(streams, "streams")
    checks.need(streams.dim() == 1, "streams", "shape (B,)", tuple(streams.shape))
    if groups is None:
        groups = torch.zeros_like(streams)
    checks.need_int(groups, "groups")
    checks.need_shape(groups, tuple(streams.shape), "groups", "one id a stream")
    seen: dict[tuple[int, int], int] = {}
    for i, member in enumerate(zip(groups.tolist(), streams.tolist(), strict=True)):
        before = seen.setdefault(member, i)
        checks.need(
            before == i,
            "streams",
            "a stream of its own for every member of a group (see fork_streams)",
            f"stream {member[1]} for members {before} and {i} of group {member[0]}",
        )


def _numbers(n: int, first: int, device: torch.device) -> Tensor:
    checks.need(n >= 0, "n", "a count >= 0", n)
    checks.need(first >= 0, "first", "a number >= 0", first)
    return torch.arange(first, first + n, dtype=torch.int64, device=device)


def signed(value: int, bits: int) -> int:
    """The signed integer with the lowest `bits` bits of `value`: torch has no unsigned products."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def fold(x: Tensor, shift: int) -> Tensor:
    """x ^ x >> shift on unsigned bits: the sign that a signed shift copies in is masked out."""
    bits = 64 if x.dtype == torch.int64 else 32
    return x ^ ((x >> shift) & ((1 << (bits - shift)) - 1))


def fold_(x: Tensor, shift: int) -> Tensor:
    """`fold` of int32 in place."""
    return x.bitwise_xor_((x >> shift).bitwise_and_((1 << (32 - shift)) - 1))


def _mix64(x: Tensor) -> Tensor:
    x = fold(x, 30) * signed(MIX64_1, 64)
    x = fold(x, 27) * signed(MIX64_2, 64)
    return fold(x, 31)
