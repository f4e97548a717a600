"""rollfuse.policy: character tokenizer, small model, warm start, models from a directory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import tiny_llama

from rollfuse.kernels.linear import linear_logp_entropy
from rollfuse.policy import (
    Policy,
    SmallModel,
    WarmStart,
    character_tokenizer,
    head_of,
    load_policy,
    need_same_head,
    small_policy,
    warm_start,
)
from rollfuse.rollout.tasks import Problem, arithmetic_task, questions_task, sort_task

TINY = SmallModel(layers=1, hidden=16, intermediate=32, heads=2, kv_heads=1)
TWENTY = Path(__file__).parent / "data" / "gsm8k_twenty.jsonl"


def test_every_character_is_a_token() -> None:
    tokenizer = character_tokenizer("0123456789+-=")
    assert tokenizer.encode("12+90=") == [1, 2, 10, 9, 0, 12]
    assert tokenizer.decode([1, 2, 10, 9, 0, 12]) == "12+90="
    assert tokenizer.eos_token_id == 13
    assert tokenizer.decode([7, 13], skip_special_tokens=True) == "7"
    assert tokenizer.encode("7x") == [7, tokenizer.unk_token_id]
    with pytest.raises(ValueError, match="different characters"):
        character_tokenizer("aa")


def test_newlines_and_spaces_survive() -> None:
    tokenizer = character_tokenizer("ab \n")
    assert tokenizer.decode(tokenizer.encode("a b\n  b")) == "a b\n  b"


def test_the_model_has_the_shape_asked_for() -> None:
    policy = small_policy(arithmetic_task(), SmallModel(4, 128, 512, 4, 2), seed=0)
    config = policy.model.config
    assert config.model_type == "qwen3"
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (4, 128, 512)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 32)
    weights = policy.model.get_input_embeddings().weight
    assert policy.head.weight.data_ptr() == weights.data_ptr()
    assert policy.stop_ids == (policy.tokenizer.eos_token_id,)
    assert not policy.model.training


def test_the_seed_decides_the_weights_and_leaves_the_global_one() -> None:
    state = torch.get_rng_state()
    one, same, other = (
        small_policy(sort_task(), TINY, seed=seed).model.get_input_embeddings().weight
        for seed in (0, 0, 1)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_task_without_alphabet_needs_a_model() -> None:
    with pytest.raises(ValueError, match="need --model"):
        small_policy(questions_task(TWENTY), TINY, seed=0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"hidden": 18}, "multiple of 2"), ({"kv_heads": 3}, "multiple of kv"), ({"layers": 0}, "1")],
)
def test_impossible_shapes_are_refused(changes: dict[str, int], said: str) -> None:
    shape = {"layers": 1, "hidden": 16, "intermediate": 32, "heads": 4, "kv_heads": 2}
    with pytest.raises(ValueError, match=said):
        SmallModel(**{**shape, **changes})


def test_warm_start_lowers_the_loss_and_depends_on_the_seed_alone() -> None:
    weights = []
    for seed in (0, 0, 1):
        policy = small_policy(sort_task(), TINY, seed=0)
        losses = warm_start(policy, sort_task(), WarmStart(50, 40, 16, 1e-2), seed=seed)
        weights.append(policy.model.get_input_embeddings().weight.detach())
    assert losses[-1] < 0.75 * losses[0]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_the_warm_start_learns_answers_and_end_tokens_only() -> None:
    """The first loss is the cross-entropy of those tokens, worked out one sequence at a time."""
    task = arithmetic_task()
    policy = small_policy(task, TINY, seed=0)
    total, n_tokens = 0.0, 0
    draws = torch.randint(8, (6,), generator=torch.Generator().manual_seed(3))
    for i in draws.tolist():
        problem = task.train[i]
        prompt, answer = policy.encode(problem), policy.tokenizer.encode(problem.answer)
        ids = torch.tensor([[*prompt, *answer, policy.tokenizer.eos_token_id]])
        logp = policy.model(ids).logits[0].log_softmax(-1)
        for at in range(len(prompt), ids.shape[1]):
            total, n_tokens = total - logp[at - 1, ids[0, at]].item(), n_tokens + 1
    losses = warm_start(policy, task, WarmStart(8, 1, 6, 0.0), seed=3)
    assert losses[0] == pytest.approx(total / n_tokens, rel=1e-5)


def test_a_saved_policy_comes_back_bitwise(tmp_path: Path) -> None:
    policy = small_policy(sort_task(), TINY, seed=0)
    policy.save(tmp_path)
    again = load_policy(tmp_path)
    for name, value in policy.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    assert again.tokenizer.encode("52719>") == policy.tokenizer.encode("52719>")
    assert again.stop_ids == policy.stop_ids


def test_questions_use_the_chat_template_if_there_is_one() -> None:
    policy = Policy(tiny_llama(), character_tokenizer("abcdefghijklmnopqrstuvwxyzQA<>:?\n "))
    problem = Problem("how many?", "2")
    ids = policy.encode(problem, is_chat=True)
    assert policy.decode(ids) == "Question: how many?\nAnswer:"
    policy.tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<a>{% endif %}"
    )
    assert policy.decode(policy.encode(problem, is_chat=True)) == "<user>how many?<a>"
    assert policy.decode(policy.encode(problem)) == "how many?"
    several = [problem, Problem("who?", "3")]
    for is_chat in (False, True):
        found = policy.encode_all(several, is_chat=is_chat)
        assert found == [policy.encode(one, is_chat=is_chat) for one in several]


def test_an_unusable_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model: need a directory with a config.json"):
        load_policy(tmp_path / "nothing")
    small_policy(sort_task(), TINY, seed=0).model.save_pretrained(tmp_path / "cut")
    (tmp_path / "cut" / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(ValueError, match=r"tokenizer.json: need JSON"):
        load_policy(tmp_path / "cut")
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(ValueError, match="need a causal LM with its tokenizer"):
        load_policy(tmp_path)


def test_the_head_gives_the_models_own_log_probs() -> None:
    policy = small_policy(sort_task(), TINY, seed=0)
    ids = torch.tensor([policy.encode(Problem("31524>", ""))])
    hidden = policy.model.get_decoder()(input_ids=ids).last_hidden_state[0]
    own = policy.model(ids).logits[0].log_softmax(-1)
    targets = torch.arange(len(hidden))
    found = linear_logp_entropy(hidden, policy.head, targets).logp
    assert torch.allclose(found, own[targets, targets], atol=1e-6)
    need_same_head(policy, ids[0].tolist())


def test_a_head_that_is_not_the_models_is_refused() -> None:
    policy = Policy(tiny_llama(), character_tokenizer("ab"))
    need_same_head(policy, [0, 1])
    policy.model.config.final_logit_softcapping = 0.5  # which Llama's forward does not apply
    assert head_of(policy.model).softcap == 0.5
    with pytest.raises(ValueError, match="need log-probs within 0.001 nats"):
        need_same_head(policy, [0, 1])
