"""TRL's GRPOTrainer with the fused loss: `FusedGRPOTrainer` where you had `GRPOTrainer`.

Sampling, rewards, advantages, old and reference log-probs, accumulation and logging stay TRL's, and
so do the numbers: this is its loss with its divisors. What it does not know raises when the trainer
is made. Under an entropy bonus it logs neither `policy_loss` nor `entropy_coef`.

    python examples/trl_grpo.py
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import nanmax, nanmin

from rollfuse import (
    Plan,
    PolicyLoss,
    TokenBatch,
    constant_length,
    grpo,
    gspo,
    head_of,
    k3,
    linear_policy_loss,
    sequence_mean,
    token_local,
    token_mean,
)

# What TRL calls a loss type is our reduction and what a micro-batch's sum is divided by, apart from
# the number of micro-batches: (trainer, mask (B, C), num_items_in_batch) -> number or 0-d tensor.
LOSS_TYPES: dict[str, tuple[Any, Any]] = {
    "grpo": (sequence_mean, lambda trainer, mask, items: len(mask)),
    "bnpo": (token_mean, lambda trainer, mask, items: mask.sum().clamp(min=1)),
    "dr_grpo": (
        constant_length,
        lambda trainer, mask, items: len(mask) * trainer.max_completion_length,
    ),
    "dapo": (token_mean, lambda trainer, mask, items: items.clamp(min=1) / parts_of(trainer)),
}


def parts_of(trainer: GRPOTrainer) -> int:
    """Micro-batches that what was generated, and num_items_in_batch counts, is divided among."""
    per_rank = trainer.args.steps_per_generation if trainer.model.training else 1
    return trainer.accelerator.num_processes * per_rank


class FusedGRPOTrainer(GRPOTrainer):
    """A GRPOTrainer whose loss goes from hidden states to gradients in one pass."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        need_supported(self)

    def _compute_loss(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        plain, batch = self.accelerator.unwrap_model(model), self._token_batch(ids, inputs)
        # The metrics want tokens without advantage, too; "skip" would spare them.
        objective, plan = objective_of(self), Plan(dropped="score")
        with self.accelerator.autocast():
            hidden = last_hidden(model, plain.get_decoder(), ids, attention)
            out = linear_policy_loss(hidden, head_of(plain), batch, objective, plan=plan)
        self._log_policy(out, batch)
        return out.loss

    def _token_batch(self, ids: Tensor, inputs: Mapping[str, Any]) -> TokenBatch:
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        prompt = ids.shape[1] - mask.shape[1]

        def aligned(value: Tensor | None) -> Tensor | None:
            """(B, L) from (B, C), (B,) from (B, 1)."""
            if value is None or value.dim() == 1:
                return value
            return pad(value, (prompt, 0)) if value.shape == mask.shape else value.squeeze(1)

        extra = {"sampling": aligned(inputs.get("importance_sampling_ratio"))}
        reduction, divisor = LOSS_TYPES[self.loss_type]
        steps = self.current_gradient_accumulation_steps if self.model.training else 1
        batch = TokenBatch.from_padded(
            ids,
            pad(mask, (prompt, 0)).bool(),
            reduction=reduction,
            denominator=steps * divisor(self, mask, inputs["num_items_in_batch"]),
            temperature=self.temperature,
            advantages=aligned(inputs["advantages"]),
            logp_old=aligned(inputs.get("old_per_token_logps")),
            logp_ref=aligned(inputs.get("ref_per_token_logps")),
            extra={name: value for name, value in extra.items() if value is not None},
        )
        # TRL's bonus is a mean over tokens, whatever divides the loss.
        bonus = self.entropy_coef / (steps * len(batch) * batch.weights)
        return replace(batch, extra={**batch.extra, "bonus": bonus})

    @torch.no_grad()
    def _log_policy(self, out: PolicyLoss, batch: TokenBatch) -> None:
        assert batch.cu_seqlens is not None and batch.advantages is not None
        lengths, advantages = batch.cu_seqlens.diff(), batch.advantages

        def by_sequence(values: Tensor) -> Tensor:
            return batch.to_padded(values).sum(1) / lengths

        def mean(values: Tensor) -> float:
            totals = torch.stack([values.sum(), values.new_tensor(len(values))])
            total, count = self.accelerator.reduce(totals, reduction="sum").tolist()
            return total / max(count, 1.0)

        old = out.logp if batch.logp_old is None else batch.logp_old
        log_ratio = out.logp - old
        is_sequence = self.importance_sampling_level == "sequence"
        if is_sequence:
            log_ratio, advantages = by_sequence(log_ratio), by_sequence(advantages)
        low = ((log_ratio.exp() < 1 - self.epsilon_low) & (advantages < 0)).float()
        high = ((log_ratio.exp() > 1 + self.epsilon_high) & (advantages > 0)).float()
        lows, highs = (low, high) if is_sequence else (by_sequence(low), by_sequence(high))
        found = {
            "entropy": mean(out.entropy),
            "clip_ratio/low_mean": mean(low),
            "clip_ratio/high_mean": mean(high),
            "clip_ratio/region_mean": mean(low + high),
            "clip_ratio/low_min": nanmin(self.accelerator.gather(lows)).item(),
            "clip_ratio/high_max": nanmax(self.accelerator.gather(highs)).item(),
        }
        if self.beta != 0.0:
            found["kl"] = mean(kl_term(self, out.logp, batch))
        for name, value in found.items():
            self._metrics["train" if self.model.training else "eval"][name].append(value)


def objective_of(trainer: GRPOTrainer) -> Any:
    """TRL's loss of one token, put together from ours."""
    low, high, delta = trainer.epsilon_low, trainer.epsilon_high, trainer.args.delta
    is_sequence = trainer.importance_sampling_level == "sequence"
    surrogate: Any = gspo(low, high) if is_sequence else grpo(low, high, dual_clip=delta)
    has_kl, has_bonus = trainer.beta != 0.0, trainer.entropy_coef != 0.0

    def objective(logp: Tensor, entropy: Tensor, batch: TokenBatch) -> Tensor:
        loss = surrogate(logp, entropy, batch) * batch.extra.get("sampling", 1.0)
        if has_kl:
            loss = loss + trainer.beta * kl_term(trainer, logp, batch)
        return loss - batch.extra["bonus"] * entropy if has_bonus else loss

    if is_sequence:
        return objective
    active = None if has_kl or has_bonus else surrogate.active
    return token_local(active=active, uses_entropy=has_bonus)(objective)


def kl_term(trainer: GRPOTrainer, logp: Tensor, batch: TokenBatch) -> Tensor:
    """(P,) the estimate of KL, times the ratio where TRL corrects it for old tokens."""
    assert batch.logp_ref is not None
    kl = k3(logp, batch.logp_ref)
    if not trainer.args.use_bias_correction_kl:
        return kl
    old = logp.detach() if batch.logp_old is None else batch.logp_old
    return (logp - old).exp() * kl


def last_hidden(model: nn.Module, decoder: nn.Module, ids: Tensor, attention: Tensor) -> Tensor:
    """(B, L, D), what the LM head sees; of the logits only the last position's are made.

    The wrapped model is called, not its decoder: DistributedDataParallel listens to no other.
    """
    kept: list[Tensor] = []
    hook = decoder.register_forward_hook(lambda _, __, out: kept.append(out.last_hidden_state))
    try:
        model(input_ids=ids, attention_mask=attention, use_cache=False, logits_to_keep=1)
    finally:
        hook.remove()
    return kept[0]


def need_supported(trainer: GRPOTrainer) -> None:
    """Raise ValueError naming what the fused loss would otherwise ignore."""
    args, level = trainer.args, trainer.importance_sampling_level
    is_sequence, has_delta = level == "sequence", args.delta is not None
    is_corrected = trainer.beta != 0.0 and args.use_bias_correction_kl
    refused = {
        f"loss_type {trainer.loss_type}": trainer.loss_type not in LOSS_TYPES,
        f"importance_sampling_level {level}": level not in ("token", "sequence"),
        "delta under sequence-level ratios": is_sequence and has_delta,
        "use_bias_correction_kl under sequence-level ratios": is_sequence and is_corrected,
        "delta <= 1 + epsilon_high": has_delta and args.delta <= 1 + trainer.epsilon_high,
        "top_entropy_quantile": trainer.top_entropy_quantile < 1.0,
        "off_policy_mask_threshold": trainer.off_policy_mask_threshold is not None,
        "use_adaptive_entropy": trainer.use_adaptive_entropy,
        "cast_lm_head_to_fp32": args.cast_lm_head_to_fp32,
        "torch_compile": args.torch_compile,
        "a router's loss": trainer.aux_loss_enabled,
        "images": trainer._is_vlm,
        "a sharded head": trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled,
        "a model that is not a PreTrainedModel": not isinstance(trainer.model, PreTrainedModel),
    }
    if any(refused.values()):
        got = ", ".join(name for name, is_on in refused.items() if is_on)
        raise ValueError(f"FusedGRPOTrainer: need a loss it has, got {got}")


def tiny_model() -> PreTrainedModel:
    """Stands for `AutoModelForCausalLM.from_pretrained(...)`."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=16, **shape, **heads))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Stands for `AutoTokenizer.from_pretrained(...)`: one token a character."""
    core = Tokenizer(models.WordLevel({c: i for i, c in enumerate("0123456789+=-_$?")}, "?"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="$", pad_token="_")


def small_digits(completion_ids: list[list[int]], **_: object) -> list[float]:
    """Reward: the share of digits below 5."""
    return [sum(token < 5 for token in ids) / len(ids) for ids in completion_ids]


def main() -> list[float]:
    """Train and return the mean reward of each step."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        args = GRPOConfig(
            folder,
            max_steps=10,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            num_generations=4,
            max_completion_length=8,
            learning_rate=1e-2,
            epsilon_high=0.28,
            entropy_coef=0.01,
            bf16=True,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        )
        trainer = FusedGRPOTrainer(
            tiny_model(),
            small_digits,
            args,
            Dataset.from_dict({"prompt": [f"{a}+{b}=" for a in range(10) for b in range(10)]}),
            processing_class=tiny_tokenizer(),
        )
        trainer.train()
    return [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]


if __name__ == "__main__":
    main()
