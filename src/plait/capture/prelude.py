"""The part of a graph that depends on no parameter: masks, positions, rotary tables."""

from __future__ import annotations

import torch
from torch import fx

from plait.capture.program import Program

__all__ = ["is_mutating", "is_random", "preludes", "written_by"]


def is_mutating(node: fx.Node) -> bool:
    """Whether an operator writes into one of its arguments (torch's schema says so)."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def written_by(node: fx.Node) -> list[fx.Node]:
    """The arguments that an operator writes into."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    found = []
    for i, argument in enumerate(schema.arguments):
        value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
        if argument.alias_info is not None and argument.alias_info.is_write and value is not None:
            found += [v for v in (value if isinstance(value, list | tuple) else (value,)) if isinstance(v, fx.Node)]
    return found


def preludes(program: Program) -> set[fx.Node]:
    """Nodes that every part of the model may compute for itself: masks, positions, rotary tables.

    They follow from inputs, buffers and constants alone: no parameter, no random number, nothing written into.
    """
    graph = program.module.graph
    found: set[fx.Node] = set()
    written = _written(graph)
    for node in graph.nodes:
        if node.op == "placeholder":
            node.meta["parameter"] = program.placeholders[node.name].kind == "parameter"
            if program.placeholders[node.name].kind != "parameter":
                found.add(node)
        elif node.op == "get_attr":
            found.add(node)
        elif node.op == "call_function":
            pure = node not in written and not is_mutating(node) and not is_random(node)
            if pure and all(parent in found for parent in node.all_input_nodes) and _is_cheap(node):
                found.add(node)
    return {node for node in found if node not in written}


def is_random(node: fx.Node) -> bool:
    """Whether an operator draws random numbers."""
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


_HEAVY = ("linear", "conv", "attention", "grouped_mm", "lstm", "gru", "rnn", "embedding", "batch_norm")


def _is_cheap(node: fx.Node) -> bool:
    name = str(node.target)
    return not any(word in name for word in _HEAVY)


def _written(graph: fx.Graph) -> set[fx.Node]:
    """Nodes whose value, or a view of it, is written into later."""
    base: dict[fx.Node, fx.Node] = {}
    written: set[fx.Node] = set()
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op == "call_function" and schema is not None and node.args and isinstance(node.args[0], fx.Node):
            aliased = bool(schema.arguments) and schema.arguments[0].alias_info is not None
            if (
                aliased
                or "view" in str(node.target)
                or "reshape" in str(node.target)
                or "contiguous" in str(node.target)
            ):
                base[node] = base.get(node.args[0], node.args[0])
            if is_mutating(node):
                written |= {node, node.args[0], base.get(node, node)}
        elif node.target is getattr and node.args:
            base[node] = node.args[0]
    return written | {n for n, b in base.items() if b in written}
