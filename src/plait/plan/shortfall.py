"""When no plan fits: the smallest shortfall, its parts, and what would make the model fit."""

from __future__ import annotations

import math
from dataclasses import dataclass

from plait.errors import PlanError
from plait.schema.cluster import Cluster
from plait.schema.estimate import MemoryParts
from plait.schema.plan import Plan
from plait.units import gib

__all__ = ["Shortfall", "shortfall_error"]


@dataclass(frozen=True, slots=True)
class Shortfall:
    """The rank of a plan that lacks most memory."""

    excess: float
    """Bytes above what its device may use."""
    plan: Plan
    parts: MemoryParts
    rank: int
    """Pipeline rank."""
    device: str


def shortfall_error(short: Shortfall, cluster: Cluster) -> PlanError:
    """The refusal, with the figures in GiB and ways out."""
    parts, limit = short.parts, short.parts.total - short.excess
    shown = ", ".join(
        f"{name} {gib(value):.1f}" for name, value in parts.to_dict().items() if value > 0.005 * parts.total
    )
    factor = parts.total / limit
    return PlanError(
        f"no plan fits: the smallest needs {gib(parts.total):.1f} GiB on pipeline rank {short.rank}, each {short.device} of "
        f"{cluster.name} may use {gib(limit):.1f} GiB ({gib(short.excess):.1f} GiB short, {short.plan.spec()})\n\n"
        f"  in GiB: {shown}",
        hint=f"take devices with {math.ceil(factor * 10) / 10:g} times the memory, about "
        f"{max(cluster.devices + 1, math.ceil(cluster.devices * factor))} devices of this kind, "
        # Weights and optimizer state do not shrink with the batch.
        f"{'a smaller batch, ' if parts.activations + parts.transient > 0.1 * parts.total else ''}or a smaller model",
    )
