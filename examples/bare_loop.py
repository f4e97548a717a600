"""The fused loss in a loop of your own: sample, reward, update.

What such loops get wrong, and how it is done here. Autocast: model and loss stand in one region,
and the head's products take the region's type while the loss and its statistics stay float32.
GradScaler: it scales the loss, and gradients are unscaled before they are clipped. Accumulation:
the denominator counts the whole step, so that micro-batches add up and nothing is divided by their
number. DistributedDataParallel: model and loss are one module, all but the last micro-batch skip
the exchange, and what it averages over ranks is divided by a rank's share of the step's tokens.

    python examples/bare_loop.py
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen3Config, Qwen3ForCausalLM

from rollfuse import TokenBatch, dapo, grpo_advantages, head_of, linear_policy_loss, token_mean

VOCABULARY, END = 64, 0


class Samples(NamedTuple):
    """B prompts with responses, padded to one length L."""

    ids: Tensor  # (B, L) int64
    attention: Tensor  # (B, L) int64, 1 on tokens
    mask: Tensor  # (B, L) bool, True on the tokens of responses
    advantages: Tensor  # (B,) float32

    def split(self, size: int) -> list[Samples]:
        return [Samples(*part) for part in zip(*(torch.split(t, size) for t in self), strict=True)]


class Learner(nn.Module):
    """Model and loss in one forward, so that DistributedDataParallel can wrap both."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, part: Samples, denominator: Tensor) -> Tensor:
        decoder = self.model.get_decoder()
        out = decoder(input_ids=part.ids, attention_mask=part.attention, use_cache=False)
        batch = TokenBatch.from_padded(
            part.ids,
            part.mask,
            reduction=token_mean,
            denominator=denominator,
            advantages=part.advantages,
        )
        # One update a sample: without logp_old every ratio is 1.
        return linear_policy_loss(out.last_hidden_state, head_of(self.model), batch, dapo()).loss


def update(
    learner: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    samples: Samples,
    dtype: torch.dtype | None,
    max_norm: float = 1.0,
) -> float:
    """One optimiser step in micro-batches of four; returns this rank's share of the loss."""
    optimizer.zero_grad()
    denominator, total = tokens_per_rank(samples.mask), 0.0
    parts, device = samples.split(4), samples.ids.device.type
    for number, part in enumerate(parts, 1):
        exchange: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if isinstance(learner, DistributedDataParallel) and number < len(parts):
            exchange = learner.no_sync()
        with exchange:
            with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
                loss = learner(part, denominator)
            scaler.scale(loss).backward()
        total += loss.item()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(learner.parameters(), max_norm)
    scaler.step(optimizer)
    scaler.update()
    return total


def tokens_per_rank(mask: Tensor) -> Tensor:
    """() tokens of the step over all ranks, divided by the ranks."""
    count = mask.sum()
    if not dist.is_initialized():
        return count
    dist.all_reduce(count)
    return count / dist.get_world_size()


@torch.no_grad()
def sample(model: Any, n_prompts: int = 4, n_samples: int = 4) -> tuple[Samples, float]:
    """Groups of responses and their mean reward: the share of tokens in the vocabulary's half."""
    prompts = torch.randint(1, VOCABULARY, (n_prompts, 3)).repeat_interleave(n_samples, 0)
    ends = {"pad_token_id": END, "eos_token_id": END, "attention_mask": torch.ones_like(prompts)}
    ids = model.generate(prompts, do_sample=True, top_k=0, max_new_tokens=8, **ends)
    responses = ids[:, 3:]
    is_end = responses == END
    counts = is_end.cumsum(1) - is_end.long() == 0  # up to the first end, which counts
    mask = nn.functional.pad(counts, (3, 0))
    attention = nn.functional.pad(counts.long(), (3, 0), value=1)
    rewards = ((responses < VOCABULARY // 2) & counts).sum(1) / counts.sum(1)
    groups = torch.arange(n_prompts).repeat_interleave(n_samples)
    return Samples(ids, attention, mask, grpo_advantages(rewards, groups)), rewards.mean().item()


def tiny_model() -> Any:
    """Stands for `AutoModelForCausalLM.from_pretrained(...)`."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=VOCABULARY, **shape, **heads))


def main(dtype: torch.dtype | None = torch.bfloat16, steps: int = 20) -> list[float]:
    """Train and return the mean reward of each step."""
    torch.manual_seed(0)
    learner = Learner(tiny_model())
    optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-2)
    # float16 alone has gradients that vanish; for the others the scaler does nothing.
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    rewards = []
    for step in range(steps):
        samples, reward = sample(learner.model)
        loss = update(learner, optimizer, scaler, samples, dtype)
        print(f"{dtype}  step {step:2d}  reward {reward:.2f}  loss {loss:+.3f}")
        rewards.append(reward)
    return rewards


if __name__ == "__main__":
    main(torch.bfloat16)
    main(torch.float16)
