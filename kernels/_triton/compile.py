"""Ahead-of-time compilation: what a kernel costs on a GPU that this machine does not have.

Each kernels/_triton/<op>.py lists its launch configurations in `compile_cases()`. This module turns
one of them into machine code for one target and reads registers, spills and shared memory from the
assembler's own report. It needs a process in which Triton's interpreter is off.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


class CompileCase(NamedTuple):
    """One launch configuration of one kernel.

    `signature` types the run-time arguments in Triton's notation ("*fp32", "i32"); every other
    parameter of the kernel stands in `constexprs`. `covering` puts the case into the default check.
    `backend` names the only one that launches it so, if there is one.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, object]
    num_warps: int
    num_stages: int
    covering: bool = True
    backend: Literal["cuda", "hip"] | None = None


class Target(NamedTuple):
    """A GPU architecture and the most shared memory (bytes) one program may use on it."""

    name: str
    backend: Literal["cuda", "hip"]
    arch: int | str
    warp_size: int
    shared_limit: int


# Source: CUDA C++ Programming Guide, table of technical specifications per compute capability;
# AMD CDNA 2, 3 and 4 instruction set architecture guides, local data share.
TARGETS = (
    Target("sm_80", "cuda", 80, 32, 163 * 1024),
    Target("sm_90", "cuda", 90, 32, 227 * 1024),
    Target("sm_100", "cuda", 100, 32, 227 * 1024),
    Target("gfx90a", "hip", "gfx90a", 64, 64 * 1024),
    Target("gfx942", "hip", "gfx942", 64, 64 * 1024),
    Target("gfx950", "hip", "gfx950", 64, 160 * 1024),
)

# What Triton knows of the pointers at launch. "small" tensors lie under 2 GiB, which lets AMD
# targets use buffer instructions; NVIDIA targets do not tell them from "aligned" ones.
Pointers = Literal["small", "aligned", "unaligned"]


class Resources(NamedTuple):
    """What one program of a compiled kernel takes."""

    registers: int  # vector registers per lane; on AMD those of both files
    scalar_registers: int  # AMD only
    spills: int  # vector registers spilled to memory: bytes on NVIDIA, registers on AMD
    local_bytes: int  # local (private) memory per lane
    scalar_spills: int  # AMD only; these go to lanes of vector registers
    shared_bytes: int
    tf32_dots: int  # matrix instructions that round float32 operands


def kernel_modules() -> list[str]:
    """The modules of this folder that hold kernels, by full name."""
    stems = sorted(path.stem for path in Path(__file__).parent.glob("*.py"))
    names = [f"rollfuse.kernels._triton.{stem}" for stem in stems]
    return [name for name in names if hasattr(importlib.import_module(name), "compile_cases")]


def compile_case(case: CompileCase, target: Target, pointers: Pointers = "aligned") -> Resources:
    """Compile `case` for `target` and read what it takes; raises whatever the compiler raises."""
    names = case.kernel.arg_names
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    attributes = {
        (i,): _pointer_attributes(target, pointers)
        for i, name in enumerate(names)
        if signature[name].startswith("*")
    }
    source = ASTSource(case.kernel, signature, case.constexprs, attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    gpu = GPUTarget(target.backend, target.arch, target.warp_size)
    log = io.StringIO()
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True
        compiled = triton.compile(source, target=gpu, options=options)
    if target.backend == "cuda":
        return _nvidia_resources(log.getvalue(), compiled.asm["ptx"], compiled.metadata.shared)
    return _amd_resources(compiled.asm["amdgcn"], compiled.metadata.shared)


def _pointer_attributes(target: Target, pointers: Pointers) -> list[list[str | int]]:
    attributes: list[list[str | int]] = []
    if pointers != "unaligned":
        attributes.append(["tt.divisibility", 16])
    if pointers == "small" and target.backend == "hip":
        attributes.append(["tt.pointer_range", 32])
    return attributes


def _nvidia_resources(ptxas_log: str, ptx: str, shared: int) -> Resources:
    stack, stores, loads = _numbers(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", ptxas_log
    )
    (registers,) = _numbers(r"Used (\d+) registers", ptxas_log)
    return Resources(
        registers=registers,
        scalar_registers=0,
        spills=max(stores, loads),
        local_bytes=stack,
        scalar_spills=0,
        shared_bytes=shared,
        tf32_dots=len(re.findall(r"mma\S*tf32", ptx)),
    )


def _amd_resources(assembly: str, shared: int) -> Resources:
    def of_kernel(field: str) -> int:
        return _numbers(rf"^\s*\.{field}:\s*(\d+)", assembly)[0]

    return Resources(
        registers=of_kernel("vgpr_count"),
        scalar_registers=of_kernel("sgpr_count"),
        spills=of_kernel("vgpr_spill_count"),
        local_bytes=of_kernel("private_segment_fixed_size"),
        scalar_spills=of_kernel("sgpr_spill_count"),
        shared_bytes=max(shared, of_kernel("group_segment_fixed_size")),
        tf32_dots=len(re.findall(r"v_mfma\S*xf32", assembly)),
    )


def _numbers(pattern: str, text: str) -> list[int]:
    found = re.search(pattern, text, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"the assembler's report has nothing like {pattern!r}:\n{text[-2000:]}")
    return [int(number) for number in found.groups()]
