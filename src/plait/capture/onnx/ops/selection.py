"""Operators that choose by values, draw at random, or sample images at places."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from plait.capture.onnx.ops.host import HOST
from plait.capture.onnx.ops.shapes import running
from plait.capture.onnx.ops.table import operator
from plait.capture.onnx.values import DTYPES, Array, Call, Value, is_static

__all__: list[str] = []

_Tensor = torch.Tensor


@operator("NonZero")
def _non_zero(_call: Call, x: _Tensor) -> _Tensor:
    return torch.nonzero(x).t()


def _host_non_zero(_call: Call, a: Array) -> Array | None:
    return np.stack(np.nonzero(np.atleast_1d(a.astype(bool)))).astype(np.int64) if is_static(a) else None


HOST["NonZero"] = _host_non_zero


@operator("Compress")
def _compress(call: Call, x: _Tensor, condition: _Tensor) -> _Tensor:
    axis = call.attribute("axis")
    if axis is None:
        x, axis = x.flatten(), 0
    return x.index_select(axis, torch.nonzero(condition).reshape(-1))


@operator("Unique")
def _unique(call: Call, x: _Tensor) -> tuple[_Tensor, ...]:
    axis, is_sorted = call.attribute("axis"), call.attribute("sorted", 1)
    flat = x.flatten() if axis is None else x
    axis = 0 if axis is None else axis % x.dim()
    values, back, counts = torch.unique(flat, return_inverse=True, return_counts=True, dim=axis)
    size = back.numel()
    first = torch.full((counts.numel(),), size, device=x.device).scatter_reduce(
        0, back, torch.arange(size, device=x.device), "amin"
    )
    if not is_sorted:
        order = torch.argsort(first)
        place = torch.empty_like(order).scatter(0, order, torch.arange(order.numel(), device=x.device))
        values, first, counts, back = values.index_select(axis, order), first[order], counts[order], place[back]
    return values, first, back, counts


@operator("NonMaxSuppression", raw=True)
def _non_max_suppression(call: Call, boxes: Value, scores: Value, *limits: Value) -> _Tensor:
    """[chosen, 3]: image, class, box; in the order of classes, the best first."""
    assert boxes is not None
    assert scores is not None
    most, overlap, least = [*limits, None, None, None][:3]
    count = 0 if most is None else call.numbers(most, "number of boxes")[0]
    shared = 0.0 if overlap is None else call.floats(overlap, "overlap")[0]
    floor = None if least is None else call.floats(least, "least score")[0]
    places, marks = call.tensor(boxes).detach(), call.tensor(scores).detach()
    found: list[list[int]] = []
    for image in range(marks.shape[0]):
        corners = _corners(places[image], center=bool(call.attribute("center_point_box", 0)))
        overlaps = _overlaps(corners)
        for kind in range(marks.shape[1]):
            kept: list[int] = []
            for box in torch.argsort(marks[image, kind], descending=True, stable=True).tolist():
                if len(kept) == count or (floor is not None and float(marks[image, kind, box]) <= floor):
                    break
                if all(float(overlaps[box, other]) <= shared for other in kept):
                    kept.append(box)
            found += [[image, kind, box] for box in kept]
    return torch.tensor(found, dtype=torch.int64, device=places.device).reshape(-1, 3)


def _corners(boxes: _Tensor, *, center: bool) -> _Tensor:
    """[boxes, 4]: two corners, the lower one first."""
    a, b, c, d = boxes.unbind(-1)
    if center:  # x, y, width, height
        a, b, c, d = b - d / 2, a - c / 2, b + d / 2, a + c / 2
    return torch.stack((torch.minimum(a, c), torch.minimum(b, d), torch.maximum(a, c), torch.maximum(b, d)), -1)


def _overlaps(boxes: _Tensor) -> _Tensor:
    """Intersection over union of each two."""
    low = torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    both = (high - low).clamp(min=0).prod(-1)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    union = area[:, None] + area[None] - both
    return torch.where(union > 0, both / union, 0.0)


@operator("ReverseSequence")
def _reverse_sequence(call: Call, x: _Tensor, lengths: _Tensor) -> _Tensor:
    time, batch = call.attribute("time_axis", 0), call.attribute("batch_axis", 1)
    steps = torch.arange(x.shape[time], device=x.device)
    ends = lengths.reshape(-1, 1)
    places = torch.where(steps < ends, ends - 1 - steps, steps)  # [batch, time]
    places = places if batch < time else places.t()
    shape = [1] * x.dim()
    shape[batch], shape[time] = x.shape[batch], x.shape[time]
    return torch.gather(x, time, places.reshape(shape).expand(x.shape))


@operator("CumProd", raw=True)
def _cumprod(call: Call, x: Value, axis: Value) -> _Tensor:
    def products(tensor: _Tensor, along: int, exclusive: bool) -> _Tensor:
        if exclusive:
            ones = torch.ones_like(tensor.narrow(along, 0, 1))
            tensor = torch.cat((ones, tensor.narrow(along, 0, tensor.shape[along] - 1)), along)
        return torch.cumprod(tensor, along)

    return running(call, x, axis, products)


@operator("Det")
def _det(_call: Call, x: _Tensor) -> _Tensor:
    out: _Tensor = torch.linalg.det(x)
    return out


@operator("GridSample")
def _grid_sample(call: Call, x: _Tensor, grid: _Tensor) -> _Tensor:
    mode = {
        "bilinear": "bilinear",
        "linear": "bilinear",
        "nearest": "nearest",
        "bicubic": "bicubic",
        "cubic": "bicubic",
    }
    how = mode[call.attribute("mode", "linear")]
    if x.dim() == 5 and how == "bicubic":
        raise call.refuse("cubic samples of volumes")
    aligned = bool(call.attribute("align_corners", 0))
    out: _Tensor = F.grid_sample(x, grid, how, call.attribute("padding_mode", "zeros"), aligned)
    return out


@operator("MaxUnpool", raw=True)
def _max_unpool(call: Call, x: Value, indices: Value, shape: Value = None) -> _Tensor:
    assert x is not None
    assert indices is not None
    tensor, kernel = call.tensor(x), call.attribute("kernel_shape")
    rank = len(kernel)
    strides, pads = call.attribute("strides") or [1] * rank, call.attribute("pads") or [0] * 2 * rank
    inner = [
        (n - 1) * s - pads[i] - pads[rank + i] + k
        for i, (n, s, k) in enumerate(zip(tensor.shape[2:], strides, kernel, strict=True))
    ]
    whole = list(tensor.shape[:2]) + inner
    if shape is not None:
        wanted = call.numbers(shape, "output shape")
        if wanted != whole:
            raise call.refuse("an output shape other than the pool's own")
    # Places count through the whole tensor, not through each image.
    flat = torch.zeros(whole, dtype=tensor.dtype, device=tensor.device).reshape(-1)
    return flat.scatter(0, call.tensor(indices).reshape(-1), tensor.reshape(-1)).reshape(whole)


def _like(call: Call, x: _Tensor | None) -> tuple[Any, torch.dtype]:
    shape = call.attribute("shape") if x is None else list(x.shape)
    return shape, DTYPES.get(call.attribute("dtype"), torch.float32 if x is None else x.dtype)


@operator("RandomNormal", "RandomNormalLike")
def _random_normal(call: Call, x: _Tensor | None = None) -> _Tensor:
    shape, kind = _like(call, x)
    drawn: _Tensor = torch.randn(shape, device=call.device) * call.attribute("scale", 1.0)
    return (drawn + float(call.attribute("mean", 0.0))).to(kind)


@operator("RandomUniform", "RandomUniformLike")
def _random_uniform(call: Call, x: _Tensor | None = None) -> _Tensor:
    shape, kind = _like(call, x)
    low, high = call.attribute("low", 0.0), call.attribute("high", 1.0)
    drawn: _Tensor = torch.rand(shape, device=call.device) * (high - low)
    return (drawn + float(low)).to(kind)


@operator("Multinomial")
def _multinomial(call: Call, x: _Tensor) -> _Tensor:
    kind = DTYPES.get(call.attribute("dtype", 6), torch.int32)
    return torch.multinomial(torch.softmax(x, -1), call.attribute("sample_size", 1), replacement=True).to(kind)


@operator("LpPool", "GlobalLpPool")
def _lp_pool(call: Call, x: _Tensor) -> _Tensor:
    p = call.attribute("p", 2)
    powers: _Tensor = x.abs() ** p
    if call.node.op == "GlobalLpPool":
        summed: _Tensor = powers.sum(list(range(2, x.dim())), keepdim=True) ** (1.0 / p)
        return summed
    kernel = list(call.attribute("kernel_shape"))
    rank = len(kernel)
    if rank > 3 or call.attribute("auto_pad", "NOTSET") != "NOTSET" or call.attribute("ceil_mode", 0):
        raise call.refuse("auto_pad, ceil_mode, or more than three dimensions")
    pads = list(call.attribute("pads") or [0] * 2 * rank)
    flat = [size for i in reversed(range(rank)) for size in (pads[i], pads[i + rank])]
    ones = torch.ones([x.shape[1], 1, *kernel], dtype=x.dtype, device=x.device)
    convolve: Any = [None, F.conv1d, F.conv2d, F.conv3d][rank]
    stride, dilation = call.attribute("strides") or [1] * rank, call.attribute("dilations") or [1] * rank
    total: _Tensor = convolve(F.pad(powers, flat), ones, None, stride, 0, dilation, x.shape[1]) ** (1.0 / p)
    return total
