"""What the tests of the samplers in examples/ share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from tiny_models import tiny_qwen3, with_float64_norms
from torch import Tensor

from rollfuse import Branch, TreeModel, tree_cache_for

PROMPT = [1, 0, 1]


class Watched(TreeModel):
    """Notes of each pass how many branches it was for, its rows, and the pages in use."""

    def __init__(self, vocabulary: int, n_pages: int = 512, page_size: int = 4) -> None:
        model = with_float64_norms(tiny_qwen3(vocab_size=vocabulary)).eval()
        super().__init__(model, tree_cache_for(model, n_pages=n_pages, page_size=page_size))
        self.branches: list[int] = []
        self.rows: list[int] = []
        self.pages: list[int] = []
        model.register_forward_pre_hook(self._note, with_kwargs=True)

    def forward(self, branches: Sequence[Branch], *, pure: bool = False) -> Tensor:
        self.branches.append(len(branches))
        self.pages.append(self.cache.statistics().n_pages_used)
        return super().forward(branches, pure=pure)

    def _note(self, module: object, args: object, given: dict[str, Tensor]) -> None:
        if "tree_pass" in given:
            self.rows.append(given["input_ids"].numel())

    @torch.no_grad()
    def logp(self, text: Sequence[int]) -> Tensor:
        """(V,) after a text, from a pass over all of it."""
        return self.model(input_ids=torch.tensor([list(text)])).logits[0, -1].log_softmax(-1)


@contextmanager
def all_pruned(model: TreeModel) -> Iterator[None]:
    """What is done inside leaves nothing in the cache, and what others have there alone."""
    cache = model.cache
    other = cache.root([*PROMPT, 1])
    model.forward([other])
    before = cache.statistics()
    yield
    cache.check()
    assert cache.statistics() == before
    assert other.tokens.tolist() == [*PROMPT, 1] and other.n_computed == 4
    other.prune()
