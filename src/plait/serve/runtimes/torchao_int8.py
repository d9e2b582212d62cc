"""Linear layers of an exported program in int8, by torchao."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["exported", "quantised"]


def quantised(program: torch.export.ExportedProgram, *, weight_only: bool) -> Any:
    """The program as a module whose linear weights are int8; a weight that something else reads, too, stays as it is."""
    import torch
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

    module: Any = program.module(check_guards=False)
    config = Int8WeightOnlyConfig() if weight_only else Int8DynamicActivationInt8WeightConfig()
    linear = torch.ops.aten.linear.default
    weights = {n.args[1].target for n in module.graph.nodes if n.target is linear and n.args[1].op == "get_attr"}
    for node in module.graph.nodes:
        if node.op == "get_attr" and any(u.target is not linear or u.args[1] is not node for u in node.users):
            weights.discard(node.target)
    for name in sorted(weights):
        owner, _, last = name.rpartition(".")
        holder = module.get_submodule(owner)
        weight = getattr(holder, last).detach().clone()
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        quantize_(layer, config)
        setattr(holder, last, torch.nn.Parameter(layer.weight, requires_grad=False))
    for node in module.graph.nodes:
        if node.target is linear:
            node.target = torch.nn.functional.linear  # the function that torchao's tensors take over
    module.recompile()
    return module


def exported(program: torch.export.ExportedProgram, *, weight_only: bool) -> torch.export.ExportedProgram:
    """The quantised program, exported again with its int8 weights and scales as plain tensors."""
    import torch
    from torchao.utils import unwrap_tensor_subclass

    from plait.serve.runtimes.casting import open_dims

    module = unwrap_tensor_subclass(quantised(program, weight_only=weight_only))
    with torch.no_grad():
        return torch.export.export(module, program.example_inputs[0], dynamic_shapes=open_dims(program), strict=False)
