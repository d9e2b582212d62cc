"""Values that flow through an imported graph, and what an operator is told.

Shapes are worked out by the graph itself (Shape, Gather, Concat, Reshape). So that they stay sizes, which torch.export
can follow, and do not become tensors of data, small whole numbers are numpy arrays on the host; where a size is open
they hold torch's SymInts.

    torch.Tensor     data, parameters, large constants
    numpy.ndarray    sizes, axes, small constants; dtype object where a size may be a SymInt
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor

from plait.capture.onnx.graph import OnnxNode

__all__ = [
    "DTYPES",
    "Array",
    "Call",
    "Sequence",
    "Value",
    "constant_tensor",
    "dtype_of",
    "host_array",
    "is_followed",
    "is_static",
]

Array = np.ndarray[Any, Any]
Value = torch.Tensor | Array | None
Sequence = list[torch.Tensor | Array]
"""A list of values, as operators on sequences make it."""

# Numbers of onnx.TensorProto.DataType.
DTYPES = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    4: torch.uint16,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    12: torch.uint32,
    13: torch.uint64,
    14: torch.complex64,
    15: torch.complex128,
    16: torch.bfloat16,
}


def dtype_of(array: Array) -> torch.dtype:
    """torch's dtype of a numpy array; a host array of sizes is int64."""
    if array.dtype == object:
        return torch.int64
    return getattr(torch, array.dtype.name, None) or _refused(array)


def _refused(array: Array) -> torch.dtype:
    raise TypeError(f"torch trains no {array.dtype}")


def constant_tensor(array: Array) -> torch.Tensor:
    """A tensor of its own memory with the array's values."""
    if array.dtype.name == "bfloat16":  # numpy has it by ml_dtypes only, which torch does not read
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(array, order="C")).to(dtype_of(array))


def host_array(value: Any) -> Array:
    """A host value as an array; numpy gives a bare Python number or SymInt for arrays of dtype object without dims."""
    if isinstance(value, np.ndarray | np.generic):
        return np.asarray(value)
    found = np.empty((), dtype=object)
    found[()] = value
    return found


def is_static(array: Array) -> bool:
    """Whether no open size stands in it."""
    return array.dtype != object or all(isinstance(item, int | np.integer) for item in array.flat)


def _no_body(attribute: str, inputs: list[Any]) -> list[Any]:
    raise NotImplementedError(f"it has no {attribute}")


def is_followed(tensor: torch.Tensor) -> bool:
    """Whether its numbers are not there to be read, since the graph is captured or only shapes are worked out."""
    return torch.compiler.is_exporting() or isinstance(tensor, FakeTensor) or tensor.is_meta


@dataclass(slots=True)
class Call:
    """One operator at the moment it runs."""

    node: OnnxNode
    training: bool
    device: torch.device
    body: Callable[[str, list[Any]], list[Any]] = _no_body
    """(attribute, its inputs) -> the outputs of the graph inside the node."""

    @property
    def opset(self) -> int:
        """Of the operator's domain."""
        return self.node.opset

    def attribute(self, name: str, default: Any = None) -> Any:
        """An attribute's value or its default."""
        return self.node.attributes.get(name, default)

    def refuse(self, why: str) -> NotImplementedError:
        """An error to raise, which names the node."""
        return NotImplementedError(why)

    def tensor(self, value: torch.Tensor | Array | Sequence) -> torch.Tensor:
        """The value as a tensor."""
        if isinstance(value, torch.Tensor):
            return value
        if isinstance(value, list):
            raise self.refuse("a sequence where it takes a tensor")
        if is_static(value):
            plain = value.astype(np.int64) if value.dtype == object else value
            if plain.ndim == 0:
                return torch.full((), plain.item(), dtype=dtype_of(plain), device=self.device)
            return constant_tensor(plain).to(self.device)
        items = [torch.scalar_tensor(item, dtype=torch.int64, device=self.device) for item in value.flat]
        return torch.stack(items).reshape(value.shape)

    def numbers(self, value: Value, what: str) -> list[Any]:
        """Whole numbers (or open sizes) that must be known while the graph is captured: axes, shapes, pads."""
        if value is None:
            raise self.refuse(f"its {what} is missing")
        if isinstance(value, torch.Tensor):
            if is_followed(value):
                raise self.refuse(f"its {what} depends on the values of the data")
            return [int(item) for item in value.detach().flatten().tolist()]
        return [item if isinstance(item, torch.SymInt) else int(item) for item in value.flat]

    def floats(self, value: Value, what: str) -> list[float]:
        """The same for fractions, such as the scales of a Resize."""
        if isinstance(value, torch.Tensor) and not is_followed(value):
            return [float(item) for item in value.detach().flatten().tolist()]
        if isinstance(value, torch.Tensor) or value is None or not is_static(value):
            raise self.refuse(f"its {what} is not a constant")
        return [float(item) for item in value.flat]

    def truth(self, value: Value) -> bool | None:
        """A condition; None where it depends on the values of the data while the graph is captured."""
        if isinstance(value, torch.Tensor):
            return None if is_followed(value) else bool(value.detach().reshape(()).item())
        if value is None:
            raise self.refuse("its condition is missing")
        return bool(value.reshape(()).item())

    def axes(self, value: Value, default: Any = None) -> list[Any] | None:
        """Axes from the input where it is given (newer opsets), else from the attribute."""
        if value is not None:
            return self.numbers(value, "axes")
        found = self.attribute("axes", default)
        return None if found is None else [int(axis) for axis in found]
