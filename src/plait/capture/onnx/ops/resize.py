"""Resize and Upsample: along each axis a weighted sum of picked rows, for every coordinate mode that ONNX has."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from plait.capture.onnx.ops.table import operator
from plait.capture.onnx.values import Call, Value

__all__: list[str] = []


@operator("Resize", "Upsample", raw=True)
def _resize(call: Call, x: Value, *others: Value) -> torch.Tensor:
    assert x is not None
    tensor = call.tensor(x)
    if call.node.op == "Upsample" or call.opset == 10:
        roi, sizes, scales = None, None, others[0] if others else None
    else:
        roi, scales, sizes = [*others, None, None, None][:3]
    if call.attribute("antialias", 0) or call.attribute("coordinate_transformation_mode") == "tf_crop_and_resize":
        raise call.refuse("antialiasing, or a region of interest")
    if call.attribute("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise call.refuse("keep_aspect_ratio_policy")
    del roi  # read by tf_crop_and_resize alone
    axes = list(call.attribute("axes") or range(tensor.dim()))
    given = np.asarray(call.attribute("scales")) if scales is None and call.attribute("scales") is not None else scales
    if isinstance(given, np.ndarray) and given.size:
        factors = call.floats(given, "scales")
        lengths = [int(np.floor(tensor.shape[axis] * factor)) for axis, factor in zip(axes, factors, strict=True)]
    else:
        lengths = call.numbers(sizes, "sizes")
        factors = [length / tensor.shape[axis] for axis, length in zip(axes, lengths, strict=True)]
    for axis, length, factor in zip(axes, lengths, factors, strict=True):
        if length != tensor.shape[axis] or factor != 1.0:
            tensor = _along(call, tensor, axis, int(length), float(factor))
    return tensor


def _along(call: Call, x: torch.Tensor, axis: int, length: int, factor: float) -> torch.Tensor:
    """x[..., length, ...]: for each new row the old rows and their weights."""
    size = int(x.shape[axis])
    places = _coordinates(call, size, length, factor)
    total: Any = None
    for picked, weight in _taps(call, places, size):
        rows = x.index_select(axis, torch.from_numpy(np.clip(picked, 0, size - 1)).to(x.device))
        if weight is not None:
            shape = [1] * x.dim()
            shape[axis] = -1
            rows = rows * torch.from_numpy(weight).to(x).view(shape)
        total = rows if total is None else total + rows
    return total  # type: ignore[no-any-return]


def _coordinates(call: Call, size: int, length: int, factor: float) -> np.ndarray[Any, Any]:
    """Where each new row lies among the old ones."""
    new = np.arange(length, dtype=np.float64)
    default = "half_pixel" if call.opset > 10 and call.node.op == "Resize" else "asymmetric"
    mode = call.attribute("coordinate_transformation_mode", default)
    if mode == "align_corners":
        return new * (size - 1) / (size * factor - 1) if length > 1 else new * 0
    if mode == "asymmetric":
        return new / factor
    if mode == "half_pixel_symmetric":
        adjusted = length / (factor * size)
        return size / 2 * (1 - adjusted) + (new + 0.5) / factor - 0.5
    if mode == "pytorch_half_pixel" and length == 1:
        return np.zeros(1)
    if mode in ("half_pixel", "pytorch_half_pixel"):
        return (new + 0.5) / factor - 0.5
    raise call.refuse(f"coordinates {mode}")


def _taps(call: Call, places: np.ndarray[Any, Any], size: int) -> list[tuple[Any, Any]]:
    """(old rows, weights) of each term; weights None where they are 1."""
    mode = call.attribute("mode", "nearest")
    base = np.floor(places)
    inside = places - base
    if mode == "nearest":
        default = "round_prefer_floor" if call.opset > 10 and call.node.op == "Resize" else "floor"
        how = call.attribute("nearest_mode", default)
        rounded = {
            "round_prefer_floor": np.ceil(places - 0.5),
            "round_prefer_ceil": np.floor(places + 0.5),
            "floor": base,
            "ceil": np.ceil(places),
        }[how]
        return [(rounded.astype(np.int64), None)]
    if mode == "linear":
        places = np.clip(places, 0, size - 1)
        base = np.floor(places)
        inside = places - base
        return [(base.astype(np.int64), 1 - inside), (base.astype(np.int64) + 1, inside)]
    if mode != "cubic":
        raise call.refuse(f"mode {mode}")
    a = call.attribute("cubic_coeff_a", -0.75)
    found = []
    for offset in (-1, 0, 1, 2):
        t = np.abs(inside - offset)
        near = (a + 2) * t**3 - (a + 3) * t**2 + 1
        far = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
        weight = np.where(t <= 1, near, far)
        row = (base + offset).astype(np.int64)
        if call.attribute("exclude_outside", 0):
            weight = np.where((row < 0) | (row >= size), 0.0, weight)
        found.append((row, weight))
    if call.attribute("exclude_outside", 0):
        total = sum(weight for _, weight in found)
        found = [(row, weight / total) for row, weight in found]
    return list(found)
