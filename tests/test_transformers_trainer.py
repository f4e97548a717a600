"""examples/transformers_trainer.py against the stock Trainer and float64."""

from __future__ import annotations

import copy

import pytest
import torch
from check import relative_error
from gradient_checks import Tensors, assert_models_no_worse, exact, moved, weights
from tiny_models import tiny_qwen3
from torch import nn
from torch.nn.functional import cross_entropy
from two_ranks import run_two_ranks

from rollfuse import linear_policy_loss

pytest.importorskip("transformers", reason="needs transformers: the extra [examples]")
pytest.importorskip("accelerate", reason="needs accelerate: the extra [examples]")

import transformers_trainer  # noqa: E402
from transformers import Gemma2Config, Gemma2ForCausalLM, Trainer, TrainingArguments  # noqa: E402
from transformers_trainer import FusedTrainer, collate, counting_examples  # noqa: E402

STEPS, STEP_EXAMPLES, RATE = 2, 6, 0.5


def examples() -> list[dict[str, list[int]]]:
    """The same ones at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return counting_examples(24)


def learn_everything(chosen):
    """Labels on every token but padding, the first one's included."""
    batch = collate(chosen)
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def arguments(folder, *, accumulate=2, **changes) -> TrainingArguments:
    """Plain gradient descent through the examples in order."""
    keywords = {
        "max_steps": STEPS,
        "per_device_train_batch_size": STEP_EXAMPLES // accumulate,
        "gradient_accumulation_steps": accumulate,
        "optim": "sgd",
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        **changes,
    }
    return TrainingArguments(str(folder), **keywords)


def trained(kind, model, folder, *, collator=collate, **changes) -> tuple[list[float], Tensors]:
    """The losses of the steps, and how far they moved the weights."""
    model = copy.deepcopy(model)
    before = weights(model)
    trainer = kind(model, arguments(folder, **changes), collator, train_dataset=examples())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, moved(weights(model), before)


def descended(model, collator) -> tuple[list[float], Tensors]:
    """The same in float64, by hand: a step's examples are one batch."""
    model, losses = exact(model), []
    before = weights(model)
    for step in range(STEPS):
        batch = collator(examples()[STEP_EXAMPLES * step : STEP_EXAMPLES * (step + 1)])
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= RATE * p.grad
        losses.append(loss.item())
    return losses, moved(weights(model), before)


@pytest.mark.parametrize("collator", [collate, learn_everything])
def test_training_equals_the_stock_trainers(collator, tmp_path):
    model = tiny_qwen3(vocab_size=64)
    losses, ours = trained(FusedTrainer, model, tmp_path, collator=collator)
    stock_losses, stock = trained(Trainer, model, tmp_path, collator=collator)
    true_losses, truth = descended(model, collator)
    assert losses == pytest.approx(true_losses, rel=1e-5)
    assert stock_losses == pytest.approx(true_losses, rel=1e-5)
    assert_models_no_worse(ours, stock, truth)


def test_accumulation_equals_one_big_batch(tmp_path):
    model = tiny_qwen3(vocab_size=64)
    losses, parts = trained(FusedTrainer, model, tmp_path, accumulate=3)
    whole_losses, whole = trained(FusedTrainer, model, tmp_path, accumulate=1)
    _, truth = descended(model, collate)
    assert losses == pytest.approx(whole_losses, rel=1e-6)
    assert_models_no_worse(parts, whole, truth)


def test_autocast_is_no_worse_than_the_stock_trainers(tmp_path, monkeypatch):
    model, loss, seen = tiny_qwen3(vocab_size=64), linear_policy_loss, []

    def spied(*arguments):
        seen.append(torch.is_autocast_enabled("cpu"))
        return loss(*arguments)

    monkeypatch.setattr(transformers_trainer, "linear_policy_loss", spied)
    _, ours = trained(FusedTrainer, model, tmp_path, bf16=True)
    _, stock = trained(Trainer, model, tmp_path, bf16=True)
    _, truth = descended(model, collate)
    worst = max(relative_error(ours[name], truth[name]) for name in truth)
    assert 1e-4 < worst < 0.2  # half precision was at work, in the head as well
    assert seen == [True] * 2 * STEPS
    assert_models_no_worse(ours, stock, truth)


RANK = """
import os, sys
from pathlib import Path
from test_transformers_trainer import FusedTrainer, Trainer, trained
from tiny_models import tiny_qwen3

folder, rank = Path(sys.argv[1]), os.environ["RANK"]
for is_average in (True, False):
    for kind in (FusedTrainer, Trainer):
        found = trained(
            kind,
            tiny_qwen3(vocab_size=64),
            folder,
            ddp_backend="gloo",
            average_tokens_across_devices=is_average,
        )
        torch.save(found, folder / f"{kind.__name__}-{is_average}-{rank}.pt")
"""


def test_two_ranks_train_like_the_stock_trainers(tmp_path):
    run_two_ranks(RANK, tmp_path)
    for run in ("True-0", "False-1"):
        losses, ours = torch.load(tmp_path / f"FusedTrainer-{run}.pt")
        stock_losses, stock = torch.load(tmp_path / f"Trainer-{run}.pt")
        assert losses == pytest.approx(stock_losses, rel=1e-5)
        for name, value in ours.items():
            assert relative_error(value, stock[name]) < 1e-4, name


def test_a_softcap_is_the_models(tmp_path):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    config = Gemma2Config(vocab_size=64, final_logit_softcapping=2.0, **shape, **heads)
    model = Gemma2ForCausalLM(config)
    losses, ours = trained(FusedTrainer, model, tmp_path)
    stock_losses, stock = trained(Trainer, model, tmp_path)
    assert losses == pytest.approx(stock_losses, rel=1e-5)
    for name, value in ours.items():
        assert relative_error(value, stock[name]) < 1e-3, name


def test_evaluation_gives_the_stock_trainers_loss(tmp_path):
    found = []
    for kind in (FusedTrainer, Trainer):
        args = arguments(tmp_path, per_device_eval_batch_size=5)
        trainer = kind(tiny_qwen3(vocab_size=64), args, collate, eval_dataset=examples())
        found.append(trainer.evaluate()["eval_loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "keywords", "message"),
    [
        ({"label_smoothing_factor": 0.1}, {}, "label_smoothing_factor"),
        ({"torch_compile": True}, {}, "torch_compile"),
        ({}, {"compute_loss_func": lambda *_, **__: None}, "compute_loss_func"),
        ({}, {"compute_metrics": lambda _: {}}, "compute_metrics"),
    ],
)
def test_what_it_would_ignore_is_refused(changes, keywords, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        FusedTrainer(tiny_qwen3(), arguments(tmp_path, **changes), collate, **keywords)


def test_a_routers_loss_and_foreign_models_are_refused(tmp_path):
    model = tiny_qwen3()
    model.config.output_router_logits = True
    with pytest.raises(ValueError, match="a router's loss"):
        FusedTrainer(model, arguments(tmp_path), collate)

    class Foreign(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.config = tiny_qwen3(), tiny_qwen3().config

        def forward(self, input_ids, labels=None):
            return self.model(input_ids, labels=labels)

    with pytest.raises(ValueError, match="not a PreTrainedModel"):
        FusedTrainer(Foreign(), arguments(tmp_path), collate)


def test_predictions_are_refused(tmp_path):
    trainer = FusedTrainer(tiny_qwen3(vocab_size=64), arguments(tmp_path), collate)
    with pytest.raises(ValueError, match="predict: need logits, which FusedTrainer never makes"):
        trainer.predict(examples()[:2])


def test_shifted_labels_are_refused(tmp_path):
    trainer = FusedTrainer(tiny_qwen3(vocab_size=64), arguments(tmp_path), collate)
    batch = collate(examples()[:2])
    with pytest.raises(ValueError, match="shift_labels"):
        trainer.compute_loss(trainer.model, {**batch, "shift_labels": batch["labels"]})
