"""What `rollfuse info` says: the backend and why, versions, abilities, what is missing."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

from rollfuse.kernels.dispatch import backend, this_machine

# extra -> the packages it brings
_EXTRAS = {
    "grpo": ("transformers", "safetensors", "math-verify", "rich", "tensorboard"),
    "bench": ("matplotlib", "pytest-benchmark"),
    "rivals": ("trl", "liger-kernel", "cut-cross-entropy"),
    "examples": ("transformers", "trl", "lightning"),
    "dev": (
        "pytest", "hypothesis", "mypy", "ruff", "build", "setuptools", "packaging", "kernels",
        "peft",
    ),
}  # fmt: skip


def info() -> dict[str, Any]:
    """Everything a bug report needs, as JSON-able values. Looks at devices, allocates nothing."""
    versions = {name: version(name) for names in _EXTRAS.values() for name in names}
    missing = {
        extra: [name for name in names if versions[name] is None]
        for extra, names in _EXTRAS.items()
    }
    return {
        "backend": {"name": backend.name, "reason": backend.reason},
        "versions": {
            "rollfuse": version("rollfuse"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "rocm": torch.version.hip,
            "triton": version("triton"),
            "numpy": version("numpy"),
            **versions,
        },
        "machine": {
            "system": f"{platform.system()} {platform.release()}",
            "processor": _processor(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "devices": _devices(),
        },
        "abilities": _abilities(),
        "missing": {extra: names for extra, names in missing.items() if names},
    }


def as_text(found: dict[str, Any]) -> str:
    """`info()` for a reader."""
    lines = [f"backend    {found['backend']['name']}: {found['backend']['reason']}"]
    machine = found["machine"]
    lines.append(
        f"machine    {machine['system']}, {machine['processor']}, {machine['cpu_capability']}, "
        f"{machine['threads']} threads"
    )
    for device in machine["devices"]:
        lines.append(f"device     {device['name']}, {device['arch']}, {device['memory_gib']} GiB")
    lines += [f"ability    {name}: {can}" for name, can in found["abilities"].items()]
    known = (f"{name} {number}" for name, number in found["versions"].items() if number)
    lines.append("versions   " + ", ".join(known))
    for extra, names in found["missing"].items():
        lines.append(f"missing    {', '.join(names)}: pip install rollfuse[{extra}]")
    return "\n".join(lines)


def version(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _abilities() -> dict[str, str]:
    has_triton = this_machine().has_triton
    on_device = backend.name in ("cuda", "rocm")
    kernels = {"cuda": "on the device", "rocm": "on the device", "interpret": "interpreted"}
    training = [name for name in _EXTRAS["grpo"] if version(name) is None]
    return {
        "Triton kernels": kernels.get(backend.name, f"not used ({backend.reason})"),
        "Triton interpreter": "yes" if has_triton else "no, needs triton",
        "ahead-of-time compilation": "yes" if has_triton else "no, needs triton",
        "bfloat16 on the device": str(torch.cuda.is_bf16_supported()) if on_device else "no device",
        "training (rollfuse grpo)": "yes" if not training else f"no, needs {', '.join(training)}",
    }


def _devices() -> list[dict[str, Any]]:
    found = []
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        arch = getattr(device, "gcnArchName", None) or f"sm_{device.major}{device.minor}"
        gib = round(device.total_memory / 2**30, 1)
        found.append({"name": device.name, "arch": arch, "memory_gib": gib})
    return found


def _processor() -> str:
    """The processor's name; the standard library knows it on few systems."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0].partition(":")[2].strip() if names else platform.machine()
