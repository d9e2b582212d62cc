"""Regions that export keeps as submodules (no_grad, autocast), written out into the flat graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

__all__ = ["inline_regions"]


def inline_regions(module: fx.GraphModule) -> None:
    """Replace `wrap_with_set_grad_enabled` and `wrap_with_autocast` calls by their bodies.

    Under no_grad, what enters is detached, so that nothing inside records a gradient. What ran with autocast
    switched off is marked `meta["no_autocast"]`, for plans whose precision switches autocast on around it.
    """
    changed = True
    while changed:
        changed = False
        for node in list(module.graph.nodes):
            name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
            if name == "wrap_with_set_grad_enabled":
                enabled, body, *arguments = node.args
                _inline(module, node, body, arguments, detach=not enabled, marks={})
                changed = True
            elif name == "wrap_with_autocast":
                _device, _dtype, enabled, _cache, body, *arguments = node.args
                marks = {"no_autocast": True} if not enabled else {"autocast": _dtype}
                _inline(module, node, body, arguments, detach=False, marks=marks)
                changed = True
    for node in list(module.graph.nodes):
        if node.op == "get_attr" and not node.users:
            module.graph.erase_node(node)
    module.delete_all_unused_submodules()


def _inline(
    module: fx.GraphModule, call: fx.Node, body: Any, arguments: list[Any], *, detach: bool, marks: dict[str, Any]
) -> None:
    inner: Any = getattr(module, body.target)
    graph = module.graph
    values: dict[fx.Node, Any] = {}
    incoming = iter(arguments)
    with graph.inserting_before(call):
        for node in inner.graph.nodes:
            if node.op == "placeholder":
                value = next(incoming)
                if detach and isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor):
                    source, value = value, graph.call_function(torch.ops.aten.detach.default, (value,))
                    value.meta.update(source.meta)
                values[node] = value
            elif node.op == "output":
                returned = fx.map_arg(node.args[0], lambda n: values[n])
            elif node.op == "get_attr":
                name = f"{body.target}_{node.target}".replace(".", "_")
                setattr(module, name, getattr(inner, node.target))
                values[node] = graph.get_attr(name)
                values[node].meta.update(node.meta)
            else:
                values[node] = graph.node_copy(node, lambda n: values[n])
                values[node].meta.update(marks)
    _replace_call(graph, call, returned)


def _replace_call(graph: fx.Graph, call: fx.Node, returned: Any) -> None:
    """Users of the call's results (getitem nodes, or the call itself) now use the body's values."""
    results = returned if isinstance(returned, tuple | list) else (returned,)
    for user in list(call.users):
        if user.op == "call_function" and getattr(user.target, "__name__", "") == "getitem":
            place: Any = user.args[1]
            user.replace_all_uses_with(results[place])
            graph.erase_node(user)
    if call.users:
        call.replace_all_uses_with(results[0])
    graph.erase_node(call)
