"""The step that puts a new key or value into its cache, written for runtimes that scatter well.

A decode program says it by a choice at every position, which every runtime knows:

    where(arange(capacity) == position, new, cache)

which reads and compares as much as it writes. A scatter copies the cache and writes one row. Measured on a cache of
2 MiB, one thread, Xeon with AVX-512: torch 0.08 ms for 0.32, OpenVINO 0.26 for 0.48, onnxruntime 0.39 for 0.67.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import fx

__all__ = ["scattered"]


def scattered(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program, changed in place: each such choice between a new value and an input is a scatter."""
    import torch

    aten, graph = torch.ops.aten, program.graph
    for node in list(graph.nodes):
        if node.target is not aten.where.self:
            continue
        mask, new, cache = node.args
        position = _position(mask)
        if position is None or cache.op != "placeholder" or not _is_row(new, cache, mask):
            continue
        dim = _dim(mask)
        with graph.inserting_before(node):
            shape = [1] * cache.meta["val"].dim()
            index = _call(graph, aten.reshape.default, position, shape)
            index = _call(graph, aten.expand_as.default, index, new)
            found = _call(graph, aten.scatter.src, cache, dim, index, new)
        node.replace_all_uses_with(found)
        graph.erase_node(node)
        for spec in program.graph_signature.output_specs:
            if spec.arg.name == node.name:
                spec.arg.name = found.name
    graph.eliminate_dead_code()
    program.graph_module.recompile()
    return program


def _call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    from torch.fx.node import map_arg

    node = graph.call_function(target, args)
    node.meta["val"] = target(*map_arg(args, lambda n: n.meta["val"]))
    return node


def _position(mask: fx.Node) -> fx.Node | None:
    """The input that a mask compares all positions with."""
    import torch

    aten = torch.ops.aten
    if mask.target not in (aten.reshape.default, aten.view.default):
        return None
    same = mask.args[0]
    if getattr(same, "target", None) is not aten.eq.Tensor:
        return None
    every, position = same.args  # type: ignore[union-attr]
    is_every = getattr(every, "target", None) is aten.arange.default and getattr(position, "op", "") == "placeholder"
    return position if is_every else None  # type: ignore[return-value]


def _dim(mask: fx.Node) -> int:
    sizes = list(mask.meta["val"].shape)
    return sizes.index(max(sizes))


def _is_row(new: fx.Node, cache: fx.Node, mask: fx.Node) -> bool:
    """Whether `new` has the cache's shape and type but for one position."""
    a, b = new.meta["val"], cache.meta["val"]
    row = list(b.shape)
    row[_dim(mask)] = 1
    return list(a.shape) == row and a.dtype == b.dtype
