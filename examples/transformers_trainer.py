"""transformers' Trainer with the fused cross-entropy: `FusedTrainer` where you had `Trainer`.

Labels hold -100 where nothing is learnt, `num_items_in_batch` counts the labels of the whole step,
so that accumulation and ranks add up to one big batch. What this does not know raises when the
trainer is made.

    python examples/transformers_trainer.py
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM, Trainer, TrainingArguments

from rollfuse import TokenBatch, head_of, linear_policy_loss, nll, token_mean


class FusedTrainer(Trainer):
    """A Trainer whose logits are never made."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        need_supported(self)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        if "shift_labels" in inputs:
            raise ValueError("inputs: need labels aligned with input_ids, got shift_labels")
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # It counts all ranks, whose gradients are averaged.
            num_items_in_batch = num_items_in_batch / self.accelerator.num_processes
        plain = self.accelerator.unwrap_model(model)
        batch = TokenBatch.from_labels(
            inputs["labels"], reduction=token_mean, denominator=num_items_in_batch
        )
        features = {name: value for name, value in inputs.items() if name != "labels"}
        with self.accelerator.autocast():
            hidden = last_hidden(model, plain.get_decoder(), features)
            loss = linear_policy_loss(hidden, head_of(plain), batch, nll()).loss
        return (loss, {"loss": loss}) if return_outputs else loss

    def predict(self, *_: Any, **__: Any) -> Any:
        raise ValueError(
            "predict: need logits, which FusedTrainer never makes; use a Trainer, or evaluate()"
        )


def last_hidden(model: nn.Module, decoder: nn.Module, features: Mapping[str, Tensor]) -> Tensor:
    """(B, L, D), what the LM head sees; of the logits only the last position's are made.

    The wrapped model is called, not its decoder: DistributedDataParallel listens to no other.
    """
    kept: list[Tensor] = []
    hook = decoder.register_forward_hook(lambda _, __, out: kept.append(out.last_hidden_state))
    try:
        model(**features, use_cache=False, logits_to_keep=1)
    finally:
        hook.remove()
    return kept[0]


def need_supported(trainer: Trainer) -> None:
    """Raise ValueError naming what the fused loss would otherwise ignore."""
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or trainer.get_tp_size() > 1
    refused = {
        "label_smoothing_factor": args.label_smoothing_factor != 0,
        "compute_loss_func": trainer.compute_loss_func is not None,
        "compute_metrics, which needs logits": trainer.compute_metrics is not None,
        "a sharded head": sharded,
        "several GPUs in one process": args.n_gpu > 1,
        "torch_compile": args.torch_compile,
        "a model that is not a PreTrainedModel": not isinstance(model, PreTrainedModel),
        "a router's loss": getattr(model.config, "output_router_logits", False),
    }
    if any(refused.values()):
        got = ", ".join(name for name, is_on in refused.items() if is_on)
        raise ValueError(f"FusedTrainer: need a plain causal language model's loss, got {got}")


def collate(examples: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
    """Prompt and response padded on the right; only the response has labels."""
    width = max(len(e["prompt"]) + len(e["response"]) for e in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.int64)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, example in enumerate(examples):
        start, text = len(example["prompt"]), [*example["prompt"], *example["response"]]
        ids[row, : len(text)] = torch.tensor(text)
        labels[row, start : len(text)] = ids[row, start : len(text)]
        mask[row, : len(text)] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def counting_examples(n: int) -> list[dict[str, list[int]]]:
    """Prompts of two to five numbers that rise by one; the response goes on counting."""
    starts, lengths = torch.randint(1, 20, (n,)).tolist(), torch.randint(2, 6, (n, 2)).tolist()
    return [
        {"prompt": [*range(s, s + p)], "response": [*range(s + p, s + p + 2 * r)]}
        for s, (p, r) in zip(starts, lengths, strict=True)
    ]


def tiny_model() -> PreTrainedModel:
    """Stands for `AutoModelForCausalLM.from_pretrained(...)`."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=64, **shape, **heads))


def main() -> list[float]:
    """Train and return the loss of each step."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            max_steps=20,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            bf16=True,
            use_cpu=True,
            remove_unused_columns=False,  # the collator reads ours
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        )
        examples = counting_examples(160)
        trainer = FusedTrainer(tiny_model(), args, collate, train_dataset=examples)
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
