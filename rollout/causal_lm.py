"""What the rollout asks of a transformers causal language model, and its refusals.

transformers is imported when a cache is made, not before: this module loads without it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rollfuse.kernels import checks
from rollfuse.kernels.head import Head
from rollfuse.kernels.linear import linear_logp_entropy
from rollfuse.kernels.wrapped import described, is_linear_head, linear_head

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel


def need_causal_lm(model: PreTrainedModel) -> None:
    """Raise TypeError, naming the model's class, unless its LM head and KV cache can be used."""
    name = type(model).__name__
    head = getattr(model, "get_output_embeddings", None)
    if head is None:
        raise TypeError(f"model: need a transformers causal language model, got {name}")
    if getattr(model.config, "is_encoder_decoder", False):
        raise TypeError(f"model: need a decoder-only model, got {name}, an encoder-decoder")
    if head() is None:
        raise TypeError(f"model: need a model with a language-model head, got {name} without one")
    arguments = forward_arguments(model)
    missing = {"input_ids", "attention_mask", cache_argument(arguments)} - arguments
    if missing:
        got = f"{name}, whose forward lacks {', '.join(sorted(missing))}"
        raise TypeError(f"model: need a causal language model with a key-value cache, got {got}")


def head_of(model: PreTrainedModel) -> Head:
    """The LM head of a transformers model, with the scale and softcap of its logits.

    An adapter that PEFT put beside it is included.

    What its config calls logit_scale (Cohere), logits_scaling (Granite), lm_head_multiplier
    (Falcon-H1), output_multiplier (Muse) and final_logit_softcapping (Gemma). A model that does
    something else to its logits has another softmax than this head.

    Args:
        model: a causal language model; `head_of(model)` on `model.get_decoder()`'s
            last_hidden_state gives the model's logits, without making them.

    Raises:
        ValueError: the model has no linear head on its hidden states.
    """
    module: Any = model.get_output_embeddings()
    checks.need(is_linear_head(module), "model", "a linear LM head", described(module))
    config = model.config.get_text_config()
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier", "output_multiplier"):
        factor = getattr(config, name, None)
        scale *= 1.0 if factor is None else float(factor)
    divisor = getattr(config, "logits_scaling", None)
    if divisor is not None:
        # HyperCLOVA X multiplies by what Granite divides by.
        multiplies = config.model_type == "hyperclovax"
        scale *= float(divisor) if multiplies else 1.0 / float(divisor)
    softcap = getattr(config, "final_logit_softcapping", None)
    return linear_head(module, scale=scale, softcap=softcap)


def head_difference(model: PreTrainedModel, ids: Tensor) -> float:
    """How far log-probs of `head_of(model)` on its hidden states are from the model's own, nats.

    The largest difference over the 16 likeliest tokens after `ids` (L,). Models differ in what they
    do between the two; a scale that `head_of` does not know is seen here.
    """
    ids = ids.to(embedding_weight(model).device).unsqueeze(0)
    with evaluating(model):
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0, -1:]
        own = model(input_ids=ids, use_cache=False).logits[0, -1].float().log_softmax(-1)
        likely = own.topk(min(16, len(own)))
        rows = torch.zeros_like(likely.indices)
        found = linear_logp_entropy(hidden, head_of(model), likely.indices, rows=rows)
    return float((found.logp - likely.values).abs().max())


def head_tolerance(model: PreTrainedModel) -> float:
    """Nats by which `head_difference` may differ from 0 by rounding."""
    return 1e-3 if embedding_weight(model).dtype in (torch.float32, torch.float64) else 0.1


def embedding_weight(model: PreTrainedModel) -> Tensor:
    """(V, D), the input embeddings: their device is where token ids go."""
    weight: Tensor = model.get_input_embeddings().weight
    return weight


def forward_arguments(model: nn.Module) -> set[str]:
    """The arguments that the model's forward names; others may be swallowed unread."""
    return set(inspect.signature(model.forward).parameters)


def cache_argument(arguments: set[str]) -> str:
    """What a forward with these arguments calls its key-value cache.

    `cache` since transformers 5.24, `past_key_values` before.
    """
    return "cache" if "cache" in arguments else "past_key_values"


def new_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty key-value cache with layers as the model's config asks for.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        TypeError: a layer keeps a state that is not keys and values per token.
    """
    try:
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "need transformers; install rollfuse[grpo]", name=error.name
        ) from error
    cache = DynamicCache(config=model.config)
    # A recurrent state has no place per token: it could not be padded, nor later cut at a token.
    for layer in cache.layers:
        kind = type(layer).__name__
        if not isinstance(layer, DynamicLayer) and kind != "DummyLayer":
            raise TypeError(
                "model: need layers that keep keys and values of each token, "
                f"got {type(model).__name__} with a {kind}"
            )
    return cache


def need_filled(cache: DynamicCache, n_tokens: int, model: nn.Module) -> None:
    """Raise TypeError if the model has not written `n_tokens` tokens into the cache it got."""
    held = cache.get_seq_length()
    if held != n_tokens:
        raise TypeError(
            f"model: need one that fills the cache it is given, got {held} of {n_tokens} tokens "
            f"from {type(model).__name__}"
        )


def left_padded(sequences: list[Tensor], lengths: Tensor) -> tuple[Tensor, Tensor | None]:
    """Sequences of several lengths that end in one column, so that all go on in the next.

    Args:
        sequences: U tensors (L_u,) int64.
        lengths: (U,) int64, L_u.

    Returns:
        ids (U, L) int64 and mask (U, L) bool, True on tokens; None where nothing is padded.
    """
    if int(lengths.min()) == int(lengths.max()):
        return torch.stack(sequences), None
    ids = nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_side="left")
    return ids, torch.arange(ids.shape[1]) >= (ids.shape[1] - lengths).unsqueeze(1)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off and no gradient inside; outside, every module has the mode it had."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        # Not inference_mode: a rotary embedding that adapts to the length keeps tensors it makes
        # here, and training could not save an inference tensor for its backward.
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
