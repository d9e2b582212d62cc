"""Operators against the ONNX standard's own cases, and what changed between opsets."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
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
from plait.capture.onnx.ops.table import OPERATORS  # noqa: E402
from plait.capture.onnx.values import constant_tensor  # noqa: E402
from plait.errors import PlaitError  # noqa: E402

PART = 4  # every fourth case; all of them take half a minute


def cases() -> Iterator[Any]:
    """The standard's cases of one operator that the table has, with plain numbers."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = collect_testcases(None)
    for case in found:
        nodes = case.model.graph.node
        arrays = [array for pair in case.data_sets[:1] for side in pair for array in side]
        plain = all(isinstance(array, np.ndarray) and array.dtype != object for array in arrays)
        # 16-bit attention differs from the reference in its last bit.
        if len(nodes) == 1 and ("", nodes[0].op_type) in OPERATORS and plain and "attention" not in case.name:
            yield case


def as_constants(case: Any) -> tuple[onnx.ModelProto, list[np.ndarray]]:
    """The case with its whole numbers (axes, shapes, pads) as constants, as exporters write them."""
    made = onnx.ModelProto()
    made.CopyFrom(case.model)
    inputs, kept = list(made.graph.input), []
    del made.graph.input[:]
    for index, (info, array) in enumerate(zip(inputs, case.data_sets[0][0], strict=True)):
        data = array.dtype.kind == "f" and not (index and array.ndim == 0)
        if (index == 0 and made.graph.node[0].op_type not in ("ConstantOfShape", "Range")) or (
            data and "resize" not in case.name
        ):
            made.graph.input.append(info)
            kept.append(array)
        else:
            made.graph.initializer.append(numpy_helper.from_array(array, info.name))
    return made, kept


def test_the_standards_own_cases(tmp_path: Path):
    """Equal, or refused with the operator's reason; never another number."""
    equal, wrong = 0, []
    for case in list(cases())[::PART]:
        if any(kind in case.name for kind in ("uint16", "uint32", "uint64", "empty_set", "training_mode")):
            continue  # torch computes little in these; the module's mode decides, not the file's
        made, inputs = as_constants(case)
        (tmp_path / "m.onnx").write_bytes(made.SerializeToString())
        try:
            module = from_onnx(tmp_path / "m.onnx").eval()
            with torch.no_grad():
                outputs = module(*(constant_tensor(np.asarray(x)) for x in inputs))
        except (PlaitError, NotImplementedError):
            continue
        expected = case.data_sets[0][1]
        for got, want in zip(outputs if isinstance(outputs, tuple) else (outputs,), expected, strict=False):
            mine = got.float().numpy() if got.dtype == torch.bfloat16 else got.numpy()
            near = want.dtype.kind in "fV" or want.dtype.name == "bfloat16"
            same = mine.shape == want.shape and (
                np.allclose(mine.astype(float), want.astype(float), rtol=case.rtol, atol=1e-5, equal_nan=True)
                if near
                else np.array_equal(mine, want)
            )
            equal += same
            if not same:
                wrong.append(case.name)

    assert not wrong
    assert equal > 220


def compare(path: Path, made: onnx.ModelProto, *inputs: np.ndarray) -> None:
    """The module's outputs are onnxruntime's, within 1e-5 of the largest."""
    path.write_bytes(made.SerializeToString())
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    expected = session.run(None, {i.name: x for i, x in zip(session.get_inputs(), inputs, strict=True)})
    with torch.no_grad():
        outputs = from_onnx(path).eval()(*map(torch.from_numpy, inputs))
    for got, want in zip(outputs if isinstance(outputs, tuple) else (outputs,), expected, strict=True):
        assert got.shape == want.shape
        assert np.abs(got.numpy() - want).max() <= 1e-5 * max(1.0, np.abs(want).max())


@pytest.mark.parametrize("opset", [7, 11, 12, 13])
def test_softmax_before_and_from_13(tmp_path: Path, opset: int):
    """Before 13 everything from the axis on is one distribution, from 13 the axis alone."""
    node = helper.make_node("Softmax", ["x"], ["y"], axis=1)
    made = model([node], [value("x", [2, 3, 4])], [value("y", [2, 3, 4])], opset=opset)
    compare(tmp_path / "m.onnx", made, weights(2, 3, 4))


@pytest.mark.parametrize("opset", [7, 10, 11, 13, 18])
def test_arguments_that_moved_from_attributes_to_inputs(tmp_path: Path, opset: int):
    """Squeeze, ReduceSum, ReduceMean, Clip, Pad and Slice in the form of each opset."""
    nodes, constants, last = [], {}, "x"

    def step(op: str, moved_in: int, inputs: dict[str, Any], **attributes: Any) -> None:
        nonlocal last
        names = []
        if opset >= moved_in:
            for name, array in inputs.items():
                constants[f"{op}.{name}"] = np.asarray(array)
                names.append(f"{op}.{name}")
        else:
            attributes |= {n: np.asarray(a).tolist() for n, a in inputs.items()}
        nodes.append(helper.make_node(op, [last, *names], [f"{op}.y"], **attributes))
        last = f"{op}.y"

    step("Slice", 10, {"starts": [0, 1], "ends": [2, 99], "axes": [0, 2]})
    step("Clip", 11, {"min": np.float32(-0.2), "max": np.float32(0.3)})
    step("Pad", 11, {"pads": [0, 1, 0, 0, 0, 2]})
    step("Unsqueeze", 13, {"axes": [0]})
    step("Squeeze", 13, {"axes": [0]})
    step("ReduceSum", 13, {"axes": [1]}, keepdims=0)
    step("ReduceMean", 18, {"axes": [1]}, keepdims=1)
    made = model(nodes, [value("x", [2, 3, 4])], [value(last, None)], constants, opset=opset)
    compare(tmp_path / "m.onnx", made, weights(2, 3, 4))


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_recurrent_layers(tmp_path: Path, kind: str, direction: str):
    """Gates in ONNX's order, both biases, the states, each direction."""
    ways, hidden, gates = 1 + (direction == "bidirectional"), 5, {"LSTM": 4, "GRU": 3, "RNN": 1}[kind]
    constants = {
        "w": weights(ways, gates * hidden, 3),
        "r": weights(ways, gates * hidden, hidden, seed=1),
        "b": weights(ways, 2 * gates * hidden, seed=2),
    }
    more = {"linear_before_reset": 1} if kind == "GRU" else {}
    outputs = ["y", "h", "c"] if kind == "LSTM" else ["y", "h"]
    node = helper.make_node(kind, ["x", "w", "r", "b"], outputs, hidden_size=hidden, direction=direction, **more)
    made = model([node], [value("x", [4, 2, 3])], [value(name, None) for name in outputs], constants)
    compare(tmp_path / "m.onnx", made, weights(4, 2, 3))


def test_the_other_gru(tmp_path: Path):
    """The reset gate before the product, which torch has no kernel for."""
    constants = {"w": weights(1, 15, 3), "r": weights(1, 15, 5, seed=1), "b": weights(1, 30, seed=2)}
    node = helper.make_node("GRU", ["x", "w", "r", "b"], ["y", "h"], hidden_size=5)
    made = model([node], [value("x", [4, 2, 3])], [value("y", None), value("h", None)], constants)
    compare(tmp_path / "m.onnx", made, weights(4, 2, 3))


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID", "NOTSET"])
def test_convolutions_and_pools(tmp_path: Path, auto_pad: str):
    """Strided, padded each way, grouped, pooled both ways and turned round again."""
    pads = {"pads": [1, 0, 2, 1]} if auto_pad == "NOTSET" else {"auto_pad": auto_pad}
    pool = {"kernel_shape": [3, 2], "strides": [2, 1], **({"pads": [1, 0, 2, 1]} if auto_pad == "NOTSET" else pads)}
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["a"], strides=[2, 1], group=2, **pads),
        helper.make_node("MaxPool", ["a"], ["m"], **pool),
        helper.make_node("AveragePool", ["m"], ["p"], **pool),
        helper.make_node("ConvTranspose", ["p", "t"], ["y"], strides=[2, 2], **pads),
    ]
    constants = {"w": weights(4, 1, 3, 3), "b": weights(4), "t": weights(4, 2, 3, 3, seed=1)}
    made = model(nodes, [value("x", [2, 2, 15, 11])], [value("y", None)], constants)
    compare(tmp_path / "m.onnx", made, weights(2, 2, 15, 11))


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("place", ["half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"])
def test_resize(tmp_path: Path, mode: str, place: str):
    """By sizes, up along one axis and down along the other."""
    node = helper.make_node("Resize", ["x", "", "", "s"], ["y"], mode=mode, coordinate_transformation_mode=place)
    made = model([node], [value("x", [1, 2, 5, 7])], [value("y", None)], {"s": np.array([1, 2, 8, 4])})
    compare(tmp_path / "m.onnx", made, weights(1, 2, 5, 7))


def test_shapes_of_an_open_batch_stay_sizes(tmp_path: Path):
    """Shape, Gather, Concat and Reshape are followed by torch.export with the batch open."""
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["n"]),
        helper.make_node("Concat", ["n", "rest"], ["t"], axis=0),
        helper.make_node("Reshape", ["x", "t"], ["r"]),
        helper.make_node("MatMul", ["r", "w"], ["y"]),
    ]
    constants = {"zero": np.array([0]), "rest": np.array([2, 3]), "w": weights(3, 4)}
    path = tmp_path / "m.onnx"
    onnx.save(model(nodes, [value("x", ["n", 6])], [value("y", None)], constants), path)
    exported = torch.export.export(
        from_onnx(path), (torch.zeros(4, 6),), dynamic_shapes=(({0: torch.export.Dim.DYNAMIC},),)
    )

    assert exported.module()(torch.zeros(7, 6)).shape == (7, 2, 4)


def test_a_shape_out_of_the_data_is_refused_by_a_capture(tmp_path: Path):
    """Run as it stands it is read from the data; captured, it is refused with the reason, and the node in a note."""
    nodes = [helper.make_node("Relu", ["x"], ["a"]), helper.make_node("Reshape", ["a", "s"], ["y"], "fold")]
    made = model(nodes, [value("x", [4]), value("s", [2], TensorProto.INT64)], [value("y", None)])
    (tmp_path / "m.onnx").write_bytes(made.SerializeToString())
    module, inputs = from_onnx(tmp_path / "m.onnx"), (torch.zeros(4), torch.tensor([2, 2]))
    assert module(*inputs).shape == (2, 2)
    with pytest.raises(NotImplementedError, match="its shape depends on the values of the data") as caught:
        torch.export.export(module, inputs, strict=False)

    assert "node 'fold' (Reshape)" in caught.value.__notes__[0]


def test_a_small_file_that_asks_for_terabytes(tmp_path: Path):
    """ConstantOfShape and Expand blow nothing up."""
    from plait.capture.target import load_target

    nodes = [helper.make_node("ConstantOfShape", ["s"], ["c"], "bomb"), helper.make_node("Add", ["h", "c"], ["y"])]
    nodes.insert(0, helper.make_node("MatMul", ["x", "w"], ["h"]))
    made = model(nodes, [value("x", ["n", 3])], [value("y", None)], {"s": np.array([1 << 20] * 2), "w": weights(3, 1)})
    (tmp_path / "m.onnx").write_bytes(made.SerializeToString())
    with pytest.raises(PlaitError, match=r"node 'bomb' \(ConstantOfShape\).*would make a tensor"):
        load_target(f"onnx:{tmp_path / 'm.onnx'}")
