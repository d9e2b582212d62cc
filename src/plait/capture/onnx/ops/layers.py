"""Operators with weights: products, convolutions, pools, norms, softmax, attention."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional as F

from plait.capture.onnx.ops.table import operator
from plait.capture.onnx.values import Call

__all__ = ["convolved", "gemm"]

_Tensor = torch.Tensor


@operator("MatMul")
def _matmul(_call: Call, a: _Tensor, b: _Tensor) -> _Tensor:
    return torch.matmul(a, b)


@operator("Gemm")
def gemm(call: Call, a: _Tensor, b: _Tensor, c: _Tensor | None = None) -> _Tensor:
    """alpha a b + beta c, either turned."""
    alpha, beta = call.attribute("alpha", 1.0), call.attribute("beta", 1.0)
    if call.attribute("transA", 0):
        a = a.t()
    weight = b if call.attribute("transB", 0) else b.t()
    if alpha != 1.0:
        a = a * alpha
    if c is not None and beta != 1.0:
        c = c * beta
    if c is None or (c.dim() == 1 and c.shape[0] == weight.shape[0]):
        return F.linear(a, weight, c)
    return F.linear(a, weight) + c


@operator("Einsum")
def _einsum(call: Call, *values: _Tensor) -> _Tensor:
    return torch.einsum(call.attribute("equation").replace(" ", ""), *values)


def _same_pads(call: Call, sizes: list[int], kernel: list[int], stride: list[int], dilation: list[int]) -> list[int]:
    """ONNX pads (all fronts, then all backs) of SAME_UPPER and SAME_LOWER."""
    fronts, backs = [], []
    for size, k, s, d in zip(sizes, kernel, stride, dilation, strict=True):
        total = max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0)
        less = total // 2
        fronts.append(less if call.attribute("auto_pad") == "SAME_UPPER" else total - less)
        backs.append(total - fronts[-1])
    return fronts + backs


def _window(call: Call, x: _Tensor, kernel: list[int]) -> tuple[list[int], list[int], list[int]]:
    """(stride, dilation, ONNX pads)."""
    rank = len(kernel)
    stride = list(call.attribute("strides") or [1] * rank)
    dilation = list(call.attribute("dilations") or [1] * rank)
    kind = call.attribute("auto_pad", "NOTSET")
    if kind in ("SAME_UPPER", "SAME_LOWER"):
        return stride, dilation, _same_pads(call, [int(n) for n in x.shape[2:]], kernel, stride, dilation)
    pads = [0] * (2 * rank) if kind == "VALID" else list(call.attribute("pads") or [0] * (2 * rank))
    return stride, dilation, pads


def _padded(x: _Tensor, pads: list[int], value: float = 0.0) -> tuple[_Tensor, list[int]]:
    """x and the symmetric padding left to the operator: what is not symmetric is padded here."""
    rank = len(pads) // 2
    if pads[:rank] == pads[rank:]:
        return x, pads[:rank]
    flat = [size for i in reversed(range(rank)) for size in (pads[i], pads[i + rank])]
    return F.pad(x, flat, value=value), [0] * rank


_CONV: list[Any] = [None, F.conv1d, F.conv2d, F.conv3d]
_CONV_TRANSPOSE: list[Any] = [None, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d]


@operator("Conv")
def convolved(call: Call, x: _Tensor, weight: _Tensor, bias: _Tensor | None = None) -> _Tensor:
    """The convolution of a node, with its strides, pads and groups."""
    kernel = list(weight.shape[2:])
    stride, dilation, pads = _window(call, x, kernel)
    x, padding = _padded(x, pads)
    out: _Tensor = _CONV[len(kernel)](x, weight, bias, stride, padding, dilation, call.attribute("group", 1))
    return out


@operator("ConvTranspose")
def _conv_transpose(call: Call, x: _Tensor, weight: _Tensor, bias: _Tensor | None = None) -> _Tensor:
    kernel, groups = list(weight.shape[2:]), call.attribute("group", 1)
    rank = len(kernel)
    stride = list(call.attribute("strides") or [1] * rank)
    dilation = list(call.attribute("dilations") or [1] * rank)
    extra = list(call.attribute("output_padding") or [0] * rank)
    pads = list(call.attribute("pads") or [0] * (2 * rank))
    kind, wanted = call.attribute("auto_pad", "NOTSET"), call.attribute("output_shape")
    full = [
        (n - 1) * s + (k - 1) * d + 1 + e
        for n, s, k, d, e in zip(x.shape[2:], stride, kernel, dilation, extra, strict=True)
    ]
    if wanted is None and kind in ("SAME_UPPER", "SAME_LOWER"):
        wanted = [n * s for n, s in zip(x.shape[2:], stride, strict=True)]
    if wanted is not None:
        total = [f - w for f, w in zip(full, wanted[-rank:], strict=True)]
        less = [t // 2 for t in total]
        more = [t - n for t, n in zip(total, less, strict=True)]
        pads = less + more if kind == "SAME_UPPER" else more + less
    function = _CONV_TRANSPOSE[rank]
    if pads[:rank] == pads[rank:] and min(pads) >= 0:
        out: _Tensor = function(x, weight, bias, stride, pads[:rank], extra, groups, dilation)
        return out
    whole: _Tensor = function(x, weight, bias, stride, 0, 0, groups, dilation)
    # Unsymmetric: the whole product, then cut (a negative pad lengthens).
    flat = [size for i in reversed(range(rank)) for size in (-pads[i], extra[i] - pads[i + rank])]
    return F.pad(whole, flat)


@operator("MaxPool")
def _max_pool(call: Call, x: _Tensor) -> _Tensor | tuple[_Tensor, _Tensor]:
    kernel = list(call.attribute("kernel_shape"))
    stride, dilation, pads = _window(call, x, kernel)
    if len([name for name in call.node.outputs if name]) > 1:
        return _max_pool_with_places(call, x, kernel, (stride, dilation, pads))
    x, padding = _padded(x, pads, -math.inf)
    if any(2 * p > k for p, k in zip(padding, kernel, strict=True)):  # more than torch pads by itself
        x, padding = _padded(
            F.pad(x, [p for q in reversed(padding) for p in (q, q)], value=-math.inf), [0] * 2 * len(kernel)
        )
    pool: Any = [None, F.max_pool1d, F.max_pool2d, F.max_pool3d][len(kernel)]
    out: _Tensor = pool(x, kernel, stride, padding, dilation, bool(call.attribute("ceil_mode", 0)))
    return out


def _max_pool_with_places(
    call: Call, x: _Tensor, kernel: list[int], window: tuple[list[int], list[int], list[int]]
) -> tuple[_Tensor, _Tensor]:
    """Also where each largest value lies, counted through the whole tensor."""
    stride, dilation, pads = window
    rank = len(kernel)
    if pads[:rank] != pads[rank:] or any(2 * p > k for p, k in zip(pads, kernel, strict=False)):
        raise call.refuse("its second output (indices) under pads that differ or are large")
    if call.attribute("storage_order", 0):
        raise call.refuse("storage_order")
    pool: Any = [None, F.max_pool1d, F.max_pool2d, F.max_pool3d][rank]
    ceil = bool(call.attribute("ceil_mode", 0))
    out, places = pool(x, kernel, stride, pads[:rank], dilation, ceil, return_indices=True)
    size = math.prod(x.shape[2:])
    first = torch.arange(x.shape[0] * x.shape[1], device=x.device).reshape(x.shape[0], x.shape[1], *[1] * rank) * size
    return out, places + first


def _spread_pool(call: Call, x: _Tensor, kernel: list[int], window: tuple[list[int], list[int], list[int]]) -> _Tensor:
    """The mean under dilation: a sum by a convolution of ones, over the count of what is inside."""
    stride, dilation, pads = window
    rank = len(kernel)
    if call.attribute("ceil_mode", 0):
        raise call.refuse("dilations with ceil_mode")
    convolve = _CONV[rank]
    flat = [size for i in reversed(range(rank)) for size in (pads[i], pads[i + rank])]
    ones = torch.ones([x.shape[1], 1, *kernel], dtype=x.dtype, device=x.device)
    total: _Tensor = convolve(F.pad(x, flat), ones, None, stride, 0, dilation, x.shape[1])
    if call.attribute("count_include_pad", 0):
        return total / math.prod(kernel)
    inside = F.pad(torch.ones_like(x[:1, :1]), flat)
    counts: _Tensor = convolve(inside, ones[:1], None, stride, 0, dilation)
    return total / counts


@operator("AveragePool")
def _average_pool(call: Call, x: _Tensor) -> _Tensor:
    kernel = list(call.attribute("kernel_shape"))
    stride, dilation, pads = _window(call, x, kernel)
    if any(d != 1 for d in dilation):
        return _spread_pool(call, x, kernel, (stride, dilation, pads))
    counts_pads, rank = bool(call.attribute("count_include_pad", 0)), len(kernel)
    pool: Any = [None, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d][rank]
    ceil = bool(call.attribute("ceil_mode", 0))
    if pads[:rank] == pads[rank:] and all(2 * p <= k for p, k in zip(pads, kernel + kernel, strict=True)):
        out: _Tensor = pool(x, kernel, stride, pads[:rank], ceil, counts_pads)
        return out
    flat = [size for i in reversed(range(rank)) for size in (pads[i], pads[i + rank])]
    mean: _Tensor = pool(F.pad(x, flat), kernel, stride, 0, ceil)
    if counts_pads:
        return mean
    share: _Tensor = pool(F.pad(torch.ones_like(x[:1, :1]), flat), kernel, stride, 0, ceil)
    return mean / share


@operator("GlobalAveragePool", "GlobalMaxPool")
def _global_pool(call: Call, x: _Tensor) -> _Tensor:
    dims = list(range(2, x.dim()))
    return x.mean(dims, keepdim=True) if call.node.op == "GlobalAveragePool" else x.amax(dims, keepdim=True)


@operator("BatchNormalization")
def _batch_norm(
    call: Call, x: _Tensor, scale: _Tensor, bias: _Tensor, mean: _Tensor, variance: _Tensor
) -> _Tensor | tuple[_Tensor, ...]:
    """Over the batch while the module trains, updating the statistics; ONNX's momentum is what is kept of the old ones."""
    momentum = 1.0 - call.attribute("momentum", 0.9)
    out = F.batch_norm(x, mean, variance, scale, bias, call.training, momentum, call.attribute("epsilon", 1e-5))
    # A file written while it trained gives the statistics out, too; those of the batch (before opset 14) nothing reads.
    return out if len(call.node.outputs) == 1 else (out, mean, variance, mean, variance)


@operator("InstanceNormalization")
def _instance_norm(call: Call, x: _Tensor, scale: _Tensor, bias: _Tensor) -> _Tensor:
    return F.instance_norm(x, weight=scale, bias=bias, eps=call.attribute("epsilon", 1e-5))


@operator("LayerNormalization")
@operator("LayerNormalization", domain="com.microsoft")
def _layer_norm(call: Call, x: _Tensor, scale: _Tensor, bias: _Tensor | None = None) -> Any:
    axis = call.attribute("axis", -1) % x.dim()
    shape = list(x.shape[axis:])
    plain = list(scale.shape) == shape and (bias is None or list(bias.shape) == shape)
    normed = F.layer_norm(x, shape, scale if plain else None, bias if plain else None, call.attribute("epsilon", 1e-5))
    out = normed if plain else normed * scale + (0 if bias is None else bias)
    if len(call.node.outputs) == 1:
        return out
    dims = list(range(axis, x.dim()))
    variance, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    return out, mean, torch.rsqrt(variance + call.attribute("epsilon", 1e-5))


@operator("RMSNormalization", "SimplifiedLayerNormalization")
@operator("SimplifiedLayerNormalization", domain="com.microsoft")
def _rms_norm(call: Call, x: _Tensor, scale: _Tensor) -> _Tensor:
    axis = call.attribute("axis", -1) % x.dim()
    return F.rms_norm(x, list(x.shape[axis:]), None, call.attribute("epsilon", 1e-5)) * scale


@operator("GroupNormalization")
def _group_norm(call: Call, x: _Tensor, scale: _Tensor, bias: _Tensor) -> _Tensor:
    groups, eps = call.attribute("num_groups"), call.attribute("epsilon", 1e-5)
    if scale.shape[0] == x.shape[1]:
        return F.group_norm(x, groups, scale, bias, eps)
    each = x.shape[1] // groups  # opset 18: one scale for each group
    return F.group_norm(x, groups, scale.repeat_interleave(each), bias.repeat_interleave(each), eps)


@operator("LpNormalization")
def _lp_norm(call: Call, x: _Tensor) -> _Tensor:
    axis, p = call.attribute("axis", -1), call.attribute("p", 2)
    length: _Tensor = torch.linalg.vector_norm(x, p, axis, keepdim=True)
    return x / length.clamp(min=torch.finfo(x.dtype).tiny)


@operator("LRN")
def _lrn(call: Call, x: _Tensor) -> _Tensor:
    size, alpha, beta = call.attribute("size"), call.attribute("alpha", 1e-4), call.attribute("beta", 0.75)
    return F.local_response_norm(x, size, alpha, beta, call.attribute("bias", 1.0))


@operator("Softmax", "LogSoftmax", "Hardmax")
def _softmax(call: Call, x: _Tensor) -> _Tensor:
    """From opset 13 along one axis; before, along everything from that axis on."""
    axis = call.attribute("axis", -1 if call.opset >= 13 else 1) % x.dim()
    shape = x.shape
    if call.opset < 13 and axis != x.dim() - 1:
        x = x.flatten(axis)
    if call.node.op == "Hardmax":
        found = F.one_hot(x.argmax(axis), x.shape[axis]).to(x.dtype).movedim(-1, axis)
    else:
        found = (torch.softmax if call.node.op == "Softmax" else torch.log_softmax)(x, axis)
    return found.reshape(shape) if found.shape != shape else found
