"""Quantised operators, computed in floating point on whole numbers: what a file rounds is rounded, and gradients pass through.

A quantised value is a tensor of floating type that holds whole numbers (exact up to 2^24 in float32), so that the network
trains on as it would in quantisation-aware training: the step of a rounding counts as the identity, its clipping is kept.
Weights that are only ever scaled back are scaled back once, when the file is read (`plait.capture.onnx.weights`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from plait.capture.onnx.ops.layers import convolved
from plait.capture.onnx.ops.table import operator
from plait.capture.onnx.values import DTYPES, Array, Call, Value

__all__ = ["scaled_back", "weight_of_few_bits"]

_Tensor = torch.Tensor
_RANGES = {torch.uint8: (0, 255), torch.int8: (-128, 127), torch.uint16: (0, 65535), torch.int16: (-32768, 32767)}
_SMALL = {21: (0, 15), 22: (-8, 7), 25: (0, 3), 26: (-2, 1)}  # onnx.TensorProto's UINT4, INT4, UINT2, INT2


def _rounded(x: _Tensor) -> _Tensor:
    """Half to even; the gradient is that of x."""
    return x + (torch.round(x) - x).detach()


def _along(scale: _Tensor, x: _Tensor, axis: int, block: int) -> _Tensor:
    """Scale or zero point in the shape of x: one number, one for each row of an axis, or one for each block of it."""
    if scale.dim() == 0 or scale.numel() == 1:
        return scale.reshape(())
    if block:
        return scale.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
    shape = [1] * x.dim()
    shape[axis] = -1
    return scale.reshape(shape)


def scaled_back(x: Array, scale: Array, zero: Array | None, axis: int, block: int) -> Array:
    """DequantizeLinear of constants."""
    given = torch.from_numpy(np.ascontiguousarray(x).astype(np.float32))
    factors = torch.from_numpy(np.asarray(scale, np.float32))
    moved = given
    if zero is not None:
        moved = given - _along(torch.from_numpy(np.asarray(zero, np.float32)), given, axis, block)
    found: Array = (moved * _along(factors, given, axis, block)).numpy()
    return found


@operator("DequantizeLinear")
@operator("DequantizeLinear", domain="com.microsoft")
def _dequantize(call: Call, x: _Tensor, scale: _Tensor, zero: _Tensor | None = None) -> _Tensor:
    axis, block = call.attribute("axis", 1), call.attribute("block_size", 0)
    moved = x.to(scale.dtype)
    if zero is not None:
        moved = moved - _along(zero.to(scale.dtype), moved, axis, block)
    return moved * _along(scale, moved, axis, block)


@operator("QuantizeLinear", raw=True)
@operator("QuantizeLinear", domain="com.microsoft", raw=True)
def _quantize(call: Call, x: Value, scale: Value, zero: Value = None) -> _Tensor:
    assert x is not None
    assert scale is not None
    tensor, factors = call.tensor(x), call.tensor(scale)
    axis, block = call.attribute("axis", 1), call.attribute("block_size", 0)
    wanted = call.attribute("output_dtype", 0)
    if wanted in _SMALL:
        low, high = _SMALL[wanted]
    else:
        kind = DTYPES.get(wanted) if wanted else torch.uint8 if zero is None else call.tensor(zero).dtype
        if kind not in _RANGES:
            raise call.refuse("quantising to floats of 8 bits, or to a type that torch has not")
        low, high = _RANGES[kind]
    scaled = _rounded(tensor / _along(factors, tensor, axis, block))
    if zero is not None:
        scaled = scaled + _along(call.tensor(zero).to(scaled.dtype), tensor, axis, block)
    return scaled.clamp(low, high)


@operator("DynamicQuantizeLinear")
def _dynamic_quantize(_call: Call, x: _Tensor) -> tuple[_Tensor, ...]:
    """(x in 0 to 255, scale, zero point), its range that of the data, which takes no gradient."""
    whole, scale, zero = _dynamic(x)
    return whole, scale, zero


def _dynamic(x: _Tensor) -> tuple[_Tensor, _Tensor, _Tensor]:
    low, high = x.detach().amin().clamp(max=0), x.detach().amax().clamp(min=0)
    scale = (high - low) / 255
    zero = torch.round((-low / scale).clamp(0, 255))
    return (_rounded(x / scale) + zero).clamp(0, 255), scale, zero


def _less(x: _Tensor, zero: _Tensor | None, kind: torch.dtype, axis: int | None = None) -> _Tensor:
    """x without its zero point, as a float."""
    moved = x.to(kind) if not x.is_floating_point() else x
    if zero is None:
        return moved
    point = zero.to(moved.dtype)
    if point.numel() > 1 and axis is not None:
        shape = [1] * moved.dim()
        shape[axis] = -1
        point = point.reshape(shape)
    return moved - (point.reshape(()) if point.numel() == 1 else point)


@operator("MatMulInteger")
def _matmul_integer(
    _call: Call, a: _Tensor, b: _Tensor, a_zero: _Tensor | None = None, b_zero: _Tensor | None = None
) -> _Tensor:
    kind = torch.float32
    return torch.matmul(_less(a, a_zero, kind, -2), _less(b, b_zero, kind, -1))


@operator("ConvInteger")
def _conv_integer(
    call: Call, x: _Tensor, w: _Tensor, x_zero: _Tensor | None = None, w_zero: _Tensor | None = None
) -> _Tensor:
    out: _Tensor = convolved(call, _less(x, x_zero, torch.float32), _less(w, w_zero, torch.float32, 0), None)
    return out


def _again(x: _Tensor, scale: _Tensor, zero: _Tensor, like: _Tensor, axis: int = 1) -> _Tensor:
    """x quantised for the next operator, in the range of the type of `like`."""
    low, high = _RANGES[like.dtype]
    scale = _along(scale, x, axis, 0)
    return (_rounded(x / scale) + _along(zero.to(x.dtype), x, axis, 0)).clamp(low, high)


def _back(x: _Tensor, scale: _Tensor, zero: _Tensor | None, axis: int = 1) -> _Tensor:
    factors = scale if scale.numel() == 1 else _along(scale, x, axis, 0)
    return _less(x, zero, scale.dtype, axis) * factors


@operator("QLinearMatMul")
def _qlinear_matmul(
    _call: Call,
    a: _Tensor,
    a_s: _Tensor,
    a_z: _Tensor,
    b: _Tensor,
    b_s: _Tensor,
    b_z: _Tensor,
    y_s: _Tensor,
    y_z: _Tensor,
) -> _Tensor:
    product = torch.matmul(_less(a, a_z, a_s.dtype, -2), _less(b, b_z, b_s.dtype, -1))
    rows = a_s.reshape(-1, 1) if a_s.numel() > 1 else a_s.reshape(())
    return _again(product * (rows * (b_s if b_s.numel() > 1 else b_s.reshape(()))), y_s, y_z, y_z, -1)


@operator("QLinearConv")
def _qlinear_conv(
    call: Call,
    *given: _Tensor,
) -> _Tensor:
    x, x_s, x_z, w, w_s, w_z, y_s, y_z, *bias = given
    out = convolved(call, _less(x, x_z, x_s.dtype), _less(w, w_z, w_s.dtype, 0), None)
    scale = x_s.reshape(()) * (w_s.reshape(()) if w_s.numel() == 1 else w_s.reshape(-1, *[1] * (out.dim() - 2)))
    if bias:
        out = out + bias[0].to(out.dtype).reshape(-1, *[1] * (out.dim() - 2))
    return _again(out * scale, y_s, y_z, y_z)


@operator("QLinearAdd", "QLinearMul", domain="com.microsoft")
def _qlinear_pair(call: Call, *given: _Tensor) -> _Tensor:
    a, a_s, a_z, b, b_s, b_z, c_s, c_z = given
    left, right = _back(a, a_s, a_z), _back(b, b_s, b_z)
    return _again(left + right if call.node.op == "QLinearAdd" else left * right, c_s, c_z, c_z)


@operator("QLinearSigmoid", "QLinearLeakyRelu", domain="com.microsoft")
def _qlinear_unary(call: Call, *given: _Tensor) -> _Tensor:
    x, x_s, x_z, y_s, y_z = given
    real = _back(x, x_s, x_z)
    made = (
        torch.sigmoid(real) if call.node.op == "QLinearSigmoid" else F.leaky_relu(real, call.attribute("alpha", 0.01))
    )
    return _again(made, y_s, y_z, y_z)


@operator("QLinearSoftmax", domain="com.microsoft")
def _qlinear_softmax(call: Call, *given: _Tensor) -> _Tensor:
    x, x_s, x_z, y_s, y_z = given
    axis, real = call.attribute("axis", -1) % x.dim(), _back(x, x_s, x_z)
    if call.attribute("opset", 13) < 13:
        return _again(torch.softmax(real.flatten(axis), -1).reshape(x.shape), y_s, y_z, y_z)
    return _again(torch.softmax(real, axis), y_s, y_z, y_z)


@operator("QLinearGlobalAveragePool", domain="com.microsoft")
def _qlinear_pool(call: Call, *given: _Tensor) -> _Tensor:
    x, x_s, x_z, y_s, y_z = given
    dims = list(range(1, x.dim() - 1)) if call.attribute("channels_last", 0) else list(range(2, x.dim()))
    return _again(_back(x, x_s, x_z).mean(dims, keepdim=True), y_s, y_z, y_z)


@operator("QLinearConcat", domain="com.microsoft")
def _qlinear_concat(call: Call, *given: _Tensor) -> _Tensor:
    y_s, y_z, *rest = given
    parts = [_back(rest[i], rest[i + 1], rest[i + 2]) for i in range(0, len(rest), 3)]
    return _again(torch.cat(parts, call.attribute("axis")), y_s, y_z, y_z)


@operator("QGemm", domain="com.microsoft")
def _q_gemm(call: Call, *given: _Tensor | None) -> _Tensor:
    a, a_s, a_z, b, b_s, b_z, *rest = given
    assert a is not None
    assert b is not None
    assert a_s is not None
    assert b_s is not None
    c, y_s, y_z = [*rest, None, None, None][:3]
    left, right = _less(a, a_z, a_s.dtype), b.to(b_s.dtype)
    if call.attribute("transA", 0):
        left = left.t()
    right = _less(right, b_z, b_s.dtype, 0 if call.attribute("transB", 0) else 1)
    if call.attribute("transB", 0):
        right = right.t()
    out = left @ right
    if c is not None:
        out = out + c.to(out.dtype)
    out = out * (a_s.reshape(()) * b_s.reshape(-1)) * call.attribute("alpha", 1.0)
    return out if y_s is None or y_z is None else _again(out, y_s, y_z, y_z)


@operator("DynamicQuantizeMatMul", domain="com.microsoft")
def _dynamic_matmul(
    _call: Call, a: _Tensor, b: _Tensor, b_s: _Tensor, b_z: _Tensor | None = None, bias: _Tensor | None = None
) -> _Tensor:
    whole, scale, zero = _dynamic(a)
    out = torch.matmul(whole - zero, _less(b, b_z, b_s.dtype, -1)) * (scale * b_s)
    return out if bias is None else out + bias


@operator("MatMulIntegerToFloat", domain="com.microsoft")
def _matmul_to_float(_call: Call, *given: Any) -> _Tensor:
    a, b, a_s, b_s, a_z, b_z, bias = [*given, None, None, None][:7]
    out: _Tensor = torch.matmul(_less(a, a_z, a_s.dtype, -2), _less(b, b_z, b_s.dtype, -1)) * (a_s * b_s)
    return out if bias is None else out + bias


@operator("MatMulNBits", domain="com.microsoft")
def _matmul_few_bits(call: Call, *given: Any) -> _Tensor:
    """x @ W^T, where W [N, K] is kept in 4 or 8 bits, blocks of K with one scale each."""
    x, packed, scales, zeros, groups, bias = [*given, None, None, None][:6]
    out = F.linear(x, weight_of_few_bits(call, packed, scales, zeros, groups).to(x.dtype))
    return out if bias is None else out + bias


def weight_of_few_bits(call: Call, packed: Any, scales: Any, zeros: Any, groups: Any) -> _Tensor:
    """W [N, K] of a MatMulNBits."""
    if groups is not None:
        raise call.refuse("reordered groups (g_idx)")
    rows, width, block = (call.attribute(name) for name in ("N", "K", "block_size"))
    bits = call.attribute("bits") or 4
    if bits not in (4, 8):
        raise call.refuse(f"{bits} bits")
    blocks = -(-width // block)
    whole = _unpacked(packed.reshape(rows, blocks, -1), bits)[..., :block]
    points: Any = float(1 << (bits - 1))
    if zeros is not None:
        points = zeros if zeros.is_floating_point() else _unpacked(zeros.reshape(rows, -1), bits)[:, :blocks]
        points = points.reshape(rows, blocks, 1).to(scales.dtype)
    weight: _Tensor = (whole.to(scales.dtype) - points) * scales.reshape(rows, blocks, 1)
    return weight.reshape(rows, -1)[:, :width]


def _unpacked(packed: _Tensor, bits: int) -> _Tensor:
    if bits == 8:
        return packed
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
