"""How operators carry placements: one rule for each operator, found by `rule_for`."""

from __future__ import annotations

from typing import Any

import torch

from plait.run.shard.operation import Rule
from plait.run.shard.rules import (
    attention,
    contraction,
    convolution,
    cuts,
    indexing,
    loss,
    norms,
    pointwise,
    reductions,
    views,
)
from plait.run.shard.rules.table import TABLE

__all__ = ["rule_for"]

# Importing a family fills the table.
_FAMILIES = (attention, contraction, convolution, cuts, indexing, loss, norms, pointwise, reductions, views)


def rule_for(target: Any) -> Rule | None:
    """The rule of an operator; None where it has none, so that its operands must be whole."""
    found = TABLE.get(target)
    if found is None and contraction.is_product(target):
        return contraction.product
    if found is None and torch.Tag.pointwise in getattr(target, "tags", ()):
        return pointwise.pointwise
    return found
