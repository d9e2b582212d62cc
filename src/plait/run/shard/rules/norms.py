"""Normalisation: along other dims than the sharded one it is local; over it, moments are summed over the group."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from plait.run.shard.local import sharded_layer_norm, sharded_rms_norm
from plait.run.shard.operation import Op, Refusal, Step, shape_of
from plait.run.shard.placement import COPIED, Placement, Sharded
from plait.run.shard.rules.table import rule

__all__: list[str] = []

aten: Any = torch.ops.aten


@rule("layer_norm", "rms_norm")
def layer_norm(op: Op) -> Step | Refusal:
    """layer_norm and rms_norm over the last dims."""
    source = op["input"]
    placement = op.at(source)
    if not isinstance(placement, Sharded):
        return Refusal("norm of parts of a sum")
    first = len(shape_of(source)) - len(op["normalized_shape"])
    parameters = [p for p in (op["weight"], op.args.get("bias")) if p is not None]
    wanted: dict[fx.Node | None, Placement] = {source: placement}
    if placement.dim < first:
        wanted |= dict.fromkeys(parameters, COPIED)
        return op.step(placement, wanted)
    wanted |= dict.fromkeys(parameters, placement.moved(placement.dim - first))
    is_rms = op.node.target is aten.rms_norm.default
    return op.step(
        placement,
        wanted,
        target=sharded_rms_norm if is_rms else sharded_layer_norm,
        patch=lambda where: {"group": where.group},
    )


@rule("group_norm")
def group_norm(op: Op) -> Step | Refusal:
    """group_norm on sharded channels: whole groups stay together."""
    source = op["input"]
    placement = op.at(source)
    groups = op["num_groups"]
    if not isinstance(placement, Sharded) or placement.dim != 1:
        return Refusal("group_norm", source)
    channels = shape_of(source)[1]
    size = channels // groups
    if channels != placement.period or len(placement.parts) > 1 or groups % op.tp or not placement.is_even(op.tp):
        return Refusal("a rank would hold part of a group", source)
    parameters = [p for p in (op["weight"], op["bias"]) if p is not None]
    wanted: dict[fx.Node | None, Placement] = {source: placement, **dict.fromkeys(parameters, placement.moved(0))}
    return (
        op.step(placement, wanted, patch=lambda where: {"num_groups": groups // where.tp}) if size else op.replicated()
    )


@rule("batch_norm", "instance_norm")
def batch_norm(op: Op) -> Step | Refusal:
    """Statistics by channel: local where channels are sharded, running statistics sharded with them."""
    source = op["input"]
    placement = op.at(source)
    if not isinstance(placement, Sharded) or placement.dim != 1:
        return Refusal("batch_norm over the sharded dim", source)
    own = [op.args.get(name) for name in ("weight", "bias", "running_mean", "running_var")]
    wanted: dict[fx.Node | None, Placement] = {source: placement}
    wanted |= dict.fromkeys([n for n in own if n is not None], placement.moved(0))
    return op.step(placement, wanted)
