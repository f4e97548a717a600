"""The wheel, built from the sdist: what it holds, and what imports where.

Two environments are assembled from links to the distributions installed here, each with exactly
what pip would bring: torch and numpy alone, and those of every extra but the developers' own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch

requirements = pytest.importorskip("packaging.requirements", reason="needs the extra dev")

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("kernels", "losses", "rollout", "bench")
# What no clone has.
NOT_BUILT = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs")
CORE = ("rollfuse.kernels.", "rollfuse.losses.")
# PyPI's triton, which the rivals require, would cover the one a ROCm torch brings.
INSTALLED_EXTRAS = {"grpo", "bench", "dev", "examples"}
INSTALLED_EXTRAS |= set() if torch.version.hip else {"rivals"}
# Namespace folders are not found by pkgutil, so the wheel's own list of files names the modules.
IMPORT_ALL = """
import importlib, json, sys
import rollfuse
found = {}
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
        found[name] = None
    except ImportError as error:
        found[name] = str(error)
print(json.dumps([rollfuse.__file__, found]))
"""


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel built from it."""
    folder = tmp_path_factory.mktemp("dist")
    # Of a copy: a build writes into the tree, where another process's may run.
    tree = shutil.copytree(ROOT, folder / "tree", symlinks=True, ignore=NOT_BUILT)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(tree))
    return folder


@pytest.fixture(scope="module")
def wheel(distributions: Path) -> Path:
    (path,) = distributions.glob("*.whl")
    return path


def sources() -> set[str]:
    """The package's files by their name in the wheel."""
    files = {path.name for path in (ROOT / "src" / "rollfuse").glob("*.py")}
    for folder in FOLDERS:
        files |= {
            str(path.relative_to(ROOT))
            for path in (ROOT / folder).rglob("*.py")
            if not path.name.startswith("test_")
        }
    return {f"rollfuse/{name}" for name in files} | {"rollfuse/py.typed"}


def test_wheel_holds_the_package_and_nothing_else(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if ".dist-info/" not in name} == sources()
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_sdist_holds_what_a_wheel_needs(distributions: Path):
    (path,) = distributions.glob("*.tar.gz")
    names = {name.partition("/")[2] for name in tarfile.open(path).getnames()}
    assert {f"src/{name}" for name in sources()} <= names
    assert {"pyproject.toml", "README.md", "LICENSE"} <= names


def test_with_torch_and_numpy_alone(wheel: Path, tmp_path: Path):
    python = environment(tmp_path, wheel, extras=set())
    imported = import_all(python, wheel)
    assert imported.pop("rollfuse") is None
    for name, error in imported.items():
        if name.startswith("rollfuse.kernels._triton."):
            assert error is None or "triton" in error, name
        elif name.startswith(CORE):
            assert error is None, f"{name}: {error}"
        else:
            assert error is None or "rollfuse[" in error, f"{name} names no extra: {error}"


def test_with_all_extras(wheel: Path, tmp_path: Path):
    extras = (INSTALLED_EXTRAS - {"dev"}) & set(metadata_of(wheel).get_all("Provides-Extra"))
    python = environment(tmp_path, wheel, extras=extras)
    for name, error in import_all(python, wheel).items():
        if not name.startswith("rollfuse.kernels._triton."):
            assert error is None, f"{name}: {error}"


def test_every_extra_is_installed_here():
    # Otherwise the environment above would be smaller than the one pip makes.
    for line in metadata.requires("rollfuse") or pytest.skip("rollfuse is not installed"):
        requirement = requirements.Requirement(line)
        wanted = [
            extra
            for extra in INSTALLED_EXTRAS
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra})
        ]
        assert not wanted or metadata.version(requirement.name), requirement.name


@pytest.mark.skipif(
    importlib.util.find_spec("kernels") is None, reason="needs Hugging Face's kernels (extra dev)"
)
@pytest.mark.parametrize("start", [("-c", "{code}"), ("-m", "timeit", "-n1", "-r1", "{code}")])
def test_hugging_face_kernels_is_not_hidden(start: tuple[str, ...]):
    code = "import kernels, rollfuse.kernels.dispatch; assert callable(kernels.get_kernel)"
    words = [word.format(code=code) for word in start]
    for folder in (ROOT, ROOT / "src"):
        environment = {"PYTHONPATH": str(ROOT / "src")}
        run(sys.executable, *words, cwd=folder, **environment)


def metadata_of(wheel: Path) -> metadata.PackageMetadata:
    (distribution,) = metadata.Distribution.discover(path=[str(wheel)])
    return distribution.metadata


def environment(folder: Path, wheel: Path, extras: set[str]) -> Path:
    """Python of a new environment with the wheel, its requirements for `extras`, and no more."""
    place = folder / "environment"
    venv.create(place, symlinks=True)
    python = place / "bin" / "python"
    site = Path(
        subprocess.check_output(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        ).strip()
    )
    zipfile.ZipFile(wheel).extractall(site)
    for name in closure(metadata_of(wheel), extras):
        link(metadata.distribution(name), site)
    return python


def closure(root: metadata.PackageMetadata, extras: set[str]) -> set[str]:
    """Names of the distributions that pip would install for `root` with `extras`."""
    found: set[str] = set()
    pending = [(line, extras) for line in root.get_all("Requires-Dist") or []]
    while pending:
        line, wanted = pending.pop()
        requirement = requirements.Requirement(line)
        marker = requirement.marker
        if marker and not any(marker.evaluate({"extra": extra}) for extra in {"", *wanted}):
            continue
        key = f"{requirement.name}[{','.join(sorted(requirement.extras))}]"
        if key not in found:
            found.add(key)
            needed = metadata.requires(requirement.name) or []
            pending += [(line, set(requirement.extras)) for line in needed]
    return {key.partition("[")[0] for key in found}


def link(distribution: metadata.Distribution, site: Path) -> None:
    """Show an installed distribution in another environment's site-packages."""
    assert distribution.files is not None, distribution.name
    for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
        target = Path(str(distribution.locate_file(top)))
        if not (site / top).exists() and target.exists():
            (site / top).symlink_to(target)


def import_all(python: Path, wheel: Path) -> dict[str, str | None]:
    """Import every module of the wheel, with the error of each that does not import."""
    modules = [
        name.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        for name in zipfile.ZipFile(wheel).namelist()
        if name.endswith(".py") and not name.endswith("__main__.py")
    ]
    done = run(str(python), "-I", "-c", IMPORT_ALL, *modules, cwd=python.parent)
    where, found = json.loads(done.splitlines()[-1])
    assert Path(where).is_relative_to(python.parent.parent)
    assert set(found) == set(modules)
    return found


def run(*command: str, cwd: Path = ROOT, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
