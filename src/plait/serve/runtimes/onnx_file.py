"""ONNX files of anybody: refused where they are broken, too new, or point at data outside their folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from plait.errors import ServeError

__all__ = ["check_onnx", "tensors_of"]


def check_onnx(path: Path) -> Any:
    """The parsed model, without the data beside it.

    Raises:
        ServeError: no such file, no ONNX, an opset that the installed onnx does not know, or external data that is not a
            plain file in the model's own folder.
    """
    import onnx

    try:
        model = onnx.load(str(path), load_external_data=False)
    except FileNotFoundError:
        raise ServeError(f"{path}: no such file") from None
    except Exception as problem:  # protobuf's own errors have no common base that is public
        raise ServeError(f"{path}: not an ONNX file ({type(problem).__name__}: {problem})") from None
    if not model.opset_import or not model.graph.node:
        raise ServeError(f"{path}: not an ONNX file (it has no graph)")
    newest = onnx.defs.onnx_opset_version()
    for opset in model.opset_import:
        if opset.domain in ("", "ai.onnx") and opset.version > newest:
            raise ServeError(
                f"{path}: it needs opset {opset.version}, the installed onnx {onnx.__version__} knows up to {newest}",
                hint="install a newer onnx and onnxruntime, or export the file with an older opset",
            )
    for tensor in tensors_of(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _check_location(path, tensor)
    return model


def _check_location(path: Path, tensor: Any) -> None:
    location = next((item.value for item in tensor.external_data if item.key == "location"), "")
    parts = (*PurePosixPath(location).parts, *PureWindowsPath(location).parts)
    climbs = ".." in parts or PurePosixPath(location).is_absolute() or bool(PureWindowsPath(location).anchor)
    folder = path.resolve().parent
    file = folder / location
    if not location or climbs or not file.resolve().is_relative_to(folder):
        raise ServeError(
            f"{path}: the data of {tensor.name!r} is at {location!r}, outside of the model's folder; refused",
            hint="a file from somebody else may point at any file of this computer; get one whose data lies beside it",
        )
    if not file.is_file():
        raise ServeError(f"{path}: the data of {tensor.name!r}, {location!r}, is not beside it")
    places = {item.key: item.value for item in tensor.external_data if item.key in ("offset", "length")}
    if not all(value.isdecimal() for value in places.values()) or sum(map(int, places.values())) > file.stat().st_size:
        raise ServeError(
            f"{path}: the data of {tensor.name!r} would lie behind the end of {location!r}, or at no place of it"
        )


def tensors_of(model: Any) -> Iterator[Any]:
    """Every tensor that a model holds: weights and constants, those of functions and inner graphs, too."""
    yield from _of_graph(model.graph)
    for function in model.functions:
        yield from _of_nodes(function.node)


def _of_graph(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _of_nodes(graph.node)


def _of_nodes(nodes: Any) -> Iterator[Any]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            if attribute.HasField("g"):
                yield from _of_graph(attribute.g)
            for graph in attribute.graphs:
                yield from _of_graph(graph)
