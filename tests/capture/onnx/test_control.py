"""Branches, loops and sequences: equal to onnxruntime, their weights found, captured where a capture can follow them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
import torch  # noqa: E402
from graphs import model, value, weights  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from plait.capture.onnx.job import from_onnx  # noqa: E402

BOOL, INT = TensorProto.BOOL, TensorProto.INT64


def inside(nodes: list[Any], inputs: list[Any], outputs: list[str], **constants: np.ndarray) -> onnx.GraphProto:
    """A graph inside a node, with weights of its own."""
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    return helper.make_graph(nodes, "inside", inputs, [value(name, None, kind(name)) for name in outputs], tensors)


def kind(name: str) -> int:
    return BOOL if name.startswith("go") else TensorProto.FLOAT


def saved(path: Path, made: onnx.ModelProto) -> Path:
    path.write_bytes(made.SerializeToString())
    return path


def compare(path: Path, *inputs: np.ndarray) -> torch.nn.Module:
    """The module, whose output is onnxruntime's."""
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {i.name: x for i, x in zip(session.get_inputs(), inputs, strict=True)})
    module = from_onnx(path).eval()
    with torch.no_grad():
        got = module(*map(torch.from_numpy, inputs)).numpy()
    assert np.abs(got - expected).max() <= 1e-5 * max(1.0, np.abs(expected).max())
    return module


def branching(path: Path) -> Path:
    """x @ w or x @ w + b, by whether the sum of x is above zero; both branches call their weight w."""
    one = inside([helper.make_node("MatMul", ["x", "w"], ["r"])], [], ["r"], w=weights(3, 4))
    product = helper.make_node("MatMul", ["x", "w"], ["m"])
    two = inside(
        [product, helper.make_node("Add", ["m", "b"], ["r"])], [], ["r"], w=weights(3, 4, seed=1), b=weights(4)
    )
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["s"], keepdims=0),
        helper.make_node("Greater", ["s", "zero"], ["c"]),
        helper.make_node("If", ["c"], ["y"], "choose", then_branch=one, else_branch=two),
    ]
    made = model(nodes, [value("x", ["n", 3])], [value("y", None)], {"zero": np.array(0, np.float32)})
    return saved(path, made)


def test_a_branch_on_data(tmp_path: Path):
    """Each side has its own weights; captured, both are computed and the right one picked."""
    path = branching(tmp_path / "m.onnx")
    x = weights(2, 3)
    for sign in (1, -1):
        module = compare(path, sign * np.abs(x))
    exported = torch.export.export(module, (torch.from_numpy(x),), strict=False).module()

    assert {tuple(p.shape) for p in module.parameters()} == {(3, 4), (4,)}
    assert len(list(module.parameters())) == 3
    for sign in (1, -1):
        given = torch.from_numpy(sign * np.abs(x))
        assert torch.allclose(exported(given), module(given))


def looping(path: Path, rounds: Any = 3, *, until: bool = False) -> Path:
    """h = tanh(h @ w + x), round by round, and all of them put together."""
    nodes = [
        helper.make_node("MatMul", ["h", "w"], ["m"]),
        helper.make_node("Add", ["m", "x"], ["a"]),
        helper.make_node("Tanh", ["a"], ["h2"]),
        helper.make_node("Identity", ["h2"], ["row"]),
    ]
    if until:
        nodes += [
            helper.make_node("ReduceMax", ["h2"], ["top"], keepdims=0),
            helper.make_node("Less", ["top", "edge"], ["go2"]),
        ]
    else:
        nodes += [helper.make_node("Identity", ["go"], ["go2"])]
    inputs = [value("i", [], INT), value("go", [], BOOL), value("h", None)]
    body = inside(nodes, inputs, ["go2", "h2", "row"], w=weights(3, 3), edge=np.array(0.4, np.float32))
    loop = helper.make_node("Loop", ["rounds", "yes", "x"], ["last", "rows"], "turns", body=body)
    nodes = [loop, helper.make_node("ReduceSum", ["rows", "first"], ["sum"], keepdims=0)]
    nodes += [helper.make_node("Add", ["sum", "last"], ["y"])]
    constants = {"rounds": np.array(rounds), "yes": np.array(True), "first": np.array([0])}
    return saved(path, model(nodes, [value("x", ["n", 3])], [value("y", None)], constants))


def test_a_loop_of_known_length(tmp_path: Path):
    """Written out by a capture, its weight trained in every round."""
    module = compare(looping(tmp_path / "m.onnx"), weights(2, 3))
    exported = torch.export.export(module, (torch.zeros(2, 3),), strict=False).module()
    given = torch.from_numpy(weights(2, 3))
    (weight,) = module.parameters()
    module(given).sum().backward()

    assert torch.allclose(exported(given), module(given))
    assert weight.grad.abs().sum() > 0


def test_a_weight_that_is_handed_into_a_loop(tmp_path: Path):
    """As tf2onnx writes it: a state that every round gives on as it came is no data."""
    nodes = [
        helper.make_node("MatMul", ["h", "v"], ["h2"]),
        helper.make_node("Identity", ["go"], ["go2"]),
        helper.make_node("Identity", ["v"], ["v2"]),
    ]
    body = inside(
        nodes, [value("i", [], INT), value("go", [], BOOL), value("h", None), value("v", None)], ["go2", "h2", "v2"]
    )
    loop = helper.make_node("Loop", ["rounds", "yes", "x", "w"], ["y", "same"], "turns", body=body)
    constants = {"rounds": np.array(2), "yes": np.array(True), "w": weights(3, 3)}
    path = saved(tmp_path / "m.onnx", model([loop], [value("x", ["n", 3])], [value("y", None)], constants))

    assert [tuple(p.shape) for p in compare(path, weights(2, 3)).parameters()] == [(3, 3)]


def test_a_loop_until_the_data_say_so(tmp_path: Path):
    """It runs; a capture is refused with the reason."""
    module = compare(looping(tmp_path / "m.onnx", 9, until=True), weights(2, 3))
    with pytest.raises(NotImplementedError, match="its condition depends on the values of the data"):
        torch.export.export(module, (torch.zeros(2, 3),), strict=False)


def test_a_loop_without_end(tmp_path: Path):
    """Billions of rounds are refused."""
    module = from_onnx(looping(tmp_path / "m.onnx", 1 << 40))
    with torch.no_grad(), pytest.raises(NotImplementedError, match="more than 65536 rounds"):
        module(torch.zeros(1, 3))


def test_scan_and_sequences(tmp_path: Path):
    """A recurrence over a series; its rows split into a sequence, one taken out, the others joined."""
    step = [
        helper.make_node("MatMul", ["h", "w"], ["m"]),
        helper.make_node("Add", ["m", "x"], ["h2"]),
        helper.make_node("Identity", ["h2"], ["row"]),
    ]
    body = inside(step, [value("h", [3]), value("x", [3])], ["h2", "row"], w=weights(3, 3))
    nodes = [
        helper.make_node("Scan", ["start", "series"], ["end", "rows"], "scan", num_scan_inputs=1, body=body),
        helper.make_node("SplitToSequence", ["rows"], ["parts"], axis=0, keepdims=1),
        helper.make_node("SequenceErase", ["parts", "one"], ["fewer"]),
        helper.make_node("SequenceInsert", ["fewer", "ends"], ["more"]),
        helper.make_node("ConcatFromSequence", ["more"], ["y"], axis=0),
        helper.make_node("Unsqueeze", ["end", "zero"], ["ends"]),
    ]
    constants = {"start": weights(3, seed=4), "one": np.array(1), "zero": np.array([0])}
    path = saved(
        tmp_path / "m.onnx",
        model([nodes[0], nodes[5], *nodes[1:5]], [value("series", [5, 3])], [value("y", None)], constants),
    )
    module = compare(path, weights(5, 3, seed=2))

    assert any(tuple(p.shape) == (3, 3) for p in module.parameters())
