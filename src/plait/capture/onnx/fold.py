"""Quantised weights, scaled back once: they become constants of floating type that train in their own units.

    DequantizeLinear of constants        a constant
    Gather, then DequantizeLinear        Gather in a table of real numbers
    QLinearConv, QLinearMatMul, QGemm    DequantizeLinear -> Conv, MatMul, Gemm -> QuantizeLinear
    MatMulNBits                          MatMul
    DynamicQuantizeMatMul,               the same with a weight of scale 1
        MatMulIntegerToFloat

What a file rounds between its layers stays rounded (`plait.capture.onnx.ops.quantized`). MatMulInteger and ConvInteger do not
know the scale of their weights, which train in steps of the quantisation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from plait.capture.onnx.values import Array, Call

__all__ = ["Folded", "folded"]

Folded = tuple[list[Any], dict[str, Array]]
"""Nodes in place of one, and constants that they need."""


def folded(node: Any, constants: dict[str, Array], makers: dict[str, Any]) -> Folded | None:
    """What stands for the node; None where it stays. `constants` by name and `makers` of values, those read so far."""
    if node.op == "DequantizeLinear" and getattr(makers.get(node.inputs[0]), "op", "") == "Gather":
        return _table(node, makers[node.inputs[0]], constants)
    rule = _RULES.get(node.op) if node.domain in ("", "com.microsoft") else None
    return None if rule is None else rule(node, constants)


def _scaled(
    node: Any, constants: dict[str, Array], slots: tuple[int, int, int], axis: int, block: int = 0
) -> Array | None:
    from plait.capture.onnx.ops.quantized import scaled_back

    names = [node.inputs[slot] if slot < len(node.inputs) else "" for slot in slots]
    if any(name and name not in constants for name in names) or not names[0] or not names[1]:
        return None
    x, scale, zero = (constants[name] if name else None for name in names)
    assert x is not None
    assert scale is not None
    return scaled_back(x, scale, zero, axis % x.ndim if x.ndim else 0, block)


def _dequantize(node: Any, constants: dict[str, Array]) -> Folded | None:
    axis, block = node.attributes.get("axis", 1), node.attributes.get("block_size", 0)
    array = _scaled(node, constants, (0, 1, 2), axis, block)
    return None if array is None else ([], {node.outputs[0]: array})


def _table(node: Any, gather: Any, constants: dict[str, Array]) -> Folded | None:
    """Rows of a table that is kept quantised with one scale for all."""
    scale = constants.get(node.inputs[1])
    if gather.inputs[0] not in constants or scale is None or scale.size != 1:
        return None
    array = _scaled(replace(node, inputs=(gather.inputs[0], *node.inputs[1:])), constants, (0, 1, 2), 0)
    if array is None:
        return None
    name = f"{node.outputs[0]}.table"
    return [replace(gather, inputs=(name, gather.inputs[1]), outputs=node.outputs)], {name: array}


def _parts(
    node: Any, op: str, weight: Array, x: tuple[int, int, int], y: tuple[int, int], bias: Array | None
) -> Folded:
    """x scaled back, the operator on real numbers, its result quantised again."""
    out, given = node.outputs[0], node.inputs
    names = {"x": f"{out}.x", "w": f"{out}.weight", "b": f"{out}.bias", "y": f"{out}.y"}
    keep = {key: value for key, value in node.attributes.items() if key != "channels_last"}
    inputs = (names["x"], names["w"]) if bias is None else (names["x"], names["w"], names["b"])
    opset = max(node.opset, 13)
    nodes = [
        replace(
            node,
            op="DequantizeLinear",
            domain="",
            opset=opset,
            attributes={},
            inputs=tuple(given[i] for i in x),
            outputs=(names["x"],),
        ),
        replace(node, op=op, domain="", opset=opset, attributes=keep, inputs=inputs, outputs=(names["y"],)),
        replace(
            node,
            op="QuantizeLinear",
            domain="",
            opset=opset,
            attributes={},
            inputs=(names["y"], *(given[i] for i in y)),
            outputs=(out,),
        ),
    ]
    return nodes, {names["w"]: weight, **({} if bias is None else {names["b"]: bias})}


def _bias(node: Any, constants: dict[str, Array], slot: int, scales: tuple[int, int]) -> tuple[Array | None, bool]:
    """(the bias in real units, whether all of it is there)."""
    if slot >= len(node.inputs) or not node.inputs[slot]:
        return None, True
    names = [node.inputs[index] for index in (slot, *scales)]
    if any(name not in constants for name in names):
        return None, False
    bias, a, b = (np.asarray(constants[name], np.float32) for name in names)
    return bias * (a.reshape(()) * b.reshape(-1)), True


def _conv(node: Any, constants: dict[str, Array]) -> Folded | None:
    weight = _scaled(node, constants, (3, 4, 5), 0)
    bias, is_whole = _bias(node, constants, 8, (1, 4))
    if weight is None or not is_whole:
        return None
    return _parts(node, "Conv", weight, (0, 1, 2), (6, 7), bias)


def _matmul(node: Any, constants: dict[str, Array]) -> Folded | None:
    weight = _scaled(node, constants, (3, 4, 5), -1)
    a_scale = constants.get(node.inputs[1])
    if weight is None or a_scale is None or a_scale.size > 1:
        return None
    return _parts(node, "MatMul", weight, (0, 1, 2), (6, 7), None)


def _gemm(node: Any, constants: dict[str, Array]) -> Folded | None:
    weight = _scaled(node, constants, (3, 4, 5), 0 if node.attributes.get("transB", 0) else 1)
    bias, is_whole = _bias(node, constants, 6, (1, 4))
    if weight is None or not is_whole or len(node.inputs) < 9 or node.attributes.get("alpha", 1.0) != 1.0:
        return None
    return _parts(node, "Gemm", weight, (0, 1, 2), (7, 8), bias)


def _few_bits(node: Any, constants: dict[str, Array]) -> Folded | None:
    import torch

    from plait.capture.onnx.ops.quantized import weight_of_few_bits

    names = [*node.inputs[1:], "", "", "", ""][:4]
    if any(name and name not in constants for name in names):
        return None
    given = [torch.from_numpy(np.array(constants[name])) if name else None for name in names]
    weight = weight_of_few_bits(Call(node, False, torch.device("cpu")), *given).float().numpy().T
    out, bias = node.outputs[0], node.inputs[5] if len(node.inputs) > 5 else ""
    made = f"{out}.y" if bias else out
    matmul = replace(
        node, op="MatMul", domain="", opset=13, attributes={}, inputs=(node.inputs[0], f"{out}.weight"), outputs=(made,)
    )
    add = replace(node, op="Add", domain="", opset=13, attributes={}, inputs=(made, bias), outputs=(out,))
    return [matmul, add] if bias else [matmul], {f"{out}.weight": np.ascontiguousarray(weight)}


def _of_scale_one(node: Any, constants: dict[str, Array], slots: tuple[int, int, int]) -> Folded | None:
    weight = _scaled(node, constants, slots, -1)
    if weight is None:
        return None
    out, inputs = node.outputs[0], list(node.inputs)
    inputs[slots[0]], inputs[slots[1]] = f"{out}.weight", f"{out}.one"
    if slots[2] < len(inputs):
        inputs[slots[2]] = ""
    made = {f"{out}.weight": weight, f"{out}.one": np.ones((), np.float32)}
    return [replace(node, inputs=tuple(inputs))], made


_RULES: dict[str, Callable[[Any, dict[str, Array]], Folded | None]] = {
    "DequantizeLinear": _dequantize,
    "QLinearConv": _conv,
    "QLinearMatMul": _matmul,
    "QGemm": _gemm,
    "MatMulNBits": _few_bits,
    "DynamicQuantizeMatMul": lambda node, constants: _of_scale_one(node, constants, (1, 2, 3)),
    "MatMulIntegerToFloat": lambda node, constants: _of_scale_one(node, constants, (1, 3, 5)),
}
