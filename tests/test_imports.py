"""Imports point one way, and arithmetic stays free of torch."""

from __future__ import annotations

import ast
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import plait

ROOT = Path(plait.__file__).parent
# A folder or file may import from its own step and from earlier ones.
STEPS = [
    {"errors", "units"},
    {"environments"},
    {"schema"},
    {"capture", "hardware"},
    {"cost"},
    {"plan"},
    {"run"},
    {"advice", "serve", "jobs", "incoming"},
    {"report"},
    {"auto"},
    {"cli"},
]
ORDER = {name: step for step, names in enumerate(STEPS) for name in names}
TORCH_FREE = {"errors", "units", "schema", "cost", "plan", "report", "advice", "cli"}
# (file, module it may reach for inside a function): why.
EXCEPTIONS = {
    ("schema/cluster.py", "plait.hardware.local"): "plait.Cluster.local() is a public name (design)",
    ("schema/cluster.py", "plait.hardware.clusters"): "plait.Cluster.load() knows the catalogue's names",
}


def part(file: Path) -> str:
    """The folder under plait (or the file's name where it lies at the top)."""
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(file: Path, *, deferred: bool) -> list[tuple[str, int]]:
    """(module, line) of every import; those for the type checker only are left out."""
    found: list[tuple[str, int]] = []

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not deferred:
                continue
            if isinstance(child, ast.Import):
                found.extend((name.name, child.lineno) for name in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module:
                found.append((child.module, child.lineno))
            visit(child)

    visit(ast.parse(file.read_text(encoding="utf-8")))
    return found


FILES = [file for file in sorted(ROOT.rglob("*.py")) if part(file) not in ("__init__", "__main__")]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_one_way(file: Path):
    """No file imports from a later stage, not even inside a function."""
    where = file.relative_to(ROOT).as_posix()
    at_load = {module for module, _ in imports(file, deferred=False)}
    wrong = [
        f"line {line}: {module}"
        for module, line in imports(file, deferred=True)
        if module.startswith("plait.")
        and ORDER[module.split(".")[1]] > ORDER[part(file)]
        and (module in at_load or (where, module) not in EXCEPTIONS)
    ]

    assert not wrong, f"{file.relative_to(ROOT)} imports what comes after it: {wrong}"


@pytest.mark.parametrize("file", [f for f in FILES if part(f) in TORCH_FREE], ids=lambda f: str(f.relative_to(ROOT)))
def test_arithmetic_is_free_of_torch(file: Path):
    """schema, cost, plan, report and advice never import torch; the command line only when a verb needs it."""
    heavy = {"torch", "transformers", "numpy", "tensorboard"}
    found = [
        f"line {line}: {module}"
        for module, line in imports(file, deferred=part(file) != "cli")
        if module.split(".")[0] in heavy - ({"numpy"} if part(file) in ("cost", "plan") else set())
    ]

    assert not found


def test_every_folder_has_its_place():
    """A new folder is given its step here before it is imported from anywhere."""
    parts = {part(file) for file in FILES}

    assert parts <= set(ORDER), parts - set(ORDER)


def best_of(count: int, *command: str) -> float:
    """Processor seconds of the quickest of a few runs: what the program needs, however busy the machine is."""
    seconds = []
    for _ in range(count):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *command], check=True, capture_output=True, timeout=60)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(seconds)


def test_import_is_quick():
    """`import plait` takes under 0.3 s."""
    assert best_of(5, "-c", "import plait") < 0.3


def test_help_is_quick():
    """`plait --help` takes under 0.5 s."""
    assert best_of(5, "-m", "plait", "--help") < 0.5


def test_help_does_not_load_torch():
    """Neither the package nor its help loads torch or numpy."""
    code = "import sys; from plait.cli.main import run; run(['--help']); print({'torch', 'numpy'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60).stdout

    assert out.strip().endswith("set()")
