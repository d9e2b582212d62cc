"""Exported programs in another floating-point type."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from plait.serve.backend import Runner

if TYPE_CHECKING:
    import torch

    from plait.serve.subject import Entry

__all__ = ["DTYPES", "cast", "in_precision", "open_dims"]

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def cast(program: torch.export.ExportedProgram, precision: str) -> torch.export.ExportedProgram:
    """The same program with floating-point weights, constants and inputs in another type; fp32 is left as it is.

    Made by exporting it again, so that what the program itself says of types (a mask made in float32) follows.
    """
    import torch

    if precision == "fp32":
        return program
    dtype = getattr(torch, DTYPES[precision])
    module: Any = program.module(check_guards=False)
    _cast_module(module, dtype)
    inputs = tuple(_to(value, dtype) for value in program.example_inputs[0])
    dims = open_dims(program)
    with torch.no_grad():
        return torch.export.export(module, inputs, dynamic_shapes=dims, strict=False)


def _cast_module(module: Any, dtype: torch.dtype) -> None:
    import torch

    module.to(dtype)
    for part in module.modules():
        for name, value in list(vars(part).items()):
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                setattr(part, name, value.to(dtype))
    # Types written into the graph: a constant of float32 in a half-precision model would turn everything after it back.
    for node in module.graph.nodes:
        if node.op == "call_function":
            node.args = tuple(_retyped(a, dtype) for a in node.args)
            node.kwargs = {k: _retyped(a, dtype) for k, a in node.kwargs.items()}
    module.recompile()


def _retyped(value: Any, dtype: torch.dtype) -> Any:
    import torch

    return dtype if value is torch.float32 else value


def _to(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if hasattr(value, "is_floating_point") and value.is_floating_point() else value


def open_dims(program: torch.export.ExportedProgram) -> Any:
    """`dynamic_shapes` that leave open what the program leaves open, with its limits."""
    import torch
    from torch.export import Dim

    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    found = []
    for name in program.graph_signature.user_inputs:
        sizes = nodes[str(name)].meta["val"].shape
        dims: dict[int, Any] = {}
        for i, size in enumerate(sizes):
            if isinstance(size, torch.SymInt):
                upper = program.range_constraints[size.node.expr].upper
                dims[i] = Dim.AUTO(max=int(upper)) if upper < 2**31 else Dim.AUTO
        found.append(dims or None)
    return tuple(found)


def in_precision(module: Callable[..., Any], entry: Entry, precision: str) -> Runner:
    """A runner that takes the entry point's own types and gives them back, whatever the module computes in."""
    import torch

    dtype = getattr(torch, DTYPES.get(precision, "float32"))
    wanted = [getattr(torch, spec.dtype) for spec in entry.outputs]

    def run(inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        with torch.no_grad():
            given = module(*(_to(t, dtype) for t in inputs) if precision in DTYPES and precision != "fp32" else inputs)
        return [t if t.dtype == d else t.to(d) for t, d in zip(given, wanted, strict=True)]

    return run
