"""Target: the distributions that draft tokens are judged by, as logits or as hidden states."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from rollfuse.kernels import checks
from rollfuse.kernels.drawing import Undrawable
from rollfuse.kernels.head import Head, as_head, operand_dtype
from rollfuse.kernels.linear_sampling import linear_log_probs, linear_sample, linear_score
from rollfuse.kernels.plan import Plan
from rollfuse.kernels.rows import compute_dtype
from rollfuse.kernels.sampling import (
    Sampled,
    Sampling,
    Scored,
    log_probs_of_tokens,
    need_rows,
    sample_tokens,
    score_tokens,
)

# Rows of logits that are picked are copied in blocks of about so many elements.
_BLOCK_ELEMENTS = 1 << 22


@dataclass(frozen=True, slots=True)
class Target:
    """R distributions, one a row: those that a draft's tokens are judged by, and what is drawn.

    Beside a draft of T tokens in N parts there are T + N rows: part by part, a row for each token
    (the distribution in its place, given what precedes it) and one for what follows the last token.
    Or there are T rows, without those last ones: then nothing is drawn after a draft that is wholly
    accepted. Or some drafts have one and others not, see `Draft.closed`.

    Args:
        rows: (R, V) logits, or beside a head (R, D) hidden states; float.
        head: the LM head, its (V, D) weight, or None.
        sampling: how tokens are drawn from a row; tensors in it have a value a row, (R,).
        plan: how the head is run.

    Raises:
        TypeError, ValueError: a shape, dtype or device is wrong.
    """

    rows: Tensor
    head: Head | Tensor | None = None
    sampling: Sampling = Sampling()
    plan: Plan = Plan()

    def __post_init__(self) -> None:
        checks.need_float(self.rows, "target.rows")
        shape = tuple(self.rows.shape)
        need_rows(self.sampling, self.rows, "target.rows", shape[0] if shape else 0)
        if self.head is None:
            good = len(shape) == 2 and shape[1] >= 1
            checks.need(good, "target.rows", "shape (R, V) with V >= 1", shape)
            return
        head = as_head(self.head)
        good = len(shape) == 2 and shape[1] == head.width
        checks.need(good, "target.rows", f"shape (R, {head.width}), the head's width", shape)
        checks.need_same_device(head.weight, self.rows, "head", "target.rows")

    @property
    def n_rows(self) -> int:
        return self.rows.shape[0]

    @property
    def vocabulary(self) -> int:
        return self.rows.shape[1] if self.head is None else as_head(self.head).vocabulary

    @property
    def dtype(self) -> torch.dtype:
        """Of log-probs: float32, or float64."""
        if self.head is None:
            return compute_dtype(self.rows.dtype)
        return compute_dtype(operand_dtype(self.rows, as_head(self.head)))

    def sample(self, streams: Tensor, positions: Tensor, rows: Tensor | None = None) -> Sampled:
        """A token from each row, or from some, with noise of (n,) or (n, K) streams."""
        parts: list[Sampled] = []
        for part, here in self._parts(rows):
            with _naming(here):
                x, sampling = self._rows(here), self._sampling(here)
                noise = streams[part], positions[part]
                if self.head is None:
                    parts.append(sample_tokens(x, *noise, sampling))
                else:
                    parts.append(linear_sample(x, self.head, *noise, sampling, plan=self.plan))
        return parts[0] if len(parts) == 1 else Sampled(*map(torch.cat, zip(*parts, strict=True)))

    def score(self, tokens: Tensor, rows: Tensor | None = None) -> Scored:
        """What each row, or some, say of a token each."""
        parts: list[Scored] = []
        for part, here in self._parts(rows):
            with _naming(here):
                x, sampling = self._rows(here), self._sampling(here)
                if self.head is None:
                    parts.append(score_tokens(x, tokens[part], sampling))
                else:
                    parts.append(linear_score(x, self.head, tokens[part], sampling, plan=self.plan))
        return parts[0] if len(parts) == 1 else Scored(*map(torch.cat, zip(*parts, strict=True)))

    def log_probs(self, rows: Tensor) -> Tensor:
        """(n, V) of some rows, under the sampling; float32 (float64 for float64 rows)."""
        x, sampling = self._rows(rows), self._sampling(rows)
        if self.head is None:
            return log_probs_of_tokens(x, sampling)
        return linear_log_probs(x, self.head, sampling, plan=self.plan)

    def _parts(self, rows: Tensor | None) -> Iterator[tuple[slice, Tensor | None]]:
        """All at once, but of picked logits some rows at a time: they are not all there twice."""
        if rows is None or self.head is not None:
            yield slice(None), rows
            return
        size = max(1, _BLOCK_ELEMENTS // self.vocabulary)
        for start in range(0, max(len(rows), 1), size):
            yield slice(start, start + size), rows[start : start + size]

    def _rows(self, rows: Tensor | None) -> Tensor:
        return self.rows if rows is None else self.rows[rows]

    def _sampling(self, rows: Tensor | None) -> Sampling:
        """The sampling of some rows."""
        if rows is None:
            return self.sampling
        picked: dict[str, Any] = {}
        for field in fields(self.sampling):
            value = getattr(self.sampling, field.name)
            if isinstance(value, Tensor):
                picked[field.name] = value[rows]
        return replace(self.sampling, **picked) if picked else self.sampling


@contextmanager
def _naming(rows: Tensor | None) -> Iterator[None]:
    """Of a row that nothing can be drawn from, say which one of the target's it is."""
    try:
        yield
    except Undrawable as error:
        row = error.row if rows is None else int(rows[error.row])
        raise Undrawable("target.rows", row) from None
