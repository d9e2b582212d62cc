"""An exported program made simpler for importers that know less than torch: exact, and without a model's or operator's name
beyond what is said here.

    sums of truth values    torch counts them; importers add truth values. They are made whole numbers first.
    positions from the end  TVM's importer reads in front of the tensor for select(-1). They are counted from the start.
    constants               what depends on no input and no weight (masks, positions) is computed now.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import fx

__all__ = ["simplified"]

_COUNTING = (
    "aten.cumsum.default",
    "aten.sum.default",
    "aten.sum.dim_IntList",
    "aten.prod.default",
    "aten.prod.dim_int",
)
_LARGEST = 1 << 22  # elements of a constant that is worked out: 16 MiB in float32


def simplified(
    program: torch.export.ExportedProgram,
    inputs: tuple[torch.Tensor, ...],
    spelled: Mapping[str, Callable[..., torch.Tensor]] | None = None,
) -> torch.export.ExportedProgram:
    """The same program at the sizes of `inputs`, simplified and exported again; operators of these names by these functions."""
    import torch

    with torch.no_grad():
        module: Any = program.module(check_guards=False)
        fixed: Any = torch.export.export(module, inputs, strict=False).module(check_guards=False)
        graph = fixed.graph
        for node in list(graph.nodes):
            if node.op == "call_function" and str(node.target) in _COUNTING and _is_truth(node.args[0]):
                _count(graph, node)
            elif str(node.target) == "aten.select.int" and isinstance(node.args[2], int) and node.args[2] < 0:
                node.args = (*node.args[:2], node.args[2] + node.args[0].meta["val"].shape[node.args[1]])
        _fold(fixed)
        graph.eliminate_dead_code()
        for node in graph.nodes:
            node.target = (spelled or {}).get(str(node.target), node.target)
        fixed.recompile()
        return torch.export.export(fixed, inputs, strict=False)


def _is_truth(value: Any) -> bool:
    import torch

    made = value.meta.get("val") if hasattr(value, "meta") else None
    return isinstance(made, torch.Tensor) and made.dtype == torch.bool


def _count(graph: fx.Graph, node: fx.Node) -> None:
    import torch

    with graph.inserting_before(node):
        whole = graph.call_function(torch.ops.aten.to.dtype, (node.args[0], torch.int64))
    node.args = (whole, *node.args[1:])


def _fold(module: Any) -> None:
    """Replace every tensor that no input and no weight has a part in by its value."""
    import torch

    graph = module.graph
    known: dict[fx.Node, torch.Tensor] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or getattr(node.target, "_schema", None) is None:
            continue
        if any(needed not in known for needed in node.all_input_nodes) or _has_chance(node):
            continue
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda needed: known[needed])
        value = node.target(*args, **kwargs)
        if isinstance(value, torch.Tensor) and value.numel() <= _LARGEST:
            known[node] = value
    for number, (node, value) in enumerate(known.items()):
        if all(user in known for user in node.users):
            continue
        name = f"_worked_out_{number}"
        module.register_buffer(name, value.clone(memory_format=torch.contiguous_format), persistent=False)
        with graph.inserting_before(node):
            held = graph.get_attr(name)
        node.replace_all_uses_with(held, delete_user_cb=lambda user: user not in known)


def _has_chance(node: fx.Node) -> bool:
    """Whether it draws random numbers or writes into its argument."""
    import torch

    target: Any = node.target
    return bool(target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags)
