"""An ONNX file, read with suspicion: everything that the importer relies on is checked here.

What a file may get wrong, and what is refused with a short message: it is no protobuf, or another kind of one; its opset is
newer than the table of operators was read against; a tensor's data are shorter or longer than its shape says; data in another
file whose path is absolute, climbs out of the model's folder or goes through a symbolic link; a value that nothing makes, that
is made twice, or that depends on itself; control flow; operators of other vendors.
"""

from __future__ import annotations

import math
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from plait.errors import TargetError

if TYPE_CHECKING:
    import onnx

__all__ = ["NEWEST_OPSET", "OLDEST_OPSET", "GraphInput", "OnnxFile", "OnnxNode", "read_onnx"]

OLDEST_OPSET = 7
NEWEST_OPSET = 28
"""Of the standard operators; what changed up to it was read operator by operator (ONNX 1.23)."""

_STANDARD = ("", "ai.onnx")
_LARGEST = 1 << 40  # elements of one tensor; far above anything real, far below what overflows
_CONTROL = ("If", "Loop", "Scan", "SequenceMap")
_NOT_ONNX = "is it really an ONNX model? It may be a download that was cut off, or a page in place of a file"


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphInput:
    """What the model is given."""

    name: str
    dtype: Any
    """numpy's dtype."""
    shape: tuple[int | str, ...]
    """A number where the file fixes the size, else the dimension's name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OnnxNode:
    """One operator."""

    name: str
    """Its own name, or its first output's where it has none."""
    op: str
    domain: str
    inputs: tuple[str, ...]
    """Empty text where an optional input is left out."""
    outputs: tuple[str, ...]
    attributes: dict[str, Any]
    """int, float, str, bytes, numpy array, or a list of these."""
    opset: int

    def __str__(self) -> str:
        return f"node {self.name!r} ({self.domain + '.' if self.domain else ''}{self.op})"


@dataclass(kw_only=True, slots=True)
class OnnxFile:
    """A checked model."""

    path: Path
    opset: int
    producer: str
    inputs: list[GraphInput]
    outputs: list[str]
    constants: dict[str, np.ndarray[Any, Any]]
    """Initializers and constants by name; bfloat16 as ml_dtypes has it."""
    nodes: list[OnnxNode] = field(default_factory=list)
    """Every node after those that make its inputs; what no output needs is left out."""


def read_onnx(path: Path | str) -> OnnxFile:
    """The model of a file, checked and with its nodes in order.

    Raises:
        TargetError: see the top of this file. Also where onnx is not installed.
    """
    path = Path(path)
    model = _parse(path)
    opsets = {entry.domain: int(entry.version) for entry in model.opset_import}
    opset = next((opsets[domain] for domain in _STANDARD if domain in opsets), 0)
    if not OLDEST_OPSET <= opset <= NEWEST_OPSET:
        which = "newer than" if opset > NEWEST_OPSET else "older than" if opset else "missing; plait knows"
        known = NEWEST_OPSET if opset > NEWEST_OPSET else OLDEST_OPSET
        raise TargetError(
            f"{path}: its opset {opset or ''} is {which} {known}".replace("  ", " "),
            hint=f"export it anew with an opset from {OLDEST_OPSET} to {NEWEST_OPSET}",
        )
    graph = model.graph
    tensors = _Tensors(path)
    constants: dict[str, np.ndarray[Any, Any]] = {}
    for tensor in graph.initializer:
        _once(path, tensor.name, constants)
        constants[tensor.name] = tensors.read(tensor, tensor.name)
    if graph.sparse_initializer:
        raise TargetError(f"{path}: it has sparse weights, which plait does not read")
    inputs = [_graph_input(path, value) for value in graph.input if value.name not in constants]
    nodes = []
    for node in graph.node:
        made = _node(path, node, opsets, opset, tensors)
        if made.op == "Constant" and made.domain == "" and len(made.outputs) == 1:
            _once(path, made.outputs[0], constants)
            constants[made.outputs[0]] = _constant(path, made)
        else:
            nodes.append(made)
    outputs = [value.name for value in graph.output]
    if not outputs:
        raise TargetError(f"{path}: the model has no output")
    ordered = _in_order(path, nodes, {*constants, *(value.name for value in inputs)}, outputs)
    used = {name for node in ordered for name in node.inputs} | set(outputs)
    return OnnxFile(
        path=path,
        opset=opset,
        producer=f"{model.producer_name} {model.producer_version}".strip(),
        inputs=inputs,
        outputs=outputs,
        constants={name: value for name, value in constants.items() if name in used},
        nodes=ordered,
    )


def _parse(path: Path) -> onnx.ModelProto:
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ModuleNotFoundError:
        raise TargetError("target onnx: onnx is not installed", hint="pip install 'plait[onnx]'") from None
    try:
        if not path.is_file():
            raise TargetError(f"target onnx:{path}: {'is a folder' if path.is_dir() else 'no such file'}")
        data = path.read_bytes()
    except OSError as problem:
        raise TargetError(f"target onnx:{path}: {problem.strerror}") from None
    try:
        model = onnx.load_model_from_string(data)
    except (DecodeError, ValueError, TypeError) as problem:
        raise TargetError(f"{path}: not an ONNX model ({str(problem)[:100]})", hint=_NOT_ONNX) from None
    if not model.graph.node and not model.graph.output:
        raise TargetError(f"{path}: not an ONNX model (it holds no graph)", hint=_NOT_ONNX)
    if model.functions:
        import onnx.inliner

        try:
            model = onnx.inliner.inline_local_functions(model)
        except Exception as problem:  # onnx's C++ side raises whatever it likes
            raise TargetError(f"{path}: its functions cannot be inlined: {_first(problem)}") from None
    return model


def _first(problem: Exception) -> str:
    return (str(problem).strip().splitlines() or [type(problem).__name__])[0][:200]


def _once(path: Path, name: str, known: Iterable[str]) -> None:
    if not name:
        raise TargetError(f"{path}: a weight or constant has no name")
    if name in known:
        raise TargetError(f"{path}: the value {name!r} is made twice")


def _graph_input(path: Path, value: Any) -> GraphInput:
    import onnx

    if not value.type.HasField("tensor_type"):
        raise TargetError(f"{path}: input {value.name!r} is no tensor but a sequence, map or optional")
    kind = value.type.tensor_type
    if not kind.HasField("shape"):
        raise TargetError(f"{path}: input {value.name!r} has no shape", hint="export it with its number of dimensions")
    shape: list[int | str] = []
    for index, dim in enumerate(kind.shape.dim):
        if dim.HasField("dim_value") and dim.dim_value > 0:
            shape.append(int(dim.dim_value))
        else:
            shape.append(dim.dim_param or f"{value.name}_{index}")
    try:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
    except KeyError:
        raise TargetError(f"{path}: input {value.name!r} has an unknown type ({kind.elem_type})") from None
    return GraphInput(name=value.name, dtype=np.dtype(dtype), shape=tuple(shape))


def _node(path: Path, node: Any, opsets: dict[str, int], opset: int, tensors: _Tensors) -> OnnxNode:
    import onnx

    domain = "" if node.domain in _STANDARD else node.domain
    name = node.name or (node.output[0] if node.output else "?")
    attributes: dict[str, Any] = {}
    graphs = [a.name for a in node.attribute if a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)]
    if graphs or (domain == "" and node.op_type in _CONTROL):
        raise TargetError(
            f"{path}: node {name!r} ({node.op_type}) is control flow, which plait does not import",
            hint="export the model with fixed control flow (no loop or branch over data)",
        )
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.TENSOR:
            attributes[attribute.name] = tensors.read(attribute.t, f"{name}.{attribute.name}")
            continue
        if attribute.ref_attr_name:
            raise TargetError(f"{path}: node {name!r}: attribute {attribute.name!r} refers to a function's argument")
        try:
            value = onnx.helper.get_attribute_value(attribute)
        except ValueError as problem:
            raise TargetError(f"{path}: node {name!r}: attribute {attribute.name!r}: {_first(problem)}") from None
        attributes[attribute.name] = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    return OnnxNode(
        name=name,
        op=node.op_type,
        domain=domain,
        inputs=tuple(node.input),
        outputs=tuple(node.output),
        attributes=attributes,
        opset=opset if domain == "" else opsets.get(node.domain, 1),
    )


def _constant(path: Path, node: OnnxNode) -> np.ndarray[Any, Any]:
    kinds = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
    for name, value in node.attributes.items():
        if name == "value":
            return np.asarray(value)
        if name in kinds:
            return np.array(value, dtype=kinds[name])
    raise TargetError(f"{path}: {node}: a constant that holds no number (text or sparse)")


def _in_order(path: Path, nodes: list[OnnxNode], known: set[str], outputs: list[str]) -> list[OnnxNode]:
    """The nodes that the outputs need, each after those it needs."""
    maker: dict[str, OnnxNode] = {}
    for node in nodes:
        for name in filter(None, node.outputs):
            if name in maker or name in known:
                raise TargetError(f"{path}: the value {name!r} is made twice")
            maker[name] = node
    done: set[str] = set(known)
    open_: set[int] = set()
    ordered: list[OnnxNode] = []
    # Depth first, by hand: a chain may be longer than Python's stack is deep.
    todo: list[tuple[str, str, bool]] = [(name, "the outputs", False) for name in reversed(outputs)]
    while todo:
        name, user, ready = todo.pop()
        if name in done and not ready:
            continue
        if name not in maker:
            raise TargetError(f"{path}: {user} needs {name!r}, which no input, weight or node gives")
        node = maker[name]
        if ready:
            if name not in done:
                ordered.append(node)
                done.update(filter(None, node.outputs))
            open_.discard(id(node))
            continue
        if id(node) in open_:
            raise TargetError(f"{path}: {node} depends on its own output")
        open_.add(id(node))
        todo.append((name, user, True))
        todo.extend((needed, str(node), False) for needed in reversed(node.inputs) if needed)
    return ordered


class _Tensors:
    """Tensors of the file, their data beside or inside it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self, tensor: Any, name: str) -> np.ndarray[Any, Any]:
        """The values, never more or fewer than the shape says."""
        import onnx

        dims = [int(dim) for dim in tensor.dims]
        count = math.prod(dims)
        if any(dim < 0 for dim in dims) or count > _LARGEST:
            self._refuse(name, f"its shape {dims} is not possible")
        kinds = onnx.TensorProto
        if tensor.data_type in (kinds.STRING, kinds.UNDEFINED):
            self._refuse(name, "it holds text or nothing")
        try:
            dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
        except KeyError:
            self._refuse(name, f"its type ({tensor.data_type}) is unknown")
        if dtype.itemsize * 8 != _bits(tensor.data_type):
            self._refuse(name, f"it is stored in {_bits(tensor.data_type)} bits a number, which plait does not train")
        if tensor.data_location == kinds.EXTERNAL:
            return self._external(tensor, name, dtype, dims)
        if tensor.HasField("raw_data"):
            if len(tensor.raw_data) != count * dtype.itemsize:
                self._refuse(name, f"{dims} needs {count * dtype.itemsize} bytes, the file has {len(tensor.raw_data)}")
            return np.frombuffer(tensor.raw_data, dtype=dtype.newbyteorder("<")).astype(dtype).reshape(dims)
        try:
            values = onnx.numpy_helper.to_array(tensor)
        except Exception as problem:  # numpy's and protobuf's own, on data that do not fit the shape
            self._refuse(name, f"its data do not fit its shape {dims} ({_first(problem)})")
        if list(values.shape) != dims:
            self._refuse(name, f"its data do not fit its shape {dims}")
        return np.asarray(values)

    def _external(self, tensor: Any, name: str, dtype: np.dtype[Any], dims: list[int]) -> np.ndarray[Any, Any]:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        wanted = math.prod(dims) * dtype.itemsize
        try:
            offset, length = int(entries.get("offset", 0)), int(entries.get("length", wanted))
        except ValueError:
            self._refuse(name, "its place in the data file is no number")
        file = self._data_file(entries.get("location", ""), name)
        size = file.stat().st_size
        if length != wanted or offset < 0 or offset + length > size:
            self._refuse(
                name, f"{dims} needs {wanted} bytes, the data file {file.name} has {max(size - offset, 0)} there"
            )
        if not wanted:
            return np.zeros(dims, dtype)
        values = np.fromfile(file, dtype=dtype.newbyteorder("<"), count=math.prod(dims), offset=offset)
        return values.astype(dtype, copy=False).reshape(dims)

    def _data_file(self, location: str, name: str) -> Path:
        """The data file, which lies in the model's folder or under it, and not through a symbolic link."""
        parts = location.replace("\\", "/").split("/")
        if not location or "\0" in location or not parts[0] or ":" in parts[0]:
            self._refuse(name, f"its data lie at {location!r}, which is no place in the model's folder")
        if ".." in parts:
            self._refuse(name, f"its data lie at {location!r}, outside the model's folder")
        file = self._path.parent
        for part in parts:
            file /= part
            if file.is_symlink():
                self._refuse(name, f"its data lie at {location!r}, which is a symbolic link")
        try:
            mode = file.stat().st_mode
        except OSError:
            self._refuse(name, f"its data file {location!r} is not there")
        if not stat.S_ISREG(mode):
            self._refuse(name, f"its data lie at {location!r}, which is no file")
        return file

    def _refuse(self, name: str, why: str) -> NoReturn:
        raise TargetError(f"{self._path}: tensor {name!r}: {why}")


def _bits(data_type: int) -> int:
    import onnx

    kinds = onnx.TensorProto
    small = {getattr(kinds, kind, -1): 4 for kind in ("UINT4", "INT4", "FLOAT4E2M1")}
    small |= {getattr(kinds, kind, -1): 2 for kind in ("UINT2", "INT2")}
    found = small.get(data_type)
    return found or int(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(data_type)).itemsize) * 8
