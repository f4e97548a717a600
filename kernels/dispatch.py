"""Which implementation runs: decided once, at import, from the torch build and one variable.

`cuda` and `rocm` send device tensors to the Triton kernels and CPU tensors to the PyTorch path,
`cpu` sends everything to the PyTorch path, `interpret` sends CPU tensors to the Triton kernels
through Triton's interpreter. Importing this module initialises no device.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor

BackendName = Literal["cuda", "rocm", "cpu", "interpret"]


@dataclass(frozen=True, slots=True)
class Backend:
    """The chosen implementation and the reason for the choice."""

    name: BackendName
    reason: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Machine:
    """The facts the choice depends on, so that the choice can be tested without the hardware."""

    torch_cuda: str | None
    torch_hip: str | None
    n_devices: int
    has_triton: bool


def this_machine() -> Machine:
    """Read the facts without creating a device context: a forked data loader stays usable."""
    built_for_gpu = torch.version.cuda is not None or torch.version.hip is not None
    return Machine(
        torch_cuda=torch.version.cuda,
        torch_hip=torch.version.hip,
        # device_count asks the driver's management library, not the runtime.
        n_devices=torch.cuda.device_count() if built_for_gpu else 0,
        has_triton=importlib.util.find_spec("triton") is not None,
    )


def choose(requested: str | None, machine: Machine) -> Backend:
    """Pick the backend, or raise RuntimeError with the reason why `requested` cannot be had."""
    gpu: BackendName = "rocm" if machine.torch_hip is not None else "cuda"
    why_no_gpu = _why_no_gpu(machine)
    if requested is None:
        if why_no_gpu is None:
            build = machine.torch_hip if gpu == "rocm" else machine.torch_cuda
            return Backend(gpu, f"torch is built for {gpu} {build} and sees a device")
        return Backend("cpu", why_no_gpu)
    if requested not in get_args(BackendName):
        raise RuntimeError(
            f"ROLLFUSE_BACKEND needs one of {', '.join(get_args(BackendName))}; got {requested!r}"
        )
    name = cast(BackendName, requested)
    if name in ("cuda", "rocm"):
        if why_no_gpu is not None:
            raise RuntimeError(f"ROLLFUSE_BACKEND={name} is not available: {why_no_gpu}")
        if name != gpu:
            raise RuntimeError(
                f"ROLLFUSE_BACKEND={name} is not available: torch is built for {gpu}"
            )
    if name == "interpret" and not machine.has_triton:
        raise RuntimeError("ROLLFUSE_BACKEND=interpret needs triton; it is not installed")
    return Backend(name, f"ROLLFUSE_BACKEND={name}")


def _why_no_gpu(machine: Machine) -> str | None:
    if machine.torch_cuda is None and machine.torch_hip is None:
        return "torch is built without CUDA or ROCm"
    if machine.n_devices == 0:
        return "torch is built for a GPU but sees no device"
    if not machine.has_triton:
        return "torch sees a GPU but triton is not installed"
    return None


backend = choose(os.environ.get("ROLLFUSE_BACKEND"), this_machine())
if backend.name == "interpret":
    # Triton reads this when a kernel is decorated, so it must stand before the first jit module.
    os.environ["TRITON_INTERPRET"] = "1"


def triton_serves(device: torch.device) -> bool:
    """Whether tensors on `device` are served by the Triton kernels under the chosen backend."""
    if backend.name == "interpret":
        return device.type == "cpu"
    return backend.name in ("cuda", "rocm") and device.type == "cuda"


def use_triton(tensor: Tensor) -> bool:
    """Whether the Triton kernels serve `tensor`."""
    return triton_serves(tensor.device)
