"""Engine: groups of sampled responses from an unmodified transformers model.

Texts lie in a TreeCache: a prompt is computed and stored once for its group and for all prompts
that begin like it, and read once a step. Members of a group share their row until their tokens
first differ: as long as they agree, keys, values and logits are the same numbers, and only the
noise of their streams differs. A sequence that has finished gives its pages back at once, and
waiting prompts take its place.

Legend: P prompts, n samples each, B = P * n sequences, V vocabulary.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rollfuse.kernels import checks
from rollfuse.kernels.head import Head
from rollfuse.kernels.noise import need_distinct_streams, new_streams
from rollfuse.kernels.sampling import Sampling
from rollfuse.kernels.verification import coupled
from rollfuse.rollout.causal_lm import (
    embedding_weight,
    evaluating,
    head_difference,
    head_of,
    head_tolerance,
)
from rollfuse.rollout.decoding import Decoding, Text, Totals
from rollfuse.rollout.drafter import Drafter, Request, need_drafter, tell
from rollfuse.rollout.judging import Judge
from rollfuse.rollout.record import RUNNING, Recorder, Rollout, Source, Tokenizer
from rollfuse.rollout.stopping import StopStrings, TextWatch
from rollfuse.rollout.tree_cache import TreeCache
from rollfuse.rollout.tree_model import TreeModel, need_tree_model, tree_cache_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Ints = npt.NDArray[np.int64]

_PLAIN = Sampling()


class Engine:
    """Generation over a transformers causal language model.

    The weights are read from the live module at every step: after an optimiser's update the next
    call uses the new ones, and nothing is kept between calls.

    Args:
        model: a decoder-only transformers model as `TreeModel` serves; left as it is.
        max_new_tokens: the longest response, >= 1.
        stop_tokens: ids that end a response, of which they are the last token. None: the model's
            own end tokens (`generation_config.eos_token_id`).
        stop_strings: texts that end a response with the token that completes one.
        tokenizer: needed to look for stop strings; unused without.
        max_batch: sequences decoded together, at least `n`. None: all that there is room for.
        kv_bytes: the most that keys and values may take. None: what the batch can come to need, at
            most half of a GPU's free memory or of the machine's. With less, sequences wait, and
            those with the shortest responses are dropped to their tokens and computed again later.
        page_size: tokens of a page of the cache.

    Attributes:
        totals: what the last `generate` has done: passes, rows, keys read, texts dropped.

    Raises:
        TypeError: the model is none of that, or stop strings lack a tokenizer.
        ValueError: a limit is below 1, a stop token is out of range or a stop string is empty.
    """

    def __init__(  # noqa: PLR0913  (the signature is the published API)
        self,
        model: PreTrainedModel,
        *,
        max_new_tokens: int,
        stop_tokens: Sequence[int] | None = None,
        stop_strings: Sequence[str] = (),
        tokenizer: Tokenizer | None = None,
        max_batch: int | None = None,
        kv_bytes: int | None = None,
        page_size: int = 16,
    ) -> None:
        need_tree_model(model)
        checks.need(max_new_tokens >= 1, "max_new_tokens", "a count >= 1", max_new_tokens)
        checks.need(max_batch is None or max_batch >= 1, "max_batch", "a count >= 1", max_batch)
        self.model = model
        self.max_new_tokens = max_new_tokens
        checks.need(kv_bytes is None or kv_bytes >= 1, "kv_bytes", "a count >= 1", kv_bytes)
        checks.need(page_size >= 1, "page_size", "a count >= 1", page_size)
        self.max_batch, self.kv_bytes, self.page_size = max_batch, kv_bytes, page_size
        self.totals = Totals()
        self.stop_strings = StopStrings(stop_strings, tokenizer)
        end_tokens = _end_tokens(model) if stop_tokens is None else stop_tokens
        self.stop_tokens = np.asarray(end_tokens, dtype=np.int64)
        self._has_plain_head: bool | None = None  # found out when it is first needed
        self._vocabulary = embedding_weight(model).shape[0]
        good = ((self.stop_tokens >= 0) & (self.stop_tokens < self._vocabulary)).all()
        checks.need(bool(good), "stop_tokens", f"ids in [0, {self._vocabulary})", list(end_tokens))

    def generate(
        self,
        prompts: Sequence[Sequence[int] | Tensor],
        n: int,
        sampling: Sampling = _PLAIN,
        *,
        streams: Tensor | None = None,
        seed: int | None = None,
        version: int = 0,
        drafter: Drafter | None = None,
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
            version: number of the policy, >= 0, recorded with every token.
            drafter: who guesses tokens for a pass to check several at once, such as
                `PastRollouts` or `SuffixDrafts`. None: every token takes a pass.

        Returns:
            A Rollout of B sequences, prompt by prompt, on the CPU.

        Raises:
            TypeError: a wrong dtype; a per-row temperature.
            ValueError: an empty prompt, a token out of range, too long a prompt for the model or
                for `kv_bytes`, two equal streams in a group (with a drafter: in the rollout),
                `max_batch` below `n`, or logits without a finite maximum.
        """
        checks.need(n >= 1, "n", "samples per prompt >= 1", n)
        checks.need(version >= 0, "version", "a number >= 0", version)
        for name in ("temperature", "top_k", "top_p", "min_p"):
            if isinstance(getattr(sampling, name), Tensor):
                raise TypeError(f"sampling.{name}: need one number, got a tensor")
        enough = self.max_batch is None or self.max_batch >= n
        checks.need(enough, "max_batch", f"at least a group, n = {n}", self.max_batch)
        texts = self._checked_prompts(prompts)
        groups = torch.arange(len(texts)).repeat_interleave(n)
        streams = _checked_streams(streams, seed, groups)
        if drafter is not None:  # which may not tell one group's noise from another's
            need_distinct_streams(streams)
        record = Recorder(len(groups))
        if texts:
            cache = self._cache(texts, n)
            cache.version = version
            with evaluating(self.model):
                model = TreeModel(self.model, cache)
                self._run(model, texts, streams.numpy(), sampling, record, drafter)
        assert not isinstance(sampling.temperature, Tensor)
        return record.rollout(texts, groups, streams, version, sampling.temperature)

    def _cache(self, texts: list[Tensor], n: int) -> TreeCache:
        """A pool for the longest prompts that may be decoded together, and for their responses."""
        page = self.page_size
        lengths = sorted((len(text) for text in texts), reverse=True)
        at_once = lengths[: max(1, self.max_batch // n)] if self.max_batch else lengths
        # Where members part, each begins a page of its own, and leaves one half empty.
        response = -(-self.max_new_tokens // page) + 2
        n_pages = sum(-(-length // page) + n * response for length in at_once)
        alone = -(-(lengths[0] + self.max_new_tokens) // page)
        one_page = tree_cache_for(self.model, n_pages=1, page_size=page).page_bytes
        limit = self.kv_bytes or _half_of_memory(embedding_weight(self.model).device)
        needed = f"at least {alone * one_page}, for the longest prompt and its response"
        checks.need(limit >= alone * one_page, "kv_bytes", needed, limit)
        n_pages = min(n_pages, limit // one_page)
        # Watched, where all is: what is in the slots, and what should be.
        watched = os.environ.get("ROLLFUSE_CHECK") == "1"
        options = {"page_size": page, "canary": watched, "checksum": watched}
        return tree_cache_for(self.model, n_pages=n_pages, **options)

    def _run(
        self,
        model: TreeModel,
        texts: list[Tensor],
        noise: Ints,
        sampling: Sampling,
        record: Recorder,
        drafter: Drafter | None,
    ) -> None:
        """Decode all sequences until they have finished."""
        n = len(noise) // len(texts)
        lengths = np.array([len(text) for text in texts], dtype=np.int64).repeat(n)
        if drafter is not None:
            need_drafter(drafter)
            drafter.start(self._request(texts, noise))
        head = self._head(texts[0])
        decoding = Decoding(
            model, self._waiting(texts, n), self.max_new_tokens, self.max_batch, drafter
        )
        self.totals = decoding.totals
        judge = Judge(
            sampling,
            coupled if drafter is None else drafter.rule,
            Source.VERIFIED if drafter is None else drafter.source,
            noise,
            lengths,
            self.max_new_tokens,
            self.stop_tokens,
            self._watches(texts, n),
        )
        decoding.start()
        while decoding.branches:
            answers = decoding.answers(as_hidden=head is not None)
            found = judge.judge(decoding, answers, head)
            record.add(found.drawn, decoding.sequence, found.finish)
            goes_on = found.finish == RUNNING
            if drafter is not None:
                tell(drafter, found.drawn, found.checked, decoding.sequence[~goes_on])
            decoding.advance(found.stay, found.ids, goes_on)
        if model.cache.has_self_checks:
            model.cache.check()
        tree = model.cache.tree
        assert tree.pool.n_free == tree.pool.n_pages, (
            "pages of texts that have ended are still held"
        )

    def _waiting(self, texts: list[Tensor], n: int) -> deque[Text]:
        """The prompts and their sequences; equal ones as one text where the batch can take it."""
        limit = self.max_batch or len(texts) * n
        waiting: dict[tuple[bytes, int], list[int]] = {}
        for p, text in enumerate(texts):
            key = text.numpy().tobytes()
            number = 0
            while len(waiting.get((key, number), ())) + n > limit:
                number += 1
            waiting.setdefault((key, number), []).extend(range(p * n, p * n + n))
        return deque(
            Text(np.frombuffer(key, np.int64), np.array(sequences), 0)
            for (key, _), sequences in waiting.items()
        )

    def _head(self, text: Tensor) -> Head | None:
        """The model's head, if its logits are that of its hidden states; None: it makes its own."""
        try:
            head = head_of(self.model)
        except ValueError:
            return None
        if self._has_plain_head is None:
            difference = head_difference(self.model, text[:8])
            self._has_plain_head = difference <= head_tolerance(self.model)
        return head if self._has_plain_head else None

    def _request(self, texts: list[Tensor], noise: Ints) -> Request:
        index = np.arange(len(texts)).repeat(len(noise) // len(texts))
        prompts = [text.numpy() for text in texts]
        return Request(prompts, index, noise, self.max_new_tokens, self._vocabulary)

    def _watches(self, texts: list[Tensor], n: int) -> dict[int, TextWatch]:
        if not self.stop_strings:
            return {}
        sequences = range(len(texts) * n)
        return {s: self.stop_strings.watch(texts[s // n].tolist()) for s in sequences}

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
        return texts


def _half_of_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    if not hasattr(os, "sysconf"):  # Windows
        return sys.maxsize
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


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
