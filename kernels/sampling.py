"""Drawing tokens from logits with the noise of `rollfuse.kernels.noise`.

A token is the argmax of logits / temperature + Gumbel noise. The noise is a function of (stream,
position, token id), so what a row draws does not depend on the other rows, and an old draw can be
checked against new logits without a stored distribution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rollfuse.kernels import checks
from rollfuse.kernels.dispatch import backend, use_triton
from rollfuse.kernels.noise import Purpose, gumbels, noise_words, row_keys
from rollfuse.kernels.rows import RowStatistics, Transform, compute_dtype
from rollfuse.kernels.statistics import (
    first_argmax,
    row_entropy,
    row_statistics_torch,
    target_logp,
    target_pre,
    target_shift,
)

if backend.name != "cpu":
    from rollfuse.kernels._triton.sampling import draw_tokens as draw_tokens_triton

# Logits per block of rows on the PyTorch path: small enough for a core's cache, large enough that
# the cost of calling an operation vanishes. The path holds about six of them.
_BLOCK_ELEMENTS = 1 << 17


@dataclass(frozen=True, slots=True)
class Sampling:
    """The distribution to draw from: softmax(logits / temperature).

    Attributes:
        temperature: > 0; one number, or (N,) floating point, one value a row.

    Raises:
        ValueError: a temperature is not a finite number > 0. The values of a tensor on a device are
            not read; a bad one makes its row undrawable (see `sample_tokens`).
    """

    temperature: Tensor | float = 1.0

    def __post_init__(self) -> None:
        needed = "finite values > 0 (for greedy decoding take logits.argmax(-1) instead)"
        if not isinstance(self.temperature, Tensor):
            good = 0.0 < self.temperature < float("inf")
            checks.need(good, "temperature", needed, self.temperature)
            return
        checks.need_float(self.temperature, "temperature")
        checks.need(
            self.temperature.dim() == 1, "temperature", "(N,)", tuple(self.temperature.shape)
        )
        if self.temperature.device.type == "cpu":
            bad = ~(self.temperature.isfinite() & (self.temperature > 0))
            if bool(bad.any()):
                row = int(bad.nonzero()[0])
                got = f"{float(self.temperature[row])} in row {row}"
                raise ValueError(f"temperature: need {needed}, got {got}")


class Sampled(NamedTuple):
    """What was drawn, and what the distribution drawn from says of it; all (N,)."""

    ids: Tensor  # int64
    logp: Tensor  # float32 (float64 for float64 logits), nats
    entropy: Tensor  # dtype of logp, nats


_PLAIN = Sampling()


def sample_tokens(
    logits: Tensor, streams: Tensor, positions: Tensor, sampling: Sampling = _PLAIN
) -> Sampled:
    """Draw one token a row.

        z = logits / temperature
        ids = argmax(z + gumbel(stream, position, token))       the lowest id of equal ones
        logp = log_softmax(z)[ids],  entropy = -sum(softmax(z) * log_softmax(z))

    No gradient flows. One pass over the logits on a device, without a host sync; on the CPU a
    bounded number of bytes beside the logits.

    Args:
        logits: (N, V), float32, bfloat16, float16 or float64, any strides; -inf is never drawn.
        streams: (N,), int64: whose noise, see `new_streams` and `fork_streams`.
        positions: (N,), int64 or int32: the position of the token to draw in its sequence.
        sampling: the distribution.

    Returns:
        ids, logp and entropy, under the distribution drawn from. On a device a row without a finite
        maximum (a NaN, +inf, all -inf, a bad temperature) has id -1 and NaN.

    Raises:
        ValueError: wrong shapes or devices, V = 0, or, on the CPU, a row without a finite maximum.
        TypeError: wrong dtypes.

    Source: Gumbel-max, Maddison, Tarlow, Minka, "A* sampling", arXiv 1411.0030, section 2; logp and
    entropy as in `rollfuse.kernels.statistics`.
    """
    _check(logits, streams, positions, sampling)
    with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
        inverse = _inverse_temperature(sampling.temperature, logits)
        # float64 serves checks; the kernels work in float32.
        if use_triton(logits) and logits.dtype != torch.float64:
            ids, stats = draw_tokens_triton(logits, streams, positions, inverse)
        else:
            ids, stats = draw_tokens_torch(logits, streams, positions, inverse)
        return _finish(logits, inverse, ids, stats)


def draw_tokens_torch(
    logits: Tensor, streams: Tensor, positions: Tensor, inverse: Tensor
) -> tuple[Tensor, RowStatistics]:
    """Ids (N,) and the rows' statistics."""
    n_rows, n_cols = logits.shape
    keys = row_keys(streams, positions, Purpose.SAMPLE)
    tokens = torch.arange(n_cols, dtype=torch.int32, device=logits.device)
    ids = torch.empty_like(streams)
    step = max(1, _BLOCK_ELEMENTS // n_cols)
    for start in range(0, n_rows, step):
        rows = slice(start, start + step)
        z = logits[rows].to(inverse.dtype) * inverse[rows].unsqueeze(-1)
        ids[rows] = first_argmax(gumbels(noise_words(keys[rows], tokens)) + z)
    return ids, row_statistics_torch(logits, Transform(inverse))


def _finish(logits: Tensor, inverse: Tensor, ids: Tensor, stats: RowStatistics) -> Sampled:
    """logp and entropy of the ids drawn; refuses the rows that nothing can be drawn from."""
    rows = torch.arange(ids.shape[0], device=ids.device)
    transform = Transform(inverse)
    shifted = target_shift(target_pre(logits, transform, rows, ids), stats, transform, rows)
    bad = ~(stats.top.isfinite() & stats.rest.isfinite() & shifted.isfinite())
    on_cpu = ids.device.type == "cpu"
    if on_cpu and bool(bad.any()):
        raise ValueError(
            "logits: need a finite maximum in every row, got none in row "
            f"{int(bad.nonzero()[0])} (a NaN, +inf or nothing but -inf)"
        )
    logp, entropy = target_logp(stats, shifted, rows, ids), row_entropy(stats)
    if on_cpu:
        return Sampled(ids, logp, entropy)
    nan = float("nan")
    return Sampled(
        ids.masked_fill(bad, -1), logp.masked_fill(bad, nan), entropy.masked_fill(bad, nan)
    )


def _inverse_temperature(temperature: Tensor | float, logits: Tensor) -> Tensor:
    """(N,) 1 / temperature in the dtype of the statistics, NaN where it is not > 0."""
    dtype = compute_dtype(logits.dtype)
    n_rows = logits.shape[0]
    if not isinstance(temperature, Tensor):
        return logits.new_full((), temperature, dtype=dtype).reciprocal().expand(n_rows)
    inverse = temperature.to(dtype).reciprocal()
    return inverse.where(temperature > 0, float("nan"))


def _check(logits: Tensor, streams: Tensor, positions: Tensor, sampling: Sampling) -> None:
    checks.need_float(logits, "logits")
    shape = tuple(logits.shape)
    checks.need(logits.dim() == 2 and shape[1] >= 1, "logits", "shape (N, V) with V >= 1", shape)
    checks.need_tensor(streams, "streams")
    if streams.dtype != torch.int64:
        raise TypeError(f"streams: need int64, got {streams.dtype}")
    checks.need_int(positions, "positions")
    per_row = [("streams", streams), ("positions", positions)]
    if isinstance(sampling.temperature, Tensor):
        per_row.append(("temperature", sampling.temperature))
    for name, value in per_row:
        checks.need_shape(value, (shape[0],), name, "one value a row of logits")
        checks.need_same_device(value, logits, name, "logits")
