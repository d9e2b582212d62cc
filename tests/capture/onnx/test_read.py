"""Files that are broken, hostile or from another time: each is refused in one short message."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
from graphs import classifier, model, value, weights  # noqa: E402
from onnx import TensorProto, external_data_helper, helper  # noqa: E402

from plait.capture.onnx.read import read_onnx  # noqa: E402
from plait.cli.main import run  # noqa: E402
from plait.errors import TargetError  # noqa: E402


def relu(constants: dict[str, np.ndarray] | None = None, **options: int) -> onnx.ModelProto:
    """A weight added, then a Relu."""
    nodes = [helper.make_node("Add", ["x", "w"], ["a"], "plus"), helper.make_node("Relu", ["a"], ["y"])]
    return model(nodes, [value("x", ["n", 3])], [value("y", ["n", 3])], constants or {"w": weights(3)}, **options)


def refused(path: Path, made: onnx.ModelProto | bytes, expected: str) -> None:
    """The file is refused with these words and the message is short."""
    path.write_bytes(made if isinstance(made, bytes) else made.SerializeToString())
    with pytest.raises(TargetError, match=expected) as caught:
        read_onnx(path)
    assert len(caught.value.message) < 500


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no graph"),
        (b"<html>404 not found</html>" * 30, "not an ONNX model"),
        (os.urandom(4096), "not an ONNX model"),
        (b"\x80\x04\x95cos\nsystem\n", "not an ONNX model"),
    ],
)
def test_no_onnx(tmp_path: Path, content: bytes, words: str):
    """Empty, a web page, noise, a pickle."""
    refused(tmp_path / "m.onnx", content, words)


def test_cut_off(tmp_path: Path):
    """Half a download."""
    path = classifier(tmp_path / "m.onnx")
    refused(path, path.read_bytes()[:200], "not an ONNX model|bytes, the file has|needs")


def test_opsets(tmp_path: Path):
    """Newer than plait knows, older than it reads, and none at all; the message has both numbers."""
    refused(tmp_path / "m.onnx", relu(opset=99), "its opset 99 is newer than 28")
    refused(tmp_path / "m.onnx", relu(opset=6), "its opset 6 is older than 7")
    made = relu()
    del made.opset_import[:]
    refused(tmp_path / "m.onnx", made, "its opset is missing")


def test_every_operator_of_the_table_was_read_up_to_the_newest_opset():
    """When onnx brings a newer opset, NEWEST_OPSET is raised by hand after reading what changed."""
    from plait.capture.onnx.read import NEWEST_OPSET

    assert onnx.defs.onnx_opset_version() >= NEWEST_OPSET


def test_unknown_operators(tmp_path: Path):
    """By name, with the node's name; another vendor's with its domain; what is close is offered."""
    from plait.capture.onnx.job import from_onnx

    for op, domain, words in [
        ("RoiAlign", "", r"node 'nms' \(RoiAlign\): plait imports no such operator"),
        ("Sofmax", "", "did you mean 'Softmax'"),
        ("Magic", "com.acme", r"\(com\.acme\.Magic\)"),
    ]:
        made = model([helper.make_node(op, ["x"], ["y"], "nms", domain=domain)], [value("x", [1])], [value("y", [1])])
        made.opset_import.append(helper.make_opsetid("com.acme", 1))
        (tmp_path / "m.onnx").write_bytes(made.SerializeToString())
        with pytest.raises(TargetError, match=words):
            from_onnx(tmp_path / "m.onnx")


def test_graphs_that_make_no_sense(tmp_path: Path):
    """A value that nothing makes, one made twice, one that needs itself, and an output that is not there."""
    ins, outs = [value("x", ["n", 3])], [value("y", ["n", 3])]
    missing = model([helper.make_node("Add", ["x", "w"], ["y"], "plus")], ins, outs)
    refused(tmp_path / "m.onnx", missing, r"node 'plus' \(Add\) needs 'w', which no input, weight or node gives")
    twice = model([helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Abs", ["x"], ["y"])], ins, outs)
    refused(tmp_path / "m.onnx", twice, "'y' is made twice")
    circle = [helper.make_node("Add", ["x", "b"], ["a"], "one"), helper.make_node("Relu", ["a"], ["b"], "two")]
    circle.append(helper.make_node("Abs", ["b"], ["y"]))
    refused(tmp_path / "m.onnx", model(circle, ins, outs), "depends on its own output")
    refused(tmp_path / "m.onnx", model([], ins, [value("z", [1])]), "the outputs needs? 'z'")


def test_a_chain_longer_than_the_stack(tmp_path: Path):
    """Five thousand nodes in a row are ordered without recursion."""
    nodes = [helper.make_node("Relu", [f"v{i}"], [f"v{i + 1}"]) for i in range(5000)]
    path = tmp_path / "m.onnx"
    path.write_bytes(model(nodes[::-1], [value("v0", [1])], [value("v5000", [1])]).SerializeToString())

    assert [node.outputs[0] for node in read_onnx(path).nodes[:2]] == ["v1", "v2"]


@pytest.mark.parametrize(
    ("dims", "data", "words"),
    [
        ([3, 1000], b"\0" * 12, "needs 12000 bytes, the file has 12"),
        ([3], b"\0" * 16, "needs 12 bytes, the file has 16"),
        ([-3], b"\0" * 12, "is not possible"),
        ([1 << 31, 1 << 31], b"", "is not possible"),
    ],
)
def test_sizes_that_lie(tmp_path: Path, dims: list[int], data: bytes, words: str):
    """A shape that the data do not fill, or that nothing could."""
    made = relu()
    tensor = made.graph.initializer[0]
    tensor.ClearField("dims")
    tensor.dims.extend(dims)
    tensor.raw_data = data
    refused(tmp_path / "m.onnx", made, words)


def test_typed_data_that_do_not_fit(tmp_path: Path):
    """The same where numbers are not stored as bytes."""
    made = relu()
    del made.graph.initializer[:]
    made.graph.initializer.append(TensorProto(name="w", dims=[3, 5], data_type=TensorProto.FLOAT, float_data=[1.0]))
    refused(tmp_path / "m.onnx", made, r"its data do not fit its shape \[3, 5\]")


def test_text_is_no_weight(tmp_path: Path):
    """Text, and numbers of four bits of which there are too few or too many."""
    for kind, words in [(TensorProto.STRING, "text"), (TensorProto.INT4, r"\[3\] needs 2 bytes, the file has 12")]:
        made = relu()
        made.graph.initializer[0].data_type = kind
        refused(tmp_path / "m.onnx", made, words)


def sparse(dims: list[int], indices: list[int], *, values: int = 2) -> onnx.ModelProto:
    """The weight of `relu` as a sparse tensor."""
    made = relu()
    del made.graph.initializer[:]
    numbers = helper.make_tensor("w", TensorProto.FLOAT, [values], [1.5, -2.5][:values])
    places = helper.make_tensor("p", TensorProto.INT64, [len(indices)], indices)
    made.graph.sparse_initializer.append(helper.make_sparse_tensor(numbers, places, dims))
    return made


def test_sparse_weights(tmp_path: Path):
    """Filled with zeros; what does not fit, or would fill the memory, is refused."""
    path = tmp_path / "m.onnx"
    path.write_bytes(sparse([3], [0, 2]).SerializeToString())

    assert read_onnx(path).constants["w"].tolist() == [1.5, 0.0, -2.5]
    refused(path, sparse([3], [0, 3]), "its indices do not fit")
    refused(path, sparse([3], [0, 1, 2]), "its indices do not fit")
    refused(path, sparse([1 << 20, 1 << 20], [0, 2]), "too large to fill")


def test_graphs_inside_graphs_inside_graphs(tmp_path: Path):
    """A file that nests branches without end is refused before Python's stack is full."""
    inner = helper.make_graph([helper.make_node("Identity", ["x"], ["b"])], "t", [], [value("b", None)])
    for _ in range(30):
        node = helper.make_node("If", ["c"], ["b"], "branch", then_branch=inner, else_branch=inner)
        del node.attribute[1:]
        inner = helper.make_graph([node], "t", [], [value("b", None)])
    node = helper.make_node("If", ["c"], ["y"], "branch", then_branch=inner, else_branch=inner)
    made = model([node], [value("x", [1]), value("c", [], TensorProto.BOOL)], [value("y", None)])
    refused(tmp_path / "m.onnx", made, "more than 20 graphs within each other|not an ONNX model")


@pytest.fixture
def external(tmp_path: Path) -> Callable[..., Path]:
    """A model in a folder of its own whose weight lies at `location`."""
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    data = weights(3).tobytes()
    for file in (folder / "w.bin", folder / "sub" / "w.bin", tmp_path / "secret.bin"):
        file.write_bytes(data)
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    (folder / "linked").symlink_to(tmp_path)

    def make(location: str, **more: int) -> Path:
        made = relu()
        tensor = made.graph.initializer[0]
        external_data_helper.set_external_data(tensor, location=location, **more)
        tensor.ClearField("raw_data")
        (folder / "m.onnx").write_bytes(made.SerializeToString())
        return folder / "m.onnx"

    return make


@pytest.mark.parametrize("location", ["w.bin", "sub/w.bin"])
def test_data_beside_the_model(external: Callable[..., Path], location: str):
    """In the model's folder and under it."""
    assert np.array_equal(read_onnx(external(location)).constants["w"], weights(3))


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("../secret.bin", "outside the model's folder"),
        ("sub/../../secret.bin", "outside the model's folder"),
        ("..\\secret.bin", "outside the model's folder"),
        ("/etc/passwd", "no place in the model's folder"),
        ("C:\\secret.bin", "no place in the model's folder"),
        ("", "no place in the model's folder"),
        ("link.bin", "a symbolic link"),
        ("linked/secret.bin", "a symbolic link"),
        ("sub", "no file"),
        ("gone.bin", "is not there"),
    ],
)
def test_data_elsewhere(external: Callable[..., Path], location: str, words: str):
    """Paths that climb out, are absolute, go through links, or lead nowhere."""
    with pytest.raises(TargetError, match=words):
        read_onnx(external(location))


@pytest.mark.parametrize(("offset", "length"), [(4, 12), (0, 24), (1 << 40, 12), (0, 4)])
def test_places_in_a_data_file_that_lie(external: Callable[..., Path], offset: int, length: int):
    """Behind the end of the file, or of another length than the shape's."""
    with pytest.raises(TargetError, match=r"needs 12 bytes, the data file w\.bin has"):
        read_onnx(external("w.bin", offset=offset, length=length))


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Status 2 and no traceback, for a missing and for a broken file."""
    (tmp_path / "broken.onnx").write_bytes(b"no")
    for name in ("none.onnx", "broken.onnx"):
        assert run(["verify", f"onnx:{tmp_path / name}", "--devices", "1", "--plan", "dp=1"]) == 2
        told = capsys.readouterr().err
        assert name in told
        assert "Traceback" not in told
