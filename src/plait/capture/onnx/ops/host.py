"""Operators on host arrays: sizes and small constants, worked out with numpy before any tensor is touched.

Used where every input of a node is a host array. Sizes may be torch's SymInts, which Python's arithmetic follows; arrays that
hold one are of dtype object, so nothing here may ask numpy for a fixed type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from plait.capture.onnx.values import DTYPES, Array, Call, is_static

__all__ = ["HOST", "LARGEST_HOST"]

LARGEST_HOST = 64
"""Elements of the largest constant that is kept on the host; the largest that a node may make there is 16 times that."""

HOST: dict[str, Callable[..., Any]] = {}


def _host(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            HOST[name] = function
        return function

    return enter


for _name, _function in {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "And": np.logical_and,
    "Or": np.logical_or,
}.items():
    HOST[_name] = lambda _call, a, b, _f=_function: np.asarray(_f(a, b))

for _name, _function in {
    "Equal": np.equal,
    "Less": np.less,
    "LessOrEqual": np.less_equal,
    "Greater": np.greater,
    "GreaterOrEqual": np.greater_equal,
}.items():
    # Comparing an open size fixes it as far as the answer needs (torch's guards), as Python itself would.
    HOST[_name] = lambda _call, a, b, _f=_function: np.asarray(_f(a, b)).astype(bool)

HOST["Not"] = lambda _call, a: np.logical_not(a)
HOST["Neg"] = lambda _call, a: np.asarray(-a)
HOST["Identity"] = lambda _call, a: a
HOST["Abs"] = lambda _call, a: np.abs(a)


def _is_whole(array: Array) -> bool:
    return array.dtype == object or np.issubdtype(array.dtype, np.integer)


@_host("Div")
def _div(_call: Call, a: Array, b: Array) -> Array:
    if not (_is_whole(a) and _is_whole(b)):
        return np.asarray(a / b)
    if is_static(a) and is_static(b):
        a, b = a.astype(np.int64), b.astype(np.int64)
        return np.asarray(np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b)))
    return np.asarray(a // b)  # sizes are never negative


@_host("Mod")
def _mod(_call: Call, a: Array, b: Array) -> Array:
    return np.asarray(a % b)


@_host("Min", "Max")
def _extreme(call: Call, *arrays: Array) -> Array:
    found = arrays[0]
    for array in arrays[1:]:
        found = np.asarray((np.minimum if call.node.op == "Min" else np.maximum)(found, array))
    return found


@_host("Where")
def _where(_call: Call, condition: Array, a: Array, b: Array) -> Array:
    return np.where(condition.astype(bool), a, b)


@_host("Cast")
def _cast(call: Call, a: Array) -> Array | None:
    to = DTYPES.get(call.attribute("to"))
    if a.dtype == object:
        return a if to in (torch.int64, torch.int32) else None
    if to is None or to == torch.bfloat16:
        return None
    return a.astype(str(to).removeprefix("torch."))


@_host("Concat")
def _concat(call: Call, *arrays: Array) -> Array:
    return np.concatenate(arrays, axis=call.attribute("axis", 1))


@_host("Gather")
def _gather(call: Call, data: Array, indices: Array) -> Array | None:
    if not is_static(indices):
        return None
    return np.take(data, indices.astype(np.int64), axis=call.attribute("axis", 0))


@_host("Squeeze")
def _squeeze(call: Call, a: Array, axes: Array | None = None) -> Array:
    found = call.axes(axes)
    return np.squeeze(a, axis=None if found is None else tuple(found))


@_host("Unsqueeze")
def _unsqueeze(call: Call, a: Array, axes: Array | None = None) -> Array:
    return np.expand_dims(a, tuple(call.axes(axes) or ()))


@_host("Reshape")
def _reshape(call: Call, a: Array, shape: Array | None = None) -> Array:
    sizes = call.attribute("shape") if shape is None else call.numbers(shape, "shape")
    if not call.attribute("allowzero", 0):
        sizes = [a.shape[i] if size == 0 else size for i, size in enumerate(sizes)]
    return a.reshape(sizes)


@_host("Slice")
def _slice(call: Call, a: Array, *places: Array | None) -> Array:
    starts, ends, axes, steps = [*places, None, None, None, None][:4]
    first = call.attribute("starts") if starts is None else call.numbers(starts, "starts")
    last = call.attribute("ends") if ends is None else call.numbers(ends, "ends")
    along = call.axes(axes) or list(range(len(first)))
    by = [1] * len(first) if steps is None else call.numbers(steps, "steps")
    index: list[slice] = [slice(None)] * a.ndim
    for axis, start, stop, step in zip(along, first, last, by, strict=True):
        # Going backwards, an end far below zero means "to the front", which Python spells None.
        past = stop if step > 0 or stop >= -a.shape[axis] else None
        index[axis] = slice(start, past, step)
    return a[tuple(index)]


@_host("Transpose")
def _transpose(call: Call, a: Array) -> Array:
    return np.transpose(a, call.attribute("perm"))


@_host("ReduceProd", "ReduceSum", "ReduceMax", "ReduceMin")
def _reduce(call: Call, a: Array, axes: Array | None = None) -> Array | None:
    found = call.axes(axes)
    if found == [] or (found is None and call.attribute("noop_with_empty_axes", 0)):
        return None
    function: Any = {"ReduceProd": np.prod, "ReduceSum": np.sum, "ReduceMax": np.max, "ReduceMin": np.min}[call.node.op]
    along = None if found is None else tuple(found)
    return np.asarray(function(a, axis=along, keepdims=bool(call.attribute("keepdims", 1))))


@_host("Range")
def _range(_call: Call, start: Array, limit: Array, step: Array) -> Array | None:
    if not (is_static(start) and is_static(limit) and is_static(step)) or not all(map(_is_whole, (start, limit, step))):
        return None
    first, last, by = (int(end.reshape(()).item()) for end in (start, limit, step))
    found = range(first, last, by)
    return np.array(found, dtype=np.int64) if len(found) <= LARGEST_HOST else None


@_host("ConstantOfShape")
def _constant_of_shape(call: Call, shape: Array) -> Array | None:
    value = np.asarray(call.attribute("value", np.zeros(1, np.float32))).reshape(-1)
    if not is_static(shape) or int(np.prod(shape.astype(np.int64))) > LARGEST_HOST or not _is_whole(value):
        return None
    return np.full(shape.astype(np.int64).tolist(), value[0], dtype=value.dtype)


@_host("Expand")
def _expand(_call: Call, a: Array, shape: Array) -> Array | None:
    if not is_static(shape) or int(np.prod(shape.astype(np.int64))) > LARGEST_HOST:
        return None
    sizes = shape.astype(np.int64).tolist()
    return np.broadcast_to(a, np.broadcast_shapes(a.shape, tuple(sizes)))


@_host("Floor", "Ceil")
def _rounded(call: Call, a: Array) -> Array:
    if _is_whole(a):
        return a
    return np.floor(a) if call.node.op == "Floor" else np.ceil(a)


@_host("Size")
def _size(_call: Call, a: Array) -> Array:
    return np.array(a.size, dtype=np.int64)
