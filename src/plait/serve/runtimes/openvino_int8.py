"""Weights of an OpenVINO model's matrix multiplications as int8, one scale for each output channel.

    Constant (int8) ── Convert ── Multiply (scale) ── MatMul

This is the form that the runtime keeps compressed in memory, and can multiply as it is.
"""

from __future__ import annotations

from typing import Any

__all__ = ["compress"]


def compress(model: Any) -> int:
    """Change the model in place; gives the number of weights that are int8 now.

    Symmetric, round to nearest: w is scale * q with q from -127 to 127, scale the largest |w| of the channel over 127.
    """
    import numpy as np
    from openvino import opset13

    made: dict[tuple[str, bool], Any] = {}
    for node in model.get_ordered_ops():
        if node.get_type_name() != "MatMul":
            continue
        source = node.input_value(1).get_node()
        if source.get_type_name() != "Constant" or source.get_element_type().get_type_name() != "f32":
            continue
        weight = source.get_data()
        if weight.ndim != 2:
            continue
        by_rows = bool(node.get_attributes()["transpose_b"])
        key = (source.get_friendly_name(), by_rows)
        if key not in made:
            scale = np.abs(weight).max(axis=1 if by_rows else 0, keepdims=True) / 127
            scale[scale == 0] = 1
            rounded = np.clip(np.rint(weight / scale), -127, 127).astype(np.int8)
            wide = opset13.convert(opset13.constant(rounded), "f32")
            made[key] = opset13.multiply(wide, opset13.constant(scale.astype(np.float32)))
        node.input(1).replace_source_output(made[key].output(0))
    return len(made)
