"""Make the checkout's own environment, .venv: `python3 .ci/environment.py [EXTRA ...]`.

A torch that this Python already has is used and never replaced if it is new enough and built for
CUDA or ROCm; otherwise the pinned one is installed. Nothing outside .venv is changed. A stamp makes
a second call a matter of milliseconds. Only the standard library is needed.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import sysconfig
from importlib import metadata, util
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "rollfuse-stamp"
OLDEST_PYTHON = (3, 10)
OLDEST_TORCH = (2, 11)
PINNED_TORCH = "torch==2.13.0"
# For torch builds that bring no triton, so that the kernels can be interpreted and compiled.
PINNED_TRITON = "triton==3.7.1; sys_platform == 'linux'"

PROBE = (
    "import json, torch;"
    "print(json.dumps([torch.__version__, torch.version.cuda, torch.version.hip, torch.__file__]))"
)


class Torch(NamedTuple):
    """What `import torch` gives in some Python."""

    version: str
    cuda: str | None
    hip: str | None
    path: str

    def is_suitable(self) -> bool:
        numbers = tuple(int(part) for part in self.version.split(".")[:2])
        return numbers >= OLDEST_TORCH and (self.cuda is not None or self.hip is not None)


def main(extras: list[str]) -> None:
    if sys.version_info < OLDEST_PYTHON:
        raise SystemExit(f"need Python {OLDEST_PYTHON} or newer, got {sys.version.split()[0]}")
    if util.find_spec("ensurepip") is None:
        raise SystemExit(
            "need Python's venv and ensurepip modules, got a Python without them "
            "(Debian and Ubuntu: apt install python3-venv)"
        )
    stamp = _stamp(extras)
    if STAMP.exists() and STAMP.read_text() == stamp:
        return
    own = _probe(Path(sys.executable)) if util.find_spec("torch") is not None else None
    if own is not None and own.is_suitable():
        print(f"-- .venv: keeps this machine's torch {own.version}", flush=True)
        _create(see_machine=True)
    else:
        print(f"-- .venv: installs {PINNED_TORCH}", flush=True)
        own = None
        _create(see_machine=False)
    _install(extras, own)
    STAMP.write_text(stamp)


def _stamp(extras: list[str]) -> str:
    """All that the environment was made from; a change in any of it makes it anew."""
    try:
        torch = metadata.version("torch")
    except metadata.PackageNotFoundError:
        torch = "none"
    parts = [sys.version, sys.prefix, torch, *sorted(extras)]
    parts += [path.read_text() for path in (ROOT / "pyproject.toml", Path(__file__))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest() + "\n"


def _probe(python: Path) -> Torch | None:
    done = subprocess.run([python, "-c", PROBE], capture_output=True, text=True, cwd=ROOT)
    return Torch(*json.loads(done.stdout)) if done.returncode == 0 else None


def _create(*, see_machine: bool) -> None:
    flags = ["--system-site-packages"] if see_machine else []
    _run(sys.executable, "-m", "venv", "--clear", *flags, VENV)
    if see_machine and sys.prefix != sys.base_prefix:
        # Started from a virtual environment: --system-site-packages shows only what lies under it.
        site = subprocess.check_output(
            [_python(), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        )
        folders = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        Path(site.strip(), "machine.pth").write_text("\n".join(sorted(folders)) + "\n")


def _install(extras: list[str], own: Torch | None) -> None:
    constraints = VENV / "constraints.txt"
    constraints.write_text(f"torch=={own.version}\n" if own else f"{PINNED_TORCH}\n")
    pip = [_python(), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pip += ["--constraint", constraints]
    if own is None:
        _run(*pip, PINNED_TORCH)
    # Before the rivals, who would bring the newest.
    if "dev" in extras and _fails_to_import("triton"):
        _run(*pip, PINNED_TRITON)
    if own is not None and own.hip is not None:
        # They require triton by the name that would cover up the one a ROCm torch brings.
        extras = [extra for extra in extras if extra != "rivals"]
    _run(*pip, "--editable", f"{ROOT}[{','.join(extras)}]" if extras else str(ROOT))
    if own is not None and _probe(_python()) != own:
        raise SystemExit(f"need {own} in .venv, got {_probe(_python())}")


def _fails_to_import(module: str) -> bool:
    done = subprocess.run([_python(), "-c", f"import {module}"], capture_output=True, cwd=ROOT)
    return done.returncode != 0


def _python() -> Path:
    return VENV / ("Scripts" if os.name == "nt" else "bin") / "python"


def _run(*command: str | Path) -> None:
    done = subprocess.run(command, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise SystemExit(done.returncode)


if __name__ == "__main__":
    main(sys.argv[1:])
