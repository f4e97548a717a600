"""Engine: groups of sampled responses from an unmodified transformers model.

Sequences that agree so far share one row of the batch. A prompt is pushed through once for its
group, and members part where their tokens first differ: as long as they agree, keys, values and
logits are the same numbers, and only the noise of their streams differs. Sequences that have
finished leave the batch. The forward pass of a step thus has one row for each distinct unfinished
text, no more.

Legend: P prompts, n samples each, B = P * n sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rollfuse.kernels import checks
from rollfuse.kernels.noise import need_distinct_streams, new_streams
from rollfuse.kernels.sampling import Sampling, sample_tokens
from rollfuse.rollout.causal_lm import (
    embedding_weight,
    evaluating,
    forward_arguments,
    need_causal_lm,
)
from rollfuse.rollout.decoding import DecodingBatch
from rollfuse.rollout.record import RUNNING, Finish, Recorder, Rollout, Tokenizer
from rollfuse.rollout.stopping import StopStrings, TextWatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Ints = npt.NDArray[np.int64]

_PLAIN = Sampling()


class Engine:
    """Generation over a transformers causal language model.

    The weights are read from the live module at every step: after an optimiser's update the next
    call uses the new ones, and nothing is kept between calls.

    Args:
        model: a decoder-only transformers model with a language-model head; left as it is.
        max_new_tokens: the longest response, >= 1.
        stop_tokens: ids that end a response, of which they are the last token. None: the model's
            own end tokens (`generation_config.eos_token_id`).
        stop_strings: texts that end a response with the token that completes one.
        tokenizer: needed to look for stop strings; unused without.
        max_batch: sequences decoded together, at least `n` (a group is not divided). None: all.

    Raises:
        TypeError: the model is none of that, or stop strings lack a tokenizer.
        ValueError: a limit is below 1, a stop token is out of range or a stop string is empty.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_new_tokens: int,
        stop_tokens: Sequence[int] | None = None,
        stop_strings: Sequence[str] = (),
        tokenizer: Tokenizer | None = None,
        max_batch: int | None = None,
    ) -> None:
        need_causal_lm(model)
        checks.need(max_new_tokens >= 1, "max_new_tokens", "a count >= 1", max_new_tokens)
        checks.need(max_batch is None or max_batch >= 1, "max_batch", "a count >= 1", max_batch)
        self.model = model
        self.max_new_tokens = max_new_tokens
        self.max_batch = max_batch
        self.stop_strings = StopStrings(stop_strings, tokenizer)
        end_tokens = _end_tokens(model) if stop_tokens is None else stop_tokens
        self.stop_tokens = np.asarray(end_tokens, dtype=np.int64)
        self._vocabulary = embedding_weight(model).shape[0]
        good = ((self.stop_tokens >= 0) & (self.stop_tokens < self._vocabulary)).all()
        checks.need(bool(good), "stop_tokens", f"ids in [0, {self._vocabulary})", list(end_tokens))
        self._arguments = forward_arguments(model)

    def generate(
        self,
        prompts: Sequence[Sequence[int] | Tensor],
        n: int,
        sampling: Sampling = _PLAIN,
        *,
        streams: Tensor | None = None,
        seed: int | None = None,
        version: int = 0,
    ) -> Rollout:
        """Sample `n` responses to every prompt.

        Token t of prompt and response is drawn with the noise of (stream, t): what a sequence
        draws depends on its stream and logits, not on the batch around it.

        Args:
            prompts: P token lists, none empty.
            n: samples per prompt.
            sampling: the distribution; its temperature is one number here.
            streams: (B,) int64, the sequences' noise, prompt by prompt. Exclusive with `seed`.
            seed: makes the streams, the same ones at every call with it.
            version: number of the policy, recorded with every token.

        Returns:
            A Rollout of B sequences, prompt by prompt, on the CPU.

        Raises:
            TypeError: a wrong dtype; a per-row temperature; a model that prompts of several lengths
                cannot be padded for.
            ValueError: an empty prompt, a token out of range, too long a prompt, two equal streams
                in a group, `max_batch` below `n`, or logits without a finite maximum.
        """
        checks.need(n >= 1, "n", "samples per prompt >= 1", n)
        if isinstance(sampling.temperature, Tensor):
            raise TypeError("sampling.temperature: need one number, got a tensor")
        enough = self.max_batch is None or self.max_batch >= n
        checks.need(enough, "max_batch", f"at least a group, n = {n}", self.max_batch)
        texts = self._checked_prompts(prompts)
        groups = torch.arange(len(texts)).repeat_interleave(n)
        streams = _checked_streams(streams, seed, groups)
        record = Recorder(len(groups))
        noise = streams.numpy()
        with evaluating(self.model):
            for wave in self._waves([len(text) for text in texts], n):
                self._run(wave, texts, noise, sampling, record)
        return record.rollout(texts, groups, streams, version, sampling.temperature)

    def _waves(self, lengths: list[int], n: int) -> list[Ints]:
        """Prompts decoded together; those of like lengths, so that little is padded."""
        order = np.argsort(lengths, kind="stable") if self.max_batch else np.arange(len(lengths))
        step = self.max_batch // n if self.max_batch else max(1, len(lengths))
        return [order[start : start + step] for start in range(0, len(order), step)]

    def _run(
        self,
        wave: Ints,
        texts: list[Tensor],
        noise: Ints,
        sampling: Sampling,
        record: Recorder,
    ) -> None:
        """Decode the groups of the prompts `wave` until all their sequences have finished."""
        n = len(noise) // len(texts)
        nodes, node = _distinct([texts[p] for p in wave])
        node = node.repeat(n)
        sequence = (wave[:, None] * n + np.arange(n)).reshape(-1)
        length = np.array([len(texts[p]) for p in wave]).repeat(n)
        watches = self._watches(sequence, texts, n)
        batch = DecodingBatch(self.model, self._arguments, nodes)
        for step in range(self.max_new_tokens):
            logits = batch.logits
            if len(node) != len(logits):
                logits = logits.index_select(0, batch.device_ints(node))
            rows = (batch.device_ints(noise[sequence]), batch.device_ints(length + step))
            drawn = sample_tokens(logits, *rows, sampling)
            ids = drawn.ids.cpu().numpy()
            if ids.min() < 0:
                raise ValueError("logits: need a finite maximum in every row, got a row without")
            finish = self._finish(ids, step, sequence, watches)
            record.add(sequence, step, drawn, ids, finish)
            live = finish == RUNNING
            if not live.any():
                return
            sequence, node, length, ids = (x[live] for x in (sequence, node, length, ids))
            # Sorted by (row, token): sequences that still agree are neighbours.
            order = np.lexsort((ids, node))
            sequence, node, length, ids = (x[order] for x in (sequence, node, length, ids))
            differs = np.ones(len(ids), dtype=bool)
            differs[1:] = (node[1:] != node[:-1]) | (ids[1:] != ids[:-1])
            batch.advance(node[differs], ids[differs])
            node = differs.cumsum() - 1

    def _finish(
        self, ids: Ints, step: int, sequence: Ints, watches: dict[int, TextWatch]
    ) -> npt.NDArray[np.uint8]:
        """(rows,) why each sequence ends with its new token, or RUNNING."""
        last = step + 1 == self.max_new_tokens
        finish = np.full(len(ids), Finish.LENGTH if last else RUNNING, dtype=np.uint8)
        if watches:
            hit = [watches[s].push(i) for s, i in zip(sequence.tolist(), ids.tolist(), strict=True)]
            finish[hit] = Finish.STOP_STRING
        for token in self.stop_tokens:
            finish[ids == token] = Finish.STOP
        return finish

    def _watches(self, sequence: Ints, texts: list[Tensor], n: int) -> dict[int, TextWatch]:
        if not self.stop_strings:
            return {}
        return {s: self.stop_strings.watch(texts[s // n].tolist()) for s in sequence.tolist()}

    def _checked_prompts(self, prompts: Sequence[Sequence[int] | Tensor]) -> list[Tensor]:
        """The prompts as (L,) int64 tensors on the CPU."""
        texts = []
        config = self.model.config.get_text_config(decoder=True)
        limit = getattr(config, "max_position_embeddings", None) or float("inf")
        for p, prompt in enumerate(prompts):
            text = torch.as_tensor(prompt, device="cpu")
            checks.need(text.dim() == 1 and len(text) > 0, f"prompts[{p}]", "tokens", prompt)
            checks.need_int(text, f"prompts[{p}]")
            room = f"{limit} tokens with max_new_tokens = {self.max_new_tokens}"
            fits = len(text) + self.max_new_tokens <= limit
            checks.need(fits, f"prompts[{p}]", f"at most {room}", f"a prompt of {len(text)}")
            texts.append(text.long())
        if texts:
            everything = torch.cat(texts)
            good = int(everything.min()) >= 0 and int(everything.max()) < self._vocabulary
            checks.need(good, "prompts", f"ids in [0, {self._vocabulary})", "another one")
        if len({len(text) for text in texts}) > 1 and "position_ids" not in self._arguments:
            raise TypeError(
                f"prompts: need one length for {type(self.model).__name__}, whose forward lacks "
                "position_ids, got several"
            )
        return texts


def _distinct(texts: list[Tensor]) -> tuple[list[Tensor], Ints]:
    """The texts without repetitions, in order, and (n,) the place there of each."""
    number: dict[bytes, int] = {}
    distinct: list[Tensor] = []
    place = np.empty(len(texts), dtype=np.int64)
    for i, text in enumerate(texts):
        place[i] = number.setdefault(text.numpy().tobytes(), len(number))
        if place[i] == len(distinct):
            distinct.append(text)
    return distinct, place


def _end_tokens(model: PreTrainedModel) -> list[int]:
    """The model's own end tokens, none if it has none."""
    config = getattr(model, "generation_config", None) or model.config
    end = config.eos_token_id
    if end is None:
        return []
    return [end] if isinstance(end, int) else list(end)


def _checked_streams(streams: Tensor | None, seed: int | None, groups: Tensor) -> Tensor:
    if (streams is None) == (seed is None):
        got = "neither" if seed is None else "both"
        raise TypeError(f"streams, seed: need one of the two, got {got}")
    if streams is None:
        assert seed is not None
        return new_streams(seed, len(groups))
    checks.need_tensor(streams, "streams")
    if streams.dtype != torch.int64:
        raise TypeError(f"streams: need int64, got {streams.dtype}")
    checks.need_shape(streams, tuple(groups.shape), "streams", "one a sequence, P * n")
    streams = streams.detach().cpu().clone()
    need_distinct_streams(streams, groups)
    return streams
