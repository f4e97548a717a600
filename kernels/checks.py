"""Argument checks shared by the ops: each error says what was needed and what came."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def need(condition: bool, name: str, needed: str, got: object) -> None:
    """Raise ValueError naming the argument, what was needed and what came."""
    if not condition:
        raise ValueError(f"{name}: need {needed}, got {got}")


def need_tensor(value: object, name: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: need a torch.Tensor, got {type(value).__name__}")
    if hasattr(value, "full_tensor"):
        raise TypeError(
            f"{name}: need a plain tensor, got a DTensor; pass its to_local() where that holds "
            "this rank's batch, or its full_tensor() where rows or columns of it are split"
        )


def need_float(tensor: Tensor, name: str) -> None:
    need_tensor(tensor, name)
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name}: need float32, bfloat16, float16 or float64, got {tensor.dtype}")


def need_int(tensor: Tensor, name: str) -> None:
    need_tensor(tensor, name)
    if tensor.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: need int64 or int32, got {tensor.dtype}")


def need_bool(tensor: Tensor, name: str) -> None:
    need_tensor(tensor, name)
    if tensor.dtype != torch.bool:
        raise TypeError(f"{name}: need bool, got {tensor.dtype}")


def need_marks(tensor: Tensor, name: str) -> None:
    """A mask as it comes from outside: tokenizers and trainers write 0 and 1."""
    need_tensor(tensor, name)
    if tensor.is_floating_point() or tensor.is_complex():
        raise TypeError(f"{name}: need bool or integers, got {tensor.dtype}")


def need_shape(tensor: Tensor, shape: tuple[int, ...], name: str, meaning: str) -> None:
    need(tuple(tensor.shape) == shape, name, f"shape {shape} ({meaning})", tuple(tensor.shape))


def may_read(tensor: Tensor) -> bool:
    """Whether its values can be checked at once, without a wait or a break in a graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def refuse_capture(device: torch.device, what: str) -> None:
    """Raise while a CUDA graph is captured that would keep what is worked out on the host."""
    if device.type != "cpu" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"CUDA graph capture: need ops that leave the host out, got {what} of rollfuse, which "
            "works out its rows there; leave it out of the captured region"
        )


def refuse_second_derivative() -> None:
    """Raise in a backward that is asked to be differentiable itself."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "backward: need create_graph=False (these ops have no second derivative), got True"
        )


def need_same_device(tensor: Tensor, other: Tensor, name: str, other_name: str) -> None:
    need(
        tensor.device == other.device,
        name,
        f"the device of {other_name} ({other.device})",
        tensor.device,
    )
