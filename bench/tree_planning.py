"""How much of a decoding step is planning: host time to append tokens, plan and commit.

Branches of one prompt grow by a token a step through TreeModel, without sampling, so the share is
that of the shortest step there is. The blocks that the PyTorch path makes of a plan count too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any
from unittest import mock

import numpy as np

from rollfuse.bench import measure, report
from rollfuse.kernels import tree_attention
from rollfuse.rollout.tree_cache import TreeCache
from rollfuse.rollout.tree_model import TreeModel, tree_cache_for

_PAGE = 16


@dataclass(slots=True)
class Watch:
    """Wall seconds inside what it watches. Calls inside one another would count twice."""

    seconds: float = 0.0

    def timing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


@contextmanager
def watching(watch: Watch) -> Iterator[None]:
    """Count what the cache and the PyTorch path do on the host; it does what it always does."""
    with (
        mock.patch.object(TreeCache, "append", watch.timing(TreeCache.append)),
        mock.patch.object(TreeCache, "plan", watch.timing(TreeCache.plan)),
        mock.patch.object(TreeCache, "commit", watch.timing(TreeCache.commit)),
        mock.patch.object(tree_attention, "_blocks_of", watch.timing(tree_attention._blocks_of)),
    ):
        yield


def planning_share(model: Any, branches: int, prompt: int, steps: int) -> dict[str, float]:
    """Seconds of a step and of its planning, means over `steps` decoding steps."""
    n_pages = -(-prompt // _PAGE) + branches * (-(-(steps + 2) // _PAGE) + 1)
    cache = tree_cache_for(model, n_pages=n_pages, page_size=_PAGE, canary=False)
    served = TreeModel(model, cache)
    vocabulary = model.config.vocab_size
    generator = np.random.default_rng(0)
    root = cache.root(generator.integers(0, vocabulary, prompt), stream=0)
    served.forward([root])
    texts = root.fork(branches)
    root.prune()

    def step() -> None:
        cache.append(texts, generator.integers(0, vocabulary, branches))
        # On a device the step ends when its logits are there.
        served.forward(texts)[0, 0].item()

    for _ in range(2):
        step()
    watch, start = Watch(), time.perf_counter()
    with watching(watch):
        for _ in range(steps):
            step()
    whole = time.perf_counter() - start
    return {
        "branches": branches,
        "steps": steps,
        "step_seconds": whole / steps,
        "planning_seconds": watch.seconds / steps,
        "share": watch.seconds / whole,
    }


def measure_shares(
    model: Any, branches: list[int], prompt: int, steps: int, repeats: int
) -> list[dict[str, Any]]:
    """The runs of every number of branches, interleaved, and the spread of their shares."""
    runs = [[planning_share(model, n, prompt, steps) for n in branches] for _ in range(repeats)]
    return [
        {
            "branches": n,
            "share": measure.spread([repeat[i]["share"] for repeat in runs]),
            "runs": [repeat[i] for repeat in runs],
        }
        for i, n in enumerate(branches)
    ]


def table(shares: list[dict[str, Any]]) -> str:
    """The shares as text."""
    lines = [("branches", "step ms", "planning ms", "share of the step, 20..80 %")]
    for found in shares:
        step, planning = (
            np.median([run[name] for run in found["runs"]]) * 1e3
            for name in ("step_seconds", "planning_seconds")
        )
        share = found["share"]
        spread = f"{share['median']:.2%}, {share['low']:.2%}..{share['high']:.2%}"
        lines.append((str(found["branches"]), f"{step:.2f}", f"{planning:.3f}", spread))
    return f"\nplanning\n{report.aligned(lines)}"
