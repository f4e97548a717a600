"""Unmodified transformers models on a TreeCache against their own plain forward passes."""

import random

import numpy as np
import pytest
import torch
from tiny_models import tiny_llama, tiny_qwen3
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Cohere2Config,
    Cohere2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from rollfuse.rollout.pages import OutOfPages
from rollfuse.rollout.tree_cache import TreeCache
from rollfuse.rollout.tree_model import TreeModel, need_tree_model, tree_cache_for

V = 64


def small(model, config, **options):
    torch.manual_seed(0)
    shape = {
        "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
        "max_position_embeddings": 128,
    }  # fmt: skip
    return model(config(**{**shape, **options})).eval()


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


WINDOWS = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
CAPS = {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 3.0}
MODELS = {
    "qwen2": lambda: small(Qwen2ForCausalLM, Qwen2Config, **WINDOWS),
    "qwen3": lambda: small(Qwen3ForCausalLM, Qwen3Config, head_dim=8),
    "llama": lambda: small(LlamaForCausalLM, LlamaConfig),
    "mistral": lambda: small(MistralForCausalLM, MistralConfig, sliding_window=6),
    "gemma2": lambda: small(Gemma2ForCausalLM, Gemma2Config, head_dim=8, sliding_window=4, **CAPS),
    "gemma3": lambda: small(Gemma3ForCausalLM, Gemma3TextConfig, head_dim=8, sliding_window=4),
    "phi": lambda: small(PhiForCausalLM, PhiConfig),
    "phi3": lambda: small(Phi3ForCausalLM, Phi3Config),
    "cohere2": lambda: small(Cohere2ForCausalLM, Cohere2Config, sliding_window=4),
    "gpt2": gpt2,
}


def plain_logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(tokens)[None]).logits[0, -1]


def walk(model, n_steps=20, page_size=4, seed=1, **options):
    """Random forks, cuts and ends; yields the branches and the logits of each step."""
    cache = tree_cache_for(model, n_pages=300, page_size=page_size, checksum=True, **options)
    tree, draw = TreeModel(model, cache), random.Random(seed)
    branches = [cache.root([draw.randrange(V) for _ in range(n)]) for n in (7, 1, 12)]
    for step in range(n_steps):
        yield branches, tree.forward(branches)
        cache.check()
        if len(branches) < 12 and step % 3 == 0:
            branch = draw.choice(branches)
            branches += branch.fork(2, at=draw.randint(1, len(branch)))
        if step % 5 == 4:
            branches.pop(draw.randrange(len(branches))).prune()
        if step % 4 == 3:
            branch = draw.choice(branches)
            branch.truncate(draw.randint(1, len(branch)))
        # Runs of plain decoding, too, and several tokens at once.
        growing = branches if step % 6 < 3 else [b for b in branches if draw.random() < 0.8]
        counts = [1 if step % 6 < 3 else draw.choice((1, 1, 4)) for _ in growing]
        cache.append(growing, [[draw.randrange(V) for _ in range(n)] for n in counts])
    for branch in branches:
        branch.prune()
    assert cache.tree.pool.n_free == cache.tree.pool.n_pages


@pytest.mark.parametrize("name", MODELS)
def test_logits_after_random_forks_are_the_plain_forwards(name):
    model = MODELS[name]().double()
    if name == "gemma2":  # PyTorch's own attention knows no cap; transformers' rounds to float32
        model.set_attn_implementation("eager")
    worst, seen = 0.0, 0
    for branches, logits in walk(model):
        for branch, found in zip(branches, logits, strict=True):
            expected = plain_logits(model, branch.tokens)
            worst = max(worst, float((found - expected).abs().max() / expected.abs().max()))
            seen += 1
    assert seen > 100 and worst < (1e-6 if name == "gemma2" else 1e-13)


def test_sinks():
    """Experts of this model do not run in float64."""
    model = small(
        GptOssForCausalLM, GptOssConfig, head_dim=8, sliding_window=4, num_local_experts=4
    )
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.normal_()
    worst = 0.0
    for branches, logits in walk(model):
        for branch, found in zip(branches, logits, strict=True):
            expected = plain_logits(model, branch.tokens)
            worst = max(worst, float((found - expected).abs().max() / expected.abs().max()))
    assert worst < 5e-6


@pytest.mark.parametrize("page_size", [1, 16])
def test_page_size_changes_nothing(page_size):
    model = tiny_qwen3(vocab_size=V).double()
    for branches, logits in walk(model, page_size=page_size, seed=3):
        for branch, found in zip(branches, logits, strict=True):
            assert torch.allclose(found, plain_logits(model, branch.tokens), rtol=0, atol=1e-12)


def test_half_precision_is_no_worse_than_the_models_own():
    exact = tiny_llama(vocab_size=V)
    model = tiny_llama(vocab_size=V).to(torch.bfloat16)
    exact.load_state_dict(model.state_dict())
    exact = exact.double()
    ours, plain = [], []
    for branches, logits in walk(model):
        for branch, found in zip(branches, logits, strict=True):
            truth = plain_logits(exact, branch.tokens)
            ours.append(float((found - truth).norm() / truth.norm()))
            own = plain_logits(model, branch.tokens)
            plain.append(float((own - truth).norm() / truth.norm()))
    assert np.mean(ours) < 1.25 * np.mean(plain)


def test_the_model_is_left_as_it_was():
    model = tiny_qwen3().train()
    names = model.config._attn_implementation, model.config.use_cache
    tree = TreeModel(model, tree_cache_for(model, n_pages=10))
    branch = tree.cache.root([1, 2, 3])
    logits = tree.forward([branch])
    assert model.training and not logits.requires_grad and torch.is_grad_enabled()
    assert (model.config._attn_implementation, model.config.use_cache) == names
    out = model(input_ids=torch.tensor([[1, 2, 3]])).logits
    out.sum().backward()
    model.eval()
    assert torch.allclose(plain_logits(model, branch.tokens), logits[0], rtol=0, atol=2e-5)


def test_an_error_inside_the_model_leaves_the_tokens_to_compute():
    model = tiny_qwen3()
    tree = TreeModel(model, tree_cache_for(model, n_pages=10))
    branch = tree.cache.root([1, 2, 3])

    def fail(*_):
        raise RuntimeError("planted")

    hook = model.model.layers[-1].register_forward_hook(fail)
    names = model.config._attn_implementation
    with pytest.raises(RuntimeError, match="planted"):
        tree.forward([branch])
    hook.remove()
    assert branch.n_computed == 0 and model.config._attn_implementation == names
    tree.cache.check()
    found = tree.forward([branch])[0]
    assert torch.allclose(found, plain_logits(model, branch.tokens), rtol=0, atol=2e-5)


def test_tokens_outside_the_vocabulary_are_refused():
    model = tiny_qwen3()
    tree = TreeModel(model, tree_cache_for(model, n_pages=10))
    for token in (-1, 48):
        branch = tree.cache.root([1, token])
        with pytest.raises(ValueError, match=r"branches: need token ids in \[0, 48\), got another"):
            tree.forward([branch])
        assert branch.n_computed == 0
    with pytest.raises(ValueError, match="branches: need at least one, got none"):
        tree.forward([])


def test_older_keys_stay_until_they_are_refused():
    model = tiny_qwen3()
    tree = TreeModel(model, tree_cache_for(model, n_pages=20))
    branch = tree.cache.root([1, 2, 3])
    tree.forward([branch])
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    tree.cache.version = 1
    tree.cache.append([branch], [[4]])
    mixed = tree.forward([branch])[0]
    assert not torch.allclose(mixed, plain_logits(model, branch.tokens), rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match=r"a text of version 1 alone, got \[0, 1\]"):
        tree.forward([branch], pure=True)
    assert tree.cache.match([1, 2, 3, 4]) is None
    fresh = tree.cache.root(branch.tokens)
    found = tree.forward([fresh], pure=True)[0]
    assert torch.allclose(found, plain_logits(model, fresh.tokens), rtol=0, atol=2e-5)


REFUSED = {
    "T5ForConditionalGeneration, an encoder-decoder": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=V, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    ),
    "BloomForCausalLM": lambda: BloomForCausalLM(
        BloomConfig(vocab_size=V, hidden_size=32, n_layer=2, n_head=4)
    ),
    "FalconForCausalLM": lambda: FalconForCausalLM(
        FalconConfig(vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    ),
    "MambaForCausalLM": lambda: MambaForCausalLM(
        MambaConfig(vocab_size=V, hidden_size=16, num_hidden_layers=1, state_size=4)
    ),
    "Llama4ForCausalLM with": lambda: small(Llama4ForCausalLM, Llama4TextConfig),
    "DeepseekV3ForCausalLM": lambda: small(DeepseekV3ForCausalLM, DeepseekV3Config),
    "got Linear": lambda: torch.nn.Linear(1, 1),
}  # fmt: skip


@pytest.mark.parametrize("words", REFUSED)
def test_models_that_cannot_be_served_are_refused_by_name(words):
    with pytest.raises(TypeError, match=words):
        need_tree_model(REFUSED[words]())


def test_windows_that_only_a_mask_knows_are_refused():
    model = small(
        Qwen2MoeForCausalLM, Qwen2MoeConfig, num_hidden_layers=1, use_sliding_window=True,
        sliding_window=4, layer_types=["sliding_attention"], num_experts=2, num_experts_per_tok=1,
        moe_intermediate_size=8, shared_expert_intermediate_size=8,
    )  # fmt: skip
    tree = TreeModel(model, tree_cache_for(model, n_pages=10))
    with pytest.raises(TypeError, match="attention that is told its window, got Qwen2MoeAttention"):
        tree.forward([tree.cache.root(range(12))])


def test_attention_that_looks_ahead_is_refused():
    model = small(Gemma3ForCausalLM, Gemma3TextConfig, head_dim=8, use_bidirectional_attention=True)
    tree = TreeModel(model, tree_cache_for(model, n_pages=10))
    with pytest.raises(TypeError, match="need causal attention, got Gemma3Attention"):
        tree.forward([tree.cache.root([1, 2])])


def test_autocast_outside_changes_little():
    model = tiny_qwen3()
    tree = TreeModel(model, tree_cache_for(model, n_pages=10))
    branch = tree.cache.root([1, 2, 3])
    with torch.autocast("cpu", torch.bfloat16):
        found = tree.forward([branch])[0]
    expected = plain_logits(model, branch.tokens)
    assert 0 < float((found - expected).abs().max()) < 0.05 * float(expected.abs().max())


def test_dropout_is_off_inside():
    model = gpt2().train()  # its config drops a tenth
    tree = TreeModel(model, tree_cache_for(model, n_pages=10))
    branch = tree.cache.root([1, 2, 3])
    found = tree.forward([branch])[0]
    assert torch.allclose(found, plain_logits(model.eval(), branch.tokens), rtol=0, atol=2e-5)


def test_a_model_whose_attention_goes_another_way_is_refused():
    model = tiny_qwen3()
    tree = TreeModel(model, tree_cache_for(model, n_pages=10))
    layer = model.model.layers[1].self_attn
    layer.forward = lambda hidden_states, **_: (hidden_states, None)
    branch = tree.cache.root([1, 2])
    with pytest.raises(TypeError, match=r"need 2 layers that attend .* got \[0\] of Qwen3"):
        tree.forward([branch])
    assert branch.n_computed == 0


def test_model_and_cache_must_match():
    model = tiny_qwen3()
    for cache in (
        TreeCache(3, 2, 8, n_pages=2, n_heads=4),
        TreeCache(2, 2, 8, n_pages=2, n_heads=4, dtype=torch.float64),
        TreeCache(2, 1, 8, n_pages=2, n_heads=4),
    ):
        with pytest.raises(ValueError, match=r"cache: need \(layers, key-value heads, width"):
            TreeModel(model, cache)
    with pytest.raises(OutOfPages):
        tree_cache_for(model, n_pages=1).root(range(17))


@pytest.mark.parametrize("hidden", [False, True])
def test_the_answers_of_a_branch_may_lie_in_several_nodes(hidden):
    model = tiny_qwen3()
    cache = tree_cache_for(model, n_pages=40, page_size=4)
    tree = TreeModel(model, cache)
    done = cache.root([1, 2, 3])
    tree.forward([done])
    prompt = cache.root([7, 8])
    one = prompt.fork()[0]
    cache.append([one], [[9, 10, 11, 12]])
    two = one.fork(at=4)[0]  # in the middle of what is not computed
    cache.append([two, done], [[13], [4, 5]])
    branches, counts = [two, done, one, prompt], np.array([4, 2, 5, 1])
    found = (tree.hidden if hidden else tree.forward)(branches, counts=counts)
    parts = found.split(counts.tolist())
    assert len(parts) == 4 and cache.last_plan.n_rows == 2 + 4 + 1 + 2
    for branch, count, part in zip(branches, counts, parts, strict=True):
        ids = torch.from_numpy(branch.tokens)[None]
        with torch.no_grad():
            whole = model(ids, output_hidden_states=True)
        whole = whole.hidden_states[-1] if hidden else whole.logits
        assert torch.allclose(part, whole[0, -count:], rtol=0, atol=2e-5)


def test_more_answers_than_are_computed_are_refused():
    model = tiny_qwen3()
    cache = tree_cache_for(model, n_pages=40)
    tree = TreeModel(model, cache)
    text = cache.root([1, 2, 3])
    tree.forward([text])
    below = text.fork()[0]
    cache.append([below], [[4, 5]])
    cache.append([text], [[6]])
    words = "counts: need as many tokens at most as this pass computes"
    for branches, counts in (([below], [3]), ([text, below], [2, 2]), ([below, text], [2, 9])):
        with pytest.raises(ValueError, match=words):
            tree.forward(branches, counts=np.array(counts))
        assert below.n_computed == 3
    with pytest.raises(ValueError, match="counts: need counts >= 1"):
        tree.forward([below], counts=np.array([0]))
    assert tree.forward([below, text], counts=np.array([2, 1])).shape == (3, 48)
    # Three rows, and one more above them that is not the next one.
    cache.append([below], [[7, 8]])
    last = below.fork()[0]
    cache.append([last], [[9]])
    top = cache.match([1, 2, 3])
    with pytest.raises(ValueError, match=words):
        tree.forward([top, last], counts=np.array([1, 4]))
    assert tree.forward([top, last], counts=np.array([1, 3])).shape == (4, 48)
    cache.check()
