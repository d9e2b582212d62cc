"""Whether a TARGET exists, read from its text without running it (no torch, no user's code), and where it lies."""

from __future__ import annotations

import ast
import importlib.machinery
import sys
from pathlib import Path

from plait.capture.arguments import TargetText, nearest
from plait.capture.target import check_target
from plait.errors import TargetError

__all__ = ["check_target_exists", "relative_target"]


def check_target_exists(text: str) -> None:
    """Refuse a TARGET whose file, module, function or model type is not there.

    A function that a file makes in another way than by `def`, an assignment or an import is not found here.

    Raises:
        TargetError: says what is missing, with the nearest name.
    """
    check_target(text)
    place = TargetText.parse(text).place
    if place.startswith("hf:"):
        _check_model_type(place.removeprefix("hf:"))
        return
    where, _, function = place.rpartition(":")
    path = _file_of(where)
    if path is None:
        raise TargetError(
            f"target {where}: no module of this name",
            hint="use a path such as examples/gpt.py:job, or run where the package can be imported",
        )
    _check_function(path, where, function.split(".")[0])


def _file_of(where: str) -> Path | None:
    """The file of a path or of a module, found without importing its parents."""
    if where.endswith(".py") or "/" in where or Path(where).is_file():
        return Path(where)
    folders = [str(Path.cwd()), *sys.path]
    spec = None
    for name in where.split("."):
        spec = importlib.machinery.PathFinder.find_spec(name, folders)
        if spec is None:
            return None
        folders = list(spec.submodule_search_locations or ())
    return Path(spec.origin) if spec is not None and spec.origin else None


def _check_function(path: Path, where: str, function: str) -> None:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except SyntaxError as problem:
        raise TargetError(f"target {where}: line {problem.lineno}: {problem.msg}") from None
    except (OSError, UnicodeDecodeError, ValueError) as problem:
        raise TargetError(f"target {where}: {problem}") from None
    functions, names = _defined(tree)
    if "*" in names or function in functions | names:
        return
    shown = sorted(name for name in functions if not name.startswith("_"))
    raise TargetError(
        f"target {where}: it has no function {function!r}{nearest(function, shown)}",
        hint=f"its functions are {', '.join(shown)}" if shown else "",
    )


def _defined(tree: ast.Module) -> tuple[set[str], set[str]]:
    """(functions and classes, other names) of a module; `*` where a star import may bring any."""
    functions: set[str] = set()
    names: set[str] = set()
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            functions.add(node.name)
            continue  # what it holds is its own
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        waiting += ast.iter_child_nodes(node)
    return functions, names


def _check_model_type(name: str) -> None:
    """A folder with a config, or one of transformers' types (where it is installed here)."""
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise TargetError(f"target hf:{name}: has no config.json")
        return
    try:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    except ImportError:
        return
    words = {
        word for known in CONFIG_MAPPING_NAMES for word in (known, known.replace("_", "-"), known.replace("-", "_"))
    }
    if name not in words:
        raise TargetError(f"target hf:{name}: transformers has no model type {name!r}{nearest(name, words, 3)}")


def relative_target(text: str, root: Path, *, must_lie_within: bool) -> str:
    """The TARGET with its file (or hf: folder) relative to `root`, as nodes see it.

    Raises:
        TargetError: the file lies outside, and the engine sends only `root` along.
    """
    place, question, arguments = text.partition("?")
    where, _, function = place.rpartition(":")
    is_folder = place.startswith("hf:") and (root / place[3:]).is_dir()
    if is_folder:
        where, function = place[3:], ""
    elif place.startswith("hf:") or not (where.endswith(".py") or "/" in where):
        return text
    path = (root / where).resolve()
    if path.is_relative_to(root.resolve()):
        near = path.relative_to(root.resolve()).as_posix()
        return f"hf:{near}{question}{arguments}" if is_folder else f"{near}:{function}{question}{arguments}"
    if must_lie_within:
        raise TargetError(
            f"target {where}: it lies outside the working directory, which is what the engine sends along",
            hint="start from the project's folder",
        )
    far = path.as_posix()
    return f"hf:{far}{question}{arguments}" if is_folder else f"{far}:{function}{question}{arguments}"
