"""Who generates in `bench tree engine`: ours, transformers two ways, and what TRL does.

All sample from the bare softmax, without an end token, so that every response is of full length.
Every call has a prompt of its own: nobody finds the last one's keys.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rollfuse.bench.choice import Unavailable
from rollfuse.bench.entrant import Entrant
from rollfuse.rollout.engine import Engine
from rollfuse.rollout.tree_cache import TreeCache

_NO_TOKEN = -1  # transformers' continuous batching takes this for "no end token"
_PAGE = 256  # tokens of a page there, its default


class Generated(NamedTuple):
    """What one call made."""

    prompt: list[int]
    responses: list[list[int]]
    kv_bytes: int  # that keys and values take at most


@dataclass(slots=True)
class Setting:
    """One model and one group."""

    model: Any
    prompt: int  # tokens
    n: int  # responses
    response: int  # tokens of each
    seed: int = 0
    copies: list[Any] = field(default_factory=list)  # of the model, for who changes it
    managers: list[Any] = field(default_factory=list)  # that run, to be stopped at the end

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


Steps = Mapping[str, Callable[[], Generated]]

NAMES = ("rollfuse", "transformers generate", "transformers continuous batching", "TRL generation")


def entrants(setting: Setting) -> list[Entrant]:
    """All of them; continuous batching must be stopped with `stop` afterwards."""
    makers = (engine_steps, generate_steps, continuous_steps, trl_steps)
    named = zip(NAMES, makers, strict=True)
    return [
        Entrant(name, partial(make, setting), ours=make is engine_steps) for name, make in named
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
        return transformers.GenerationConfig(**_plain_sampling(setting), **options)

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
    options = {**_plain_sampling(setting), **{name: getattr(args, name) for name in taken}}
    config = transformers.GenerationConfig(**options, disable_compile=True)
    accelerator = accelerate.Accelerator(cpu=on_cpu)

    def step() -> Generated:
        with unwrapped(setting.model, accelerator, generation_kwargs=options) as model:
            assert model is setting.model
            return _generate(setting, config)

    return {"model.generate": step}


def _plain_sampling(setting: Setting) -> dict[str, Any]:
    return {
        "do_sample": True,
        "max_new_tokens": setting.response,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "eos_token_id": None,
        "pad_token_id": 0,
    }


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


def continuous_steps(setting: Setting) -> Steps:
    """transformers' continuous batching: managers that run already; requests are timed to the end.

    A group is one request of n sequences, or n requests, of which all but the first can find the
    prompt's pages. The pool has the pages of n whole texts and one more each. They have a copy of
    the model: a manager may change how it attends.
    """
    transformers = importlib.import_module("transformers")
    classes = importlib.import_module("transformers.generation.configuration_utils")
    n, length = setting.n, setting.prompt + setting.response
    model = copy.deepcopy(setting.model)
    setting.copies.append(model)
    pool = {"num_blocks": n * (-(-length // _PAGE) + 1), "seed": 0}
    steps: dict[str, Callable[[], Generated]] = {}
    for name, prompts, sequences in (("one request", 1, n), ("a request a sequence", n, 1)):
        options = {**_plain_sampling(setting), "eos_token_id": _NO_TOKEN}
        config = transformers.GenerationConfig(**options, num_return_sequences=sequences)
        batching = classes.ContinuousBatchingConfig(**pool)
        start = partial(_started, setting, model, config, batching)
        steps[name] = _Requests(setting, start, prompts)
    return steps


class _Requests:
    """Sends requests to a manager, which the first call starts and a warm-up follows."""

    def __init__(self, setting: Setting, start: Callable[[], Any], n_requests: int) -> None:
        self._setting, self._start, self._n_requests = setting, start, n_requests
        self._manager: Any = None

    def __call__(self) -> Generated:
        if self._manager is None:
            self._manager = self._start()
        setting, manager = self._setting, self._manager
        prompt = setting.next_prompt()
        manager.add_requests([prompt] * self._n_requests, max_new_tokens=setting.response)
        responses: list[list[int]] = []
        while len(responses) < setting.n:
            result = manager.get_result(timeout=1)
            if result is None:
                if not manager.is_running():
                    raise RuntimeError("the generation thread has ended")
            elif result.error is not None:
                raise RuntimeError(str(result.error))
            elif result.is_finished():
                responses.append(list(result.generated_tokens))
        return Generated(prompt, responses, int(manager.batch_processor.cache.cache_tensor.nbytes))


def _started(setting: Setting, model: Any, generation: Any, batching: Any) -> Any:
    manager = model.init_continuous_batching(
        generation_config=generation, continuous_batching_config=batching
    )
    manager.warmup()
    manager.start()
    setting.managers.append(manager)
    return manager


def stop(setting: Setting) -> None:
    """End the managers' threads."""
    for manager in setting.managers:
        manager.stop(block=True)
        manager.destroy()
    setting.managers.clear()


@dataclass(slots=True)
class Passes:
    """Forward passes and the tokens that went through them."""

    passes: int = 0
    pushed: int = 0


@contextmanager
def counting(*models: Any) -> Iterator[Passes]:
    """Count what goes through the models' embeddings inside."""
    found = Passes()

    def count(module: Any, arguments: tuple[Any, ...]) -> None:
        found.passes += 1
        found.pushed += arguments[0].numel()

    embeddings = [model.get_input_embeddings() for model in models]
    hooks = [embedding.register_forward_pre_hook(count) for embedding in embeddings]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
