"""Sums, means, softmax: along other dims they carry the sharded one; over it, sums become parts of a sum."""

from __future__ import annotations

from typing import Any

import torch

from plait.run.shard.local import scaled_mean, sharded_softmax
from plait.run.shard.operation import Op, Refusal, Step, Where, dims_of, shape_of
from plait.run.shard.placement import PARTIAL, Sharded
from plait.run.shard.rules.table import rule

__all__: list[str] = []

aten: Any = torch.ops.aten


@rule("sum", "mean", "nansum")
def total(op: Op) -> Step | Refusal:
    """Sums and means."""
    source = op.operands[0]
    placement = op.at(source)
    is_mean = op.node.target.overloadpacket.__name__ == "mean"  # type: ignore[union-attr]
    shape = shape_of(source)
    dims = dims_of(op.args.get("dim"), len(shape))
    if placement is PARTIAL:
        return op.step(PARTIAL, {source: PARTIAL})
    if not isinstance(placement, Sharded):
        return op.replicated()
    if placement.dim not in dims:
        return op.step(kept(placement, dims, bool(op.args.get("keepdim"))), {source: placement})
    if not is_mean:
        return op.step(PARTIAL, {source: placement})
    size = shape[placement.dim]

    def ratio(where: Where) -> dict[str, Any]:
        local = size // placement.period * placement.local_period(where.tp, where.rank)
        return {"ratio": local / size}

    return op.step(PARTIAL, {source: placement}, target=scaled_mean, leading=(op.node.target,), patch=ratio)


def kept(placement: Sharded, dims: tuple[int, ...], keepdim: bool) -> Sharded:
    """The placement after other dims have been reduced."""
    return placement if keepdim else placement.moved(placement.dim - sum(d < placement.dim for d in dims))


@rule(
    "amax", "amin", "max.dim", "min.dim", "argmax", "argmin", "var.dim", "var.correction", "std.dim", "std.correction"
)
@rule(
    "logsumexp", "linalg_vector_norm", "norm.ScalarOpt_dim", "any.dim", "all.dim", "topk", "median.dim", "prod.dim_int"
)
@rule("var_mean.dim", "var_mean.correction", "kthvalue", "mode")
def along(op: Op) -> Step | Refusal:
    """Reductions that are no sums: fine along other dims."""
    source = op.operands[0]
    placement = op.at(source)
    if not isinstance(placement, Sharded):
        return Refusal("reduction of parts of a sum")
    dims = dims_of(op.args.get("dim"), len(shape_of(source)))
    if placement.dim in dims:
        return Refusal(f"{op.node.target} over the sharded dim", source)
    keepdim = bool(op.args.get("keepdim")) or "topk" in str(op.node.target)
    out = kept(placement, dims, keepdim)
    value = op.node.meta["val"]
    return op.step((out,) * len(value) if isinstance(value, tuple | list) else out, {source: placement})


@rule("softmax.int", "log_softmax.int", "_softmax", "_log_softmax", "special_softmax", "special_log_softmax")
def softmax(op: Op) -> Step | Refusal:
    """Softmax and its logarithm; over the sharded dim with two small all-reduces."""
    source = op.operands[0]
    placement = op.at(source)
    if not isinstance(placement, Sharded):
        return Refusal("softmax of parts of a sum")
    dim = op["dim"] % len(op.shape)
    if placement.dim != dim:
        return op.step(placement, {source: placement})
    logarithm = "log" in op.node.target.overloadpacket.__name__  # type: ignore[union-attr]
    dtype = op.args.get("dtype") or op.node.meta["val"].dtype
    return op.step(
        placement,
        {source: placement},
        target=sharded_softmax,
        patch=lambda where: {"logarithm": logarithm, "group": where.group, "dtype": dtype},
    )
