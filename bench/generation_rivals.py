"""Who generates in `bench tree engine`: ours, transformers two ways, and what TRL does.

All sample from the bare softmax, without an end token, so that every response is of full length.
Every call has a prompt of its own: nobody finds the last one's keys.
"""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rollfuse.bench.choice import Unavailable
from rollfuse.bench.continuous_batching import continuous_steps
from rollfuse.bench.entrant import Entrant
from rollfuse.bench.generation import Generated, Setting, Steps, plain_sampling
from rollfuse.rollout.engine import Engine
from rollfuse.rollout.tree_cache import TreeCache

NAMES = ("rollfuse", "transformers generate", "transformers continuous batching", "TRL generation")

_TIMED = (
    "timed: prompt once, decoding, sampling, every token's logp and entropy",
    "timed: prompt n times, decoding, sampling",
    "timed: first request to last result, in a process of its own; not its manager's start and end",
    "timed: as transformers generate, and unwrapping the model",
)


def entrants(setting: Setting) -> list[Entrant]:
    """All of them; `setting.stop` must be called afterwards."""
    makers = (engine_steps, generate_steps, continuous_steps, trl_steps)
    named = zip(NAMES, makers, _TIMED, strict=True)
    return [
        Entrant(name, partial(make, setting), make is engine_steps, about)
        for name, make, about in named
    ]


class _Engine(Engine):
    """Tells how large its pool was, and is otherwise what it is."""

    pool_bytes = 0

    def _cache(self, texts: list[Tensor], n: int) -> TreeCache:
        cache = super()._cache(texts, n)
        self.pool_bytes = sum(slab.nbytes for layer in cache.layers for slab in layer)
        return cache


def engine_steps(setting: Setting) -> Steps:
    engine = _Engine(setting.model, max_new_tokens=setting.response, stop_tokens=[])

    def step() -> Generated:
        prompt = setting.next_prompt()
        made = engine.generate([prompt], setting.n, seed=setting.seed)
        responses = [made.response(b).tolist() for b in range(len(made))]
        return Generated(prompt, responses, engine.pool_bytes)

    return {"": step}


def generate_steps(setting: Setting) -> Steps:
    """`generate`, with the cache that grows and with the one of fixed size."""
    transformers = importlib.import_module("transformers")

    def config(**options: Any) -> Any:
        return transformers.GenerationConfig(**plain_sampling(setting), **options)

    return {
        "dynamic cache": partial(_generate, setting, config()),
        "static cache": partial(_generate, setting, config(cache_implementation="static")),
    }


def trl_steps(setting: Setting) -> Steps:
    """TRL's GRPOTrainer without vLLM: `generate` with its configuration, gradients off."""
    for name in ("trl", "accelerate"):
        if importlib.util.find_spec(name) is None:
            raise Unavailable(f"{name} is not installed")
    trl, accelerate = (importlib.import_module(name) for name in ("trl", "accelerate"))
    unwrapped = importlib.import_module("trl.models.utils").unwrap_model_for_generation
    transformers = importlib.import_module("transformers")
    on_cpu = setting.model.device.type == "cpu"
    with tempfile.TemporaryDirectory() as folder:
        args = trl.GRPOConfig(output_dir=folder, use_cpu=on_cpu, bf16=False, report_to="none")
    taken = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "cache_implementation")
    options = {**plain_sampling(setting), **{name: getattr(args, name) for name in taken}}
    config = transformers.GenerationConfig(**options, disable_compile=True)
    accelerator = accelerate.Accelerator(cpu=on_cpu)

    def step() -> Generated:
        with unwrapped(setting.model, accelerator, generation_kwargs=options) as model:
            assert model is setting.model
            return _generate(setting, config)

    return {"model.generate": step}


@torch.no_grad()
def _generate(setting: Setting, config: Any) -> Generated:
    prompt = setting.next_prompt()
    torch.manual_seed(setting.seed)
    ids = torch.tensor([prompt] * setting.n, device=setting.model.device)
    mask = torch.ones_like(ids)
    made = setting.model.generate(ids, attention_mask=mask, generation_config=config)
    responses = made[:, setting.prompt :].tolist()
    # The last token's keys and values are never made, but a cache of fixed size has room for them.
    is_static = config.cache_implementation == "static"
    length = setting.prompt + setting.response - (0 if is_static else 1)
    return Generated(prompt, responses, setting.n * length * setting.token_bytes)
