"""An ONNX file, read with suspicion: everything that the importer relies on is checked here.

What a file may get wrong, and what is refused with a short message: it is no protobuf, or another kind of one; its opset is
newer than the table of operators was read against; a tensor's data are shorter or longer than its shape says; data in another
file whose path is absolute, climbs out of the model's folder or goes through a symbolic link; a value that nothing makes, that
is made twice, or that depends on itself; operators of other vendors.

The graphs inside control flow (If, Loop, Scan) are read with it; what they make is given names of its own, since the two
branches of an If may use the same ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from plait.capture.onnx.fold import folded
from plait.capture.onnx.graph import Body, GraphInput, OnnxFile, OnnxNode, every
from plait.capture.onnx.tensors import Tensors
from plait.errors import TargetError

if TYPE_CHECKING:
    import onnx

__all__ = ["NEWEST_OPSET", "OLDEST_OPSET", "read_onnx"]

OLDEST_OPSET = 7
NEWEST_OPSET = 28
"""Of the standard operators; what changed up to it was read operator by operator (ONNX 1.23)."""

_STANDARD = ("", "ai.onnx")
_COMPOSED = (
    *("AffineGrid", "Bernoulli", "BlackmanWindow", "CenterCropPad", "HammingWindow", "HannWindow"),
    *("LinearAttention", "CausalConvWithState", "MeanVarianceNormalization", "NegativeLogLikelihoodLoss"),
    *("SequenceMap", "SoftmaxCrossEntropyLoss", "SwiGLU"),
)
"""Operators that the standard itself writes out in others."""
_DEEPEST = 20  # graphs within graphs
_NOT_ONNX = "is it really an ONNX model? It may be a download that was cut off, or a page in place of a file"


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
    reader = _Reader(path, opsets, opset)
    graph = model.graph
    reader.weights(graph, {})
    inputs = [_graph_input(path, value) for value in graph.input if value.name not in reader.constants]
    nodes = reader.nodes(graph, {})
    outputs = [value.name for value in graph.output]
    if not outputs:
        raise TargetError(f"{path}: the model has no output")
    ordered = _in_order(path, nodes, {*reader.constants, *(value.name for value in inputs)}, outputs)
    used = {name for node in every(ordered) for name in node.needs} | set(outputs)
    used |= {name for node in every(ordered) for body in node.bodies.values() for name in body.outputs}
    return OnnxFile(
        path=path,
        opset=opset,
        producer=f"{model.producer_name} {model.producer_version}".strip(),
        inputs=inputs,
        outputs=outputs,
        constants={name: value for name, value in reader.constants.items() if name in used},
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
    return _inlined(model, path)


def _inlined(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """With the file's functions, and the standard's that plait has no operator of its own for, replaced by their nodes."""
    import onnx.inliner
    import onnx.shape_inference

    try:
        if model.functions:
            model = onnx.inliner.inline_local_functions(model)
        composed = [("", name) for name in _COMPOSED if _uses(model.graph, name)]
        if composed:
            model = onnx.shape_inference.infer_shapes(model)  # the inliner asks for the types of values
            model = onnx.inliner.inline_selected_functions(model, composed, inline_schema_functions=True)
    except Exception as problem:  # onnx's C++ side raises whatever it likes
        raise TargetError(f"{path}: its functions cannot be inlined: {_first(problem)}") from None
    return model


def _uses(graph: Any, op: str, depth: int = 0) -> bool:
    inside = (attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g"))
    return any(node.op_type == op for node in graph.node) or (
        depth < _DEEPEST and any(_uses(one, op, depth + 1) for one in inside)
    )


def _first(problem: Exception) -> str:
    return (str(problem).strip().splitlines() or [type(problem).__name__])[0][:200]


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


class _Reader:
    """Nodes and constants of a graph and of those inside it. `rename` gives a value of the file its name here."""

    def __init__(self, path: Path, opsets: dict[str, int], opset: int) -> None:
        self.path = path
        self.constants: dict[str, np.ndarray[Any, Any]] = {}
        self._tensors = Tensors(path)
        self._opsets, self._opset = opsets, opset
        self._prefixes: set[str] = set()

    def weights(self, graph: Any, rename: dict[str, str]) -> None:
        """Take the graph's own constants."""
        for tensor in graph.initializer:
            self._keep(rename.get(tensor.name, tensor.name), self._tensors.read(tensor, tensor.name))
        for sparse in graph.sparse_initializer:
            name = sparse.values.name
            self._keep(rename.get(name, name), self._tensors.read_sparse(sparse, name))

    def _keep(self, name: str, array: np.ndarray[Any, Any]) -> None:
        if not name:
            raise TargetError(f"{self.path}: a weight or constant has no name")
        if name in self.constants:
            raise TargetError(f"{self.path}: the value {name!r} is made twice")
        self.constants[name] = array

    def nodes(self, graph: Any, rename: dict[str, str], depth: int = 0) -> list[OnnxNode]:
        """The graph's nodes as they stand; those that are constants are taken."""
        found: list[OnnxNode] = []
        makers: dict[str, OnnxNode] = {}
        read = [self._node(node, rename, depth) for node in graph.node]
        rest = [made for made in read if made.op != "Constant" or made.domain != "" or len(made.outputs) != 1]
        kept = {id(made) for made in rest}
        for made in read:
            if id(made) not in kept:
                self._keep(made.outputs[0], _constant(self.path, made))
        for made in rest:
            instead, constants = folded(made, self.constants, makers) or ([made], {})
            for name, array in constants.items():
                self._keep(name, array)
            found.extend(instead)
            makers.update((name, one) for one in instead for name in one.outputs)
        return found

    def _node(self, node: Any, rename: dict[str, str], depth: int) -> OnnxNode:
        import onnx

        kinds = onnx.AttributeProto
        domain = "" if node.domain in _STANDARD else node.domain
        name = node.name or (node.output[0] if node.output else "?")
        where = f"{self.path}: node {name!r}"
        attributes: dict[str, Any] = {}
        bodies: dict[str, Body] = {}
        captured: dict[str, None] = {}
        for attribute in node.attribute:
            if attribute.ref_attr_name:
                raise TargetError(f"{where}: attribute {attribute.name!r} refers to a function's argument")
            if attribute.type == kinds.GRAPH:
                bodies[attribute.name], used = self._body(attribute.g, f"{name}.{attribute.name}", rename, depth + 1)
                captured |= dict.fromkeys(used)
            elif attribute.type == kinds.TENSOR:
                attributes[attribute.name] = self._tensors.read(attribute.t, f"{name}.{attribute.name}")
            elif attribute.type == kinds.SPARSE_TENSOR:
                attributes[attribute.name] = self._tensors.read_sparse(
                    attribute.sparse_tensor, f"{name}.{attribute.name}"
                )
            else:
                try:
                    value = onnx.helper.get_attribute_value(attribute)
                except ValueError as problem:
                    raise TargetError(f"{where}: attribute {attribute.name!r}: {_first(problem)}") from None
                attributes[attribute.name] = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
        return OnnxNode(
            name=name,
            op=node.op_type,
            domain=domain,
            inputs=tuple(rename.get(value, value) for value in node.input),
            outputs=tuple(rename.get(value, value) for value in node.output),
            attributes=attributes,
            opset=self._opset if domain == "" else self._opsets.get(node.domain, 1),
            bodies=bodies,
            captured=tuple(captured),
        )

    def _body(self, graph: Any, prefix: str, outer: dict[str, str], depth: int) -> tuple[Body, list[str]]:
        """A graph inside, and what it uses from outside."""
        if depth > _DEEPEST:
            raise TargetError(f"{self.path}: {prefix}: more than {_DEEPEST} graphs within each other")
        while prefix in self._prefixes:
            prefix += "_"
        self._prefixes.add(prefix)
        own = [value.name for value in graph.input]
        own += [tensor.name for tensor in graph.initializer] + [
            sparse.values.name for sparse in graph.sparse_initializer
        ]
        own += [name for node in graph.node for name in node.output if name]
        rename = {**outer, **{name: f"{prefix}.{name}" for name in own}}
        self.weights(graph, rename)
        nodes = self.nodes(graph, rename, depth)
        inputs = tuple(rename[value.name] for value in graph.input)
        outputs = tuple(rename.get(value.name, value.name) for value in graph.output)
        made = {*inputs, *self.constants, *(name for node in nodes for name in node.outputs)}
        used = dict.fromkeys(name for node in nodes for name in node.needs if name not in made)
        used |= dict.fromkeys(name for name in outputs if name not in made)
        known = {*inputs, *self.constants, *used}
        ordered = _in_order(self.path, nodes, known, list(outputs))
        return Body(inputs=inputs, outputs=outputs, nodes=tuple(ordered)), list(used)


def _constant(path: Path, node: OnnxNode) -> np.ndarray[Any, Any]:
    kinds = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
    for name, value in node.attributes.items():
        if name in ("value", "sparse_value"):
            return np.asarray(value)
        if name in kinds:
            return np.array(value, dtype=kinds[name])
    raise TargetError(f"{path}: {node}: a constant that holds no number (text)")


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
        todo.extend((needed, str(node), False) for needed in reversed(node.needs))
    return ordered
