"""ModelDrafts: a smaller model guesses, with the noise of the sequence it guesses for.

Both models draw by the largest of logits / temperature + noise. With the same noise they draw the
same token with a chance of at least (1 - TV) / (1 + TV), TV being the distance of their
distributions, and the small one need not know the large one's.

Source: Daliri, Musco, Suresh, "Coupling without communication and drafter-invariant speculative
decoding", arXiv 2408.07978.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from rollfuse.kernels import checks
from rollfuse.kernels.sampling import Sampling, sample_tokens
from rollfuse.kernels.verification import Rule, coupled
from rollfuse.rollout.branch import Branch
from rollfuse.rollout.causal_lm import embedding_weight
from rollfuse.rollout.drafter import Chunk, Ints, News, Request
from rollfuse.rollout.record import Source
from rollfuse.rollout.tree_model import TreeModel, need_tree_model, tree_cache_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(slots=True)
class ModelDrafts:
    """A `Drafter`.

    Args:
        model: a causal language model with the tokens of the one it guesses for.
        n_tokens: of a guess.
        sampling: the distribution the large model is sampled from.

    Raises:
        TypeError, ValueError: the model cannot be served, `n_tokens` is below 1; in a `generate`,
            its vocabulary is not the large model's, or it has too few positions.
    """

    model: PreTrainedModel
    n_tokens: int = 4
    sampling: Sampling = Sampling()
    rule: Rule = field(init=False, default=coupled)
    source: Source = field(init=False, default=Source.VERIFIED)
    _tree: TreeModel | None = field(init=False, default=None)
    _branches: dict[int, Branch] = field(init=False, default_factory=dict)
    _known: dict[int, int] = field(init=False, default_factory=dict)  # tokens that are no guess
    _streams: Ints = field(init=False, default_factory=lambda: np.empty(0, np.int64))

    def __post_init__(self) -> None:
        need_tree_model(self.model)
        checks.need(self.n_tokens >= 1, "n_tokens", "a count >= 1", self.n_tokens)

    def start(self, request: Request) -> None:
        vocabulary = embedding_weight(self.model).shape[0]
        needed = f"a draft model with the {request.vocabulary} tokens of the other one"
        checks.need(vocabulary == request.vocabulary, "model", needed, vocabulary)
        page, lengths = 16, [len(prompt) for prompt in request.prompts]
        config = self.model.config.get_text_config(decoder=True)
        limit = getattr(config, "max_position_embeddings", None) or sys.maxsize
        most = max(lengths) + request.longest + self.n_tokens
        checks.need(most <= limit, "model", f"a draft model with {most} positions", limit)
        response = -(-(request.longest + self.n_tokens) // page) + 2
        n_pages = sum(-(-length // page) for length in lengths)
        n_pages += response * len(request.prompt_index)
        cache = tree_cache_for(self.model, n_pages=n_pages, page_size=page, canary=False)
        self._tree = TreeModel(self.model, cache)
        self._streams = request.streams
        roots: list[Branch] = []
        for prompt in request.prompts:
            roots.append(cache.match(prompt) or cache.root())
            cache.append(roots[-1:], [prompt[len(roots[-1]) :]])
        self._branches = {s: roots[p].fork()[0] for s, p in enumerate(request.prompt_index)}
        self._known = {s: lengths[p] for s, p in enumerate(request.prompt_index)}
        for root in roots:
            root.prune()

    def propose(self, sequences: Sequence[int]) -> list[Chunk | None]:
        assert self._tree is not None, "start comes first"
        cache, branches = self._tree.cache, [self._branches[s] for s in sequences]
        for s, branch in zip(sequences, branches, strict=True):
            branch.truncate(self._known[s])  # a guess that nobody took up
        streams = torch.from_numpy(self._streams[list(sequences)]).to(cache.device)
        for _ in range(self.n_tokens):
            logits = self._tree.forward(branches)
            drawn = sample_tokens(logits, streams, cache.positions(branches), self.sampling)
            cache.append(branches, drawn.ids)
        return [Chunk(branch.tokens[-self.n_tokens :]) for branch in branches]

    def advance(self, news: Sequence[News]) -> None:
        assert self._tree is not None, "start comes first"
        branches = [self._branches[new.sequence] for new in news]
        rests: list[Ints] = []
        for (s, tokens, *_), branch in zip(news, branches, strict=True):
            guess = branch.tokens[self._known[s] :]
            n = min(len(guess), len(tokens))
            agrees = guess[:n] == tokens[:n]
            n = n if agrees.all() else int(agrees.argmin())
            branch.truncate(self._known[s] + n)
            rests.append(tokens[n:])
            self._known[s] += len(tokens)
        self._tree.cache.append(branches, rests)

    def finish(self, sequences: Sequence[int]) -> None:
        for s in sequences:
            self._branches.pop(s).prune()
