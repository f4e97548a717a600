"""head_of: the head gives the model's own logits, whatever its config does to them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny_llama, tiny_qwen3
from torch import nn

from rollfuse import head_of, linear_logp_entropy

transformers = pytest.importorskip("transformers", reason="needs transformers: the extra [grpo]")

SHAPE = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}


def model_of(name: str, **changes: object) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SHAPE, **changes)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(tiny_qwen3, id="untied"),
        pytest.param(lambda: tiny_llama(tie_word_embeddings=True), id="tied"),
        pytest.param(lambda: model_of("Gemma2", head_dim=8, final_logit_softcapping=2.0), id="cap"),
        pytest.param(lambda: model_of("Cohere", logit_scale=0.2), id="scale"),
        pytest.param(lambda: model_of("Granite", logits_scaling=3.0), id="divisor"),
        pytest.param(lambda: model_of("HyperCLOVAX", logits_scaling=3.0), id="factor"),
    ],
)
def test_the_head_gives_the_models_log_probs(model):
    model = model()
    ids = torch.randint(1, 48, (1, 9))
    with torch.no_grad():
        own = model(input_ids=ids).logits[0].log_softmax(-1)
        hidden = model.get_decoder()(input_ids=ids).last_hidden_state[0]
        targets = torch.randint(48, (9,))
        found = linear_logp_entropy(hidden, head_of(model), targets).logp
    torch.testing.assert_close(found, own[torch.arange(9), targets], rtol=1e-5, atol=1e-5)


def stub(head: nn.Module, **config: object) -> SimpleNamespace:
    text = SimpleNamespace(model_type="stub", **config)
    whole = SimpleNamespace(get_text_config=lambda: text)
    return SimpleNamespace(get_output_embeddings=lambda: head, config=whole)


def test_a_config_of_parts_is_asked_for_its_text():
    head = head_of(stub(nn.Linear(4, 9), final_logit_softcapping=30.0, logit_scale=None))
    assert (head.softcap, head.scale) == (30.0, 1.0)
    assert head.bias is not None and head.weight.shape == (9, 4)


def test_factors_multiply():
    found = head_of(stub(nn.Linear(4, 9), lm_head_multiplier=0.5, output_multiplier=3.0))
    assert found.scale == 1.5


@pytest.mark.parametrize("head", [None, nn.Embedding(9, 4), nn.Sequential(nn.Linear(4, 9))])
def test_a_head_that_is_not_linear_is_refused(head):
    with pytest.raises(ValueError, match="model: need a linear LM head, got"):
        head_of(stub(head))


def test_a_tied_head_with_trained_tokens_is_refused_with_advice():
    peft = pytest.importorskip("peft", reason="needs peft")
    config = peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 7])
    model = peft.get_peft_model(tiny_qwen3(tie_word_embeddings=True), config)
    with pytest.raises(ValueError, match=r"TrainableTokensWrapper, .* Head of its `weight`"):
        head_of(model)
