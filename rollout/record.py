"""Rollout: generated sequences, packed, and where each of their tokens came from.

Legend: P prompts (groups), B sequences in the order they were asked for, T response tokens of all
sequences end to end. Everything lies on the CPU, where grading and packing happen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rollfuse.kernels import checks

Ints = npt.NDArray[np.int64]

# In the place of a Finish while a sequence goes on.
RUNNING = 255


class Source(IntEnum):
    """Who chose a token."""

    SAMPLED = 0  # drawn from the model
    VERIFIED = 1  # proposed by a draft or an older rollout and accepted
    FORCED = 2  # put there by the caller
    EXTERNAL = 3  # by another engine
    LENIENT = 4  # an older rollout's, kept by a rule that does not keep the policy's law


class Finish(IntEnum):
    """Why a sequence ended."""

    STOP = 0  # a stop token, which is the response's last token
    STOP_STRING = 1  # a stop string, completed by the response's last token
    LENGTH = 2  # the longest response allowed


class Tokenizer(Protocol):
    """What is asked of a tokenizer; those of transformers fit."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str: ...


@dataclass(frozen=True, slots=True)
class Rollout:
    """B sequences, each a prompt and a response, with a record of every response token.

    Args:
        prompts: P tensors (L_p,) int64, L_p >= 1; one a group.
        prompt_index: (B,) int64 in [0, P), the prompt of each sequence: its group.
        tokens: (T,) int64, the responses end to end, end tokens included.
        cu_seqlens: (B + 1,) int64, where each response starts and ends, from 0 to T.
        logp: (T,) float32 or float64, nats, under the distribution the token was drawn from.
        entropy: (T,) as logp, nats, of that distribution.
        version: (T,) int64, the policy version that drew the token.
        source: (T,) uint8, a `Source`.
        streams: (B,) int64, the noise stream of each sequence.
        finish: (B,) uint8, a `Finish`.
        temperature: of the distribution drawn from.
        token_streams: (T,) int64, the stream whose noise drew each token: the sequence's, or that
            of the older rollout it was verified from. None: the sequences'.
        support: (T,) as logp, nats below the largest logit past which sampling had cut the
            distribution (inf: nowhere), for `TokenBatch.support`. None: it was never cut.

    Raises:
        TypeError, ValueError: a shape, dtype, device or value is wrong.
    """

    prompts: tuple[Tensor, ...]
    prompt_index: Tensor
    tokens: Tensor
    cu_seqlens: Tensor
    logp: Tensor
    entropy: Tensor
    version: Tensor
    source: Tensor
    streams: Tensor
    finish: Tensor
    temperature: float = 1.0
    token_streams: Tensor | None = None
    support: Tensor | None = None

    def __post_init__(self) -> None:
        if self.token_streams is None:
            streams = self.streams.repeat_interleave(self.cu_seqlens.diff())
            object.__setattr__(self, "token_streams", streams)
        _check_shapes(self)
        _check_values(self)

    def __len__(self) -> int:
        return self.prompt_index.shape[0]

    @property
    def lengths(self) -> Tensor:
        """(B,) int64, tokens in each response."""
        return self.cu_seqlens.diff()

    def response(self, b: int) -> Tensor:
        """(n,) int64, the tokens of sequence `b`'s response, end token included."""
        checks.need(-len(self) <= b < len(self), "b", f"a sequence of {len(self)}", b)
        start, end = self.cu_seqlens[b % len(self)], self.cu_seqlens[b % len(self) + 1]
        return self.tokens[start:end]

    def responses(self) -> tuple[Tensor, ...]:
        """B views (n_b,) int64 of the responses."""
        return torch.split(self.tokens, self.lengths.tolist())

    def texts(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> list[str]:
        """The B responses in words, without special tokens such as the end token."""
        return [
            tokenizer.decode(response.tolist(), skip_special_tokens=skip_special_tokens)
            for response in self.responses()
        ]

    def select(self, rows: Tensor | Sequence[int]) -> Rollout:
        """The sequences `rows`, (n,) int64 in any order or (B,) bool; prompts keep their numbers.

        Raises:
            IndexError: a sequence is not there.
        """
        index = torch.as_tensor(rows)
        if index.dtype == torch.bool:
            checks.need_shape(index, (len(self),), "rows", "one bool a sequence")
            index = index.nonzero().squeeze(1)
        index = index.long()
        lengths = self.lengths[index]
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        # Token j of the selection is token j - (new start) + (old start) of its sequence here.
        shift = (self.cu_seqlens[index] - cu_seqlens[:-1]).repeat_interleave(lengths)
        tokens = torch.arange(len(shift)) + shift
        per_token = {name: getattr(self, name)[tokens] for name in _token_fields(self)}
        per_sequence = {name: getattr(self, name)[index] for name in _SEQUENCE_FIELDS}
        return replace(self, cu_seqlens=cu_seqlens, **per_token, **per_sequence)


class Drawn(NamedTuple):
    """Tokens that sequences got in one step, (n,) each, and where they came from."""

    sequence: Ints
    step: Ints  # the number of the token in its response
    ids: Ints
    stream: Ints
    source: npt.NDArray[np.uint8]
    logp: Tensor
    entropy: Tensor
    support: Tensor | None


@dataclass
class Recorder:
    """What was drawn, step by step, and in the end the Rollout of it."""

    n_sequences: int
    finish: npt.NDArray[np.uint8] = field(init=False)
    drawn: list[Drawn] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.finish = np.full(self.n_sequences, RUNNING, dtype=np.uint8)

    def add(self, drawn: Drawn, sequences: Ints, finish: npt.NDArray[np.uint8]) -> None:
        """What one step gave, and why each of `sequences` ends with it, or RUNNING."""
        self.drawn.append(drawn)
        self.finish[sequences] = finish

    def rollout(
        self,
        prompts: list[Tensor],
        groups: Tensor,
        streams: Tensor,
        version: int,
        temperature: float,
    ) -> Rollout:
        sequence, step, ids, stream = (self._joined(i, np.int64) for i in range(4))
        cu_seqlens = np.zeros(self.n_sequences + 1, dtype=np.int64)
        cu_seqlens[1:] = np.bincount(sequence, minlength=self.n_sequences).cumsum()
        # order[t] is the number in the record of the rollout's token t.
        order = np.empty_like(sequence)
        order[cu_seqlens[sequence] + step] = np.arange(len(sequence))
        index = torch.from_numpy(order)
        supports = [d.support for d in self.drawn if d.support is not None]
        return Rollout(
            prompts=tuple(prompts),
            prompt_index=groups,
            tokens=torch.from_numpy(ids)[index],
            cu_seqlens=torch.from_numpy(cu_seqlens),
            logp=_on_cpu([d.logp for d in self.drawn])[index],
            entropy=_on_cpu([d.entropy for d in self.drawn])[index],
            version=torch.full((len(sequence),), version),
            source=torch.from_numpy(self._joined(4, np.uint8))[index],
            streams=streams,
            finish=torch.from_numpy(self.finish),
            temperature=temperature,
            token_streams=torch.from_numpy(stream)[index],
            support=_on_cpu(supports)[index] if supports else None,
        )

    def _joined(self, i: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        return np.concatenate([*(d[i] for d in self.drawn), np.empty(0, dtype)])


def _on_cpu(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts).cpu() if parts else torch.empty(0)


_TOKEN_FIELDS = ("tokens", "logp", "entropy", "version", "source", "token_streams")
_SEQUENCE_FIELDS = ("prompt_index", "streams", "finish")
_DTYPES = {
    "prompt_index": torch.int64,
    "tokens": torch.int64,
    "cu_seqlens": torch.int64,
    "version": torch.int64,
    "streams": torch.int64,
    "token_streams": torch.int64,
    "source": torch.uint8,
    "finish": torch.uint8,
}


def _token_fields(rollout: Rollout) -> tuple[str, ...]:
    return _TOKEN_FIELDS if rollout.support is None else (*_TOKEN_FIELDS, "support")


def _check_shapes(rollout: Rollout) -> None:
    if not isinstance(rollout.prompts, tuple):
        raise TypeError(f"prompts: need a tuple of tensors, got {type(rollout.prompts).__name__}")
    for p, prompt in enumerate(rollout.prompts):
        checks.need_tensor(prompt, f"prompts[{p}]")
        if prompt.dtype != torch.int64:
            raise TypeError(f"prompts[{p}]: need int64, got {prompt.dtype}")
        good = prompt.dim() == 1 and len(prompt) > 0
        checks.need(good, f"prompts[{p}]", "shape (L,) with L >= 1", tuple(prompt.shape))
    for name, dtype in _DTYPES.items():
        value = getattr(rollout, name)
        checks.need_tensor(value, name)
        if value.dtype != dtype:
            raise TypeError(f"{name}: need {dtype}, got {value.dtype}")
    for name in ("logp", "entropy", *(["support"] if rollout.support is not None else [])):
        checks.need_float(getattr(rollout, name), name)
    for name in (*_token_fields(rollout), *_SEQUENCE_FIELDS, "cu_seqlens"):
        device = getattr(rollout, name).device
        checks.need(device.type == "cpu", name, "a tensor on the CPU", device)
    checks.need(rollout.tokens.dim() == 1, "tokens", "shape (T,)", tuple(rollout.tokens.shape))
    index = rollout.prompt_index
    checks.need(index.dim() == 1, "prompt_index", "shape (B,)", tuple(index.shape))
    for name in _token_fields(rollout):
        shape = tuple(rollout.tokens.shape)
        checks.need_shape(getattr(rollout, name), shape, name, "one value a token")
    for name in _SEQUENCE_FIELDS:
        checks.need_shape(getattr(rollout, name), (len(rollout),), name, "one value a sequence")
    checks.need_shape(rollout.cu_seqlens, (len(rollout) + 1,), "cu_seqlens", "B + 1 borders")


def _check_values(rollout: Rollout) -> None:
    lengths, n_tokens = rollout.lengths, len(rollout.tokens)
    whole = int(rollout.cu_seqlens[0]) == 0 and int(rollout.cu_seqlens[-1]) == n_tokens
    whole = whole and bool((lengths >= 0).all())
    checks.need(
        whole, "cu_seqlens", f"non-decreasing from 0 to T = {n_tokens}", rollout.cu_seqlens.tolist()
    )
    index, n_prompts = rollout.prompt_index, len(rollout.prompts)
    good = bool(((index >= 0) & (index < n_prompts)).all())
    checks.need(good, "prompt_index", f"numbers in [0, {n_prompts})", index.tolist())
    for name, value in (("tokens", rollout.tokens), *_named_prompts(rollout)):
        checks.need(bool((value >= 0).all()), name, "token ids >= 0", "a negative one")
    # -inf is a legal log-prob, of a token that the policy forbids.
    checks.need(bool((rollout.logp < torch.inf).all()), "logp", "nats, not NaN", "another value")
    good = bool(rollout.entropy.isfinite().all())
    checks.need(good, "entropy", "finite values", "another value")
    if rollout.support is not None:
        checks.need(bool((rollout.support >= 0).all()), "support", "nats >= 0", "another value")
    for name, kind in (("source", Source), ("finish", Finish)):
        good = bool((getattr(rollout, name) < len(kind)).all())
        checks.need(good, name, f"values of {kind.__name__}", "another number")
    good = 0.0 < rollout.temperature < float("inf")
    checks.need(good, "temperature", "a finite value > 0", rollout.temperature)


def _named_prompts(rollout: Rollout) -> list[tuple[str, Tensor]]:
    return [("prompts", torch.cat(rollout.prompts))] if rollout.prompts else []
