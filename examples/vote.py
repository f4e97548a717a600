"""Self-consistency: sample responses to one prompt, extract their answers, go with the majority.

The samples share the prompt's keys and values, and the prompt is computed once. A sample that has
ended is pruned, and when the samples that are still running can no longer change the outcome, they
are pruned as well.

Source: Wang et al., "Self-consistency improves chain of thought reasoning", arXiv 2203.11171.

    python examples/vote.py
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from rollfuse import TreeModel, sample_tokens, tree_cache_for

VOCABULARY, END = 64, 0
Votes = Counter[Hashable]


def vote(
    model: TreeModel,
    prompt: Sequence[int],
    n: int,
    n_tokens: int,
    extract: Callable[[list[int]], Hashable],
    end: int | None = None,
    stream: int | None = None,
) -> tuple[Hashable, Votes]:
    """The answer of most of the responses (None without any), and the votes that were counted.

    Args:
        n_tokens: the longest response; a shorter one ends with the token `end`.
        extract: the answer in a response's tokens; None: there is none, and the sample no vote.
        stream: the noise of the group, of which each sample's is forked; None: a new one.
    """
    root = model.cache.root(prompt, stream=stream)
    live, votes = root.fork(n), Votes()
    root.prune()
    try:
        while live and not is_decided(votes, len(live)):
            # The first pass makes one row of logits and hands it to all branches.
            logits = model.forward(live)
            positions = model.cache.positions(live)
            ids = sample_tokens(logits, model.cache.streams(live), positions).ids
            model.cache.append(live, ids)
            is_last = len(live[0]) == len(prompt) + n_tokens
            ended = [b for b, i in zip(live, ids.tolist(), strict=True) if is_last or i == end]
            answers = [extract(branch.tokens[len(prompt) :].tolist()) for branch in ended]
            votes.update(answer for answer in answers if answer is not None)
            for branch in ended:
                live.remove(branch)
                branch.prune()
        # Of equal answers the one that was given first.
        return (votes.most_common(1)[0][0] if votes else None), votes
    finally:
        for branch in live:
            branch.prune()


def is_decided(votes: Votes, n_live: int) -> bool:
    """Whether even all of the samples still running could not bring the second one level."""
    counts = [count for _, count in votes.most_common(2)] + [0, 0]
    return counts[0] > counts[1] + n_live


def tiny_model() -> Any:
    """Stands for `AutoModelForCausalLM.from_pretrained(...)`."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=VOCABULARY, **shape, **heads))


def main() -> Votes:
    """Vote on what a response's last token is, modulo 4; returns the votes."""
    torch.manual_seed(0)
    policy = tiny_model()
    model = TreeModel(policy, tree_cache_for(policy, n_pages=256, page_size=8))
    answer, votes = vote(model, [5, 17, 3], 64, 16, lambda response: response[-1] % 4)
    print(f"answer {answer}  votes {dict(votes)}")
    return votes


if __name__ == "__main__":
    main()
