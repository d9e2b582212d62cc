"""Quantised files and onnxruntime's fused operators: equal forward, and their weights train in floating point."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
import torch  # noqa: E402
from graphs import classifier, model, value, weights  # noqa: E402
from onnx import TensorProto, helper  # noqa: E402

from plait.capture.onnx.job import from_onnx  # noqa: E402


def compare(path: Path, x: np.ndarray, within: float = 1e-5) -> torch.nn.Module:
    """The module, equal to onnxruntime; every parameter gets a gradient."""
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {session.get_inputs()[0].name: x})
    module = from_onnx(path)
    out = module(torch.from_numpy(x))
    out.float().square().sum().backward()
    assert np.abs(out.detach().numpy() - expected).max() <= within * max(1.0, np.abs(expected).max())
    assert all(p.grad is not None and p.is_floating_point() for p in module.parameters())
    return module


@pytest.mark.parametrize("form", ["dynamic", "QDQ", "QOperator"])
def test_quantised_by_onnxruntime(tmp_path: Path, form: str):
    """Each form's weights are parameters of floating type: of their own size, or in steps where the file hides the scale."""
    tools = pytest.importorskip("onnxruntime.quantization")
    source, path, x = classifier(tmp_path / "m.onnx"), tmp_path / "q.onnx", weights(4, 6, seed=3)
    if form == "dynamic":
        tools.quantize_dynamic(source, path, weight_type=tools.QuantType.QInt8)
    else:

        class Reader(tools.CalibrationDataReader):
            """Two batches."""

            def __init__(self) -> None:
                self._batches = iter([{"x": x}, {"x": x}])

            def get_next(self) -> dict[str, np.ndarray] | None:
                return next(self._batches, None)

        tools.quantize_static(source, path, Reader(), quant_format=getattr(tools.QuantFormat, form))
    # onnxruntime's own kernel of a quantised softmax rounds some values to the next step.
    module = compare(path, x, within=1.01 / 255 if form == "QDQ" else 1e-5)

    largest = max(p.abs().max().item() for p in module.parameters())
    assert (largest > 2) == (form == "dynamic")
    assert {(6, 8), (8, 4)} <= {tuple(p.shape) for p in module.parameters()}


def test_numbers_of_four_bits(tmp_path: Path):
    """A weight of four bits with a scale for each block of two rows."""
    numbers = np.arange(24).reshape(6, 4) % 16 - 8
    four = helper.make_tensor("w4", TensorProto.INT4, [6, 4], numbers.flatten().tolist())
    nodes = [
        helper.make_node("DequantizeLinear", ["w4", "s"], ["w"], axis=0, block_size=2),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    made = model(nodes, [value("x", ["n", 6])], [value("y", None)], {"s": np.abs(weights(3, 4)) + 0.1}, opset=21)
    made.graph.initializer.append(four)
    made.ir_version = 10
    path = tmp_path / "m.onnx"
    path.write_bytes(made.SerializeToString())
    module = compare(path, weights(2, 6))

    assert np.allclose(next(module.parameters())[0].detach(), numbers[0] * (np.abs(weights(3, 4)) + 0.1)[0])


def test_fused_operators(tmp_path: Path):
    """A product, a biased activation and a norm over the sum of two, as onnxruntime's optimizer writes them."""
    nodes = [
        helper.make_node("FusedMatMul", ["x", "w"], ["a"], alpha=0.5, transB=1, domain="com.microsoft"),
        helper.make_node("BiasGelu", ["a", "b"], ["h"], domain="com.microsoft"),
        helper.make_node("SkipLayerNormalization", ["h", "x", "g", "e"], ["y"], epsilon=1e-5, domain="com.microsoft"),
    ]
    constants = {"w": weights(8, 8), "b": weights(8), "g": 1 + weights(8, seed=1), "e": weights(8, seed=2)}
    made = model(nodes, [value("x", ["n", 3, 8])], [value("y", None)], constants)
    made.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    path = tmp_path / "m.onnx"
    path.write_bytes(made.SerializeToString())
    module = compare(path, weights(2, 3, 8, seed=5))

    assert len(list(module.parameters())) == 4
