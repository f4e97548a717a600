"""TreeModel: an unmodified transformers model whose attention reads a TreeCache.

The rows of a pass lie side by side in one packed sequence with positions of their own. An attention
function registered with transformers gets the new keys and values of each layer, stores them and
attends by the plan, which travels as a keyword argument of the model's forward. transformers makes
no mask and keeps no cache. The model's own attention is put back after each pass.

Legend: B branches, N rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from rollfuse.kernels import checks
from rollfuse.kernels.tree_attention import tree_decode_attention
from rollfuse.rollout.branch import Branch
from rollfuse.rollout.causal_lm import (
    embedding_weight,
    evaluating,
    forward_arguments,
    need_causal_lm,
    new_cache,
)
from rollfuse.rollout.token_tree import Ints
from rollfuse.rollout.tree_cache import TreeCache
from rollfuse.rollout.tree_step import TreeStep

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_NAME = "rollfuse_tree"
_LAYERS = {"full_attention", "sliding_attention", "attention"}


def tree_cache_for(model: PreTrainedModel, *, n_pages: int, **options: Any) -> TreeCache:
    """An empty TreeCache of the model's layers, heads, dtype and device.

    Args:
        model: as for `TreeModel`.
        n_pages, options: as of `TreeCache`.

    Raises:
        TypeError: the model cannot be served.
    """
    need_tree_model(model)
    weight = embedding_weight(model)
    options = {"dtype": weight.dtype, "device": weight.device, **options}
    n_layers, n_kv_heads, head_dim, n_heads = _sizes(model)
    return TreeCache(n_layers, n_kv_heads, head_dim, n_pages=n_pages, n_heads=n_heads, **options)


class TreeModel:
    """Next-token logits of branches of a TreeCache.

    Args:
        model: a decoder-only transformers model whose layers all attend to keys and values of
            tokens, in full or in a sliding window; left as it is. Its live weights are used: a
            caller that changes them sets `cache.version`. One pass at a time. A rotary embedding
            that adapts to the longest text of a pass (dynamic, longrope) makes the others depend on
            it, here as in a batch of transformers.
        cache: of that model's sizes, see `tree_cache_for`.

    Raises:
        TypeError: the model cannot be served: its name and why.
        ValueError: the cache is of other sizes.
    """

    def __init__(self, model: PreTrainedModel, cache: TreeCache) -> None:
        need_tree_model(model)
        keys = cache.layers[0].keys
        weight = embedding_weight(model)
        needed = (*_sizes(model), weight.dtype, weight.device)
        got = (len(cache.layers), *keys.shape[1:], keys.shape[1] * cache.group)
        got = (*got, keys.dtype, keys.device)
        meaning = "(layers, key-value heads, width, heads, dtype, device)"
        checks.need(needed == got, "cache", f"{meaning} = {needed} of the model", got)
        _register()
        self.model, self.cache = model, cache
        text = model.config.get_text_config(decoder=True)
        self._configs = list({id(c): c for c in (model.config, text)}.values())
        self.vocabulary = embedding_weight(model).shape[0]
        self._keeps_logits = "logits_to_keep" in forward_arguments(model)

    def forward(
        self, branches: Sequence[Branch], *, counts: Ints | None = None, pure: bool = False
    ) -> Tensor:
        """Compute what is not computed of the branches' texts.

        Args:
            branches: B of them, none empty, in any order.
            counts: (B,) how many of each branch's last tokens to answer; more than 1 where they
                are not computed yet. None: 1.
            pure: refuse texts of which another policy version wrote a part.

        Returns:
            (sum of counts, V), the logits after each of these tokens, branch by branch; (B, V)
            without counts. No gradient flows.

        Raises:
            ValueError: see `TreeCache.plan`; a token id is not in the vocabulary; a count is not
                between 1 and the tokens that are computed here.
            TypeError: the model's layers do not attend through transformers' interface.
            Any error leaves the cache as it was, with the same tokens still to compute.
        """
        step = self._plan(branches, pure=pure)
        rows = self._rows(step, counts)
        index = torch.from_numpy(rows).to(self.cache.device, non_blocking=True)
        in_order = _are_all(rows, len(step.ids))
        keep = {"logits_to_keep": index} if self._keeps_logits and not in_order else {}
        logits: Tensor = self._run(self.model, step, **keep).logits[0]
        return logits if in_order or keep else logits.index_select(0, index)

    def hidden(self, branches: Sequence[Branch], *, counts: Ints | None = None) -> Tensor:
        """`forward`, but the hidden states as the LM head takes them (see `head_of`): (.., D)."""
        step = self._plan(branches, pure=False)
        rows = self._rows(step, counts)
        hidden: Tensor = self._run(self.model.get_decoder(), step).last_hidden_state[0]
        if _are_all(rows, len(step.ids)):
            return hidden
        return hidden.index_select(0, torch.from_numpy(rows).to(hidden.device, non_blocking=True))

    def _rows(self, step: TreeStep, counts: Ints | None) -> Ints:
        """The rows of `step` that answer the last counts[b] tokens of each branch."""
        if counts is None:
            return step.last
        checks.need(bool((counts >= 1).all()), "counts", "counts >= 1", counts.tolist())
        return step.paths.rows(counts)

    def _plan(self, branches: Sequence[Branch], *, pure: bool) -> TreeStep:
        step = self.cache.plan(branches, pure=pure)
        good = 0 <= int(step.ids.min()) and int(step.ids.max()) < self.vocabulary
        checks.need(good, "branches", f"token ids in [0, {self.vocabulary})", "another one")
        return step

    def _run(self, module: nn.Module, step: TreeStep, **options: Any) -> Any:
        """What the model, or its decoder, gives for the rows of `step`, which is done then."""
        device = self.cache.device
        served = _Pass(self.cache, step, self._configs[-1])
        with evaluating(self.model), _attending(self._configs):
            out = module(
                input_ids=torch.from_numpy(step.ids).to(device, non_blocking=True).unsqueeze(0),
                position_ids=step.plan.on(device).positions.unsqueeze(0),
                use_cache=False,
                tree_pass=served,
                **options,
            )
        n_layers = len(self.cache.layers)
        if served.layers != list(range(n_layers)):
            raise TypeError(
                f"model: need {n_layers} layers that attend through transformers' attention "
                f"interface in order, got {served.layers} of {type(self.model).__name__}"
            )
        self.cache.commit(step)
        return out


def need_tree_model(model: PreTrainedModel) -> None:
    """Raise TypeError, naming the model's class, unless a TreeCache can serve it."""
    need_causal_lm(model)
    name = type(model).__name__
    config = model.config.get_text_config(decoder=True)
    new_cache(model)  # refuses states that are not of a token
    kinds = set(getattr(config, "layer_types", None) or ()) - _LAYERS
    if kinds:
        raise TypeError(f"model: need full or sliding attention, got {name} with {sorted(kinds)}")
    if "position_ids" not in forward_arguments(model):
        raise TypeError(f"model: need a forward with position_ids, got {name}")
    if getattr(config, "kv_lora_rank", None):
        raise TypeError(f"model: need keys as wide as values, got {name} with latent attention")
    if getattr(config, "num_kv_shared_layers", 0):
        raise TypeError(f"model: need layers with keys of their own, got {name}, which shares them")
    if not getattr(model, "_supports_attention_backend", False):
        raise TypeError(
            f"model: need one whose attention can be replaced, got {name} without "
            "transformers' attention interface"
        )


@dataclass(slots=True)
class _Pass:
    """One forward pass on its way through the model."""

    cache: TreeCache
    step: TreeStep
    config: PreTrainedConfig
    layers: list[int] = field(default_factory=list)  # served so far

    def has_window(self, layer: int) -> bool:
        """Whether the layer's mask would be one of a sliding window."""
        kinds = getattr(self.config, "layer_types", None)
        if kinds:
            return bool(kinds[layer] == "sliding_attention")
        is_used = getattr(self.config, "use_sliding_window", True)
        return is_used and getattr(self.config, "sliding_window", None) is not None


def _attend(  # noqa: PLR0913  (the signature is transformers')
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    tree_pass: _Pass | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query (1, Hq, N, D), key and value (1, H, N, D)."""
    name = type(module).__name__
    if tree_pass is None:
        raise TypeError(f"model: need one that hands its keyword arguments on, got {name}")
    if attention_mask is not None or others.get("position_bias") is not None:
        raise TypeError(f"model: need attention without a mask or bias of its own, got {name}")
    if not getattr(module, "is_causal", True) or others.get("is_causal") is False:
        raise TypeError(f"model: need causal attention, got {name}, which looks ahead")
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    if sliding_window is None and tree_pass.has_window(layer):
        raise TypeError(
            f"model: need attention that is told its window, got {name}, whose mask alone has it"
        )
    cache, step = tree_pass.cache, tree_pass.step
    keys = cache.layers[layer].keys
    # Under autocast they come in another dtype.
    q, k, v = (x.squeeze(0).transpose(0, 1).to(keys.dtype) for x in (query, key, value))
    if not k.shape[1:] == v.shape[1:] == keys.shape[1:]:
        got = f"{tuple(k.shape[1:])} and {tuple(v.shape[1:])}"
        raise TypeError(f"model: need keys and values {tuple(keys.shape[1:])}, got {got} of {name}")
    cache.write(layer, k, v, step)
    out = tree_decode_attention(
        q, cache.layers[layer], step.plan,
        scale=scaling, window=sliding_window, softcap=softcap, sinks=s_aux,
    )  # fmt: skip
    tree_pass.layers.append(layer)
    return out.unsqueeze(0).to(query.dtype), None


def _are_all(rows: Ints, n_rows: int) -> bool:
    return len(rows) == n_rows and bool((rows == np.arange(n_rows)).all())


def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, _attend)


@contextmanager
def _attending(configs: list[PreTrainedConfig]) -> Iterator[None]:
    """The models of `configs` attend to the tree inside."""
    names = [config._attn_implementation_internal for config in configs]
    try:
        for config in configs:
            config._attn_implementation_internal = _NAME
        yield
    finally:
        for config, name in zip(configs, names, strict=True):
            config._attn_implementation_internal = name


def _sizes(model: PreTrainedModel) -> tuple[int, int, int, int]:
    """Layers, key-value heads, width of a head, query heads."""
    config = model.config.get_text_config(decoder=True)
    n_heads = config.num_attention_heads
    n_kv_heads = getattr(config, "num_key_value_heads", None) or n_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // n_heads
    return config.num_hidden_layers, n_kv_heads, head_dim, n_heads
