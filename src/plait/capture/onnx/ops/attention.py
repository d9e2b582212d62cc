"""The standard's attention: with masks, a window, a cap on the scores, and a cache of keys and values."""

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
_PLAIN = {"q_num_heads", "kv_num_heads", "is_causal", "scale", "softmax_precision"}


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
def _attention(
    call: Call,
    q: Value,
    k: Value,
    v: Value,
    mask: Value = None,
    past_k: Value = None,
    past_v: Value = None,
    lengths: Value = None,
) -> tuple[_Tensor, ...] | _Tensor:
    parts, flat = [], False
    for value, name in ((q, "q_num_heads"), (k, "kv_num_heads"), (v, "kv_num_heads")):
        assert value is not None
        tensor = call.tensor(value)
        if tensor.dim() == 3:
            tensor, flat = tensor.reshape(*tensor.shape[:2], call.attribute(name), -1).transpose(1, 2), True
        parts.append(tensor)
    query, key, values = parts
    past = 0
    if past_k is not None and past_v is not None:
        before = call.tensor(past_k), call.tensor(past_v)
        past = before[0].shape[2]
        key, values = torch.cat((before[0], key), 2), torch.cat((before[1], values), 2)
    present = key, values
    if key.shape[1] != query.shape[1]:
        times = query.shape[1] // key.shape[1]
        key, values = key.repeat_interleave(times, 1), values.repeat_interleave(times, 1)
    added = call.tensor(mask) if isinstance(mask, torch.Tensor | np.ndarray) else None
    causal, wanted = bool(call.attribute("is_causal", 0)), [bool(name) for name in call.node.outputs]
    further = [name for name in set(call.node.attributes) - _PLAIN if call.attribute(name) not in (0, -1)]
    scores = None
    if further or lengths is not None or wanted[3:] == [True] or past or (causal and added is not None):
        there = None if lengths is None else call.tensor(lengths)
        out, scores = _written_out(call, query, key, values, added, past, there)
    else:
        out = F.scaled_dot_product_attention(query, key, values, added, is_causal=causal, scale=call.attribute("scale"))
    out = out.transpose(1, 2).flatten(-2) if flat else out
    return out if len(wanted) == 1 else (out, *present, scores)  # type: ignore[return-value]


def _written_out(
    call: Call, q: _Tensor, k: _Tensor, v: _Tensor, mask: _Tensor | None, past: Any, lengths: _Tensor | None
) -> tuple[_Tensor, _Tensor]:
    """(result, the scores that `qk_matmul_output_mode` asks for)."""
    mode, cap = call.attribute("qk_matmul_output_mode", 0), call.attribute("softcap", 0.0)
    scores = torch.matmul(q, k.mT) * (call.attribute("scale") or 1 / math.sqrt(q.shape[-1]))
    stages = {0: scores}
    if cap:
        scores = torch.tanh(scores / cap) * cap
    stages[1] = scores
    if mask is not None:
        missing = k.shape[2] - mask.shape[-1]
        if mask.dtype == torch.bool:
            mask = torch.where(mask, 0.0, -math.inf).to(q.dtype)
        scores = scores + (F.pad(mask, (0, missing), value=-math.inf) if missing else mask)
    kept = _kept(call, q, k, past, lengths)
    if kept is not None:
        scores = torch.where(kept, scores, -math.inf)
    stages[2] = scores
    empty = torch.isneginf(scores).all(-1, keepdim=True)  # a row that sees nothing gives zeros
    shares = torch.where(empty, 0.0, torch.softmax(torch.where(empty, 0.0, scores), -1))
    stages[3] = shares
    return torch.matmul(shares.to(v.dtype), v), stages[mode]


def _kept(call: Call, q: _Tensor, k: _Tensor, past: Any, lengths: _Tensor | None) -> _Tensor | None:
    """Which keys a query may see: [length, keys], or [batch, 1, length, keys]."""
    rows = torch.arange(q.shape[2], device=q.device)[:, None]
    keys = torch.arange(k.shape[2], device=q.device)
    at: Any = rows + past
    kept = None
    if lengths is not None:
        ends = lengths.reshape(-1, 1, 1, 1)
        at, kept = rows + ends - q.shape[2], keys < ends
    bounds = [at + call.attribute("right_window_size", -1)] if call.attribute("right_window_size", -1) >= 0 else []
    if call.attribute("is_causal", 0):
        bounds.append(at)
    for bound in bounds:
        kept = keys <= bound if kept is None else kept & (keys <= bound)
    left = call.attribute("left_window_size", -1)
    if left >= 0:
        kept = keys >= at - left if kept is None else kept & (keys >= at - left)
    return kept
