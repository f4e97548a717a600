from dataclasses import replace

import pytest
import torch
from tiny_models import tiny_llama, tiny_qwen3, with_float64_norms

from rollfuse.losses.reductions import sequence_mean, token_mean
from rollfuse.rollout.packing import hidden_rows, hidden_rows_padded, pack_rollout, token_batch
from rollfuse.rollout.record import Rollout

# Responses by group: duplicates, beginnings of one another, single tokens, forks, and in group 3
# nothing but single tokens. Groups 0 and 2 have one text as their prompt.
PROMPTS = [[3, 1, 4, 1, 5], [9], [3, 1, 4, 1, 5], [2, 6, 5]]
RESPONSES = [
    (0, [7, 8, 9, 2]), (0, [7, 8, 9, 2]), (0, [7, 8, 6]), (0, [2]), (0, [7, 8, 9, 5, 1, 1, 4]),
    (1, [7, 8, 9]), (1, [4, 4]), (1, [11, 12, 13, 14, 15, 16]),
    (2, [7, 8, 6]), (2, [4, 4, 2]), (2, [2, 2]),
    (3, [8]), (3, [9]), (3, [8]),
]  # fmt: skip
EQUAL_PROMPTS = [[3, 1, 4], [9, 2, 6], [3, 1, 4], [2, 6, 5]]


def rollout(prompts=PROMPTS, responses=RESPONSES) -> Rollout:
    lengths = torch.tensor([len(r) for _, r in responses], dtype=torch.int64)
    n = int(lengths.sum())
    return Rollout(
        prompts=tuple(torch.tensor(p) for p in prompts),
        prompt_index=torch.tensor([p for p, _ in responses], dtype=torch.int64),
        tokens=torch.tensor([t for _, r in responses for t in r], dtype=torch.int64),
        cu_seqlens=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)),
        logp=-torch.linspace(0.1, 2.0, n),
        entropy=torch.linspace(0.5, 1.0, n),
        version=torch.arange(n) // 3,
        source=torch.zeros(n, dtype=torch.uint8),
        streams=torch.arange(len(responses)),
        finish=torch.zeros(len(responses), dtype=torch.uint8),
        temperature=0.5,
    )


def alone(model, made, b):
    """Hidden rows that predict sequence b's response, from a forward of that sequence alone."""
    prompt, response = made.prompts[made.prompt_index[b]], made.response(b)
    ids = torch.cat([prompt, response])[None]
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]
    return hidden[len(prompt) - 1 : -1]


def loss(hidden, seed):
    """Anything smooth, with a weight of its own for each pair."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(hidden.shape, generator=generator, dtype=torch.float64)
    return (weights * torch.tanh(hidden)).sum()


def gradients(model, value):
    model.zero_grad()
    value.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def windowed():
    layers = ["sliding_attention", "full_attention"]
    return tiny_qwen3(use_sliding_window=True, sliding_window=4, layer_types=layers)


MODELS = {"qwen3": tiny_qwen3, "llama": tiny_llama, "window": windowed}
FORWARDS = {"shared": hidden_rows, "padded": hidden_rows_padded}


@pytest.mark.parametrize("prompts", [PROMPTS, EQUAL_PROMPTS], ids=["ragged", "equal"])
@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("name", MODELS)
def test_rows_and_gradients_equal_those_of_sequences_alone(name, forward, prompts):
    model = with_float64_norms(MODELS[name]()).train()
    made = rollout(prompts)
    packed = pack_rollout(made)
    hidden = FORWARDS[forward](model, packed)
    assert hidden.shape == (packed.n_rows, 32)
    pairs = hidden[packed.rows]
    plain = torch.cat([alone(model, made, b) for b in range(len(made))])
    assert (pairs - plain).abs().max() < 1e-10 * plain.abs().max()
    expected = gradients(model, loss(plain, seed=1))
    found = gradients(model, loss(pairs, seed=1))
    assert expected.keys() == found.keys() and len(found) > 10
    for key, gradient in expected.items():
        # Norms, not entries: a gradient's small entries carry the rounding of its large ones.
        error = (found[key] - gradient).norm() / gradient.norm()
        assert error < 1e-9, f"{key}: {error:.1e}"


def test_an_unmodified_model_in_float32():
    model = tiny_qwen3().train()
    made = rollout()
    packed = pack_rollout(made)
    plain = torch.cat([alone(model, made, b) for b in range(len(made))])
    expected = gradients(model, loss(plain, seed=1))
    found = gradients(model, loss(hidden_rows(model, packed)[packed.rows], seed=1))
    for key, gradient in expected.items():
        assert (found[key] - gradient).norm() < 1e-5 * gradient.norm(), key


def test_what_is_pushed_through():
    packed = pack_rollout(rollout())
    assert [p.tolist() for p in packed.prompts] == [[3, 1, 4, 1, 5], [9], [2, 6, 5]]
    groups: dict[int, list[list[int]]] = {0: [], 1: [], 2: []}
    for prompt, tokens in zip(packed.input_prompt.tolist(), packed.inputs, strict=True):
        groups[prompt].append(tokens.tolist())
    assert sorted(groups[0]) == [[2], [4, 4], [7, 8, 9, 5, 1, 1]]
    assert sorted(groups[1]) == [[4], [7, 8], [11, 12, 13, 14, 15]]
    assert groups[2] == []
    assert packed.n_rows == 3 + 9 + 8
    # First tokens hang on the prompt's row, whatever their group.
    firsts = packed.rows[packed.cu_seqlens[:-1]].tolist()
    assert firsts == [0] * 5 + [1] * 3 + [0] * 3 + [2] * 3
    assert packed.rows[:4].tolist() == packed.rows[4:8].tolist()
    assert packed.targets.tolist() == rollout().tokens.tolist()


def test_inputs_are_shared_under_one_prompt_only():
    packed = pack_rollout(rollout(responses=[(0, [4, 1]), (1, [4, 2, 7])]))
    assert [i.tolist() for i in packed.inputs] == [[4], [4, 2]]
    assert packed.input_prompt.tolist() == [0, 1]
    assert packed.rows.tolist() == [0, 2, 1, 3, 4]


def test_each_distinct_text_goes_through_the_model_once():
    model, shapes = tiny_qwen3(), []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    hidden_rows(model, pack_rollout(rollout()))
    assert shapes == [(3, 5), (6, 6)]


def test_the_order_depends_on_the_tokens_alone():
    one, two = (pack_rollout(rollout()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.inputs, two.inputs, strict=True))
    assert torch.equal(one.rows, two.rows)
    assert one.input_prompt.tolist() == sorted(one.input_prompt.tolist())


def test_keep_leaves_out_sequences_and_what_only_they_needed():
    made, model = rollout(), with_float64_norms(tiny_qwen3())
    keep = torch.zeros(len(made), dtype=torch.bool)
    keep[[2, 9, 12]] = True
    packed = pack_rollout(made, keep)
    assert [p.tolist() for p in packed.prompts] == [[3, 1, 4, 1, 5], [2, 6, 5]]
    assert sorted(i.tolist() for i in packed.inputs) == [[4, 4], [7, 8]]
    assert packed.sequences.tolist() == [2, 9, 12]
    assert packed.cu_seqlens.tolist() == [0, 3, 6, 7]
    assert packed.targets.tolist() == [7, 8, 6, 4, 4, 2, 9]
    assert torch.equal(made.tokens[packed.tokens], packed.targets)
    plain = torch.cat([alone(model, made, b) for b in (2, 9, 12)])
    assert torch.allclose(hidden_rows(model, packed)[packed.rows], plain, rtol=0, atol=1e-9)


def test_only_single_tokens_and_no_sequences_at_all():
    model = tiny_qwen3()
    made = rollout(responses=[(1, [8]), (0, [9]), (1, [8])])
    packed = pack_rollout(made)
    plain = torch.cat([alone(model, made, b) for b in range(3)])
    for forward in FORWARDS.values():
        assert torch.allclose(forward(model, packed)[packed.rows], plain, atol=1e-5)
    assert packed.inputs == () and packed.n_rows == 2
    nothing = pack_rollout(made, torch.zeros(3, dtype=torch.bool))
    for forward in FORWARDS.values():
        hidden = forward(model, nothing)
        assert hidden.shape == (0, 32)
        hidden.sum().backward()
    assert nothing.cu_seqlens.tolist() == [0] and nothing.rows.tolist() == []


def test_empty_responses_have_no_pairs():
    packed = pack_rollout(rollout(responses=[(0, []), (1, [8, 9]), (1, [])]))
    assert packed.sequences.tolist() == [1]
    assert packed.cu_seqlens.tolist() == [0, 2]
    assert len(packed.prompts) == 1


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_gradient_checkpointing_takes_the_padded_pass():
    model = with_float64_norms(tiny_qwen3()).train()
    packed = pack_rollout(rollout())
    expected = gradients(model, loss(hidden_rows(model, packed), seed=1))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    calls = []
    model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    found = gradients(model, loss(hidden_rows(model, packed), seed=1))
    assert len(calls) == 1, "the shared pass is two calls"
    for key, gradient in expected.items():
        assert (found[key] - gradient).norm() < 1e-9 * gradient.norm(), key


def test_a_model_that_ignores_its_cache_is_refused():
    model = tiny_qwen3()
    decoder, forward = model.model, model.model.forward
    decoder.forward = lambda past_key_values, use_cache, **kw: forward(use_cache=False, **kw)
    with pytest.raises(TypeError, match="got 0 of 5 tokens from Qwen3ForCausalLM"):
        hidden_rows(model, pack_rollout(rollout()))


def test_token_batch_carries_the_record():
    made = rollout()
    keep = torch.arange(len(made)) % 2 == 0
    packed = pack_rollout(made, keep)
    advantages = torch.arange(len(made), dtype=torch.float32) - 5
    old, ref = torch.randn(len(made.tokens)), torch.randn(len(made.tokens))
    batch = token_batch(
        packed, made, advantages=advantages, reduction=sequence_mean, denominator=14.0,
        logp_old=old, logp_ref=ref,
    )  # fmt: skip
    tokens = [t for b in range(0, 14, 2) for t in made.response(b).tolist()]
    assert batch.targets.tolist() == tokens
    where = torch.cat(
        [torch.arange(made.cu_seqlens[b], made.cu_seqlens[b + 1]) for b in range(0, 14, 2)]
    )
    assert torch.equal(batch.logp_behaviour, made.logp[where])
    assert torch.equal(batch.logp_old, old[where])
    assert torch.equal(batch.logp_ref, ref[where])
    assert torch.equal(batch.version, made.version[where])
    assert batch.advantages[:4].tolist() == [-5] * 4 and batch.advantages[-1] == 12 - 5
    assert batch.temperature == 0.5
    assert batch.known is None
    assert batch.weights.sum().item() == pytest.approx(7 / 14)
    assert torch.equal(batch.rows, packed.rows)
    assert torch.equal(batch.cu_seqlens, packed.cu_seqlens)


def test_the_sampler_is_the_old_policy_unless_told():
    made = rollout()
    batch = token_batch(
        pack_rollout(made), made, advantages=torch.ones(len(made)), reduction=token_mean
    )
    assert torch.equal(batch.logp_old, made.logp) and batch.logp_ref is None
    assert batch.weights.sum().item() == pytest.approx(1.0)


def test_bad_input():
    made = rollout()
    packed = pack_rollout(made)
    with pytest.raises(ValueError, match="keep: need shape"):
        pack_rollout(made, torch.ones(3, dtype=torch.bool))
    with pytest.raises(TypeError, match="keep: need bool, got torch.int64"):
        pack_rollout(made, torch.ones(len(made), dtype=torch.int64))
    with pytest.raises(ValueError, match="advantages: need shape"):
        token_batch(packed, made, advantages=torch.ones(3), reduction=token_mean)
    for name in ("logp_old", "logp_ref"):
        with pytest.raises(ValueError, match=f"{name}: need shape"):
            token_batch(
                packed, made, advantages=torch.ones(len(made)), reduction=token_mean,
                **{name: torch.zeros(2)},
            )  # fmt: skip
    with pytest.raises(TypeError, match="Qwen3Model without one"):
        hidden_rows(tiny_qwen3().model, packed)


def test_float64_records_make_float32_batches():
    made = replace(rollout(), logp=rollout().logp.double())
    batch = token_batch(
        pack_rollout(made), made, advantages=torch.ones(len(made)), reduction=token_mean
    )
    assert batch.logp_old.dtype == batch.logp_behaviour.dtype == torch.float32
