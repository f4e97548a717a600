"""`.ci/environment.py` keeps a suitable torch of the machine, else installs the pinned one."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module that makes its environment in a temporary folder."""
    specification = importlib.util.spec_from_file_location("env", ROOT / ".ci" / "environment.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    monkeypatch.setattr(module, "VENV", tmp_path)
    monkeypatch.setattr(module, "STAMP", tmp_path / "stamp")
    return module


@pytest.mark.parametrize(
    ("version", "cuda", "hip", "suitable"),
    [
        ("2.11.0", "13.0", None, True),
        ("2.13.0+rocm7.1", None, "7.1", True),
        ("3.0.0a0+git1234", "13.0", None, True),
        ("2.13.0+cpu", None, None, False),
        ("2.9.1", "12.8", None, False),
    ],
)
def test_suitable_torch(environment, version, cuda, hip, suitable):
    assert environment.Torch(version, cuda, hip, "").is_suitable() is suitable


def commands_of(environment, monkeypatch, own) -> list[str]:
    commands: list[str] = []
    monkeypatch.setattr(
        environment, "_run", lambda *words: commands.append(" ".join(map(str, words)))
    )
    monkeypatch.setattr(environment, "_probe", lambda python: own)
    monkeypatch.setattr(environment, "_fails_to_import", lambda module: own is None)
    environment._install(["bench", "dev", "rivals"], own)
    return commands


def test_the_machines_torch_is_not_replaced(environment, monkeypatch):
    own = environment.Torch("2.12.0+rocm7.1", None, "7.1", "torch/__init__.py")
    (command,) = commands_of(environment, monkeypatch, own)
    assert environment.PINNED_TORCH not in command
    assert "--constraint" in command
    assert (environment.VENV / "constraints.txt").read_text() == "torch==2.12.0+rocm7.1\n"
    assert command.endswith("[bench,dev]")  # the rivals would bring another triton


def test_a_cuda_torch_gets_the_rivals(environment, monkeypatch):
    own = environment.Torch("2.12.0", "13.0", None, "torch/__init__.py")
    (command,) = commands_of(environment, monkeypatch, own)
    assert command.endswith("[bench,dev,rivals]")


def test_the_pinned_torch_is_installed_otherwise(environment, monkeypatch):
    torch, triton, package = commands_of(environment, monkeypatch, None)
    assert environment.PINNED_TORCH in torch.split()
    assert environment.PINNED_TRITON in triton
    assert package.endswith("[bench,dev,rivals]")


def test_a_torch_that_changed_under_way_is_an_error(environment, monkeypatch):
    own = environment.Torch("2.12.0", "13.0", None, "a")
    monkeypatch.setattr(environment, "_run", lambda *words: None)
    monkeypatch.setattr(environment, "_probe", lambda python: own._replace(path="b"))
    with pytest.raises(SystemExit, match="need Torch"):
        environment._install([], own)


def test_stamp_tells_what_the_environment_was_made_from(environment, monkeypatch):
    stamp = environment._stamp(["dev"])
    assert stamp == environment._stamp(["dev"])
    assert stamp != environment._stamp(["dev", "grpo"])
    monkeypatch.setattr(environment.metadata, "version", lambda name: "99.0")
    assert stamp != environment._stamp(["dev"])
