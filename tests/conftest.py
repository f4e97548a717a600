"""For every test: fixed seeds, and memory nobody has written yet holds NaN."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import wraps

import numpy as np
import pytest
import torch
from quick_interpreter import quicken
from torch import Tensor

quicken()


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry that a kernel or an `out=` never stored must not pass by what lay there before."""
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(Tensor, name, _poisoned(getattr(Tensor, name)))


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(allocate)
    def allocate_poisoned(*args: object, **kwargs: object) -> Tensor:
        tensor = allocate(*args, **kwargs)
        # A compiler traces the plain call; a fill on the meta device would be lost anyway.
        if tensor.is_floating_point() and not torch.compiler.is_compiling():
            tensor.detach().fill_(math.nan)
        return tensor

    return allocate_poisoned
