"""A group that is generated: its sizes, what comes of it, what is counted, and the floor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from rollfuse.bench.apart import Apart, Elsewhere


@dataclass(slots=True)
class Passes:
    """Forward passes and the tokens that went through them."""

    passes: int = 0
    pushed: int = 0

    def clear(self) -> None:
        self.passes = self.pushed = 0


class Generated(NamedTuple):
    """What one call made."""

    prompt: list[int]
    responses: list[list[int]]
    kv_bytes: int  # that keys and values take at most
    counted: Passes | None = None  # by who made them in another process


@dataclass(slots=True)
class Setting:
    """One model and one group."""

    recipe: Callable[[], Any]  # makes the model, or its equal in another process
    prompt: int  # tokens
    n: int  # responses
    response: int  # tokens of each
    seed: int = 0
    apart: list[Apart] = field(default_factory=list)  # processes, to be ended by `stop`
    model: Any = None

    def __post_init__(self) -> None:
        if self.model is None:
            self.model = self.recipe()

    @property
    def token_bytes(self) -> int:
        """Of a token's keys and values in all layers."""
        config = self.model.config
        size = config.num_key_value_heads * config.head_dim * self.model.dtype.itemsize
        return 2 * int(config.num_hidden_layers) * int(size)

    def next_prompt(self) -> list[int]:
        """Another one each time, made of the next seed."""
        self.seed += 1
        generator = torch.Generator().manual_seed(self.seed)
        vocabulary = self.model.config.vocab_size
        return torch.randint(vocabulary, (self.prompt,), generator=generator).tolist()

    def stop(self) -> None:
        """End the processes that were started."""
        for apart in self.apart:
            apart.close()
        self.apart.clear()


Steps = Mapping[str, Callable[[], Generated | Elsewhere]]


FLOOR = "floor (the model alone)"


def plain_sampling(setting: Setting) -> dict[str, Any]:
    """Options of transformers' GenerationConfig: the bare softmax, and no end token."""
    return {
        "do_sample": True,
        "max_new_tokens": setting.response,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "eos_token_id": None,
        "pad_token_id": 0,
    }


def floor_step(setting: Setting) -> Callable[[], None]:
    """The model's forward over as many tokens as a group needs, without any context.

    One pass over the prompt, which attends to itself as in training, up to its last row's logits.
    Then `response - 1` passes over n rows of one token, up to their logits, each of which attends
    to itself alone. No keys or values are kept or read and nothing is sampled. What makes one
    token a text a pass with this model's forward does all of this and more, so the best of caches
    cannot be faster, but where texts still agree and it pushes their rows once.
    """
    prompt = torch.tensor([setting.next_prompt()], device=setting.model.device)
    rows = prompt[0, torch.arange(setting.n) % setting.prompt, None]  # (n, 1)

    @torch.no_grad()
    def step() -> None:
        setting.model(prompt, use_cache=False, logits_to_keep=1)
        for _ in range(setting.response - 1):
            setting.model(rows, use_cache=False)

    return step


@contextmanager
def counting(model: Any) -> Iterator[Passes]:
    """Count what goes through the model's embedding inside."""
    found = Passes()

    def count(module: Any, arguments: tuple[Any, ...]) -> None:
        found.passes += 1
        found.pushed += arguments[0].numel()

    hook = model.get_input_embeddings().register_forward_pre_hook(count)
    try:
        yield found
    finally:
        hook.remove()
