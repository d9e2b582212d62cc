"""Operators that move, select and reduce: shapes, slices, gathers, scatters, sums."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from plait.capture.onnx.ops.table import operator
from plait.capture.onnx.values import DTYPES, Array, Call, Value, constant_tensor, is_followed

__all__: list[str] = []

_Tensor = torch.Tensor
_LARGEST = 1 << 28  # elements of a constant that a node may blow up out of a few: 1 GiB in float32


def _sizes(sizes: Any) -> Array:
    found = np.empty(len(sizes), dtype=object)
    found[:] = list(sizes)
    return found


@operator("Shape", raw=True)
def _shape(call: Call, x: Value) -> Array:
    assert x is not None
    return _sizes(list(x.shape)[slice(call.attribute("start", 0), call.attribute("end"))])


@operator("Size", raw=True)
def _size(_call: Call, x: Value) -> Array:
    assert x is not None
    found = np.empty((), dtype=object)
    found[()] = math.prod(x.shape)
    return found


@operator("Reshape", raw=True)
def _reshape(call: Call, x: Value, shape: Value = None) -> _Tensor:
    assert x is not None
    tensor = call.tensor(x)
    sizes = list(call.attribute("shape", [])) if shape is None else call.numbers(shape, "shape")
    if not call.attribute("allowzero", 0):
        sizes = [tensor.shape[i] if isinstance(size, int) and size == 0 else size for i, size in enumerate(sizes)]
    return tensor.reshape(sizes)


@operator("Flatten")
def _flatten(call: Call, x: _Tensor) -> _Tensor:
    axis = call.attribute("axis", 1)
    axis += x.dim() if axis < 0 else 0
    if 0 < axis < x.dim():
        return x.flatten(axis).flatten(0, axis - 1)
    return x.reshape(1, -1) if axis == 0 else x.reshape(-1, 1)


@operator("Transpose")
def _transpose(call: Call, x: _Tensor) -> _Tensor:
    order = call.attribute("perm") or list(range(x.dim()))[::-1]
    return x.t() if list(order) == [1, 0] else x.permute(order)


@operator("Squeeze", raw=True)
def _squeeze(call: Call, x: Value, axes: Value = None) -> _Tensor:
    assert x is not None
    tensor, found = call.tensor(x), call.axes(axes)
    if found is None:
        return tensor.squeeze()
    wrong = [axis for axis in found if tensor.shape[axis] != 1]
    if wrong:
        raise ValueError(f"axis {wrong[0]} of {list(tensor.shape)} is not of size 1")
    return tensor.squeeze(found)


@operator("Unsqueeze", raw=True)
def _unsqueeze(call: Call, x: Value, axes: Value = None) -> _Tensor:
    assert x is not None
    tensor, found = call.tensor(x), call.axes(axes) or []
    rank = tensor.dim() + len(found)
    for axis in sorted(axis % rank for axis in found):
        tensor = tensor.unsqueeze(axis)
    return tensor


@operator("Concat")
def _concat(call: Call, *values: _Tensor) -> _Tensor:
    return torch.cat(values, call.attribute("axis", 1))


@operator("Split", raw=True)
def _split(call: Call, x: Value, sizes: Value = None) -> tuple[_Tensor, ...]:
    assert x is not None
    tensor, axis = call.tensor(x), call.attribute("axis", 0)
    given = call.attribute("split") if sizes is None else call.numbers(sizes, "split")
    if given is None:
        parts = call.attribute("num_outputs", len(call.node.outputs))
        return torch.split(tensor, -(-tensor.shape[axis] // parts), axis)
    return torch.split(tensor, list(given), axis)


@operator("Slice", raw=True)
def _slice(call: Call, x: Value, *places: Value) -> _Tensor:
    assert x is not None
    tensor = call.tensor(x)
    starts, ends, axes, steps = [*places, None, None, None, None][:4]
    first = call.attribute("starts") if starts is None else call.numbers(starts, "starts")
    last = call.attribute("ends") if ends is None else call.numbers(ends, "ends")
    along = call.axes(axes) or list(range(len(first)))
    by = [1] * len(first) if steps is None else call.numbers(steps, "steps")
    for axis, start, stop, step in zip(along, first, last, by, strict=True):
        if step < 0:
            size = tensor.shape[axis]
            picked = range(size)[slice(start, stop if stop >= -size else None, step)]
            tensor = tensor.index_select(axis, torch.tensor(list(picked), dtype=torch.int64, device=call.device))
            continue
        index = [slice(None)] * tensor.dim()
        index[axis] = slice(start, stop, step)
        tensor = tensor[tuple(index)]
    return tensor


@operator("Expand", raw=True)
def _expand(call: Call, x: Value, shape: Value) -> _Tensor:
    assert x is not None
    tensor, sizes = call.tensor(x), call.numbers(shape, "shape")
    if all(isinstance(size, int) for size in sizes) and math.prod(sizes) > _LARGEST * max(1, tensor.numel()):
        raise call.refuse(f"it would make a tensor of {sizes}")
    shape_of_both: Any = torch.broadcast_shapes(tensor.shape, sizes)  # type: ignore[no-untyped-call]
    return tensor.expand(shape_of_both)


@operator("Tile", raw=True)
def _tile(call: Call, x: Value, repeats: Value) -> _Tensor:
    assert x is not None
    return call.tensor(x).repeat(call.numbers(repeats, "repeats"))


@operator("ConstantOfShape", raw=True)
def _constant_of_shape(call: Call, shape: Value) -> _Tensor:
    value = np.asarray(call.attribute("value", np.zeros(1, np.float32))).reshape(-1)
    sizes = call.numbers(shape, "shape")
    if all(isinstance(size, int) for size in sizes) and math.prod(sizes) > _LARGEST:
        raise call.refuse(f"it would make a tensor of {sizes}")
    kind = constant_tensor(value)
    return torch.full(sizes, kind[0].item() if kind.numel() else 0, dtype=kind.dtype, device=call.device)


@operator("Range", raw=True)
def _range(call: Call, start: Value, limit: Value, step: Value) -> _Tensor:
    ends = []
    for value in (start, limit, step):
        if value is None or (isinstance(value, torch.Tensor) and is_followed(value)):
            raise call.refuse("its ends depend on the values of the data")
        ends.append(value.reshape(()).item())
    whole = all(isinstance(end, int | torch.SymInt) for end in ends)
    kind = torch.int64 if whole else torch.float32
    if isinstance(start, torch.Tensor):
        kind = start.dtype
    if all(isinstance(end, int | float) for end in ends) and abs(ends[1] - ends[0]) > _LARGEST * abs(ends[2]):
        raise call.refuse(f"it would make {abs(ends[1] - ends[0]) / abs(ends[2] or 1):.0f} numbers")
    return torch.arange(*ends, dtype=kind, device=call.device)


@operator("EyeLike")
def _eye_like(call: Call, x: _Tensor) -> _Tensor:
    kind = DTYPES.get(call.attribute("dtype"), x.dtype)
    rows = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
    places = torch.arange(x.shape[1], device=x.device) - rows
    return torch.eq(places, call.attribute("k", 0)).to(kind)


@operator("Gather", raw=True)
def _gather(call: Call, data: Value, indices: Value) -> _Tensor:
    assert data is not None
    assert indices is not None
    tensor, axis = call.tensor(data), call.attribute("axis", 0)
    if isinstance(indices, np.ndarray) and indices.ndim == 0:
        return tensor.select(axis, indices.item())
    index = call.tensor(indices)
    if (
        isinstance(tensor, torch.nn.Parameter)
        and axis == 0
        and tensor.dim() == 2
        and not isinstance(indices, np.ndarray)
    ):
        return F.embedding(index, tensor)  # a table; its rows are counted from the front
    axis %= tensor.dim()
    index = torch.where(index < 0, index + tensor.shape[axis], index)
    picked = tensor.index_select(axis, index.reshape(-1))
    return picked.reshape(*tensor.shape[:axis], *index.shape, *tensor.shape[axis + 1 :])


@operator("GatherElements")
def _gather_elements(call: Call, data: _Tensor, indices: _Tensor) -> _Tensor:
    axis = call.attribute("axis", 0)
    return torch.gather(data, axis, torch.where(indices < 0, indices + data.shape[axis], indices))


@operator("GatherND")
def _gather_nd(call: Call, data: _Tensor, indices: _Tensor) -> _Tensor:
    batch = call.attribute("batch_dims", 0)
    lead: list[_Tensor] = []
    for dim in range(batch):
        shape = [1] * (indices.dim() - 1)
        shape[dim] = -1
        lead.append(torch.arange(data.shape[dim], device=data.device).view(shape))
    return data[(*lead, *indices.unbind(-1))]


def _reduced(call: Call) -> str | None:
    reduction: str = call.attribute("reduction", "none")
    return {"none": None, "add": "sum", "mul": "prod", "max": "amax", "min": "amin"}[reduction]


@operator("ScatterElements", "Scatter")
def _scatter_elements(call: Call, data: _Tensor, indices: _Tensor, updates: _Tensor) -> _Tensor:
    axis, how = call.attribute("axis", 0), _reduced(call)
    index = torch.where(indices < 0, indices + data.shape[axis], indices)
    return data.scatter(axis, index, updates) if how is None else data.scatter_reduce(axis, index, updates, how)


@operator("ScatterND")
def _scatter_nd(call: Call, data: _Tensor, indices: _Tensor, updates: _Tensor) -> _Tensor:
    how = _reduced(call)
    if how not in (None, "sum"):
        # Along the flattened front dims, where one index stands for the whole tuple.
        depth = indices.shape[-1]
        rows = torch.zeros(indices.shape[:-1], dtype=torch.int64, device=data.device)
        for place, size in zip(indices.unbind(-1), data.shape[:depth], strict=True):
            rows = rows * size + torch.where(place < 0, place + size, place)
        flat = data.reshape(math.prod(data.shape[:depth]), -1)
        moved = updates.reshape(-1, flat.shape[1])
        where = rows.reshape(-1, 1).expand(moved.shape)
        return flat.scatter_reduce(0, where, moved, how).reshape(data.shape)
    return data.index_put(indices.unbind(-1), updates, accumulate=how == "sum")


@operator("OneHot", raw=True)
def _one_hot(call: Call, indices: Value, depth: Value, values: Value) -> _Tensor:
    assert indices is not None
    assert values is not None
    count, axis = call.numbers(depth, "depth")[0], call.attribute("axis", -1)
    index, pair = call.tensor(indices).long(), call.tensor(values)
    index = torch.where(index < 0, index + count, index)
    places = torch.arange(count, device=call.device)
    axis %= index.dim() + 1
    shape = [1] * (index.dim() + 1)
    shape[axis] = count
    return torch.where(index.unsqueeze(axis) == places.view(shape), pair[1], pair[0])


@operator("Pad", raw=True)
def _pad(call: Call, x: Value, pads: Value = None, value: Value = None, axes: Value = None) -> _Tensor:
    assert x is not None
    tensor, mode = call.tensor(x), call.attribute("mode", "constant")
    given = call.attribute("pads") if pads is None else call.numbers(pads, "pads")
    along = call.numbers(axes, "axes") if axes is not None else list(range(tensor.dim()))
    fill = call.attribute("value", 0.0) if value is None else value
    fill = fill.reshape(()).item() if isinstance(fill, np.ndarray) else fill
    each = {axis % tensor.dim(): (given[i], given[i + len(along)]) for i, axis in enumerate(along)}
    if mode == "constant":
        flat = [size for axis in reversed(range(tensor.dim())) for size in each.get(axis, (0, 0))]
        return F.pad(tensor, flat, value=fill.item() if isinstance(fill, torch.Tensor) else fill)
    for axis, (before, after) in each.items():
        if (before, after) != (0, 0):
            size = tensor.shape[axis]
            how: Any = mode if mode in ("edge", "reflect") else "wrap"
            picked = np.pad(np.arange(size), (before, after), mode=how)
            tensor = tensor.index_select(axis, torch.from_numpy(picked).to(call.device))
    return tensor


@operator("Trilu", raw=True)
def _trilu(call: Call, x: Value, k: Value = None) -> _Tensor:
    assert x is not None
    place = call.numbers(k, "diagonal")[0] if k is not None else 0
    return (torch.triu if call.attribute("upper", 1) else torch.tril)(call.tensor(x), place)


def running(call: Call, x: Value, axis: Value, totals: Callable[[_Tensor, int, bool], _Tensor]) -> _Tensor:
    """What `totals` gives of (tensor, axis, whether a place leaves itself out), from the end where the node says so."""
    assert x is not None
    tensor, along = call.tensor(x), call.numbers(axis, "axis")[0]
    backwards = call.attribute("reverse", 0)
    if backwards:
        tensor = tensor.flip(along)
    total = totals(tensor, along, bool(call.attribute("exclusive", 0))).to(tensor.dtype)
    return total.flip(along) if backwards else total


@operator("CumSum", raw=True)
def _cumsum(call: Call, x: Value, axis: Value) -> _Tensor:
    def sums(tensor: _Tensor, along: int, exclusive: bool) -> _Tensor:
        total = torch.cumsum(tensor, along).to(tensor.dtype)
        return total - tensor if exclusive else total

    return running(call, x, axis, sums)


@operator("TopK", raw=True)
def _top_k(call: Call, x: Value, k: Value = None) -> tuple[_Tensor, _Tensor]:
    assert x is not None
    count = call.attribute("k") if k is None else call.numbers(k, "k")[0]
    axis = call.attribute("axis", -1)
    # Of equal values the one in front comes first, which torch.topk does not promise.
    values, indices = torch.sort(call.tensor(x), dim=axis, descending=bool(call.attribute("largest", 1)), stable=True)
    return values.narrow(axis, 0, count), indices.narrow(axis, 0, count)


@operator("ArgMax", "ArgMin")
def _arg_extreme(call: Call, x: _Tensor) -> _Tensor:
    axis, keep = call.attribute("axis", 0), bool(call.attribute("keepdims", 1))
    find = torch.argmax if call.node.op == "ArgMax" else torch.argmin
    if call.attribute("select_last_index", 0):
        last: _Tensor = x.shape[axis] - 1 - find(x.flip(axis), axis, keep)
        return last
    return find(x, axis, keep)


@operator("DepthToSpace")
def _depth_to_space(call: Call, x: _Tensor) -> _Tensor:
    block, (n, c, h, w) = call.attribute("blocksize"), x.shape
    if call.attribute("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, block)
    x = x.reshape(n, block, block, c // block**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return x.reshape(n, c // block**2, h * block, w * block)


@operator("SpaceToDepth")
def _space_to_depth(call: Call, x: _Tensor) -> _Tensor:
    block, (n, c, h, w) = call.attribute("blocksize"), x.shape
    crd = call.attribute("mode", "DCR") == "CRD"
    x = x.reshape(n, c, h // block, block, w // block, block).permute((0, 1, 3, 5, 2, 4) if crd else (0, 3, 5, 1, 2, 4))
    return x.reshape(n, c * block**2, h // block, w // block)


@operator(
    *("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceSumSquare"),
    *("ReduceLogSum", "ReduceLogSumExp"),
    raw=True,
)
def _reduce(call: Call, x: Value, axes: Value = None) -> _Tensor:
    assert x is not None
    tensor, found, keep = call.tensor(x), call.axes(axes), bool(call.attribute("keepdims", 1))
    if not found:
        if call.attribute("noop_with_empty_axes", 0):
            return tensor
        found = list(range(tensor.dim()))
    if call.node.op == "ReduceProd":
        for axis in sorted((axis % tensor.dim() for axis in found), reverse=True):
            tensor = tensor.prod(axis, keepdim=keep)
        return tensor
    reduced: _Tensor = _REDUCTIONS[call.node.op](tensor, found, keep)
    return reduced.to(tensor.dtype)


_REDUCTIONS: dict[str, Any] = {
    "ReduceSum": lambda x, axes, keep: x.sum(axes, keepdim=keep),
    "ReduceMean": lambda x, axes, keep: x.mean(axes, keepdim=keep),
    "ReduceMax": lambda x, axes, keep: x.amax(axes, keepdim=keep),
    "ReduceMin": lambda x, axes, keep: x.amin(axes, keepdim=keep),
    "ReduceL1": lambda x, axes, keep: x.abs().sum(axes, keepdim=keep),
    "ReduceL2": lambda x, axes, keep: (x * x).sum(axes, keepdim=keep).sqrt(),
    "ReduceSumSquare": lambda x, axes, keep: (x * x).sum(axes, keepdim=keep),
    "ReduceLogSum": lambda x, axes, keep: x.sum(axes, keepdim=keep).log(),
    "ReduceLogSumExp": lambda x, axes, keep: x.logsumexp(axes, keepdim=keep),
}
