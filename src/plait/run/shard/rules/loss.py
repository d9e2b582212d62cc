"""Losses on sharded classes: a vocabulary-sharded projection need not be gathered."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from plait.run.shard.local import sharded_cross_entropy
from plait.run.shard.operation import Op, Refusal, Step, Where, shape_of
from plait.run.shard.placement import PARTIAL, REPLICATED, Placement, Sharded
from plait.run.shard.rules.table import rule

__all__: list[str] = []

aten: Any = torch.ops.aten


@rule("cross_entropy_loss")
def cross_entropy(op: Op) -> Step | Refusal:
    """Cross entropy with class indices, the classes sharded."""
    logits, target = op["self"], op["target"]
    placement = op.at(logits)
    if not isinstance(placement, Sharded):
        return Refusal("cross entropy of parts of a sum")
    shape = shape_of(logits)
    classes = 1 if len(shape) > 1 else 0
    simple = op["weight"] is None and not op["label_smoothing"] and not target.meta["val"].is_floating_point()
    if placement.dim != classes or not simple or placement.period != shape[classes] or len(placement.parts) > 1:
        return Refusal("this form of cross entropy is not split", logits)

    def local(where: Where) -> dict[str, Any]:
        ((start, stop),) = placement.ranges(where.tp, where.rank)
        return {
            "start": start,
            "stop": stop,
            "group": where.group,
            "reduction": op["reduction"],
            "ignore": op["ignore_index"],
        }

    wanted: dict[fx.Node | None, Placement] = {logits: placement, target: REPLICATED}
    return op.step(REPLICATED, wanted, target=sharded_cross_entropy, patch=local)


@rule("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy_with_logits", "binary_cross_entropy")
def elementwise_loss(op: Op) -> Step | Refusal:
    """Losses that are a sum over elements: a part of the sum on each rank."""
    split = op.split_operands()
    if not split or op["reduction"] not in (1, 2):
        return Refusal("loss without reduction")
    node, placement = split[0]
    if not placement.is_even(op.tp) or any(shape_of(n) != shape_of(node) for n in op.operands):
        return Refusal("loss with broadcast", node)
    if op["reduction"] == 2:
        return op.step(PARTIAL, {}, rest=placement)
    from plait.run.shard.local import scaled_mean

    return op.step(
        PARTIAL,
        {},
        rest=placement,
        target=scaled_mean,
        leading=(op.node.target,),
        patch=lambda where: {"ratio": 1 / where.tp},
    )
