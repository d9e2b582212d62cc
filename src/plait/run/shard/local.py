"""Operators on local slices that are more than the original operator with smaller arguments.

Lowered graphs call these by name; each says how its result is placed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional

from plait.run.shard.collectives import all_reduce, copy, reduce

__all__ = [
    "forked_random",
    "scaled_mean",
    "sharded_cross_entropy",
    "sharded_embedding",
    "sharded_layer_norm",
    "sharded_rms_norm",
    "sharded_softmax",
    "shared_heads_attention",
]


def forked_random(operation: Callable[..., Any], *args: Any, rank: int, **kwargs: Any) -> Any:
    """A random operator on a slice: a stream of its own on each rank, while the default stream stays the same on all.

    One seed is drawn from the default generator, which all ranks hold in the same state; so a recomputation that
    restores that state draws the same numbers again.
    """
    seed = int(torch.randint(0, 2**62, (), dtype=torch.int64)) + 1 + rank
    device = next(a.device for a in args if isinstance(a, torch.Tensor))
    if device.type in ("cpu", "meta"):
        generator = torch.default_generator
        state = generator.get_state()
        generator.manual_seed(seed)
        try:
            return operation(*args, **kwargs)
        finally:
            generator.set_state(state)
    module = torch.get_device_module(device)
    state = module.get_rng_state(device)
    module.manual_seed(seed)
    try:
        return operation(*args, **kwargs)
    finally:
        module.set_rng_state(state, device)


def scaled_mean(operation: Callable[..., torch.Tensor], *args: Any, ratio: float, **kwargs: Any) -> torch.Tensor:
    """The mean over a slice, times the slice's share of the whole: a part of the sum that is the mean."""
    return operation(*args, **kwargs) * ratio


def sharded_embedding(weight: torch.Tensor, indices: torch.Tensor, start: int, stop: int, padding: int) -> torch.Tensor:
    """Rows of a table of which this rank holds `start:stop`; zero for others, so the result is a part of a sum.

    weight [stop - start, width], indices [...] -> [..., width]. Row `padding` gets no gradient (-1: all do).
    """
    local = indices - start
    outside = (local < 0) | (local >= stop - start)
    local = local.masked_fill(outside, 0)
    known = padding - start if start <= padding < stop else -1
    rows: torch.Tensor = torch.ops.aten.embedding.default(weight, local, known)
    return rows.masked_fill(outside.unsqueeze(-1), 0)


class _CrossEntropy(torch.autograd.Function):
    """Two collectives of one number (then two) per position, whatever the number of classes."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, target: torch.Tensor, start: int, stop: int, name: str, ignore: int
    ) -> torch.Tensor:
        logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
        highest = all_reduce(logits.amax(-1), name, fresh=True, op=dist.ReduceOp.MAX)
        shifted = logits - highest.unsqueeze(-1)
        local = target - start
        mine = (local >= 0) & (local < stop - start)
        local = local.masked_fill(~mine, 0)
        chosen = shifted.gather(-1, local.unsqueeze(-1)).squeeze(-1).masked_fill(~mine, 0)
        shares = shifted.exp_()
        sums = all_reduce(torch.stack([shares.sum(-1), chosen]), name, fresh=True)
        ignored = target == ignore
        ctx.save_for_backward(shares.div_(sums[0].unsqueeze(-1)), local, mine, ignored)
        return (sums[0].log() - sums[1]).masked_fill(ignored, 0)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        shares, local, mine, ignored = ctx.saved_tensors
        grad = grad.masked_fill(ignored, 0)
        # A new tensor: what was saved is needed again where the graph is kept.
        result = shares * grad.unsqueeze(-1)
        result.scatter_add_(-1, local.unsqueeze(-1), (-grad * mine).unsqueeze(-1))
        return result, None, None, None, None, None


def sharded_cross_entropy(
    self: torch.Tensor, target: torch.Tensor, start: int, stop: int, group: str, reduction: int, ignore: int
) -> torch.Tensor:
    """Cross entropy over classes of which this rank holds `start:stop`; the result is replicated.

    self [N, C, ...] or [C], target [N, ...] or []; reduction as in ATen: 0 none, 1 mean over what counts, 2 sum.
    """
    logits = self.movedim(1, -1) if self.dim() > 1 else self
    dtype = self.dtype
    losses = _CrossEntropy.apply(logits, target, start, stop, group, ignore).to(dtype)  # type: ignore[no-untyped-call]
    if reduction == 0:
        return losses  # type: ignore[no-any-return]
    total = losses.sum()
    return total / (target != ignore).sum() if reduction == 1 else total  # type: ignore[no-any-return]


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, logarithm: bool, name: str) -> torch.Tensor:
        highest = all_reduce(x.amax(dim, keepdim=True), name, fresh=True, op=dist.ReduceOp.MAX)
        shifted = x - highest
        powers = shifted.exp()
        total = all_reduce(powers.sum(dim, keepdim=True), name, fresh=True)
        result = shifted - total.log() if logarithm else powers / total
        ctx.save_for_backward(result)
        ctx.dim, ctx.logarithm, ctx.name = dim, logarithm, name
        return result

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (result,) = ctx.saved_tensors
        weighted = grad if ctx.logarithm else grad * result
        total = all_reduce(weighted.sum(ctx.dim, keepdim=True), ctx.name, fresh=True)
        return (grad - result.exp() * total if ctx.logarithm else result * (grad - total)), None, None, None


def sharded_softmax(
    self: torch.Tensor, dim: int, logarithm: bool, group: str, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Softmax (or its logarithm) over the dim that is sharded; sharded as its input."""
    x = self if dtype is None else self.to(dtype)
    return _Softmax.apply(x, dim, logarithm, group)  # type: ignore[no-any-return, no-untyped-call]


def _sum_everywhere(x: torch.Tensor, dims: list[int], group: str) -> torch.Tensor:
    """The sum over dims and ranks, for use on every rank's slice again."""
    return copy(reduce(x.sum(dims, keepdim=True), group, True), group)


def sharded_layer_norm(
    input: torch.Tensor,  # noqa: A002  the operator's own argument names, by which it is called
    normalized_shape: list[int],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    group: str,
) -> torch.Tensor:
    """Layer norm over dims of which one is sharded; `normalized_shape` is the whole one."""
    dims = list(range(input.dim() - len(normalized_shape), input.dim()))
    count = math.prod(normalized_shape)
    x = input.float() if input.dtype in (torch.bfloat16, torch.float16) else input
    centred = x - _sum_everywhere(x, dims, group) / count
    result = centred * torch.rsqrt(_sum_everywhere(centred * centred, dims, group) / count + eps)
    result = result.to(input.dtype)
    result = result if weight is None else result * weight
    return result if bias is None else result + bias


def sharded_rms_norm(
    input: torch.Tensor,  # noqa: A002
    normalized_shape: list[int],
    weight: torch.Tensor | None,
    eps: float | None,
    group: str,
) -> torch.Tensor:
    """RMS norm over dims of which one is sharded; `normalized_shape` is the whole one."""
    dims = list(range(input.dim() - len(normalized_shape), input.dim()))
    x = input.float() if input.dtype in (torch.bfloat16, torch.float16) else input
    small = torch.finfo(x.dtype).eps if eps is None else eps
    square = _sum_everywhere(x * x, dims, group) / math.prod(normalized_shape)
    result = (x * torch.rsqrt(square + small)).to(input.dtype)
    return result if weight is None else result * weight


def shared_heads_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = True,
    dim: int,
    heads: int,
    place: tuple[int, int],
) -> torch.Tensor:
    """Attention of this rank's query heads with the one key head, of `heads` in all, that they share."""
    rank, tp = place
    index = rank * heads // tp
    return functional.scaled_dot_product_attention(
        query,
        key.narrow(dim, index, 1),
        value.narrow(dim, index, 1),
        attn_mask,
        dropout_p,
        is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )
