"""Convolutions and pooling: channels are split as a linear layer's features are; grouped ones carry whole groups."""

from __future__ import annotations

from typing import Any

from torch import fx

from plait.run.shard.operation import Op, Refusal, Step, shape_of
from plait.run.shard.placement import Placement, Sharded
from plait.run.shard.rules.contraction import Letters, contract
from plait.run.shard.rules.table import rule

__all__: list[str] = []


@rule("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution")
def convolution(op: Op) -> Step | Refusal:
    """Convolutions of a batch [n, channels, ...]."""
    source, weight, bias, groups = (op[name] for name in ("input", "weight", "bias", "groups"))
    spatial = len(shape_of(weight)) - 2
    if len(shape_of(source)) != spatial + 2:
        return Refusal("convolution without a batch dim", source)
    if groups > 1:
        return _grouped(op, groups)
    name = op.node.target.overloadpacket.__name__  # type: ignore[union-attr]
    transposed = "transpose" in name or op.args.get("transposed") is True
    outer, inner = "STU"[:spatial], "stu"[:spatial]
    letters = Letters(
        ((source, "ni" + outer), (weight, ("io" if transposed else "oi") + inner)),
        "no" + outer,
        (bias, "o") if bias is not None else None,
        fixed=outer + inner,
    )
    return contract(op, letters)


def _grouped(op: Op, groups: int) -> Step | Refusal:
    source, weight, bias = op["input"], op["weight"], op["bias"]
    placement = op.at(source)
    if not isinstance(placement, Sharded):
        return op.replicated()
    if placement.dim == 0:
        return Refusal("convolution along the sharded batch", source)
    if placement.dim != 1 or "transpose" in str(op.node.target):
        return Refusal("grouped convolution along the sharded dim", source)
    channels, outputs = shape_of(source)[1], op.shape[1]
    size = channels // groups
    local = placement.scaled(1, size, op.tp)  # in whole groups
    out = local.scaled(outputs // groups, 1, op.tp) if local else None
    if local is None or out is None:
        plain = Sharded(1, (channels,), size)
        return Refusal("a rank would hold part of a group", source, (plain,) if plain.fits(op.tp) else ())
    wanted: dict[fx.Node | None, Placement] = {source: placement, weight: out.moved(0)}
    if bias is not None:
        wanted[bias] = out.moved(0)

    def patch(where: Any) -> dict[str, Any]:
        return {"groups": groups // local.period * local.local_period(where.tp, where.rank)}

    return op.step(out, wanted, patch=patch)


@rule("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool2d_with_indices")
@rule("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool2d", "lp_pool2d")
@rule("upsample_nearest1d", "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_linear1d")
@rule(
    "_upsample_bilinear2d_aa", "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d", "glu_"
)
def pooling(op: Op) -> Step | Refusal:
    """Operators on the last dims of [n, channels, ...]."""
    source = op.operands[0]
    placement = op.at(source)
    name = op.node.target.overloadpacket.__name__  # type: ignore[union-attr]
    spatial = next((int(c) for c in name if c.isdigit()), 3)
    rank = len(shape_of(source))
    if not isinstance(placement, Sharded) or placement.dim >= rank - spatial:
        return Refusal("pooling along the sharded dim", source)
    value = op.node.meta["val"]
    return op.step((placement,) * len(value) if isinstance(value, tuple | list) else placement, {source: placement})
