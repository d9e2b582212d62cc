"""What one collective took where it was measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

from plait.errors import HardwareError
from plait.schema.records import Record

__all__ = ["COLLECTIVES", "Timing"]

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "send")


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing(Record):
    """A collective of `nbytes` over a group of `ranks`, beyond the compute around it.

    Where processes share cores, a collective costs each of them time of a core, which nothing hides, and a wait in which
    the core is free for others.
    """

    collective: str
    """all_reduce, all_gather, reduce_scatter or send."""
    ranks: int
    nbytes: float
    """Of the whole tensor: what is reduced, gathered from all ranks, scattered to them, or sent."""
    core: float
    """Seconds of its cores that each process spends."""
    wait: float
    """Seconds beside these."""

    def __post_init__(self) -> None:
        if self.collective not in COLLECTIVES:
            raise HardwareError(f"timing {self.collective!r} is not one of {', '.join(COLLECTIVES)}")
        if self.ranks < 2:
            raise HardwareError(f"timing {self.collective}: ranks={self.ranks} must be at least 2")
        for name in ("nbytes", "core", "wait"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0 or value > (3600.0 if name != "nbytes" else 1e15):
                raise HardwareError(f"timing {self.collective}: {name}={value:g} is not a believable figure")
