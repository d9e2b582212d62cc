"""Fused operators of onnxruntime (com.microsoft), as its optimizer and its transformers tools write them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from plait.capture.onnx.ops.layers import convolved, gemm
from plait.capture.onnx.ops.table import operator
from plait.capture.onnx.values import Call

__all__: list[str] = []

_Tensor = torch.Tensor
_DOMAIN = "com.microsoft"


def _activated(call: Call, x: _Tensor) -> _Tensor:
    name = call.attribute("activation", "")
    given = [float(value) for value in call.attribute("activation_params", [])]
    known: dict[str, Callable[[_Tensor], _Tensor]] = {
        "": lambda t: t,
        "Relu": torch.relu,
        "Sigmoid": torch.sigmoid,
        "Tanh": torch.tanh,
        "LeakyRelu": lambda t: F.leaky_relu(t, given[0] if given else call.attribute("activation_alpha", 0.01)),
        "Clip": lambda t: t.clamp(given[0], given[1]),
        "HardSigmoid": lambda t: torch.clamp(given[0] * t + given[1], 0, 1),
    }
    if name not in known:
        raise call.refuse(f"activation {name}")
    return known[name](x)


@operator("FusedMatMul", domain=_DOMAIN)
def _fused_matmul(call: Call, a: _Tensor, b: _Tensor) -> _Tensor:
    if call.attribute("transBatchA", 0) or call.attribute("transBatchB", 0):
        raise call.refuse("transBatchA or transBatchB")
    a = a.mT if call.attribute("transA", 0) else a
    b = b.mT if call.attribute("transB", 0) else b
    return torch.matmul(a, b) * float(call.attribute("alpha", 1.0))


@operator("FusedGemm", domain=_DOMAIN)
def _fused_gemm(call: Call, a: _Tensor, b: _Tensor, c: _Tensor | None = None) -> _Tensor:
    return _activated(call, gemm(call, a, b, c))


@operator("FusedConv", domain=_DOMAIN)
def _fused_conv(call: Call, x: _Tensor, w: _Tensor, b: _Tensor | None = None, z: _Tensor | None = None) -> _Tensor:
    out = convolved(call, x, w, b)
    return _activated(call, out if z is None else out + z)


@operator("BiasGelu", domain=_DOMAIN)
def _bias_gelu(_call: Call, x: _Tensor, bias: _Tensor) -> _Tensor:
    return F.gelu(x + bias)


@operator("FastGelu", domain=_DOMAIN)
def _fast_gelu(_call: Call, x: _Tensor, bias: _Tensor | None = None) -> _Tensor:
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


@operator("QuickGelu", domain=_DOMAIN)
def _quick_gelu(call: Call, x: _Tensor) -> _Tensor:
    return x * torch.sigmoid(call.attribute("alpha", 1.702) * x)


@operator("BiasSoftmax", domain=_DOMAIN)
def _bias_softmax(call: Call, x: _Tensor, bias: _Tensor) -> _Tensor:
    axis = call.attribute("axis", 1) % x.dim()
    if not call.attribute("is_inner_broadcast", 1):
        raise call.refuse("a bias that is spread over the outer dimensions")
    return torch.softmax((x + bias).flatten(axis), -1).reshape(x.shape)


@operator("SkipLayerNormalization", domain=_DOMAIN)
def _skip_layer_norm(call: Call, x: _Tensor, skip: _Tensor, gamma: _Tensor, *rest: _Tensor | None) -> tuple[Any, ...]:
    beta, bias = [*rest, None, None][:2]
    total = x + skip if bias is None else x + skip + bias
    normed = F.layer_norm(total, [total.shape[-1]], gamma, beta, call.attribute("epsilon", 1e-12))
    return normed, None, None, total


@operator("SkipSimplifiedLayerNormalization", domain=_DOMAIN)
def _skip_rms_norm(
    call: Call, x: _Tensor, skip: _Tensor, gamma: _Tensor, bias: _Tensor | None = None
) -> tuple[Any, ...]:
    total = x + skip if bias is None else x + skip + bias
    normed = F.rms_norm(total, [total.shape[-1]], None, call.attribute("epsilon", 1e-12)) * gamma
    return normed, None, None, total


@operator("EmbedLayerNormalization", domain=_DOMAIN)
def _embed_layer_norm(call: Call, ids: _Tensor, kinds: _Tensor | None, *tables: _Tensor | None) -> tuple[Any, ...]:
    words, places, segments, gamma, beta, mask, positions = [*tables, *[None] * 7][:7]
    assert words is not None
    assert places is not None
    at = places[: ids.shape[1]] if positions is None else F.embedding(positions, places)
    total = F.embedding(ids, words) + at
    if segments is not None and kinds is not None:
        total = total + F.embedding(kinds, segments)
    normed = F.layer_norm(total, [total.shape[-1]], gamma, beta, call.attribute("epsilon", 1e-12))
    counted = torch.zeros(ids.shape[0], dtype=torch.int32, device=ids.device) if mask is None else mask.sum(1).int()
    return normed, counted, total


def _heads(x: _Tensor, count: int) -> _Tensor:
    """[batch, length, heads x width] -> [batch, heads, length, width]."""
    return x.reshape(*x.shape[:2], count, -1).transpose(1, 2)


def _padding(call: Call, mask: _Tensor | None, q: _Tensor, k: _Tensor) -> _Tensor | None:
    """What is added to the scores: [batch, 1, 1 or length, length of keys]."""
    if mask is None:
        return None
    if mask.dim() == 1 and mask.shape[0] == q.shape[0]:  # lengths
        kept = torch.arange(k.shape[2], device=q.device) < mask[:, None]
        kept = kept[:, None, None]
    elif mask.dim() == 2 and mask.shape[1] == k.shape[2]:
        kept = mask[:, None, None] != 0
    elif mask.dim() == 3:
        kept = mask[:, None] != 0
    else:
        raise call.refuse("a mask of starts and ends, or of four dimensions")
    return torch.where(kept, 0.0, call.attribute("mask_filter_value", -10000.0)).to(q.dtype)


def _attend(call: Call, q: _Tensor, k: _Tensor, v: _Tensor, *added: _Tensor | None) -> _Tensor:
    """softmax(q k^T x scale + what is added) v; [batch, length, heads x width]."""
    scores = torch.matmul(q, k.mT) * (call.attribute("scale") or 1 / math.sqrt(q.shape[-1]))
    for one in added:
        if one is not None:
            scores = scores + one
    if call.attribute("unidirectional", 0):
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
        scores = torch.where(seen, scores, torch.finfo(scores.dtype).min)
    out: _Tensor = torch.matmul(torch.softmax(scores, -1), v)
    return out.transpose(1, 2).flatten(-2)


def _no_cache(call: Call, further: Any) -> None:
    if any(value is not None for value in further) or len([name for name in call.node.outputs if name]) > 1:
        raise call.refuse("a key-value cache or its further outputs")


@operator("Attention", domain=_DOMAIN)
def _attention(call: Call, x: _Tensor, weights: _Tensor, *rest: _Tensor | None) -> _Tensor:
    bias, mask, past, added, *further = [*rest, None, None, None, None]
    _no_cache(call, (past, *further))
    if call.attribute("do_rotary", 0):
        raise call.refuse("do_rotary")
    heads, sizes = call.attribute("num_heads"), call.attribute("qkv_hidden_sizes")
    mixed = torch.matmul(x, weights) if bias is None else torch.matmul(x, weights) + bias
    parts: Any = torch.split(mixed, list(sizes) if sizes else mixed.shape[-1] // 3, -1)
    q, k, v = (_heads(part, heads) for part in parts)
    return _attend(call, q, k, v, _padding(call, mask, q, k), added)


@operator("MultiHeadAttention", domain=_DOMAIN)
def _multi_head_attention(call: Call, q: _Tensor, *rest: _Tensor | None) -> _Tensor:
    given: list[Any] = [*rest, *[None] * 5]
    k, v, bias, mask, added, *further = given
    _no_cache(call, further)
    heads = call.attribute("num_heads")
    if k is None or v is None:
        if q.dim() != 5:
            raise call.refuse("keys or values that are not given")
        q, k, v = (q[:, :, :, i].flatten(2) for i in range(3))  # packed: [batch, length, heads, 3, width]
    if k.dim() == 5:
        k, v = (k[:, :, :, i].flatten(2) for i in range(2))
    if bias is not None:
        width = q.shape[-1]
        q = q + bias[:width]
        k = k + bias[width : 2 * width] if k.dim() == 3 else k
        v = v + bias[2 * width :] if v.dim() == 3 else v
    keys, values = (part if part.dim() == 4 else _heads(part, heads) for part in (k, v))
    query = _heads(q, heads)
    return _attend(call, query, keys, values, _padding(call, mask, query, keys), added)


@operator("RotaryEmbedding", domain=_DOMAIN)
def _rotary(call: Call, x: _Tensor, places: _Tensor, cos: _Tensor, sin: _Tensor) -> _Tensor:
    flat = x.dim() == 3
    if flat:
        heads = call.attribute("num_heads", 0) or x.shape[-1] // (2 * cos.shape[-1])
        x = _heads(x, heads)
    if places.numel() == 1 and places.dim() == 1:
        places = places + torch.arange(x.shape[2], device=x.device)[None]
    out = _turned(x, cos[places][:, None], sin[places][:, None], interleaved=bool(call.attribute("interleaved", 0)))
    return out.transpose(1, 2).flatten(-2) if flat else out


def _turned(x: _Tensor, cos: _Tensor, sin: _Tensor, *, interleaved: bool) -> _Tensor:
    width = 2 * cos.shape[-1]
    part, rest = x[..., :width], x[..., width:]
    if interleaved:
        a, b = part[..., 0::2], part[..., 1::2]
        part = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    else:
        a, b = part.chunk(2, -1)
        part = torch.cat((a * cos - b * sin, a * sin + b * cos), -1)
    return torch.cat((part, rest), -1)


@operator("GroupQueryAttention", domain=_DOMAIN)
def _group_query_attention(call: Call, q: _Tensor, *rest: _Tensor | None) -> tuple[Any, ...]:
    """Without a past: the prompt of each sample, causal, its padding behind. Keys and values are given out as the cache."""
    given: list[Any] = [*rest, *[None] * 8]
    k, v, past_k, past_v, lengths, _, cos, sin, *further = given
    if any(one is not None and one.numel() for one in (past_k, past_v)) or any(one is not None for one in further):
        raise call.refuse("a key-value cache that is not empty, or its newest inputs")
    if call.attribute("local_window_size", -1) > 0 or call.attribute("softcap", 0.0):
        raise call.refuse("local_window_size or softcap")
    heads, groups = call.attribute("num_heads"), call.attribute("kv_num_heads")
    if k is None or v is None:
        width = q.shape[-1] // (heads + 2 * groups)
        q, k, v = torch.split(q, [heads * width, groups * width, groups * width], -1)
    query, keys, values = _heads(q, heads), _heads(k, groups), _heads(v, groups)
    if call.attribute("do_rotary", 0):
        assert cos is not None
        assert sin is not None
        places = torch.arange(q.shape[1], device=q.device)
        turned = bool(call.attribute("rotary_interleaved", 0))
        query, keys = (_turned(one, cos[places], sin[places], interleaved=turned) for one in (query, keys))
    whole = [one.repeat_interleave(heads // groups, 1) for one in (keys, values)]
    del lengths  # a causal mask already hides the padding behind from what stands before it
    scale = call.attribute("scale") or 1 / math.sqrt(query.shape[-1])
    out = F.scaled_dot_product_attention(query, whole[0], whole[1], is_causal=True, scale=scale)
    return out.transpose(1, 2).flatten(-2), keys, values
