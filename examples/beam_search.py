"""Beam search on a tree of texts: the likeliest responses, found by going on with the best few.

A beam is a branch. Where it goes on in several ways it is forked, which copies nothing; where it
goes on in none it is pruned, and its pages are free at once. Texts that have ended wait aside and
take no place from those that go on; a beam that can no longer get ahead of them is given up, as no
text gets likelier with another token. Tokens branch off one by one here: small pages waste least.

    python examples/beam_search.py
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from rollfuse import TreeModel, tree_cache_for

VOCABULARY = 64
Scored = tuple[float, list[int]]  # log-prob of a response in nats, its tokens


def beam_search(
    model: TreeModel, prompt: Sequence[int], n_beams: int, n_tokens: int, end: int | None = None
) -> list[Scored]:
    """The `n_beams` best responses found, best first, of `n_tokens` tokens or up to `end`."""
    cache = model.cache
    ended: list[Scored] = []
    beams, scores = [cache.root(prompt)], [0.0]
    try:
        for _ in range(n_tokens):
            if not beams:
                break
            total = model.forward(beams).cpu().double().log_softmax(-1)  # (beams, V)
            total += torch.tensor(scores, dtype=torch.float64).unsqueeze(1)
            if end is not None:
                texts = [[*beam.tokens[len(prompt) :].tolist(), end] for beam in beams]
                found = zip(total[:, end].tolist(), texts, strict=True)
                ended = heapq.nlargest(n_beams, [*ended, *found])
                total[:, end] = -torch.inf
            best = total.flatten().topk(min(n_beams, total.numel()))
            floor = ended[-1][0] if len(ended) == n_beams else -torch.inf
            chosen = best.indices[best.values > floor]
            scores = best.values[: len(chosen)].tolist()
            children = [beams[i].fork()[0] for i in (chosen // total.shape[1]).tolist()]
            # Before their children grow: an only child then goes on in its parent's page.
            for beam in beams:
                beam.prune()
            beams = children
            cache.append(beams, chosen % total.shape[1])
        texts = [beam.tokens[len(prompt) :].tolist() for beam in beams]
        return heapq.nlargest(n_beams, [*ended, *zip(scores, texts, strict=True)])
    finally:
        for beam in beams:
            beam.prune()


def tiny_model() -> Any:
    """Stands for `AutoModelForCausalLM.from_pretrained(...)`."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=VOCABULARY, **shape, **heads))


def main() -> list[float]:
    """Search with more and more beams; returns the best log-prob of each number."""
    torch.manual_seed(0)
    policy, found = tiny_model(), []
    model = TreeModel(policy, tree_cache_for(policy, n_pages=1024, page_size=4))
    for n_beams in (1, 4, 16, 64):
        score, text = beam_search(model, [5, 17, 3], n_beams, 12)[0]
        print(f"{n_beams:2d} beams  log-prob {score:7.3f}  {text}")
        found.append(score)
    return found


if __name__ == "__main__":
    main()
