"""The backend is chosen once, from facts alone, and choosing it touches no device."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rollfuse.kernels.dispatch import Backend, Machine, backend, choose, use_triton

ROOT = Path(__file__).resolve().parent.parent
CPU = Machine(torch_cuda=None, torch_hip=None, n_devices=0, has_triton=False)
NVIDIA = Machine(torch_cuda="13.0", torch_hip=None, n_devices=2, has_triton=True)
AMD = Machine(torch_cuda=None, torch_hip="7.1", n_devices=1, has_triton=True)


@pytest.mark.parametrize(
    ("requested", "machine", "name", "reason"),
    [
        (None, CPU, "cpu", "without CUDA or ROCm"),
        (None, NVIDIA, "cuda", "cuda 13.0"),
        (None, AMD, "rocm", "rocm 7.1"),
        (None, replace(NVIDIA, n_devices=0), "cpu", "sees no device"),
        (None, replace(AMD, has_triton=False), "cpu", "triton is not installed"),
        ("cuda", NVIDIA, "cuda", "ROLLFUSE_BACKEND=cuda"),
        ("rocm", AMD, "rocm", "ROLLFUSE_BACKEND=rocm"),
        ("cpu", NVIDIA, "cpu", "ROLLFUSE_BACKEND=cpu"),
        ("interpret", AMD, "interpret", "ROLLFUSE_BACKEND=interpret"),
    ],
)
def test_choice(requested: str | None, machine: Machine, name: str, reason: str):
    chosen = choose(requested, machine)
    assert chosen.name == name
    assert str(chosen) == name
    assert reason in chosen.reason


@pytest.mark.parametrize(
    ("requested", "machine", "reason"),
    [
        ("tpu", NVIDIA, "needs one of cuda, rocm, cpu, interpret; got 'tpu'"),
        ("", NVIDIA, "got ''"),
        ("cuda", CPU, "built without CUDA or ROCm"),
        ("cuda", AMD, "built for rocm"),
        ("rocm", NVIDIA, "built for cuda"),
        ("rocm", replace(AMD, n_devices=0), "sees no device"),
        ("cuda", replace(NVIDIA, has_triton=False), "triton is not installed"),
        ("interpret", CPU, "needs triton"),
    ],
)
def test_what_cannot_be_had_raises_with_the_reason(requested: str, machine: Machine, reason: str):
    with pytest.raises(RuntimeError, match=reason):
        choose(requested, machine)


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), **environment},
        capture_output=True,
        text=True,
    )


def test_the_variable_is_read_at_import():
    done = run("import rollfuse; print(rollfuse.backend)", ROLLFUSE_BACKEND="cpu")
    assert done.stdout.strip() == "cpu", done.stderr
    done = run("import rollfuse", ROLLFUSE_BACKEND="abacus")
    assert done.returncode != 0
    assert "got 'abacus'" in done.stderr


def test_import_leaves_devices_alone_and_a_forked_child_can_compute():
    done = run(
        """
import os, torch, rollfuse
assert not torch.cuda.is_initialized()
child = os.fork()
if child == 0:
    device = "cuda" if torch.cuda.device_count() else "cpu"
    os._exit(0 if torch.ones(3, device=device).sum().item() == 3 else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    )
    assert done.returncode == 0, done.stderr


def test_import_does_not_change_torch_settings():
    settings = "[torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype(), "
    settings += "torch.get_float32_matmul_precision(), torch.initial_seed()]"
    done = run(f"import torch\nbefore = {settings}\nimport rollfuse\nassert before == {settings}")
    assert done.returncode == 0, done.stderr


def test_who_is_served_by_triton(monkeypatch: pytest.MonkeyPatch):
    tensor = torch.zeros(2)
    for name, expected in [("cpu", False), ("interpret", True), ("cuda", False), ("rocm", False)]:
        monkeypatch.setattr("rollfuse.kernels.dispatch.backend", Backend(name, ""))
        assert use_triton(tensor) is expected, name


def test_the_tests_run_on_the_backend_that_was_asked_for():
    assert backend.name == os.environ.get("ROLLFUSE_BACKEND", backend.name)
