"""The direction of imports, and what may know Hydra, held by reading the code."""

from __future__ import annotations

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = {"rankseg", "models", "datasets", "trainers", "configs", "scripts", "train", "test"}
ALLOWED = {  # package -> packages of the project that it may import
    "rankseg": {"rankseg"},
    "models": {"models"},
    "datasets": {"datasets"},
    "trainers": {"trainers", "rankseg"},
    "configs": {"configs", "trainers", "rankseg", "models", "datasets"},
}
LEAVES = {"configs.errors", "configs.files"}  # all that models, datasets and trainers import of configs
KNOW_HYDRA = {"configs", "scripts"}


def imported(path: Path) -> set[str]:
    """Top-level names of everything that a file imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def sources(package: str) -> list[Path]:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files, f"{package} is empty"
    return files


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_point_one_way(package: str) -> None:
    for path in sources(package):
        wrong = (imported(path) & OURS) - ALLOWED[package]
        if package in {"models", "datasets", "trainers"} and configs_imported(path) <= LEAVES:
            wrong -= {"configs"}
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


def modules_imported(path: Path) -> set[str]:
    """The project's modules that a file imports, inside functions too: ``configs.build``, ``datasets.base``."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            package = f"{path.parent.name}." * bool(node.level) + (node.module or "")
            found |= {package, *(f"{package}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def configs_imported(path: Path) -> set[str]:
    """The modules of ``configs`` that a file imports; ``configs`` itself if it imports the package."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "configs":
            found.add(node.module or "")
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "configs"}
    return found


@pytest.mark.parametrize("file", ["errors.py", "files.py", "__init__.py"])
def test_the_leaves_import_nothing_of_the_project(file: str) -> None:
    assert not imported(ROOT / "configs" / file) & (OURS - {"configs"})
    assert configs_imported(ROOT / "configs" / file) <= {"configs.errors"}


def test_no_imports_go_in_a_circle() -> None:
    files = {
        str(path.relative_to(ROOT).with_suffix("")).replace("/", "."): path
        for package in (*ALLOWED, "scripts")
        for path in sources(package)
        if path.name != "__init__.py"  # what gathers the others
    }
    graph = {name: modules_imported(path) & files.keys() for name, path in files.items()}
    assert graph["configs.build"] and graph["datasets.folder"]
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("package", sorted(set(ALLOWED) - KNOW_HYDRA))
def test_only_the_edge_knows_hydra(package: str) -> None:
    for path in sources(package):
        assert not imported(path) & {"hydra", "omegaconf"}, path


def test_the_method_needs_torch_alone() -> None:
    for path in sources("rankseg"):
        allowed = {"torch", "rankseg"} | ({"triton"} if path.stem == "triton_kernels" else set())  # optional
        extra = imported(path) - set(sys.stdlib_module_names) - allowed
        assert not extra, f"{path.relative_to(ROOT)} imports {sorted(extra)}"


def test_no_file_is_two_ideas() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for package in (*ALLOWED, "scripts")
        for path in sources(package)
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 500
    }
    assert not long
