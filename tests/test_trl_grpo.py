"""examples/trl_grpo.py against TRL's own loss, metrics and training, and against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from check import relative_error
from gradient_checks import assert_models_no_worse, gradients, moved, weights
from tiny_models import tiny_qwen3, with_float64_norms
from torch import Tensor
from two_ranks import run_two_ranks

from rollfuse import check_objective

pytest.importorskip("trl", reason="needs trl: the extra [examples]")

from datasets import Dataset  # noqa: E402
from transformers import Qwen3ForCausalLM  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402
from trl_grpo import FusedGRPOTrainer, objective_of, small_digits, tiny_tokenizer  # noqa: E402

B, PROMPT, COMPLETION = 6, 4, 7


@pytest.fixture(autouse=True)
def no_telemetry(monkeypatch):
    monkeypatch.setenv("CI", "true")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model in a directory, where TRL finds it again as its reference."""
    folder = tmp_path_factory.mktemp("model")
    tiny_qwen3(vocab_size=16).save_pretrained(folder)
    return folder


class EagerGRPOTrainer(GRPOTrainer):
    """TRL's loss on log-probs and entropies from logits, in the model's dtype."""

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, **_
    ):
        logits = model(input_ids, attention_mask=attention_mask).logits / self.temperature
        log_p = logits[:, -logits_to_keep - 1 : -1].log_softmax(-1)
        logp = log_p.gather(2, input_ids[:, -logits_to_keep:, None]).squeeze(2)
        return logp, -(log_p.exp() * log_p).sum(-1), None


def trainer_of(kind, saved, folder, **changes):
    keywords = {
        "per_device_train_batch_size": B,
        "gradient_accumulation_steps": 3,
        "steps_per_generation": 6,
        "num_generations": B,
        "max_completion_length": COMPLETION + 1,
        "optim": "sgd",
        "learning_rate": 0.5,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        **changes,
    }
    trainer = kind(
        Qwen3ForCausalLM.from_pretrained(saved),
        small_digits,
        GRPOConfig(str(folder), **keywords),
        Dataset.from_dict({"prompt": [f"{a}+{b}=" for a in range(4) for b in range(10)]}),
        processing_class=tiny_tokenizer(),
    )
    trainer.current_gradient_accumulation_steps = 3
    trainer.model.train()
    return trainer


def step_inputs(**changes: Tensor) -> dict[str, Tensor]:
    """One micro-batch as TRL hands it over; a prompt padded on the left, a response left out."""
    lengths = torch.tensor([7, 1, 4, 0, 5, 6])
    mask = (torch.arange(COMPLETION) < lengths[:, None]).long()
    prompt_mask = torch.ones(B, PROMPT, dtype=torch.int64)
    prompt_mask[1, :2] = 0
    return {
        "prompt_ids": torch.randint(10, (B, PROMPT)),
        "prompt_mask": prompt_mask,
        "completion_ids": torch.randint(10, (B, COMPLETION)),
        "completion_mask": mask,
        "advantages": torch.tensor([1.0, -1.5, 0.0, 2.0, -0.5, 0.7]),
        "num_items_in_batch": torch.tensor(131),
        **changes,
    }


def near_old(saved, inputs: dict[str, Tensor], spread: float = 0.2) -> Tensor:
    """(B, C) old log-probs that put the ratios on both sides of the clip."""
    model = Qwen3ForCausalLM.from_pretrained(saved)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    with torch.no_grad():
        log_p = model(ids, attention_mask=attention).logits[:, PROMPT - 1 : -1].log_softmax(-1)
    logp = log_p.gather(2, inputs["completion_ids"][..., None]).squeeze(2)
    return logp + spread * torch.randn(B, COMPLETION)


def measured(trainer, inputs):
    """Loss, gradients and metrics of one micro-batch."""
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return loss.detach(), gradients(trainer.model), metrics


def assert_equals_trl(saved, folder, inputs, *, with_vllm=False, **changes) -> None:
    """Loss and gradients no worse than TRL's, the same metrics; the clip is met where it can be."""
    found = []
    for kind in (FusedGRPOTrainer, GRPOTrainer, EagerGRPOTrainer):
        trainer = trainer_of(kind, saved, folder, **changes)
        trainer.use_vllm = with_vllm
        if kind is EagerGRPOTrainer:
            with_float64_norms(trainer.model)
        found.append(measured(trainer, inputs))
    (loss, ours, metrics), (stock_loss, stock, stock_metrics), (true_loss, truth, _) = found
    bound = 2.0 * (stock_loss - true_loss).abs() + 1e-6 * (true_loss.abs() + 0.01)
    assert (loss - true_loss).abs() <= bound, (loss, stock_loss, true_loss)
    assert_models_no_worse(ours, stock, truth)
    assert (0.0 < metrics["clip_ratio/region_mean"] < 1.0) == ("old_per_token_logps" in inputs)
    unlogged = {"policy_loss", "entropy_coef"}
    assert metrics.keys() == stock_metrics.keys() - unlogged
    for name, value in metrics.items():
        assert value == pytest.approx(stock_metrics[name], rel=1e-4, abs=1e-6), name


LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo"]


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_loss_types(saved, tmp_path, loss_type, beta):
    inputs = step_inputs()
    inputs["old_per_token_logps"] = near_old(saved, inputs)
    inputs["ref_per_token_logps"] = near_old(saved, inputs, 0.5)
    assert_equals_trl(saved, tmp_path, inputs, loss_type=loss_type, beta=beta)


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.7},
        {"epsilon_high": 0.28, "delta": 1.4},
        {"beta": 0.1, "use_bias_correction_kl": False},
        {"importance_sampling_level": "sequence", "loss_type": "grpo", "epsilon": 0.1},
        {"importance_sampling_level": "sequence", "beta": 0.1, "use_bias_correction_kl": False},
        *({"entropy_coef": 0.05, "loss_type": name} for name in LOSSES),
        {"entropy_coef": 0.05, "importance_sampling_level": "sequence"},
    ],
    ids=str,
)
def test_options(saved, tmp_path, changes):
    inputs = step_inputs()
    spread = 0.6 if "delta" in changes else 0.2  # ratios above delta, too
    old = near_old(saved, inputs, spread) / changes.get("temperature", 1.0)
    inputs["old_per_token_logps"] = old
    inputs["ref_per_token_logps"] = near_old(saved, inputs, 0.5)
    assert_equals_trl(saved, tmp_path, inputs, **changes)


def test_autocast(saved, tmp_path):
    inputs = step_inputs()
    inputs["old_per_token_logps"] = near_old(saved, inputs)
    found = []
    for kind, is_half in ((FusedGRPOTrainer, True), (GRPOTrainer, True), (EagerGRPOTrainer, False)):
        trainer = trainer_of(kind, saved, tmp_path, bf16=is_half)
        if not is_half:
            with_float64_norms(trainer.model)
        found.append(measured(trainer, inputs)[1])
    ours, stock, truth = found
    worst = max(relative_error(ours[name], truth[name]) for name in truth)
    assert 1e-3 < worst < 0.2  # half precision was at work
    assert_models_no_worse(ours, stock, truth)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_without_old_log_probs(saved, tmp_path, level):
    inputs = step_inputs()
    inputs["ref_per_token_logps"] = near_old(saved, inputs, 0.5)
    is_token = level == "token"
    assert_equals_trl(
        saved,
        tmp_path,
        inputs,
        beta=0.1,
        importance_sampling_level=level,
        use_bias_correction_kl=is_token,
    )


@pytest.mark.parametrize("width", [1, COMPLETION])
def test_the_samplers_weight_spares_the_kl(saved, tmp_path, width):
    inputs = step_inputs(importance_sampling_ratio=torch.rand(B, width) * 2)
    inputs["importance_sampling_ratio"][2] = 0.0
    inputs["old_per_token_logps"] = near_old(saved, inputs)
    inputs["ref_per_token_logps"] = near_old(saved, inputs, 0.5)
    assert_equals_trl(saved, tmp_path, inputs, with_vllm=True, beta=0.1)


def test_tool_mask_and_advantages_of_tokens(saved, tmp_path):
    inputs = step_inputs(tool_mask=torch.ones(B, COMPLETION, dtype=torch.int64))
    inputs["tool_mask"][:, 2] = 0
    inputs["advantages"] = torch.randn(B, COMPLETION)
    inputs["old_per_token_logps"] = near_old(saved, inputs)
    assert_equals_trl(saved, tmp_path, inputs, loss_type="grpo")


def test_a_micro_batch_without_tokens_has_loss_0(saved, tmp_path):
    inputs = step_inputs(completion_mask=torch.zeros(B, COMPLETION, dtype=torch.int64))
    trainer = trainer_of(FusedGRPOTrainer, saved, tmp_path, entropy_coef=0.05)
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    assert loss == 0.0
    grads = [p.grad for p in trainer.model.parameters() if p.grad is not None]
    assert all(not g.any() for g in grads)


def test_evaluation_does_not_accumulate(saved, tmp_path):
    inputs = step_inputs()
    inputs["old_per_token_logps"] = near_old(saved, inputs)
    for loss_type in LOSSES:
        found = []
        for kind in (FusedGRPOTrainer, GRPOTrainer):
            trainer = trainer_of(kind, saved, tmp_path, loss_type=loss_type)
            trainer.model.eval()
            with torch.no_grad():
                found.append(trainer._compute_loss(trainer.model, inputs).item())
            assert trainer._metrics["eval"] and not trainer._metrics["train"]
        assert found[0] == pytest.approx(found[1], rel=1e-5), loss_type


@pytest.mark.parametrize("changes", [{}, {"beta": 0.1}, {"entropy_coef": 0.05}, {"delta": 1.5}])
def test_the_objective_keeps_its_word(saved, tmp_path, changes):
    trainer = trainer_of(FusedGRPOTrainer, saved, tmp_path, **changes)
    inputs = step_inputs(importance_sampling_ratio=torch.rand(B, COMPLETION))
    inputs["old_per_token_logps"] = near_old(saved, inputs)
    inputs["ref_per_token_logps"] = near_old(saved, inputs)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    batch = trainer._token_batch(ids, inputs)
    check_objective(objective_of(trainer), batch)
    check_objective(objective_of(trainer), replace(batch, logp_old=None), seed=1)


def trained(kind, saved, folder, **changes):
    """What the steps logged, and how far they moved the weights.

    Two generations, two updates on each, two micro-batches an update.
    """
    steps = {"gradient_accumulation_steps": 2, "steps_per_generation": 2, "num_iterations": 2}
    trainer = trainer_of(
        kind, saved, folder, num_generations=3, max_steps=4, **{**steps, **changes}
    )
    before = weights(trainer.model)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return logs, moved(weights(trainer.model), before)


def assert_same_training(ours, theirs) -> None:
    (logs, mine), (stock_logs, stock) = ours, theirs
    assert len(logs) == len(stock_logs) == 4
    # The same tokens were sampled, or the rest could not be compared.
    sampled = [[entry.get("num_tokens") for entry in kept] for kept in (logs, stock_logs)]
    assert sampled[0] == sampled[1]
    for entry, other in zip(logs, stock_logs, strict=True):
        for name in ("loss", "grad_norm", "entropy", "clip_ratio/region_mean"):
            assert entry[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), name
    for name, value in mine.items():
        assert relative_error(value, stock[name]) < 1e-3, name


@pytest.mark.parametrize("changes", [{}, {"beta": 0.05, "loss_type": "grpo"}], ids=str)
def test_training_equals_trls(saved, tmp_path, changes):
    found = [trained(kind, saved, tmp_path, **changes) for kind in (FusedGRPOTrainer, GRPOTrainer)]
    assert_same_training(*found)


RANK = """
import os, sys
from pathlib import Path
from test_trl_grpo import FusedGRPOTrainer, GRPOTrainer, trained

folder, rank = Path(sys.argv[1]), os.environ["RANK"]
for name in ("dapo", "bnpo"):
    for kind in (FusedGRPOTrainer, GRPOTrainer):
        found = trained(kind, folder / "model", folder, loss_type=name, ddp_backend="gloo")
        torch.save(found, folder / f"{kind.__name__}-{name}-{rank}.pt")
"""


def test_two_ranks_train_like_trls(tmp_path):
    tiny_qwen3(vocab_size=16).save_pretrained(tmp_path / "model")
    run_two_ranks(RANK, tmp_path)
    for run in ("dapo-0", "bnpo-1"):
        kinds = ("FusedGRPOTrainer", "GRPOTrainer")
        assert_same_training(*(torch.load(tmp_path / f"{kind}-{run}.pt") for kind in kinds))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({"loss_type": name}, name) for name in ("cispo", "sapo", "luspo", "vespo")),
        ({"importance_sampling_level": "sequence", "delta": 1.5}, "delta under sequence"),
        ({"importance_sampling_level": "sequence", "beta": 0.1}, "use_bias_correction_kl"),
        ({"delta": 1.2}, "delta <= 1"),
        ({"top_entropy_quantile": 0.5}, "top_entropy_quantile"),
        ({"off_policy_mask_threshold": 0.5}, "off_policy_mask_threshold"),
        ({"use_adaptive_entropy": True}, "use_adaptive_entropy"),
        ({"cast_lm_head_to_fp32": True}, "cast_lm_head_to_fp32"),
    ],
    ids=str,
)
def test_what_it_would_ignore_is_refused(saved, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(FusedGRPOTrainer, saved, tmp_path, **changes)
