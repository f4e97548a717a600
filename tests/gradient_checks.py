"""Gradients of whole models: ours and PyTorch's, both against float64."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from check import assert_no_worse
from tiny_models import with_float64_norms
from torch import Tensor, nn

Tensors = Mapping[str, Tensor]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def moved(after: Tensors, before: Tensors) -> dict[str, Tensor]:
    return {name: after[name] - before[name] for name in after}


def exact(model: nn.Module) -> nn.Module:
    """A copy in float64 throughout."""
    return with_float64_norms(copy.deepcopy(model))


def assert_models_no_worse(
    ours: Tensors, ref: Tensors, truth: Tensors, *, slack: float = 2.0, floor: float = 1e-6
) -> None:
    """Every parameter's tensor, and all of them as one vector."""
    assert ours.keys() == ref.keys() == truth.keys()
    for name in truth:
        assert truth[name].abs().max() > 0, name
        assert_no_worse(name, ours[name], ref[name], truth[name], slack=slack, floor=floor)
    whole = [torch.cat([t[name].flatten() for name in truth]) for t in (ours, ref, truth)]
    assert_no_worse("all parameters", *whole, slack=slack, floor=floor)
