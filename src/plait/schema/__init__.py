"""The records that one stage hands to the next. Frozen, free of torch, equal after a round trip through JSON."""

from plait.schema.cluster import Cluster, Device, Group, Link
from plait.schema.estimate import Breakdown, Estimate, MemoryParts, Span
from plait.schema.graph import Graph, Operator, ParameterSpec, Segment, TensorSpec
from plait.schema.plan import Plan

__all__ = [
    "Breakdown",
    "Cluster",
    "Device",
    "Estimate",
    "Graph",
    "Group",
    "Link",
    "MemoryParts",
    "Operator",
    "ParameterSpec",
    "Plan",
    "Segment",
    "Span",
    "TensorSpec",
]
