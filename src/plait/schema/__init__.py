"""The records that one stage hands to the next. Frozen, free of torch, equal after a round trip through JSON."""

from plait.schema.graph import Graph, Operator, ParameterSpec, Segment, TensorSpec
from plait.schema.plan import Plan

__all__ = ["Graph", "Operator", "ParameterSpec", "Plan", "Segment", "TensorSpec"]
