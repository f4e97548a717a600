"""Best of N with early pruning: at checkpoints the worst half of the samples is given up.

All samples share the prompt's keys and values, and the prompt is computed once. A pruned sample's
pages are free at once. What the others draw does not depend on that: a token's noise is a function
of its branch's stream and its position.

    python examples/best_of_n.py
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from rollfuse import Branch, TreeModel, sample_tokens, tree_cache_for

VOCABULARY, END = 64, 0


@dataclass
class Sample:
    branch: Branch
    logp: list[float] = field(default_factory=list)  # nats, one a token
    has_ended: bool = False


def best_of_n(
    model: TreeModel,
    prompt: Sequence[int],
    n: int,
    n_tokens: int,
    checkpoints: Collection[int] = (),
    end: int | None = None,
    stream: int | None = None,
) -> tuple[float, list[int]]:
    """Mean log-prob and tokens of the likeliest response per token, of those left in the end.

    Args:
        n_tokens: the longest response; a shorter one ends with the token `end`.
        checkpoints: after how many tokens half of the samples (rounded down) are given up.
        stream: the noise of the group, of which each sample's is forked; None: a new one.
    """
    root = model.cache.root(prompt, stream=stream)
    samples = [Sample(branch) for branch in root.fork(n)]
    root.prune()
    try:
        for length in range(1, n_tokens + 1):
            live = [sample for sample in samples if not sample.has_ended]
            if not live:
                break
            draw(model, live, end)
            if length in checkpoints:
                samples.sort(key=lambda sample: fmean(sample.logp), reverse=True)
                while len(samples) > (n + 1) // 2:
                    samples.pop().branch.prune()
                n = len(samples)
        best = max(samples, key=lambda sample: fmean(sample.logp))
        return fmean(best.logp), best.branch.tokens[len(prompt) :].tolist()
    finally:
        for sample in samples:
            sample.branch.prune()


def draw(model: TreeModel, live: Sequence[Sample], end: int | None) -> None:
    """A token for each sample. The first pass makes one row of logits and hands it to all."""
    branches = [sample.branch for sample in live]
    logits = model.forward(branches)
    positions = model.cache.positions(branches)
    drawn = sample_tokens(logits, model.cache.streams(branches), positions)
    model.cache.append(branches, drawn.ids)
    for sample, token, logp in zip(live, drawn.ids.tolist(), drawn.logp.tolist(), strict=True):
        sample.logp.append(logp)
        sample.has_ended = token == end


def tiny_model() -> Any:
    """Stands for `AutoModelForCausalLM.from_pretrained(...)`."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=VOCABULARY, **shape, **heads))


def main() -> list[float]:
    """The best of more and more samples; returns their mean log-probs."""
    torch.manual_seed(0)
    policy, found = tiny_model(), []
    model = TreeModel(policy, tree_cache_for(policy, n_pages=256, page_size=8))
    for n in (1, 8, 64):
        score, text = best_of_n(model, [5, 17, 3], n, 16, checkpoints=(4, 8), end=END)
        print(f"best of {n:2d}  log-prob per token {score:6.3f}  {text}")
        found.append(score)
    return found


if __name__ == "__main__":
    main()
