"""The shape of the package: who imports whom, what lies where, and what is public."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import rollfuse

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("kernels", "losses", "rollout", "bench")
# What a module of each part may import of the package. "api" is `from rollfuse import ...`;
# "loop" is every module of src/rollfuse but the API page.
ALLOWED = {
    "kernels": {"kernels"},
    "losses": {"losses", "kernels"},
    "rollout": {"rollout", "kernels"},
    "loop": {"loop", "api", "kernels", "losses", "rollout", "bench"},
    "api": {"kernels", "losses", "rollout"},
    "bench": {"bench", "api", "loop", "kernels", "losses", "rollout"},
    "examples": {"api"},
}
MODULES = sorted(
    path
    for folder in (*FOLDERS, "src/rollfuse", "examples")
    for path in (ROOT / folder).rglob("*.py")
    if not any(parent.is_symlink() for parent in path.parents)
)


def part_of(path: Path) -> str:
    folder = path.relative_to(ROOT).parts[0]
    if folder != "src":
        return folder
    return "api" if path.name == "__init__.py" else "loop"


def part_named(module: str) -> str:
    _, _, rest = module.partition(".")
    part = rest.partition(".")[0]
    if not part:
        return "api"
    return part if part in FOLDERS else "loop"


def imports(source: str) -> set[str]:
    """Full names of all modules that `source` imports, wherever the import stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "need absolute imports, got a relative one"
            assert node.module is not None
            if node.module == "rollfuse":
                submodules = {alias.name for alias in node.names} & submodule_names()
                found |= {f"rollfuse.{name}" for name in submodules}
                if len(submodules) == len(node.names):
                    continue
            found.add(node.module)
    return found


def submodule_names() -> set[str]:
    return {module.name for module in pkgutil.iter_modules(rollfuse.__path__)} | set(FOLDERS)


def breaches(part: str, source: str, *, is_jit: bool) -> set[str]:
    """The imports in `source` that a module of `part` must not make."""
    names = imports(source)
    own = {name for name in names if name.split(".")[0] == "rollfuse"}
    wrong = {name for name in own if part_named(name) not in ALLOWED[part]}
    wrong |= {name for name in names if name.split(".")[0] in FOLDERS}
    if not is_jit:
        wrong |= {name for name in names if name.split(".")[0] == "triton"}
    if part in ("kernels", "losses") and not is_jit:
        third_party = {name.split(".")[0] for name in names - own} - set(sys.stdlib_module_names)
        wrong |= third_party - {"torch", "numpy"}
    return wrong


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_dependencies_point_one_way(path: Path):
    is_jit = path.parent == ROOT / "kernels" / "_triton"
    assert breaches(part_of(path), path.read_text(), is_jit=is_jit) == set()


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("kernels", "from rollfuse.losses.kl import k3"),
        ("kernels", "from rollfuse import TokenBatch"),
        ("kernels", "def f():\n    import triton.language"),
        ("losses", "import rollfuse.rollout.engine"),
        ("losses", "from rollfuse import rollout"),
        ("losses", "import transformers"),
        ("rollout", "from rollfuse.losses import kl"),
        ("loop", "import triton"),
        ("loop", "import kernels.batch"),
        ("examples", "from rollfuse.policy import head_of"),
    ],
)
def test_a_planted_breach_is_found(part: str, source: str):
    assert breaches(part, source, is_jit=False) != set()


def test_no_folder_is_a_regular_package():
    # With an __init__.py, kernels/ would hide Hugging Face's package of that name.
    for folder in (*FOLDERS, "tests", "examples", "kernels/_triton"):
        assert not (ROOT / folder / "__init__.py").exists(), folder


def test_links_lead_to_the_root_folders():
    for folder in FOLDERS:
        link = ROOT / "src" / "rollfuse" / folder
        assert link.is_symlink()
        assert link.resolve() == ROOT / folder


def test_public_names_are_listed_once():
    assert len(rollfuse.__all__) == len(set(rollfuse.__all__))
    imported = {name for name in vars(rollfuse) if not name.startswith("_")}
    assert imported - submodule_names() == set(rollfuse.__all__)


def test_no_public_name_is_a_submodules():
    stems = {path.stem for path in MODULES} | set(FOLDERS)
    assert stems & set(rollfuse.__all__) == set()


@pytest.mark.parametrize("name", rollfuse.__all__)
def test_public_name_is_documented(name: str):
    value = getattr(rollfuse, name)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert inspect.getdoc(value), f"{name} has no docstring"
    else:
        assert inspect.getdoc(type(value)), f"{name} is an undocumented {type(value).__name__}"


def test_public_functions_take_at_most_seven_parameters():
    for name in rollfuse.__all__:
        value = getattr(rollfuse, name)
        if inspect.isfunction(value):
            assert len(inspect.signature(value).parameters) <= 7, name


def test_importing_the_api_stays_within_torch_and_numpy():
    extras = ("transformers", "datasets", "matplotlib", "rich", "tensorboard", "safetensors")
    code = f"import sys, rollfuse; print([name for name in {extras} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "src", capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_modules_are_importable_by_one_name_only():
    for folder in FOLDERS:
        for path in (ROOT / folder).glob("*.py"):
            if path.stem != "__main__" and folder in ("kernels", "losses"):
                importlib.import_module(f"rollfuse.{folder}.{path.stem}")
    assert not {name for name in sys.modules if name.split(".")[0] in ("losses", "rollout")}
