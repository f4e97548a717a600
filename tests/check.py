"""Numeric checks: our error against float64 truth beside PyTorch's own error in the same dtype.

And that a device is not waited for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

needs_device = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs an NVIDIA or AMD device"
)


@contextmanager
def no_wait() -> Iterator[None]:
    """Waiting for the device raises RuntimeError inside."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def relative_error(out: Tensor, truth: Tensor) -> float:
    """Frobenius norm of the error over that of the truth."""
    scale = truth.double().norm().item()
    error = (out.double() - truth.double()).norm().item()
    return error / scale if scale else error


def assert_no_worse(
    name: str, out: Tensor, ref: Tensor, truth: Tensor, *, slack: float = 1.5, floor: float = 2e-7
) -> None:
    """`out` is at most `slack` times as far from `truth` as `ref`, PyTorch in the same dtype.

    `floor` is a relative error that is always allowed: the rounding of the result itself.
    """
    ours, theirs = relative_error(out, truth), relative_error(ref, truth)
    allowed = slack * theirs + floor
    assert ours <= allowed, f"{name}: relative error {ours:.3e}, allowed {allowed:.3e}"


def assert_rows_no_worse(
    name: str, out: Tensor, ref: Tensor, truth: Tensor, *, slack: float = 1.5, floor: float = 2e-7
) -> None:
    """The same for the worst row."""

    def worst(x: Tensor) -> float:
        norms = truth.double().norm(dim=-1)
        return ((x.double() - truth.double()).norm(dim=-1) / norms.clamp_min(1e-30)).max().item()

    ours, theirs = worst(out), worst(ref)
    allowed = slack * theirs + floor
    assert ours <= allowed, f"{name}: worst row {ours:.3e}, allowed {allowed:.3e}"


def assert_close(name: str, out: Tensor, truth: Tensor, *, atol: float) -> None:
    """Largest absolute error; equal infinities are equal."""
    same = (out == truth) | (out.isnan() & truth.isnan())
    error = torch.where(same, 0.0, (out.double() - truth.double()).abs()).max().item()
    assert error <= atol, f"{name}: error {error:.3e}, allowed {atol:.3e}"
