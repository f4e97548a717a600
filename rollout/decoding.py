"""DecodingBatch: the model's cache for a set of texts that grow a token at a time.

A row is one distinct text, whatever number of sequences share it. This is the part of generation
that knows how keys and values are kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rollfuse.rollout.causal_lm import (
    cache_argument,
    embedding_weight,
    left_padded,
    need_filled,
    new_cache,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Ints = npt.NDArray[np.int64]


class DecodingBatch:
    """The model's cache and last logits for a set of distinct texts, one row each."""

    def __init__(self, model: PreTrainedModel, arguments: set[str], texts: list[Tensor]) -> None:
        self._model = model
        self._device = embedding_weight(model).device
        self._cache = new_cache(model)
        self._cached = {cache_argument(arguments): self._cache, "use_cache": True}
        # The model's own forward makes the logits: it knows of its soft caps and scales.
        self._last = {"logits_to_keep": 1} if "logits_to_keep" in arguments else {}
        lengths = torch.tensor([len(text) for text in texts])
        ids, mask = left_padded(texts, lengths)
        self._width = ids.shape[1]
        self._padding = self._width - lengths.numpy()  # (rows,) columns before a text begins
        positions = None if mask is None else (mask.cumsum(1) - 1).clamp_(min=0)
        self.logits = self._forward(ids, mask, positions)  # (rows, V)
        need_filled(self._cache, self._width, model)

    def device_ints(self, values: Ints) -> Tensor:
        return torch.from_numpy(values).to(self._device, non_blocking=True)

    def advance(self, parent: Ints, ids: Ints) -> None:
        """Go on with one row for each token `ids`, which follows the text of row `parent`."""
        if len(parent) != len(self._padding) or (parent != np.arange(len(parent))).any():
            self._cache.reorder_cache(self.device_ints(parent))
            self._padding = self._padding[parent]
        self._width += 1
        mask = positions = None
        if self._padding.any():
            padding = torch.from_numpy(self._padding).unsqueeze(1)
            mask = torch.arange(self._width) >= padding
            positions = self._width - 1 - padding
        self.logits = self._forward(torch.from_numpy(ids).unsqueeze(1), mask, positions)

    def _forward(self, ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
        """Logits (rows, V) after the last column. Without padding the model needs no mask."""
        padding = {}
        if mask is not None and positions is not None:
            padding = {
                "attention_mask": mask.to(self._device, non_blocking=True),
                "position_ids": positions.to(self._device, non_blocking=True),
            }
        out = self._model(
            input_ids=ids.to(self._device, non_blocking=True),
            **self._cached,
            **padding,
            **self._last,
        )
        logits: Tensor = out.logits[:, -1]
        return logits
