"""Operators with weights: products, convolutions, pools, norms, softmax, attention."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from plait.capture.onnx.ops.table import operator
from plait.capture.onnx.values import Call, Value

__all__: list[str] = []

_Tensor = torch.Tensor


@operator("MatMul")
def _matmul(_call: Call, a: _Tensor, b: _Tensor) -> _Tensor:
    return torch.matmul(a, b)


@operator("Gemm")
def _gemm(call: Call, a: _Tensor, b: _Tensor, c: _Tensor | None = None) -> _Tensor:
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
def _conv(call: Call, x: _Tensor, weight: _Tensor, bias: _Tensor | None = None) -> _Tensor:
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
def _max_pool(call: Call, x: _Tensor) -> _Tensor:
    if len([name for name in call.node.outputs if name]) > 1:
        raise call.refuse("its second output (indices)")
    kernel = list(call.attribute("kernel_shape"))
    stride, dilation, pads = _window(call, x, kernel)
    x, padding = _padded(x, pads, -math.inf)
    if any(2 * p > k for p, k in zip(padding, kernel, strict=True)):  # more than torch pads by itself
        x, padding = _padded(
            F.pad(x, [p for q in reversed(padding) for p in (q, q)], value=-math.inf), [0] * 2 * len(kernel)
        )
    pool: Any = [None, F.max_pool1d, F.max_pool2d, F.max_pool3d][len(kernel)]
    out: _Tensor = pool(x, kernel, stride, padding, dilation, bool(call.attribute("ceil_mode", 0)))
    return out


@operator("AveragePool")
def _average_pool(call: Call, x: _Tensor) -> _Tensor:
    kernel = list(call.attribute("kernel_shape"))
    stride, dilation, pads = _window(call, x, kernel)
    if any(d != 1 for d in dilation):
        raise call.refuse("dilations")
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
def _batch_norm(call: Call, x: _Tensor, scale: _Tensor, bias: _Tensor, mean: _Tensor, variance: _Tensor) -> _Tensor:
    """Over the batch while the module trains, updating the statistics; ONNX's momentum is what is kept of the old ones."""
    momentum = 1.0 - call.attribute("momentum", 0.9)
    return F.batch_norm(x, mean, variance, scale, bias, call.training, momentum, call.attribute("epsilon", 1e-5))


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


@operator("RotaryEmbedding")
def _rotary(call: Call, x: _Tensor, cos: _Tensor, sin: _Tensor, places: _Tensor | None = None) -> _Tensor:
    heads, flat = call.attribute("num_heads", 0), x.dim() == 3
    if flat:
        x = x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)
    if places is not None:
        cos, sin = cos[places], sin[places]
    width = call.attribute("rotary_embedding_dim", 0) or x.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    if call.attribute("interleaved", 0):
        a, b = turned[..., 0::2], turned[..., 1::2]
        out = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        out = torch.cat((a * cos - b * sin, a * sin + b * cos), -1)
    out = torch.cat((out, rest), -1)
    return out.transpose(1, 2).flatten(-2) if flat else out


@operator("Attention", raw=True)
def _attention(call: Call, q: Value, k: Value, v: Value, mask: Value = None, *others: Value) -> _Tensor:
    if any(other is not None for other in others) or len([name for name in call.node.outputs if name]) > 1:
        raise call.refuse("a key-value cache or its further outputs")
    further = set(call.node.attributes) - {"q_num_heads", "kv_num_heads", "is_causal", "scale", "softmax_precision"}
    asked = sorted(name for name in further if call.attribute(name) not in (0, -1))
    if asked:
        raise call.refuse(f"its {asked[0]}")
    parts, flat = [], False
    for value, name in ((q, "q_num_heads"), (k, "kv_num_heads"), (v, "kv_num_heads")):
        assert value is not None
        tensor = call.tensor(value)
        if tensor.dim() == 3:
            tensor, flat = tensor.reshape(*tensor.shape[:2], call.attribute(name), -1).transpose(1, 2), True
        parts.append(tensor)
    query, key, values = parts
    if key.shape[1] != query.shape[1]:
        times = query.shape[1] // key.shape[1]
        key, values = key.repeat_interleave(times, 1), values.repeat_interleave(times, 1)
    added = call.tensor(mask) if isinstance(mask, torch.Tensor | np.ndarray) else None
    causal = bool(call.attribute("is_causal", 0))
    out = F.scaled_dot_product_attention(query, key, values, added, is_causal=causal, scale=call.attribute("scale"))
    return out.transpose(1, 2).flatten(-2) if flat else out
