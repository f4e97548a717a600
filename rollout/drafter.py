"""Drafters: who guesses how a text goes on, so that a pass can check several tokens at once.

Whatever is guessed, the engine decides by its rule what stays. Under `coupled`, the default, a
token stays iff it is what the engine would have drawn there itself: with the sequence's own noise,
or, for a token that says whose noise drew it, with that (an older rollout, verified again under new
weights). Either way the law of the responses is the policy's, and in the first case they are the
very tokens that plain decoding draws.

A drafter is asked once a step about all sequences that go on, and told what they got.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from rollfuse.kernels import checks
from rollfuse.kernels.verification import Rule
from rollfuse.rollout.record import Drawn, Source

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(slots=True)
class Chunk:
    """A guess: the tokens that may come next in one sequence.

    Args:
        tokens: (k,) int64, k >= 1.
        streams: (k,) int64, whose noise drew them. None: nobody's who matters.
        logp: (k,) float32, nats, under the distribution that drew them. None: unknown.
        is_open: a token may be drawn after the last one in the same pass. Not if the drafter knows
            more, or if the text ends there.
    """

    tokens: Ints
    streams: Ints | None = None
    logp: Floats | None = None
    is_open: bool = True

    def within(self, n: int) -> Chunk:
        """The beginning of the guess that `n` >= 1 answers of a pass can decide."""
        if len(self.tokens) + self.is_open <= n:
            return self
        streams = None if self.streams is None else self.streams[:n]
        logp = None if self.logp is None else self.logp[:n]
        return Chunk(self.tokens[:n], streams, logp, is_open=False)

    @property
    def n_computed(self) -> int:
        """How many of its tokens a pass has to compute to answer all that is wanted."""
        return len(self.tokens) - (not self.is_open)

    @property
    def computed(self) -> Ints:
        """Those tokens."""
        return self.tokens[: self.n_computed]


class Request(NamedTuple):
    """What an engine is about to generate."""

    prompts: list[Ints]
    prompt_index: Ints  # (B,) the prompt of each sequence
    streams: Ints  # (B,) their own noise
    longest: int  # of a response, in tokens
    vocabulary: int


class News(NamedTuple):
    """What a step has given one sequence."""

    sequence: int
    tokens: Ints  # (n,), n >= 1
    stayed: int  # how many of the first of them it had been guessed
    checked: int  # how many guessed tokens the step has decided on


class Drafter(Protocol):
    """Who guesses. Sequences are numbers in [0, B); a call concerns those it names."""

    @property
    def rule(self) -> Rule:
        """Which guessed tokens stay. Set it in `__init__`: a function in a class is a method."""

    @property
    def source(self) -> Source:
        """What is recorded as the source of those."""

    def start(self, request: Request) -> None:
        """A `generate` begins; what the drafter knows of an earlier one ends."""

    def propose(self, sequences: Sequence[int]) -> list[Chunk | None]:
        """A guess for each sequence, None without one. Asked again without an `advance` between,
        for a text that gave way to others, it is the same question."""

    def advance(self, news: Sequence[News]) -> None:
        """What sequences have got in a step."""

    def finish(self, sequences: Sequence[int]) -> None:
        """These sequences have ended."""


def need_drafter(drafter: Drafter) -> None:
    """Raise TypeError for a rule that is missing or has become a method."""
    if not callable(getattr(drafter, "rule", None)):
        raise TypeError(f"drafter.rule: need a rule of verification, got {type(drafter).__name__}")
    if getattr(drafter.rule, "__self__", None) is drafter:
        raise TypeError(
            "drafter.rule: need a rule that is an attribute of the instance, got one of the class, "
            "which is a method (set it in __init__)"
        )


def need_chunks(chunks: Sequence[Chunk | None], sequences: Sequence[int], vocabulary: int) -> None:
    """Raise ValueError or TypeError unless these are guesses for so many sequences."""
    needed = f"{len(sequences)} guesses, one a sequence"
    checks.need(len(chunks) == len(sequences), "propose", needed, len(chunks))
    for chunk in chunks:
        if chunk is None:
            continue
        if not isinstance(chunk, Chunk):
            raise TypeError(f"propose: need a Chunk or None, got {type(chunk).__name__}")
        for name, kind in (("tokens", np.int64), ("streams", np.int64), ("logp", np.floating)):
            values = getattr(chunk, name)
            if values is None and name != "tokens":
                continue
            if not isinstance(values, np.ndarray):
                raise TypeError(f"{name}: need an array of NumPy, got {type(values).__name__}")
            if not np.issubdtype(values.dtype, kind):
                raise TypeError(f"{name}: need {kind.__name__}, got {values.dtype}")
            good = values.ndim == 1 and len(values) == len(chunk.tokens) >= 1
            checks.need(good, name, "one value a token, at least one", values.shape)
    tokens = [chunk.tokens for chunk in chunks if chunk is not None]
    if tokens:
        every = np.concatenate(tokens)
        good = 0 <= int(every.min()) and int(every.max()) < vocabulary
        needed = f"token ids in [0, {vocabulary})"
        checks.need(good, "tokens", needed, f"{every.min()} to {every.max()}")


def tell(drafter: Drafter, drawn: Drawn, checked: Ints, ended: Ints) -> None:
    """Tell what all sequences of a step got, and which of them have ended with it."""
    starts = np.flatnonzero(np.diff(drawn.sequence, prepend=-1))
    stayed = np.add.reduceat(drawn.source != Source.SAMPLED, starts, dtype=np.int64)
    borders = pairwise([*starts.tolist(), len(drawn.ids)])
    columns = zip(
        drawn.sequence[starts].tolist(), borders, stayed.tolist(), checked.tolist(), strict=True
    )
    drafter.advance([News(s, drawn.ids[a:b], n, k) for s, (a, b), n, k in columns])
    if len(ended):
        drafter.finish(ended.tolist())
