"""One token a row, or what a row says of a given one, for logits that are there.

The ops of `sampling` and `linear_sampling` differ in where the logits come from; the steps are
here, once: where the row is cut, the draw, statistics, log-prob and entropy.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rollfuse.kernels.dispatch import backend, use_triton
from rollfuse.kernels.noise import NoiseFamily, gumbels
from rollfuse.kernels.rows import RowStatistics, Transform
from rollfuse.kernels.sampling_noise import draw_keys, smallest_words
from rollfuse.kernels.shard import Shard
from rollfuse.kernels.statistics import (
    Scratch,
    finite,
    first_argmax,
    prepare,
    row_entropy,
    row_statistics,
    row_statistics_torch,
    target_logp,
    target_pre,
    target_shift,
)
from rollfuse.kernels.truncation import Cuts, centred, support_of

if backend.name != "cpu":
    from rollfuse.kernels._triton.sampling import draw_tokens as draw_tokens_triton

# Logits per block of rows on the PyTorch path: small enough for a core's cache, large enough that
# the cost of calling an operation vanishes.
_BLOCK_ELEMENTS = 1 << 17
# Bytes an element of a block takes at most: scores, words and their temporaries; under cuts, where
# next to nothing is cut, places, sorted values and masses.
_DRAW_BYTES, _CUT_BYTES = 40, 96


class Noise(NamedTuple):
    """What S rows are drawn with."""

    streams: Tensor  # (S, K) int64
    positions: Tensor  # (S,) int64 or int32
    family: NoiseFamily


class Outcome(NamedTuple):
    """What came of S rows."""

    ids: Tensor  # (S,) int64
    logp: Tensor  # (S,) nats
    entropy: Tensor  # (S,) nats
    support: Tensor  # (S,) nats
    bad: Tensor  # (S,) bool, nothing can be drawn from the row


def draw_rows(
    logits: Tensor, transform: Transform, cuts: Cuts, noise: Noise, shard: Shard | None = None
) -> Outcome:
    """Draw a token from each of the rows (S, V); all ranks' columns of it under a shard."""
    transform, support = _cut(logits, transform, cuts)
    first_token = 0 if shard is None else shard.start
    # float64 serves checks; the kernels work in float32.
    if use_triton(logits) and logits.dtype != torch.float64:
        ids, scores, stats = draw_tokens_triton(logits, transform, noise, first_token)
        if transform.invariant:
            # The same code, but another kernel's compiler may contract it otherwise.
            stats = row_statistics(logits, transform)
    else:
        ids, scores, stats = draw_tokens_torch(logits, transform, noise, first_token)
    if shard is not None:
        ids = shard.winners(scores, ids)
    found = _outcome(logits, transform, stats, ids, support, shard)
    return found._replace(bad=found.bad | ~found.logp.isfinite())


def score_rows(
    logits: Tensor, transform: Transform, cuts: Cuts, targets: Tensor, shard: Shard | None = None
) -> Outcome:
    """What each of the rows (S, V) says of its target (S,), an id of the whole vocabulary."""
    transform, support = _cut(logits, transform, cuts)
    stats = row_statistics(logits, transform)
    return _outcome(logits, transform, stats, targets, support, shard)


def log_probs_of_rows(logits: Tensor, transform: Transform, cuts: Cuts) -> Tensor:
    """(S, V) log-probs of all columns of the rows (S, V); -inf where `score_rows` says so."""
    transform, _ = _cut(logits, transform, cuts)
    row = torch.arange(logits.shape[0], device=logits.device).unsqueeze(1)
    column = torch.arange(logits.shape[1], device=logits.device)
    pre = target_pre(logits, transform, row, column)
    # The distance as it is before the factor: what is scaled first is rounded, and cut, otherwise.
    distance = pre - finite(pre.amax(1)).unsqueeze(1)
    z = distance * transform.factor.unsqueeze(1)
    if transform.reach is not None:
        z.masked_fill_(distance < -transform.reach.unsqueeze(1), -torch.inf)
    return z.log_softmax(1)


def draw_tokens_torch(
    logits: Tensor, transform: Transform, noise: Noise, first_token: int
) -> tuple[Tensor, Tensor, RowStatistics]:
    """Ids (S,), the first column being `first_token`; their z plus noise (S,); statistics."""
    ids, best = _best_tokens(logits, transform, noise, first_token)
    return ids, best, row_statistics_torch(logits, transform)


def _best_tokens(
    logits: Tensor, transform: Transform, noise: Noise, first_token: int
) -> tuple[Tensor, Tensor]:
    n_rows, n_cols = logits.shape
    keys = draw_keys(*noise)
    tokens = torch.arange(
        first_token, first_token + n_cols, dtype=torch.int32, device=logits.device
    )
    ids = noise.streams.new_empty(n_rows)
    best = torch.empty_like(transform.factor)
    scratch = Scratch(logits, transform, _BLOCK_ELEMENTS)
    for start, stop in scratch.blocks(n_rows):
        part = transform.rows(start, stop)
        pre = prepare(logits[start:stop], part, scratch)
        z = torch.mul(pre, part.factor.unsqueeze(1), out=scratch.first[: stop - start])
        if part.reach is not None:
            distance = pre - finite(pre.amax(1)).unsqueeze(1)
            z.masked_fill_(distance < -part.reach.unsqueeze(1), -torch.inf)
        noised = z.add_(gumbels(smallest_words(keys[start:stop], tokens, noise.family)))
        column = first_argmax(noised)
        best[start:stop] = noised.gather(1, column.unsqueeze(1)).squeeze(1)
        ids[start:stop] = column + first_token
    return ids, best


class Undrawable(ValueError):
    """Nothing can be drawn from a row."""

    def __init__(self, source: str, row: int) -> None:
        super().__init__(
            f"{source}: need a finite maximum in every row, got none in row {row} (a NaN, +inf or "
            "nothing but -inf)"
        )
        self.row = row


def settled(found: Outcome, source: str) -> Outcome:
    """Refuses rows that nothing can be drawn from on the CPU; marks them elsewhere, with NaN.

    source: what their logits are made of, for the message.
    """
    bad = found.bad
    if bad.device.type == "cpu":
        if bool(bad.any()):
            raise Undrawable(source, int(bad.nonzero()[0]))
        return found
    logp, entropy, support = (
        values.masked_fill(bad, torch.nan) for values in (found.logp, found.entropy, found.support)
    )
    return Outcome(found.ids.masked_fill(bad, -1), logp, entropy, support, bad)


def scratch_bytes(n_rows: int, n_cols: int, n_cuts: int) -> int:
    """Bytes that drawing from a chunk of rows takes beside the chunk, PyTorch path."""
    block_rows = max(1, min(n_rows, _BLOCK_ELEMENTS // max(n_cols, 1)))
    each = _CUT_BYTES if n_cuts else _DRAW_BYTES
    return block_rows * n_cols * each + 4 * n_cols


def _cut(logits: Tensor, transform: Transform, cuts: Cuts) -> tuple[Transform, Tensor]:
    """(the transform of the truncated rows, their support (S,))."""
    support = support_of(logits, transform, cuts)
    if not cuts.is_any:
        return transform, support
    support = centred(logits, transform, support)
    return transform.cut(support), support


def _outcome(  # noqa: PLR0913
    logits: Tensor,
    transform: Transform,
    stats: RowStatistics,
    ids: Tensor,
    support: Tensor,
    shard: Shard | None,
) -> Outcome:
    rows = torch.arange(ids.shape[0], device=ids.device)
    if shard is None:
        pre = target_pre(logits, transform, rows, ids)
    else:
        mine, here = shard.owned(ids, logits.shape[1])
        pre = torch.where(mine, target_pre(logits, transform, rows, here), -torch.inf)
        stats, pre = shard.merge(stats, transform.factor, pre)
    shifted = target_shift(pre, stats, transform, rows)
    logp = target_logp(stats, shifted, rows, ids)
    if transform.reach is not None:
        is_out = pre - finite(stats.top) < -transform.reach
        logp = logp.masked_fill(is_out, -torch.inf)
    bad = ~(stats.top.isfinite() & stats.rest.isfinite()) | support.isnan()
    return Outcome(ids, logp, row_entropy(stats), support, bad)
