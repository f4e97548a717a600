from collections import deque
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import VOCABULARY, tiny_llama, tiny_qwen3
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from rollfuse import grpo, head_of, linear_policy_loss, token_mean
from rollfuse.kernels.noise import new_streams
from rollfuse.kernels.sampling import Sampling, sample_tokens
from rollfuse.rollout import decoding
from rollfuse.rollout.decoding import Decoding, Text
from rollfuse.rollout.engine import Engine
from rollfuse.rollout.packing import hidden_rows, pack_rollout, token_batch
from rollfuse.rollout.record import Finish, Source
from rollfuse.rollout.tree_cache import TreeCache
from rollfuse.rollout.tree_model import TreeModel, tree_cache_for

# Lengths 1 to 9 with two equal ones, the last prompt a repetition: padding, none, and sharing.
RAGGED = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9], [3, 2, 3, 8, 4], [9]]
EQUAL = [[3, 1, 4], [1, 5, 9], [2, 6, 5]]


def gemma2():
    """Caps on attention and final logits, an embedding scale, every other layer a window of 4."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=4,
        final_logit_softcapping=2.0, initializer_range=0.3, eos_token_id=None, bos_token_id=None,
        pad_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    return Gemma2ForCausalLM(config)


def gpt2():
    """Learned positions: one that is off by one reads another row of a table."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64,
        initializer_range=0.3, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def windowed():
    return tiny_qwen3(
        use_sliding_window=True,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    )


MODELS = {"qwen3": tiny_qwen3, "llama": tiny_llama, "gemma2": gemma2, "gpt2": gpt2, "win": windowed}


def forward_rows(model):
    """A list that grows by the shape of the ids at each forward pass."""
    shapes = []
    model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    return shapes


@pytest.mark.parametrize("prompts", [RAGGED, EQUAL], ids=["ragged", "equal"])
@pytest.mark.parametrize("name", MODELS)
def test_every_token_is_drawn_from_the_full_forward(name, prompts):
    model, sampling = MODELS[name]().eval(), Sampling(0.7)
    made = Engine(model, max_new_tokens=7, stop_tokens=[5]).generate(prompts, 4, sampling, seed=1)
    assert len(made) == 4 * len(prompts)
    for b in range(len(made)):
        prompt, response = prompts[made.prompt_index[b]], made.response(b)
        with torch.no_grad():
            logits = model(input_ids=torch.cat([torch.tensor(prompt), response])[None]).logits[0]
        logits = logits[len(prompt) - 1 : -1]
        positions = len(prompt) + torch.arange(len(response))
        alone = sample_tokens(logits, made.streams[b].expand(len(response)), positions, sampling)
        tokens = slice(made.cu_seqlens[b], made.cu_seqlens[b + 1])
        assert response.tolist() == alone.ids.tolist()
        assert torch.allclose(made.logp[tokens], alone.logp, rtol=0, atol=1e-5)
        assert torch.allclose(made.entropy[tokens], alone.entropy, rtol=0, atol=1e-5)
    assert made.temperature == 0.7


def test_a_sequence_does_not_depend_on_the_batch():
    model = tiny_qwen3()
    engine = Engine(model, max_new_tokens=8, stop_tokens=[5])
    together = engine.generate(RAGGED, 3, seed=4)
    for p, prompt in enumerate(RAGGED):
        alone = engine.generate([prompt], 3, streams=together.streams[3 * p : 3 * p + 3])
        part = together.select(together.prompt_index == p)
        assert torch.equal(alone.tokens, part.tokens)
        assert torch.equal(alone.finish, part.finish)
        assert torch.allclose(alone.logp, part.logp, rtol=0, atol=1e-5)


@pytest.mark.parametrize("max_batch", [3, 7, 100])
def test_waves_give_the_same_rollout_in_the_same_order(max_batch):
    model = tiny_qwen3()
    whole = Engine(model, max_new_tokens=6, stop_tokens=[5]).generate(RAGGED, 3, seed=4)
    shapes = forward_rows(model)
    engine = Engine(model, max_new_tokens=6, stop_tokens=[5], max_batch=max_batch)
    waves = engine.generate(RAGGED, 3, seed=4)
    assert torch.equal(whole.tokens, waves.tokens)
    assert torch.equal(whole.cu_seqlens, waves.cu_seqlens)
    assert torch.equal(whole.prompt_index, waves.prompt_index)
    assert torch.equal(whole.streams, waves.streams)
    assert torch.allclose(whole.logp, waves.logp, rtol=0, atol=1e-5)
    assert max(rows for rows, _ in shapes) <= max_batch


def kv_bytes(model, n_pages, page_size):
    return n_pages * tree_cache_for(model, n_pages=1, page_size=page_size).page_bytes


@pytest.mark.parametrize("n_pages", [4, 5, 9, 20, 40])
def test_with_little_room_texts_wait_or_are_computed_again_and_the_tokens_are_the_same(
    n_pages, monkeypatch
):
    monkeypatch.setenv("ROLLFUSE_CHECK", "1")
    model = tiny_qwen3()
    roomy = Engine(model, max_new_tokens=7, stop_tokens=[5], page_size=4)
    whole = roomy.generate(RAGGED, 6, Sampling(0.7), seed=4)
    limit = kv_bytes(model, n_pages, 4)
    engine = Engine(model, max_new_tokens=7, stop_tokens=[5], page_size=4, kv_bytes=limit)
    tight = engine.generate(RAGGED, 6, Sampling(0.7), seed=4)
    for name in ("tokens", "cu_seqlens", "finish", "streams", "prompt_index"):
        assert torch.equal(getattr(whole, name), getattr(tight, name))
    assert torch.allclose(whole.logp, tight.logp, rtol=0, atol=1e-5)
    assert roomy.totals.dropped == 0
    assert (engine.totals.dropped > 0) == (n_pages < 40)
    assert engine.totals.passes > roomy.totals.passes or n_pages == 40


def test_the_only_text_left_starts_again_with_all_the_room_there_is():
    model = tiny_qwen3()
    options = {"max_new_tokens": 10, "stop_tokens": [], "page_size": 4}
    whole = Engine(model, **options).generate([[3, 1]], 2, seed=0)
    assert len({*whole.tokens[::10].tolist()}) == 2  # they part at once, which wastes half a page
    engine = Engine(model, kv_bytes=kv_bytes(model, 3, 4), **options)
    tight = engine.generate([[3, 1]], 2, seed=0)
    assert torch.equal(tight.tokens, whole.tokens) and engine.totals.dropped >= 2


def test_the_shortest_response_is_dropped_and_the_others_stay_in_their_rows():
    model = tiny_qwen3()
    tree = TreeModel(model, tree_cache_for(model, n_pages=20))
    texts = [
        Text(np.array([i, i, i]), np.array(s), m)
        for i, s, m in ((1, [4], 3), (2, [0, 7], 1), (3, [5], 2))
    ]
    at_work = Decoding(tree, deque(texts), longest=12)
    at_work.start()
    left = at_work._drop_one(np.array([10, 20, 30]))
    (dropped,) = at_work.waiting
    assert dropped.tokens.tolist() == [2, 2, 2, 20]
    assert dropped.sequences.tolist() == [0, 7] and dropped.made == 1
    assert left.tolist() == [10, 30] and at_work.totals.dropped == 1
    assert at_work.sequence.tolist() == [4, 5] and at_work.row.tolist() == [0, 1]
    assert at_work.made.tolist() == [3, 2]
    assert [branch.tokens.tolist() for branch in at_work.branches] == [[1] * 3, [3] * 3]
    tree.cache.check()


def test_long_prompts_are_taken_up_a_few_at_a_time(monkeypatch):
    monkeypatch.setattr(decoding, "_PREFILL", 20)
    model = tiny_qwen3()
    shapes = forward_rows(model)
    prompts = [[i] * 15 for i in range(10)]
    Engine(model, max_new_tokens=3).generate(prompts, 1, seed=0)
    assert max(rows for _, rows in shapes) <= 2 * 15 + 10


def test_equal_prompts_are_one_text_as_far_as_the_batch_takes_them():
    model = tiny_qwen3()
    shapes = forward_rows(model)
    engine = Engine(model, max_new_tokens=5, max_batch=4)
    made = engine.generate([[1, 2, 3]] * 4, 2, seed=4)
    whole = Engine(model, max_new_tokens=5).generate([[1, 2, 3]] * 4, 2, seed=4)
    assert torch.equal(made.tokens, whole.tokens)
    assert max(rows for _, rows in shapes[1:5]) <= 4


def test_the_cache_is_checked_at_the_end_where_all_is(monkeypatch):
    monkeypatch.setenv("ROLLFUSE_CHECK", "1")
    versions = []

    def checked(cache):
        versions.append(cache.version)

    monkeypatch.setattr(TreeCache, "check", checked)
    Engine(tiny_qwen3(), max_new_tokens=2).generate([[1]], 1, seed=0, version=3)
    assert versions == [3]
    with pytest.raises(ValueError, match="version: need a number >= 0, got -1"):
        Engine(tiny_qwen3(), max_new_tokens=2).generate([[1]], 1, seed=0, version=-1)


def test_a_pool_costs_what_is_used_of_it():
    engine = Engine(tiny_qwen3(), max_new_tokens=100, stop_tokens=range(VOCABULARY))
    made = engine.generate([[1, 2]] * 300, 16, seed=0)
    assert made.lengths.max() == 1


def test_a_pool_too_small_for_one_prompt_is_refused():
    model = tiny_qwen3()
    limit = kv_bytes(model, 3, 4)
    engine = Engine(model, max_new_tokens=7, page_size=4, kv_bytes=limit)
    with pytest.raises(
        ValueError, match=r"kv_bytes: need at least \d+, for the longest prompt and"
    ):
        engine.generate(RAGGED, 1, seed=0)


def test_finished_sequences_make_room_for_waiting_prompts():
    """Continuous batching: two groups at a time, the next one joins as members finish."""
    model, stop = tiny_qwen3(), range(0, VOCABULARY, 4)
    prompts = [[i, i + 1] for i in range(14)]
    shapes = forward_rows(model)
    engine = Engine(model, max_new_tokens=12, stop_tokens=stop, max_batch=6)
    made = engine.generate(prompts, 3, seed=4)
    waves = int(made.lengths.view(7, 6).amax(1).sum())
    assert len(shapes) < 0.9 * waves
    assert max(rows for _, rows in shapes) <= 6 + 2


def test_keys_that_groups_share_are_read_once():
    model = tiny_qwen3()
    engine = Engine(model, max_new_tokens=4)
    engine.generate([list(range(40))], 16, seed=0)
    totals = engine.totals
    assert totals.passes == 4
    # The prompt once, then each response by itself: nobody agrees for long at this temperature.
    assert totals.kv_read < 40 + 3 * 40 + 16 * (1 + 2 + 3) + 1
    assert totals.kv_apart > 16 * 3 * 40


def test_the_same_call_gives_the_same_bits():
    engine = Engine(tiny_qwen3(), max_new_tokens=6, stop_tokens=[5])
    one, two = (engine.generate(RAGGED, 3, seed=4, version=v) for v in (2, 3))
    assert torch.equal(one.tokens, two.tokens) and torch.equal(one.logp, two.logp)
    assert one.version.unique().tolist() == [2] and two.version.unique().tolist() == [3]
    assert one.source.unique().tolist() == [Source.SAMPLED]
    assert torch.equal(one.streams, new_streams(4, 15))
    other = engine.generate(RAGGED, 3, seed=5)
    assert not torch.equal(one.response(0), other.response(0))


def test_the_forward_has_one_row_for_each_distinct_unfinished_text():
    model = tiny_qwen3()
    shapes = forward_rows(model)
    # So cold that members of a group often agree; two of the five prompts are one text.
    engine = Engine(model, max_new_tokens=6, stop_tokens=range(0, VOCABULARY, 4))
    engine.generate([[1]], 1, seed=0)  # which also finds out what the model's head is
    shapes.clear()
    made = engine.generate(RAGGED, 6, Sampling(0.5), seed=4)
    texts = [(tuple(RAGGED[made.prompt_index[b]]), made.response(b).tolist()) for b in range(30)]
    distinct = [len({(p, *r[:step]) for p, r in texts if len(r) > step}) for step in range(6)]
    # Prompts: every beginning that they share is computed once.
    beginnings = {tuple(prompt[: i + 1]) for prompt in RAGGED for i in range(len(prompt))}
    assert shapes == [(1, len(beginnings)), *((1, rows) for rows in distinct[1:] if rows)]
    unfinished = [sum(len(r) > step for _, r in texts) for step in range(6)]
    assert distinct[1] < unfinished[1] and unfinished[3] < 30, "nothing shared, nothing finished"


def test_stop_tokens_end_a_response_and_belong_to_it():
    stop = [5, 17, 40]
    made = Engine(tiny_qwen3(), max_new_tokens=12, stop_tokens=stop).generate(EQUAL, 16, seed=0)
    for response, finish in zip(made.responses(), made.finish, strict=True):
        hits = [i for i, token in enumerate(response.tolist()) if token in stop]
        assert hits == ([len(response) - 1] if finish == Finish.STOP else [])
        assert finish == Finish.STOP or len(response) == 12
    assert {Finish.STOP, Finish.LENGTH} == set(made.finish.tolist())


def test_end_tokens_come_from_the_model_unless_given():
    model = tiny_qwen3(eos_token_id=[7, 9])
    assert Engine(model, max_new_tokens=1).stop_tokens.tolist() == [7, 9]
    assert Engine(model, max_new_tokens=1, stop_tokens=()).stop_tokens.tolist() == []
    assert Engine(tiny_qwen3(), max_new_tokens=1).stop_tokens.tolist() == []
    made = Engine(model, max_new_tokens=20).generate(EQUAL, 8, seed=0)
    assert (made.finish == Finish.STOP).any()


class Letters:
    """Token i is a letter of the first 26 or, from 26 on, a pair of letters."""

    def decode(self, token_ids, *, skip_special_tokens):
        return "".join(chr(97 + i % 26) * (1 if i < 26 else 2) for i in token_ids)


def test_stop_strings_end_a_response_with_the_token_that_completes_them():
    strings = ["aa", "bc", "jk", "k", "xyz"]
    tokenizer, model = Letters(), tiny_qwen3()
    engine = Engine(
        model, max_new_tokens=15, stop_tokens=[5], stop_strings=strings, tokenizer=tokenizer
    )
    made = engine.generate(RAGGED, 8, seed=0)
    free = Engine(model, max_new_tokens=15, stop_tokens=[5]).generate(RAGGED, 8, seed=0)
    for b, finish in enumerate(made.finish.tolist()):
        tokens = free.response(b).tolist()
        texts = [tokenizer.decode(tokens[: i + 1], skip_special_tokens=False) for i in range(15)]
        ends = [i for i, token in enumerate(tokens) if token == 5]
        ends += [i for i, t in enumerate(texts) if i < len(tokens) and any(s in t for s in strings)]
        length = min(ends) + 1 if ends else 15
        assert made.response(b).tolist() == tokens[:length]
        expected = Finish.STOP_STRING if ends else Finish.LENGTH
        assert finish == (Finish.STOP if tokens[length - 1] == 5 else expected)
    assert set(made.finish.tolist()) == set(Finish)


def test_the_next_call_uses_new_weights():
    model = tiny_qwen3()
    engine = Engine(model, max_new_tokens=6)
    before = engine.generate(RAGGED, 2, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    after = engine.generate(RAGGED, 2, seed=0)
    fresh = Engine(model, max_new_tokens=6).generate(RAGGED, 2, seed=0)
    assert not torch.equal(before.tokens, after.tokens)
    assert torch.equal(after.tokens, fresh.tokens) and torch.equal(after.logp, fresh.logp)


def test_dropout_is_off_inside_and_modes_are_restored_outside():
    model = tiny_llama(attention_dropout=0.9).train()
    model.lm_head.eval()
    modes = [module.training for module in model.modules()]
    engine = Engine(model, max_new_tokens=4)
    in_training = engine.generate(RAGGED, 2, seed=0)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(engine.generate(RAGGED, 2, seed=0).logp, in_training.logp)
    in_eval = Engine(model.eval(), max_new_tokens=4).generate(RAGGED, 2, seed=0)
    assert torch.equal(in_training.logp, in_eval.logp)
    assert not any(module.training for module in model.modules())


def test_modes_are_restored_after_an_error():
    model = tiny_qwen3().train()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="finite maximum"):
        Engine(model, max_new_tokens=4).generate(RAGGED, 2, seed=0)
    assert model.training and torch.is_grad_enabled()


def test_training_works_after_generation():
    # This rotary embedding makes another tensor of its own when a text gets longer than any before.
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "attention_factor": 1.0,
        "original_max_position_embeddings": 12, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
    }  # fmt: skip
    model = tiny_llama(rope_parameters=rope).train()
    made = Engine(model, max_new_tokens=11).generate(RAGGED, 2, seed=0)
    rotary = model.model.rotary_emb
    assert not rotary.long_inv_freq.is_inference()
    assert not any(buffer.is_inference() for buffer in model.buffers())
    assert not made.logp.is_inference() and not made.logp.requires_grad
    (model(input_ids=made.response(0)[None]).logits.sum() * made.logp.sum()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_no_prompts_make_an_empty_rollout():
    made = Engine(tiny_qwen3(), max_new_tokens=4).generate([], 3, seed=0)
    assert len(made) == 0 and made.prompts == () and made.tokens.shape == (0,)


def test_half_precision_models():
    model = tiny_qwen3(dtype=torch.bfloat16)
    made = Engine(model, max_new_tokens=4).generate(RAGGED, 2, seed=0)
    assert made.logp.dtype == torch.float32 and made.lengths.tolist() == [4] * 10


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompts": [[1], []]}, r"prompts\[1\]: need tokens, got \[\]"),
        ({"prompts": [[1, VOCABULARY]]}, r"prompts: need ids in \[0, 48\)"),
        ({"prompts": [[-1]]}, r"prompts: need ids in \[0, 48\)"),
        ({"prompts": [[1] * 125]}, "at most 128 tokens with max_new_tokens = 4, got a prompt of"),
        ({"prompts": [[1]], "n": 0}, "n: need samples per prompt >= 1, got 0"),
        ({"prompts": [[1]], "n": 9}, "max_batch: need at least a group, n = 9, got 8"),
        ({"prompts": [[1]], "streams": torch.tensor([1, 1])}, "a stream of its own"),
        ({"prompts": [[1]], "streams": torch.tensor([1])}, r"streams: need shape \(2,\)"),
    ],
)
def test_bad_input(arguments, words):
    engine = Engine(tiny_qwen3(), max_new_tokens=4, max_batch=8)
    arguments = {"n": 2, "seed": None if "streams" in arguments else 0, **arguments}
    with pytest.raises(ValueError, match=words):
        engine.generate(arguments.pop("prompts"), arguments.pop("n"), **arguments)


def test_bad_types():
    engine = Engine(tiny_qwen3(), max_new_tokens=4)
    with pytest.raises(TypeError, match=r"prompts\[0\]: need int64 or int32, got torch.float32"):
        engine.generate([[0.5]], 1, seed=0)
    with pytest.raises(TypeError, match="need one of the two, got neither"):
        engine.generate([[1]], 1)
    with pytest.raises(TypeError, match="need one of the two, got both"):
        engine.generate([[1]], 1, seed=0, streams=torch.tensor([1]))
    with pytest.raises(TypeError, match="streams: need int64, got torch.int32"):
        engine.generate([[1]], 1, streams=torch.tensor([1], dtype=torch.int32))
    with pytest.raises(TypeError, match="temperature: need one number, got a tensor"):
        engine.generate([[1]], 1, Sampling(torch.ones(1)), seed=0)


def test_bad_limits():
    with pytest.raises(ValueError, match="max_new_tokens: need a count >= 1, got 0"):
        Engine(tiny_qwen3(), max_new_tokens=0)
    with pytest.raises(ValueError, match="max_batch: need a count >= 1, got 0"):
        Engine(tiny_qwen3(), max_new_tokens=1, max_batch=0)
    with pytest.raises(ValueError, match=r"stop_tokens: need ids in \[0, 48\), got \[48\]"):
        Engine(tiny_qwen3(), max_new_tokens=1, stop_tokens=[48])
    with pytest.raises(TypeError, match="tokenizer: need one"):
        Engine(tiny_qwen3(), max_new_tokens=1, stop_strings=["x"])


def test_models_that_cannot_be_used_are_refused_by_name():
    shape = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1}
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    bert = BertForMaskedLM(BertConfig(**shape, num_attention_heads=2, intermediate_size=16))
    with pytest.raises(TypeError, match="T5ForConditionalGeneration, an encoder-decoder"):
        Engine(t5, max_new_tokens=1)
    with pytest.raises(TypeError, match="Qwen3Model without one"):
        Engine(tiny_qwen3().model, max_new_tokens=1)
    with pytest.raises(TypeError, match="BertForMaskedLM"):
        Engine(bert, max_new_tokens=1)
    with pytest.raises(TypeError, match="got Linear"):
        Engine(torch.nn.Linear(1, 1), max_new_tokens=1)


def test_recurrent_layers_are_refused():
    config = Qwen3NextConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, linear_num_key_heads=1,
        linear_num_value_heads=1, linear_key_head_dim=8, linear_value_head_dim=8, num_experts=2,
        num_experts_per_tok=1, moe_intermediate_size=8, shared_expert_intermediate_size=8,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    with pytest.raises(TypeError, match="Qwen3NextForCausalLM with a LinearAttentionLayer"):
        Engine(Qwen3NextForCausalLM(config), max_new_tokens=1, stop_tokens=()).generate(
            [[1]], 1, seed=0
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "sampling", [Sampling(0.8, top_p=0.7), Sampling(top_k=5), Sampling(min_p=0.1), Sampling(0.9)]
)
def test_what_sampling_has_cut_the_loss_replays(sampling, dtype):
    """The trainer's log-probs of an unchanged policy are the sampler's: every ratio is 1."""
    model = tiny_qwen3(dtype=dtype)
    made = Engine(model, max_new_tokens=12, stop_tokens=[5]).generate(RAGGED, 16, sampling, seed=4)
    assert (made.support is not None) == sampling.is_cut
    packed = pack_rollout(made)
    batch = token_batch(packed, made, advantages=torch.ones(len(made)), reduction=token_mean)
    found = linear_policy_loss(hidden_rows(model, packed), head_of(model), batch, grpo())
    differs = (found.logp.detach().float() - batch.logp_behaviour).abs()
    # The forward in another batch rounds otherwise; a lost border would be off by tenths.
    bound, share = (1e-3, 0.001) if dtype == torch.float32 else (0.15, 0.01)
    assert float((differs > bound).float().mean()) <= share
    if sampling.is_cut:
        whole = linear_policy_loss(
            hidden_rows(model, packed), head_of(model), replace(batch, support=None), grpo()
        )
        apart = (whole.logp.detach().float() - batch.logp_behaviour).abs()
        assert float((apart > bound).float().mean()) > 0.1
