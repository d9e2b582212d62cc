"""Which values of a graph share memory, and which are written to in place."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from plait.run.shard.operation import forget

__all__ = ["functional_form", "mutated_values", "shares_memory", "working_copy", "written_operands"]


def written_operands(node: fx.Node) -> list[fx.Node]:
    """The operands that this operator writes to in place."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None:
        return []
    found = []
    for index, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
            if isinstance(value, fx.Node):
                found.append(value)
    return found


def functional_form(node: fx.Node) -> Any | None:
    """The operator that does the same as an in-place one and returns a new tensor; None if there is none."""
    packet = getattr(node.target, "overloadpacket", None)
    name = getattr(packet, "__name__", "")
    if not name.endswith("_") or len(written_operands(node)) != 1:
        return None
    other = getattr(torch.ops.aten, name[:-1], None)
    return getattr(other, node.target._overloadname, None) if other is not None else None  # type: ignore[union-attr]


_MAY_ALIAS = {"reshape", "contiguous", "to", "flatten", "type_as", "expand_as", "dropout", "unflatten", "movedim"}


def shares_memory(node: fx.Node) -> list[fx.Node]:
    """The operands whose memory the result may share."""
    if node.target is operator.getitem:
        return [a for a in node.args if isinstance(a, fx.Node)]
    schema = getattr(node.target, "_schema", None)
    if schema is None or node.op != "call_function":
        return []
    packet: Any = getattr(node.target, "overloadpacket", None)
    if getattr(packet, "__name__", "") in _MAY_ALIAS or torch.Tag.maybe_aliasing_or_mutating in node.target.tags:  # type: ignore[union-attr]
        return [a for a in node.args[:1] if isinstance(a, fx.Node)]
    found = []
    for index, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and index < len(node.args):
            value = node.args[index]
            found += [v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, fx.Node)]
    return found


def mutated_values(graph: fx.Graph) -> dict[fx.Node, int]:
    """Every node whose memory some operator writes to, with the number of its group of nodes that share it.

    batch_norm's running statistics are written without the schema saying so; they are placed with its channels and
    have no other reader, so they are left out.
    """
    parent: dict[fx.Node, fx.Node] = {}

    def root(node: fx.Node) -> fx.Node:
        while parent.get(node, node) is not node:
            node = parent[node]
        return node

    written: list[fx.Node] = []
    for node in graph.nodes:
        parent[node] = node
        for source in shares_memory(node):
            parent[root(node)] = root(source)
        written += written_operands(node)
    roots = {root(node) for node in written}
    numbers = {each: index for index, each in enumerate(sorted(roots, key=lambda n: n.name))}
    return {node: numbers[root(node)] for node in graph.nodes if root(node) in roots}


def working_copy(graph: fx.Graph) -> fx.Graph:
    """A copy to decide on or to lower from: same names, fills rewritten, nothing remembered."""
    copied = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        values[node] = copied.node_copy(node, values.__getitem__)
    forget(copied)
    rewrite_fills(copied)
    forget(copied)
    return copied


_aten: Any = torch.ops.aten
_SCATTERS = {_aten.slice.Tensor: _aten.slice_scatter.default, _aten.select.int: _aten.select_scatter.default}


def rewrite_fills(graph: fx.Graph) -> None:
    """Turn `x[a:b] = y` on fresh memory into values: `slice_scatter`, which can be sharded, instead of a write.

    Only where nothing but `x` itself is read afterwards. Deterministic, so that deciding and lowering see the same.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if node.target is not _aten.copy_.default or node.users or node.kwargs or len(node.args) != 2:
            continue
        chain: list[fx.Node] = []
        base = node.args[0]
        while isinstance(base, fx.Node) and base.target in _SCATTERS and set(base.users) <= {node, *chain}:
            chain.append(base)
            base = base.args[0]
        if not chain or not isinstance(base, fx.Node) or base.op != "call_function" or shares_memory(base):
            continue
        views = [
            user
            for user in base.users
            if user is not chain[-1] and shares_memory(user) and user.target not in _SCATTERS
        ]
        later = [user for user in base.users if order.get(user, len(order)) > order[node]]
        if any(order.get(view, len(order)) < order[node] for view in views):
            continue
        _replace_fill(graph, node, chain, base, later)
        order = {each: index for index, each in enumerate(graph.nodes)}


def _replace_fill(graph: fx.Graph, node: fx.Node, chain: list[fx.Node], base: fx.Node, later: list[fx.Node]) -> None:
    with graph.inserting_before(node):
        value = node.args[1]
        assert isinstance(value, fx.Node)
        target = node.args[0]
        assert isinstance(target, fx.Node)
        filled = graph.call_function(_aten.expand_as.default, (value, target))
        filled.meta = {**node.meta, "val": target.meta["val"]}
        for view in chain:
            whole = view.args[0]
            assert isinstance(whole, fx.Node)
            scattered = graph.call_function(_SCATTERS[view.target], (whole, filled, *view.args[1:]))
            scattered.meta = {**node.meta, "val": whole.meta["val"]}
            filled = scattered
    for user in later:
        user.replace_input_with(base, filled)
    graph.erase_node(node)
