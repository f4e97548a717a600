"""transformers' continuous batching in `bench tree engine`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from rollfuse.bench import measure
from rollfuse.bench.apart import Apart, Elsewhere
from rollfuse.bench.generation import Generated, Setting, Steps, counting, plain_sampling

_NO_TOKEN = -1  # what it takes for "no end token"
_PAGE = 256  # tokens of a page there, its default


def continuous_steps(setting: Setting) -> Steps:
    """transformers' continuous batching: requests to a manager that runs already, to their end.

    A group is one request of n sequences, or n requests, of which all but the first can find the
    prompt's pages. A manager's thread never sleeps for long, so it has a process of its own and
    runs there only while it is timed. Who starts it, stops it and talks to that process waits off
    the clock.
    """
    apart = Apart(partial(_managers, setting.recipe, setting.n, setting.prompt, setting.response))
    setting.apart.append(apart)

    def step(name: str) -> Elsewhere:
        answer: Elsewhere = apart(name, setting.next_prompt())
        return answer

    return {name: partial(step, name) for name in ("one request", "a request a sequence")}


def _managers(
    make_model: Callable[[], Any], n: int, prompt: int, response: int
) -> Mapping[str, Any]:
    """The steps of that process; each has a model of its own, which keeps its manager."""
    importlib.import_module("transformers.utils.logging").set_verbosity_error()
    sizes = {"one request": (1, n), "a request a sequence": (n, 1)}
    return {
        name: _Requests(Setting(make_model, prompt, n, response), requests, sequences)
        for name, (requests, sequences) in sizes.items()
    }


class _Requests:
    """Starts a manager, sends requests of so many sequences each, and stops it again.

    The first call makes it and warms it up. Its pool has the pages of n whole texts and one more
    each.
    """

    def __init__(self, setting: Setting, n_requests: int, sequences: int) -> None:
        transformers = importlib.import_module("transformers")
        classes = importlib.import_module("transformers.generation.configuration_utils")
        self._setting, self._n_requests = setting, n_requests
        pages = -(-(setting.prompt + setting.response) // _PAGE) + 1
        options = {**plain_sampling(setting), "eos_token_id": _NO_TOKEN}
        self._options = {
            "generation_config": transformers.GenerationConfig(
                **options, num_return_sequences=sequences
            ),
            "continuous_batching_config": classes.ContinuousBatchingConfig(
                num_blocks=setting.n * pages, seed=0
            ),
            "persistent_manager": True,
        }

    def __call__(self, prompt: list[int]) -> Elsewhere:
        model = self._setting.model
        # A hook costs microseconds a pass.
        with (
            counting(model) as counted,
            model.continuous_batching_context_manager(**self._options) as manager,
        ):
            with manager.pause():  # its loop has begun
                counted.clear()
            made, seconds = measure.timed(partial(self._send, manager, prompt), model.device)
            kv_bytes = int(manager.batch_processor.cache.cache_tensor.nbytes)
        return Elsewhere(Generated(prompt, made, kv_bytes, counted), seconds)

    def _send(self, manager: Any, prompt: list[int]) -> list[list[int]]:
        n, length = self._setting.n, self._setting.response
        manager.add_requests([prompt] * self._n_requests, max_new_tokens=length)
        responses: list[list[int]] = []
        while len(responses) < n:
            result = manager.get_result(timeout=1)
            if result is None:
                if not manager.is_running():
                    raise RuntimeError("the generation thread has ended")
            elif result.error is not None:
                raise RuntimeError(str(result.error))
            elif result.is_finished():
                responses.append(list(result.generated_tokens))
        return responses
