"""Which constants are weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
from graphs import classifier, convolutional, model, value, weights  # noqa: E402
from onnx import TensorProto, helper  # noqa: E402

from plait.capture.onnx.job import from_onnx  # noqa: E402
from plait.errors import TargetError  # noqa: E402


def trained(path: Path, **options: list[str]) -> set[str]:
    """Names in the file of the parameters."""
    module = from_onnx(path, **options)
    parameters = {name for name, _ in module.named_parameters()}
    return {name for name, path in module.names.items() if path in parameters}


def save(
    path: Path, nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray], *inputs: onnx.ValueInfoProto
) -> Path:
    onnx.save(model(nodes, list(inputs), [value("y", None)], constants), path)
    return path


def test_linear_layers_and_their_biases(tmp_path: Path):
    """Kernels and the bias that is added; names of other frameworks become names that torch takes."""
    path = classifier(tmp_path / "m.onnx")

    assert trained(path) == {"dense/kernel:0", "dense/bias:0", "out/kernel:0"}
    assert "dense_kernel_0" in dict(from_onnx(path).named_parameters())


def test_statistics_are_buffers_and_pixel_scales_constants(tmp_path: Path):
    """Batch norm trains scale and shift; the running statistics are buffers; what meets the raw input is fixed."""
    path = convolutional(tmp_path / "m.onnx")
    module = from_onnx(path)

    assert trained(path) == {"conv.weight", "bn.weight", "bn.bias", "fc.weight", "fc.bias"}
    assert {name for name, _ in module.named_buffers()} == {"bn.mean", "bn.var"}


def test_tables_positions_masks_and_frequencies(tmp_path: Path):
    """A table and the positions added to it train; a mask and what meets only positions do not."""
    ids = value("ids", ["n", 4], TensorProto.INT64)
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["e"]),
        helper.make_node("Gather", ["places", "steps"], ["p"]),
        helper.make_node("Add", ["e", "p"], ["h"]),
        helper.make_node("Transpose", ["h"], ["ht"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["h", "ht"], ["s"]),
        helper.make_node("Mul", ["s", "root"], ["s1"]),
        helper.make_node("Add", ["s1", "mask"], ["s2"]),
        helper.make_node("Cast", ["ids"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["f", "last"], ["f1"]),
        helper.make_node("MatMul", ["f1", "frequencies"], ["angles"]),
        helper.make_node("Cos", ["angles"], ["cos"]),
        helper.make_node("ReduceMean", ["cos"], ["c"]),
        helper.make_node("Add", ["s2", "c"], ["y"]),
    ]
    mask = np.triu(np.full((4, 4), -3e38, np.float32), 1)
    constants = {
        "table": weights(9, 8),
        "places": weights(6, 8, seed=1),
        "steps": np.arange(4)[None],
        "root": np.array(0.35, np.float32),
        "mask": mask,
        "last": np.array([-1]),
        "frequencies": weights(1, 4),
    }
    path = save(tmp_path / "m.onnx", nodes, constants, ids)

    assert trained(path) == {"table", "places"}
    assert trained(path, train=["freq*"]) == {"table", "places", "frequencies"}
    assert trained(path, fixed=["pla*"]) == {"table"}
    with pytest.raises(TargetError, match=r"train=stps matches no constant of floating type"):
        trained(path, train=["stps"])


def test_a_tied_output_layer_is_one_parameter(tmp_path: Path):
    """A table and its transpose in the same file, as exporters write a tied output layer."""
    table = weights(9, 8)
    nodes = [helper.make_node("Gather", ["table", "ids"], ["e"]), helper.make_node("MatMul", ["e", "turned"], ["y"])]
    ids = value("ids", ["n", 4], TensorProto.INT64)
    path = save(tmp_path / "m.onnx", nodes, {"table": table, "turned": table.T.copy()}, ids)

    assert sum(p.numel() for p in from_onnx(path).parameters()) == 72


def test_awkward_names(tmp_path: Path):
    """Names that are taken, clash with each other or with torch's own, or hold nothing but dots."""
    names = ["training", "a.b", "a", "a/b", "a_b", "...", "forward", "a.b.c"]
    nodes, last = [], "x"
    for index, name in enumerate(names):
        nodes.append(helper.make_node("MatMul", [last, name], [f"v{index}"]))
        last = f"v{index}"
    nodes.append(helper.make_node("Relu", [last], ["y"]))
    constants = {name: weights(3, 3, seed=i) for i, name in enumerate(names)}
    module = from_onnx(save(tmp_path / "m.onnx", nodes, constants, value("x", ["n", 3])))

    assert len(list(module.parameters())) == len(names)
    for name, path in module.names.items():
        assert np.array_equal(module.get_parameter(path).detach().numpy(), constants[name])
