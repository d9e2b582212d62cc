"""ONNX files of anybody."""

from __future__ import annotations

from pathlib import Path

import pytest

from plait.errors import ServeError
from plait.serve.runtimes.onnx_file import check_onnx

onnx = pytest.importorskip("onnx")


def model(opset: int = 20, location: str | None = None):
    from onnx import TensorProto, helper

    weight = helper.make_tensor("w", TensorProto.FLOAT, [2], [1.0, 2.0])
    if location is not None:
        weight.ClearField("float_data")
        weight.data_location = TensorProto.EXTERNAL
        weight.external_data.add(key="location", value=location)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", [x], [y], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


def saved(path: Path, found) -> Path:
    path.write_bytes(found.SerializeToString())
    return path


def test_a_good_file_is_parsed(tmp_path):
    """With its weights inside, or beside it."""
    assert check_onnx(saved(tmp_path / "m.onnx", model())).graph.node[0].op_type == "Add"
    (tmp_path / "m.data").write_bytes(b"0" * 8)
    check_onnx(saved(tmp_path / "n.onnx", model(location="m.data")))


@pytest.mark.parametrize("location", ["../secret", "/etc/hostname", "a/../../secret", "..\\secret", "C:\\secret", ""])
def test_data_outside_of_the_folder_is_refused(tmp_path, location):
    """A hostile file would have any file of this computer read as weights."""
    (tmp_path / "secret").write_bytes(b"0" * 8)
    folder = tmp_path / "m"
    folder.mkdir()

    with pytest.raises(ServeError, match="outside of the model's folder; refused"):
        check_onnx(saved(folder / "m.onnx", model(location=location)))


def test_a_link_that_leads_out_is_refused(tmp_path):
    """The same by a symbolic link."""
    (tmp_path / "secret").write_bytes(b"0" * 8)
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "m.data").symlink_to(tmp_path / "secret")

    with pytest.raises(ServeError, match="outside of the model's folder"):
        check_onnx(saved(folder / "m.onnx", model(location="m.data")))


def test_broken_missing_and_too_new(tmp_path):
    """Each is said in one line."""
    (tmp_path / "m.onnx").write_bytes(b"\x00\xffnothing of the kind")
    with pytest.raises(ServeError, match="not an ONNX file"):
        check_onnx(tmp_path / "m.onnx")
    (tmp_path / "empty.onnx").write_bytes(b"")
    with pytest.raises(ServeError, match="not an ONNX file"):
        check_onnx(tmp_path / "empty.onnx")
    with pytest.raises(ServeError, match="no such file"):
        check_onnx(tmp_path / "absent.onnx")
    with pytest.raises(ServeError, match="it needs opset 99, the installed onnx"):
        check_onnx(saved(tmp_path / "new.onnx", model(opset=99)))
