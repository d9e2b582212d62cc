"""How operators carry placements: one rule for each operator, found by `rule_for`."""

from __future__ import annotations

from typing import Any

import torch

from plait.run.shard.operation import Op, Refusal, Rule, Step
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

__all__ = ["ask", "rule_for"]

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


def ask(op: Op) -> Step | Refusal:
    """The answer of an operator's rule; a refusal where it has none, or where its arguments are not as a rule knows them.

    An unknown form of an operator costs parallelism and shows in the explanation; it never stops a plan.
    """
    rule = rule_for(op.node.target)
    if rule is None:
        return Refusal(f"{op.node.target} has no rule")
    try:
        return rule(op)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, AssertionError) as problem:
        return Refusal(f"the rule of {op.node.target} does not know this form: {type(problem).__name__} {problem}")
