"""Random transformers models small enough to be run many times."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config
from transformers import Qwen3ForCausalLM as Qwen3

VOCABULARY = 48
_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    # Far from the usual 0.02: distributions with some shape, hidden rows that differ.
    "initializer_range": 0.3,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}


def tiny_qwen3(*, dtype: torch.dtype = torch.float32, **changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen3Config(**{**_SHAPE, "head_dim": 8, **changes})
    return Qwen3(config).to(dtype)


def tiny_llama(*, dtype: torch.dtype = torch.float32, **changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**_SHAPE, **changes})).to(dtype)


def with_float64_norms(model: PreTrainedModel) -> PreTrainedModel:
    """`model` in float64 throughout: the norms of transformers compute in float32 otherwise."""
    model = model.double()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = _Norm(module)
    return model


class _Norm:
    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, x: Tensor) -> Tensor:
        epsilon = self.module.variance_epsilon
        return self.module.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)
