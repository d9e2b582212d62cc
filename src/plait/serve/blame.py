"""Which operator of the exported program stopped a runtime, and where it stands in the user's source."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["Blamed", "blame", "kind_of", "operators_in", "user_frame"]

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)\n\s*([^\n]*)')
_OPERATOR = re.compile(r"\b(?:aten|torch\.ops\.aten|prims|higher_order)(?:[.:_]|::)+([a-z_0-9]+)")
_NAMED = re.compile(r"\b(?:node|operator|operation|function|op)s?:? +[%'\"`]?([a-z_][a-z_0-9]*)", re.IGNORECASE)
_WORD = re.compile(r"[A-Za-z_][A-Za-z_0-9]*")


@dataclass(frozen=True, slots=True)
class Blamed:
    """An operator that an error names."""

    operator: str
    """Such as aten.grouped_mm.default."""
    where: str
    """`file:line, in function: code` of the user's own line; empty where the graph does not know it."""


def blame(text: str, program: torch.export.ExportedProgram) -> Blamed | None:
    """The first operator of the program that the text of an error names, by its node or by its kind.

    An operator that the program gets by decomposition alone stands where the one is that it is a part of.
    """
    nodes = _nodes(program)
    found = _named(text, nodes)
    if found is None and operators_in(text):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = _named(text, _nodes(program.run_decompositions()))
    return found


def _nodes(program: torch.export.ExportedProgram) -> list[Any]:
    """Its operators, those in the branches of torch.cond, too."""
    graphs = [getattr(part, "graph", None) for part in program.graph_module.modules()]
    return [node for graph in graphs if graph is not None for node in graph.nodes if node.op == "call_function"]


def _named(text: str, nodes: list[Any]) -> Blamed | None:
    words = _WORD.findall(text)
    by_name = {node.name: node for node in nodes}
    # A node's own name tells one operator from its likes; names such as `add` are also plain words, so they need a number.
    named = set(_NAMED.findall(text))
    for word in (found.removeprefix("node_") for found in words):  # as torch's ONNX exporter calls them
        if word in by_name and (word[-1].isdigit() or f"%{word}" in text or word in named):
            return _blamed(by_name[word])
    kinds: dict[str, Any] = {}
    for node in nodes:
        kinds.setdefault(kind_of(node), node)
    for kind in (*operators_in(text), *(k for found in sorted(named) for k in _spellings(found))):
        if kind in kinds:
            return _blamed(kinds[kind])
    return None


def operators_in(text: str) -> dict[str, None]:
    """Kinds of ATen operators that a text names, in order, in each spelling that a program may have for them."""
    return dict.fromkeys(kind for found in _OPERATOR.findall(text) for kind in _spellings(found))


def _spellings(found: str) -> tuple[str, ...]:
    plain = found.strip("_")
    shorter = re.sub(r"_(default|tensor|scalar|int|dim|forward|with_indices|copy|out)$", "", plain, flags=re.IGNORECASE)
    return (found, plain, shorter)


def kind_of(node: Any) -> str:
    """`gelu` of aten.gelu.default and aten.gelu_.default."""
    name = str(node.target)
    return (name.split(".")[1] if name.count(".") else name).strip("_")


def _blamed(node: Any) -> Blamed:
    return Blamed(str(node.target), user_frame(node.meta.get("stack_trace") or ""))


def user_frame(stack: str) -> str:
    """The innermost frame of a recorded stack that is not torch's or plait's own."""
    frames = [f for f in _FRAME.findall(stack) if "/torch/" not in f[0] and "/plait/" not in f[0]]
    if not frames:
        return ""
    file, line, function, code = frames[-1]
    return f"{file}:{line}, in {function}: {code.strip()}"
