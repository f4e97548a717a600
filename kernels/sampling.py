"""Drawing tokens from logits, with noise that is a function of (stream, position, token id).

A token is the argmax of logits / temperature + Gumbel noise over what top-k, top-p and min-p leave.
What a row draws does not depend on the other rows, and an old draw can be checked against new
logits without a stored distribution.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rollfuse.kernels import checks
from rollfuse.kernels.arguments import need_targets_below, safe_targets
from rollfuse.kernels.drawing import Noise, draw_rows, log_probs_of_rows, score_rows, settled
from rollfuse.kernels.noise import NoiseFamily
from rollfuse.kernels.rows import Transform, compute_dtype
from rollfuse.kernels.truncation import Cuts


def _check_values(value: Any, name: str, needed: str, is_good: Callable[[Any], Any]) -> None:
    """Refuse a number that is not good, or a tensor on the CPU that holds one."""
    integer = is_good is _is_count
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, Integral if integer else Real):
            kinds = "an int or an integer tensor" if integer else "a float or a tensor of floats"
            raise TypeError(f"{name}: need {kinds}, got {type(value).__name__}")
        checks.need(bool(is_good(value)), name, needed, value)
        return
    (checks.need_int if integer else checks.need_float)(value, name)
    checks.need(value.dim() == 1, name, "(N,)", tuple(value.shape))
    if value.device.type == "cpu":
        bad = ~is_good(value if integer else value.double())
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            raise ValueError(f"{name}: need {needed}, got {value[row].item()} in row {row}")


# What the kernels compute with, in float32: less is 0 to some of them, and its reciprocal inf.
_LEAST = 2.0**-126


def _is_positive(value: Any) -> Any:
    return (value >= _LEAST) & (value <= 1.0 / _LEAST)


def _is_count(value: Any) -> Any:
    return value >= 1


def _is_share(value: Any) -> Any:
    return (value >= _LEAST) & (value <= 1)


def _is_floor(value: Any) -> Any:
    return (value >= 0) & (value <= 1)


@dataclass(frozen=True, slots=True)
class Sampling:
    """The distribution to draw from, and whose noise to draw with.

    softmax(logits / temperature) over the tokens that are left, in this order, by top_k: the k most
    likely ones; by top_p: of these the fewest of the most likely ones that have a share p of their
    probability; by min_p: those with at least min_p of the largest probability. It is the order of
    Hugging Face; vLLM takes min_p before top_k and top_p, which is another set where min_p and
    top_p both cut. What ties with the last token kept, to 1e-5 of its distance from the largest
    logit and to 1e-6 nats, is kept.

    Attributes:
        temperature: > 0, in [2^-126, 2^126]; one number, or (N,) floating point, one value a row.
            A row of which the largest logit over it is no float32 cannot be drawn from.
        top_k: >= 1, V or more means all; one int, (N,) int64 or int32, or None.
        top_p: in (0, 1]; one number, (N,) floating point, or None.
        min_p: in [0, 1]; likewise.
        noise: the family, see NoiseFamily.

    Raises:
        ValueError: a value is none of these. The values of a tensor on a device are not read; a bad
            one makes its row undrawable (see `sample_tokens`).
        TypeError: a type or dtype is another one.
    """

    temperature: Tensor | float = 1.0
    top_k: Tensor | int | None = None
    top_p: Tensor | float | None = None
    min_p: Tensor | float | None = None
    noise: NoiseFamily = NoiseFamily.ROLLFUSE

    def __post_init__(self) -> None:
        hint = (
            "finite values > 0 (for greedy decoding take logits.argmax(-1) instead), from 2^-126 "
            "to 2^126"
        )
        _check_values(self.temperature, "temperature", hint, _is_positive)
        if self.top_k is not None:
            _check_values(self.top_k, "top_k", "integers >= 1, or None for all", _is_count)
        if self.top_p is not None:
            _check_values(self.top_p, "top_p", "values in (0, 1] and >= 2^-126, or None", _is_share)
        if self.min_p is not None:
            _check_values(self.min_p, "min_p", "values in [0, 1], or None", _is_floor)
        if not isinstance(self.noise, NoiseFamily):
            raise TypeError(f"noise: need a NoiseFamily, got {self.noise!r}")

    @property
    def is_cut(self) -> bool:
        """Whether tokens can lose their probability."""
        return not (self.top_k is self.top_p is self.min_p is None)


class Sampled(NamedTuple):
    """What was drawn, and what the distribution drawn from says of it; all (N,)."""

    ids: Tensor  # int64
    logp: Tensor  # float32 (float64 for float64 logits), nats
    entropy: Tensor  # dtype of logp, nats
    support: Tensor  # dtype of logp, nats below the row's largest z that were kept; +inf: all


class Scored(NamedTuple):
    """What a distribution says of given tokens; all (N,)."""

    logp: Tensor  # float32 (float64 for float64 logits), nats; -inf outside the support
    entropy: Tensor  # dtype of logp, nats
    support: Tensor  # as in Sampled


PLAIN = Sampling()


def sample_tokens(
    logits: Tensor, streams: Tensor, positions: Tensor, sampling: Sampling = PLAIN
) -> Sampled:
    """Draw one token a row.

        z = logits / temperature
        ids = argmax(z + gumbel(stream, position, token))       the lowest id of equal ones
        logp = log_softmax(z)[ids],  entropy = -sum(softmax(z) * log_softmax(z))
        support: tokens with z < max(z) - support have no probability

    all over what `sampling` leaves. The noise is added to z in float32: past |z| of about 1e5 that
    rounds it and coarsens the law (subtract the largest logit of such rows first). With K streams a
    row its noise is the largest of their Gumbels; equal streams count once. `TokenBatch.support`
    takes `support`, so that losses compare like with like. No gradient flows, and no host sync
    happens. On the CPU a bounded number of bytes beside the logits.

    Args:
        logits: (N, V), float32, bfloat16, float16 or float64, any strides; -inf is never drawn.
        streams: (N,) or (N, K), int64: whose noise, see `new_streams` and `fork_streams`.
        positions: (N,), int64 or int32: the position of the token to draw in its sequence.
        sampling: the distribution.

    Returns:
        ids, logp, entropy and support, under the distribution drawn from. On a device a row without
        a finite maximum (a NaN, +inf, all -inf, a bad value of `sampling`) has id -1 and NaN.

    Raises:
        ValueError: wrong shapes or devices, V = 0, or, on the CPU, a row without a finite maximum.
        TypeError: wrong dtypes.

    Source: Gumbel-max, Maddison, Tarlow, Minka, "A* sampling", arXiv 1411.0030, section 2; top-p,
    Holtzman et al., arXiv 1904.09751; min-p, Nguyen et al., arXiv 2407.01082.
    """
    _check_logits(logits)
    n_rows = logits.shape[0]
    need_rows(sampling, logits, "logits", n_rows)
    noise = noise_of_rows(sampling, streams, positions, logits, "logits", n_rows)
    with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
        transform, cuts = _described(logits, sampling)
        found = settled(draw_rows(logits, transform, cuts, noise), "logits")
    return Sampled(*found[:4])


def score_tokens(logits: Tensor, targets: Tensor, sampling: Sampling = PLAIN) -> Scored:
    """What the distribution that `sampling` describes says of given tokens, without gradient.

    Args:
        logits: (N, V), as in `sample_tokens`.
        targets: (N,), int64 or int32, in [0, V).
        sampling: the distribution; its noise plays no part.

    Returns:
        logp, entropy and support. A target outside the support has logp -inf. On a device NaN where
        nothing can be drawn from the row, or the target is no token.

    Raises:
        ValueError, TypeError: as `sample_tokens`; a CPU target outside [0, V).
    """
    _check_logits(logits)
    need_targets(targets, logits, "logits", *logits.shape)
    need_rows(sampling, logits, "logits", logits.shape[0])
    with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
        transform, cuts = _described(logits, sampling)
        inside = safe_targets(targets.long(), logits.shape[1])
        found = score_rows(logits, transform, cuts, inside)
        found = settled(found._replace(bad=found.bad | (inside != targets)), "logits")
    return Scored(*found[1:4])


def log_probs_of_tokens(logits: Tensor, sampling: Sampling = PLAIN) -> Tensor:
    """(N, V) what `score_tokens` says of every token; dtype of its logp, nats."""
    _check_logits(logits)
    need_rows(sampling, logits, "logits", logits.shape[0])
    with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
        return log_probs_of_rows(logits, *_described(logits, sampling))


def noise_of_rows(  # noqa: PLR0913
    sampling: Sampling, streams: Tensor, positions: Tensor, of: Tensor, name: str, n_rows: int
) -> Noise:
    """Streams (N, K) and positions (N,), checked against the rows of `of`, called `name`."""
    checks.need_tensor(streams, "streams")
    if streams.dtype != torch.int64:
        raise TypeError(f"streams: need int64, got {streams.dtype}")
    checks.need_int(positions, "positions")
    got = tuple(streams.shape)
    good = streams.dim() in (1, 2) and got[0] == n_rows and min(got[1:], default=1) >= 1
    needed = f"shape ({n_rows},) or ({n_rows}, K) with K >= 1, one or K a row of {name}"
    checks.need(good, "streams", needed, got)
    checks.need_shape(positions, (n_rows,), "positions", f"one value a row of {name}")
    checks.need_same_device(streams, of, "streams", name)
    checks.need_same_device(positions, of, "positions", name)
    each = streams if streams.dim() == 2 else streams.unsqueeze(1)
    return Noise(each, positions, sampling.noise)


def need_rows(sampling: Sampling, of: Tensor, name: str, n_rows: int) -> None:
    """Refuse values of a row each that are not for the rows of `of`, called `name`."""
    if not isinstance(sampling, Sampling):
        raise TypeError(f"sampling: need a Sampling, got {type(sampling).__name__}")
    for field in ("temperature", "top_k", "top_p", "min_p"):
        value = getattr(sampling, field)
        if isinstance(value, Tensor):
            checks.need_shape(value, (n_rows,), field, f"one value a row of {name}")
            checks.need_same_device(value, of, field, name)


def need_targets(targets: Tensor, of: Tensor, name: str, n_rows: int, vocabulary: int) -> None:
    checks.need_int(targets, "targets")
    checks.need_shape(targets, (n_rows,), "targets", f"one a row of {name}")
    checks.need_same_device(targets, of, "targets", name)
    need_targets_below(targets, vocabulary)


def temperature_of_rows(
    sampling: Sampling, like: Tensor, n_rows: int, dtype: torch.dtype
) -> Tensor:
    """(N,) on the device of `like`, NaN where it is not > 0."""
    temperature = _of_rows(sampling.temperature, like, n_rows, dtype)
    return temperature.where(temperature > 0, torch.nan)


def cuts_of_rows(sampling: Sampling, like: Tensor, n_rows: int, dtype: torch.dtype) -> Cuts:
    """The cuts of each of N rows, on the device of `like`."""
    options = (
        (sampling.top_k, torch.int64),
        (sampling.top_p, dtype),
        (sampling.min_p, dtype),
    )
    return Cuts(
        *(None if value is None else _of_rows(value, like, n_rows, to) for value, to in options)
    )


def _described(logits: Tensor, sampling: Sampling) -> tuple[Transform, Cuts]:
    n_rows, dtype = logits.shape[0], compute_dtype(logits.dtype)
    temperature = temperature_of_rows(sampling, logits, n_rows, dtype)
    return Transform(temperature.reciprocal()), cuts_of_rows(sampling, logits, n_rows, dtype)


def _of_rows(value: Tensor | float, like: Tensor, n_rows: int, dtype: torch.dtype) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(dtype).contiguous()
    if dtype == torch.int64:
        value = min(value, 2**62)  # as good as any other number past V
    return like.new_full((n_rows,), value, dtype=dtype)


def _check_logits(logits: Tensor) -> None:
    checks.need_float(logits, "logits")
    shape = tuple(logits.shape)
    checks.need(logits.dim() == 2 and shape[1] >= 1, "logits", "shape (N, V) with V >= 1", shape)
