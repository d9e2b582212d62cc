"""Small ONNX graphs for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = ["classifier", "convolutional", "model", "value"]


def value(name: str, shape: list[Any], kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    """An input or output."""
    return helper.make_tensor_value_info(name, kind, shape)


def model(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    constants: dict[str, np.ndarray] | None = None,
    opset: int = 17,
) -> onnx.ModelProto:
    """A model with constants as initializers."""
    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in (constants or {}).items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def weights(*shape: int, seed: int = 0, scale: float = 0.3) -> np.ndarray:
    """Random float32."""
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def classifier(path: Path, *, batch: Any = "batch") -> Path:
    """MatMul, Add, Relu, MatMul, Softmax: as TensorFlow writes a dense classifier."""
    nodes = [
        helper.make_node("MatMul", ["x", "dense/kernel:0"], ["a"], "first"),
        helper.make_node("Add", ["a", "dense/bias:0"], ["b"]),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("MatMul", ["c", "out/kernel:0"], ["d"]),
        helper.make_node("Softmax", ["d"], ["y"], axis=-1),
    ]
    constants = {
        "dense/kernel:0": weights(6, 8),
        "dense/bias:0": weights(8, seed=1),
        "out/kernel:0": weights(8, 4, seed=2),
    }
    onnx.save(model(nodes, [value("x", [batch, 6])], [value("y", [batch, 4])], constants), path)
    return path


def convolutional(path: Path) -> Path:
    """Conv, batch norm, Relu, pool, Gemm; what stands at the input's side is a constant scale."""
    nodes = [
        helper.make_node("Mul", ["x", "scale"], ["x1"]),
        helper.make_node("Conv", ["x1", "conv.weight"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["a", "bn.weight", "bn.bias", "bn.mean", "bn.var"], ["b"], momentum=0.8),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("MaxPool", ["c"], ["d"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Flatten", ["d"], ["e"]),
        helper.make_node("Gemm", ["e", "fc.weight", "fc.bias"], ["y"], transB=1),
    ]
    constants = {
        "scale": np.array([[[[0.5]], [[2.0]]]], np.float32),
        "conv.weight": weights(4, 2, 3, 3),
        "bn.weight": 1 + weights(4),
        "bn.bias": weights(4, seed=1),
        "bn.mean": weights(4, seed=2),
        "bn.var": 1 + abs(weights(4, seed=3)),
        "fc.weight": weights(5, 36, seed=4),
        "fc.bias": weights(5, seed=5),
    }
    onnx.save(model(nodes, [value("x", ["n", 2, 6, 6])], [value("y", ["n", 5])], constants), path)
    return path
