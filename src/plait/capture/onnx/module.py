"""An ONNX graph as a torch module that trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from plait.capture.arguments import nearest
from plait.capture.naming import register
from plait.capture.onnx.graph import OnnxFile, OnnxNode, every
from plait.capture.onnx.ops import (  # noqa: F401  fill the table
    attention,
    control,
    elementwise,
    layers,
    microsoft,
    quantized,
    recurrent,
    resize,
    selection,
    shapes,
)
from plait.capture.onnx.ops.host import HOST, LARGEST_HOST
from plait.capture.onnx.ops.table import OPERATORS
from plait.capture.onnx.values import Array, Call, Value, constant_tensor, host_array
from plait.capture.onnx.weights import Roles
from plait.errors import TargetError

__all__ = ["OnnxModule"]


@dataclass(frozen=True, slots=True)
class _Body:
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    steps: tuple[_Step, ...]


@dataclass(frozen=True, slots=True)
class _Step:
    node: OnnxNode
    last: tuple[str, ...]
    """Values that nothing needs after this node."""
    bodies: dict[str, _Body]
    """Graphs inside it, of control flow."""


class OnnxModule(nn.Module):
    """The graph, node by node; weights under the file's own names.

    `forward(*inputs)` takes the inputs in the file's order, `forward(**inputs)` by name; it gives the one output, or a tuple.
    Batch norm and dropout follow `.train()` and `.eval()` as in any torch module.
    """

    def __init__(self, file: OnnxFile, roles: Roles) -> None:
        super().__init__()
        refuse_unknown(file)
        self.input_names = [value.name for value in file.inputs]
        self.output_names = list(file.outputs)
        self.opset = file.opset
        self.names: dict[str, str] = {}
        """The file's name of a weight -> its name in this module."""
        self._small: dict[str, Array] = {}
        self._transposed = {name: first for name, first in roles.transposed.items() if first in file.constants}
        parameters = set(roles.parameters)
        for name, array in file.constants.items():
            if name in self._transposed:
                continue
            if name not in parameters and name not in roles.statistics and array.size <= LARGEST_HOST:
                self._small[name] = array
                continue
            trains = name in parameters
            # Weights of whole numbers (MatMulInteger) train as numbers of floating type.
            whole = trains and np.issubdtype(array.dtype, np.integer)
            self._register(name, array.astype(np.float32) if whole else array, trains=trains)
        self._steps = _steps(file.nodes, {*file.outputs, *file.constants, ""})

    def _register(self, name: str, array: Array, *, trains: bool) -> None:
        try:
            tensor = constant_tensor(array)
        except TypeError as problem:
            raise TargetError(f"weight {name!r}: {problem}") from None
        self.names[name] = register(self, name, tensor, kind="parameter" if trains else "buffer")

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """The outputs: one tensor, or a tuple of them."""
        given = dict(zip(self.input_names, inputs, strict=False))
        unknown = [name for name in named if name not in self.input_names or name in given]
        if unknown or len(inputs) > len(self.input_names):
            raise TypeError(f"the model takes {', '.join(self.input_names)}, not {unknown or len(inputs)}")
        given.update(named)
        missing = [name for name in self.input_names if name not in given]
        if missing:
            raise TypeError(f"the input {missing[0]!r} is missing")
        values: dict[str, Value] = {**self._small, **given}
        for name, path in self.names.items():
            owner, _, leaf = path.rpartition(".")
            values[name] = getattr(self.get_submodule(owner), leaf)
        device = next(
            (value.device for value in values.values() if isinstance(value, torch.Tensor)), torch.device("cpu")
        )
        for step in self._steps:
            self._run(step, values, device)
            for name in step.last:
                values.pop(name, None)
        results = [self._value(name, values) for name in self.output_names]
        call = Call(_NOWHERE, self.training, device)
        tensors = tuple(call.tensor(value) for value in results if value is not None)
        return tensors[0] if len(tensors) == 1 else tensors

    def _value(self, name: str, values: dict[str, Value]) -> Value:
        if name not in self._transposed:
            return values[name]
        # Turned where it is used: a view of a weight that lived from the start would bar every cut of the graph.
        first = values[self._transposed[name]]
        assert isinstance(first, torch.Tensor)
        return first.t()

    def _run(self, step: _Step, values: dict[str, Value], device: torch.device) -> None:
        node = step.node
        inputs = [self._value(name, values) if name else None for name in node.inputs]

        def body(attribute: str, given: list[Any]) -> list[Any]:
            inside = step.bodies[attribute]
            own = {**values, **dict(zip(inside.inputs, given, strict=True))}
            for one in inside.steps:
                self._run(one, own, device)
                for name in one.last:
                    own.pop(name, None)
            return [self._value(name, own) for name in inside.outputs]

        call = Call(node, self.training, device, body)
        try:
            found = _apply(call, inputs)
        except Exception as problem:
            if not getattr(problem, "__notes__", None):
                problem.add_note(f"in {node} of the ONNX graph")
            raise
        outputs = found if isinstance(found, tuple) else (found,)
        values.update(zip(node.outputs, outputs, strict=False))
        absent = [name for name in node.outputs[len(outputs) :] if name]
        if absent:
            raise NotImplementedError(f"{node}: its output {absent[0]!r} is not made")


_NOWHERE = OnnxNode(name="", op="", domain="", inputs=(), outputs=(), attributes={}, opset=0)


def _apply(call: Call, inputs: list[Value]) -> Any:
    node = call.node
    arrays = [value for value in inputs if value is not None]
    if node.domain == "" and node.op in HOST and all(isinstance(value, np.ndarray) for value in arrays):
        found = HOST[node.op](call, *inputs)
        if found is not None:
            array = host_array(found)
            if array.size <= 16 * LARGEST_HOST:
                return array
    operator = OPERATORS[node.domain, node.op]
    if operator.raw:
        return operator.function(call, *inputs)
    return operator.function(call, *(None if value is None else call.tensor(value) for value in inputs))


def refuse_unknown(file: OnnxFile) -> None:
    """Raise TargetError for the first operator that the table lacks, with how many others there are."""
    unknown = [node for node in every(file.nodes) if (node.domain, node.op) not in OPERATORS]
    if not unknown:
        return
    first = unknown[0]
    kinds = sorted({f"{node.domain}.{node.op}".lstrip(".") for node in unknown})
    known = [name for domain, name in OPERATORS if domain == first.domain]
    others = f" (nor does it import {', '.join(kinds[1:6])})" if len(kinds) > 1 else ""
    hint = "export with a lower opset or other settings, or open an issue that names the operator"
    if first.domain.endswith("nchwc"):
        hint = "onnxruntime laid this file out for one CPU: save it with ORT_ENABLE_EXTENDED, not ORT_ENABLE_ALL"
    raise TargetError(
        f"{file.path}: {first}: plait imports no such operator{nearest(first.op, known)}{others}", hint=hint
    )


def _steps(nodes: Sequence[OnnxNode], kept: set[str]) -> tuple[_Step, ...]:
    last: dict[str, int] = {}
    for index, node in enumerate(nodes):
        last.update(dict.fromkeys((*node.needs, *node.outputs), index))
    ends: list[list[str]] = [[] for _ in nodes]
    for name, index in last.items():
        if name not in kept:
            ends[index].append(name)
    return tuple(_Step(node, tuple(end), _bodies(node)) for node, end in zip(nodes, ends, strict=True))


def _bodies(node: OnnxNode) -> dict[str, _Body]:
    made = {}
    for attribute, body in node.bodies.items():
        # What comes from outside stays: it is needed again in the next round, or by others.
        own = {*body.inputs, *(name for one in body.nodes for name in one.outputs)}
        outside = {name for one in body.nodes for name in one.needs} - own
        made[attribute] = _Body(body.inputs, body.outputs, _steps(body.nodes, {*body.outputs, *outside, ""}))
    return made
