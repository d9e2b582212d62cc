"""How much an operator computes and writes, from the shapes it was captured with."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from plait.run.shard.operation import Op, is_tensor
from plait.run.shard.rules.contraction import letters_of

__all__ = ["elements_of", "flops_of", "hint_shape"]


def hint_shape(node: fx.Node) -> tuple[int, ...]:
    """Shape at capture: symbolic sizes as they were then."""
    return tuple(_hint(size) for size in node.meta["val"].shape)


def _hint(size: Any) -> int:
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return int(hint) if hint is not None else 1


def elements_of(node: fx.Node) -> float:
    """Elements of a node's tensor, or of all its tensors."""
    value = node.meta.get("val")
    values = value if isinstance(value, tuple | list) else [value]
    return float(sum(math.prod(map(_hint, v.shape)) for v in values if isinstance(v, torch.Tensor)))


def flops_of(node: fx.Node) -> float:
    """Floating-point operations of a product, a convolution or an attention; 0 of anything else."""
    if node.op != "call_function" or not is_tensor(node):
        return 0.0
    op = Op(node, 1, {})
    letters = letters_of(op)
    if letters is not None:
        sizes: dict[str, int] = {}
        for operand, text in letters.operands:
            sizes.update(zip(text, hint_shape(operand), strict=True))
        sizes.pop(".", None)
        for fixed in letters.fixed[1:]:
            sizes.pop(fixed, None)  # a row belongs to one expert only
        return 2.0 * math.prod(sizes.values())
    name = getattr(getattr(node.target, "overloadpacket", None), "__name__", "")
    if name == "scaled_dot_product_attention":
        *lead, length, width = hint_shape(op["query"])
        return 4.0 * math.prod(lead) * length * width * hint_shape(op["key"])[-2]
    if name.startswith(("conv", "_convolution")):
        return 2.0 * elements_of(node) * math.prod(hint_shape(op["weight"])[1:])
    return 0.0
