"""A LightningModule with the fused loss: automatic optimisation, autocast, accumulation.

Lightning divides the loss of every micro-batch by `accumulate_grad_batches`, and averages gradients
over ranks. A mean over the step's tokens needs their number: `InSteps` puts it into each
micro-batch, and the denominator is a micro-batch's share of it.

    python examples/lightning_module.py
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import lightning
import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from rollfuse import TokenBatch, dapo, grpo_advantages, head_of, linear_policy_loss, token_mean

VOCABULARY = 64
Batch = dict[str, Tensor]


class FusedPolicy(lightning.LightningModule):
    """DAPO's loss on recorded responses.

    A batch holds ids, attention and mask (B, L), where mask is True on the tokens of responses,
    advantages (B,), logp_old (B, L) under the policy that sampled, and step_tokens ().
    """

    def __init__(self, model: PreTrainedModel, learning_rate: float = 3e-3) -> None:
        super().__init__()
        self.model, self.learning_rate = model, learning_rate

    def training_step(self, batch: Batch, index: int) -> Tensor:
        decoder = self.model.get_decoder()
        out = decoder(input_ids=batch["ids"], attention_mask=batch["attention"], use_cache=False)
        tokens = TokenBatch.from_padded(
            batch["ids"],
            batch["mask"],
            reduction=token_mean,
            denominator=self.share_of(batch["step_tokens"]),
            advantages=batch["advantages"],
            logp_old=batch["logp_old"],
        )
        found = linear_policy_loss(
            out.last_hidden_state, head_of(self.model), tokens, dapo(entropy_coef=0.01)
        )
        self.log("entropy", found.entropy.nanmean())
        return found.loss

    def share_of(self, step_tokens: Tensor) -> Tensor:
        """() tokens a micro-batch of a rank, so that Lightning's two averages give back the sum."""
        # A copy, because it reduces in place and the step's micro-batches share the tensor.
        over_ranks = self.trainer.strategy.reduce(step_tokens.clone(), reduce_op="sum")
        return over_ranks / (self.trainer.world_size * self.trainer.accumulate_grad_batches)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=self.learning_rate)


class InSteps:
    """Micro-batches with the tokens of their optimiser step, the last step's fewer included."""

    def __init__(self, batches: Iterable[Batch], accumulate: int) -> None:
        self.batches, self.accumulate = batches, accumulate

    def __iter__(self) -> Iterator[Batch]:
        left = iter(self.batches)
        while step := list(islice(left, self.accumulate)):
            tokens = torch.stack([batch["mask"].sum() for batch in step]).sum()
            for batch in step:
                yield {**batch, "step_tokens": tokens}


def recorded(model: Any, n_batches: int, size: int = 4) -> list[Batch]:
    """Responses of 2 to 6 tokens to prompts of 3, sampled and scored by `model`."""
    batches = []
    for _ in range(n_batches):
        prompts = torch.randint(VOCABULARY, (1, 3)).expand(size, 3)
        ids = model.generate(prompts, do_sample=True, top_k=0, max_new_tokens=6)
        place, length = torch.arange(9), torch.randint(5, 10, (size, 1))
        mask = (place >= 3) & (place < length)
        with torch.no_grad():
            logp = model(ids).logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)
        rewards = ((ids < VOCABULARY // 2) & mask).sum(1) / mask.sum(1)
        batches.append(
            {
                "ids": ids,
                "attention": (place < length).long(),
                "mask": mask,
                "advantages": grpo_advantages(rewards, torch.zeros(size, dtype=torch.int64)),
                "logp_old": torch.nn.functional.pad(logp, (1, 0)),
            }
        )
    return batches


def tiny_model() -> PreTrainedModel:
    """Stands for `AutoModelForCausalLM.from_pretrained(...)`."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    ends = {"eos_token_id": None, "pad_token_id": 0}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=VOCABULARY, **shape, **heads, **ends))


def main() -> dict[str, float]:
    """Train for five steps of up to three micro-batches and return the last metrics."""
    lightning.seed_everything(0)
    model = tiny_model()
    trainer = lightning.Trainer(
        accelerator="cpu",
        precision="bf16-mixed",
        max_epochs=1,
        accumulate_grad_batches=3,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(FusedPolicy(model), InSteps(recorded(model, 14), trainer.accumulate_grad_batches))
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


if __name__ == "__main__":
    print(main())
