"""One way to serve, with what it costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from plait.advice.answer import Price
from plait.advice.needs import Needs
from plait.advice.serve_work import ServeWork
from plait.cost.serving import ServingEstimate
from plait.schema.records import Record
from plait.units import gib

__all__ = ["ServeAnswer", "usd_of"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeAnswer(Record):
    """One way to serve."""

    accelerator: str
    count: float
    """Accelerators of the fleet."""
    instances: int
    units: int
    """Copies of what is rented together."""
    throughput: float
    """Output tokens (samples) per second of the fleet, kept full."""
    hours: float
    """Until the work is done: at the rate asked for, else at the fleet's."""
    on_demand: Price | None
    spot: Price | None
    energy_kwh: float | None
    co2_kg: float | None
    estimate: ServingEstimate
    """Of one unit."""
    runtime: str
    headroom_gib: float | None
    reasons: tuple[str, ...]

    def price(self, *, spot: bool) -> Price | None:
        """The price that is ranked by."""
        return self.spot if spot else self.on_demand

    @property
    def name(self) -> str:
        """COUNTxPART."""
        return f"{self.count:g}x{self.accelerator}"

    def summary(self, work: ServeWork) -> dict[str, Any]:
        """The fields of `plait advise --task serve --json`."""
        found = self.estimate

        def priced(price: Price | None) -> dict[str, Any] | None:
            if price is None:
                return None
            per_million = price.usd / work.amount * 1e6
            return {**price.summary(self.accelerator, self.instances), "usd_per_million": per_million}

        return {
            "accelerator": self.accelerator,
            "count": self.count,
            "instances": self.instances,
            "hours": self.hours,
            "usd": self.on_demand.usd if self.on_demand else None,
            "usd_spot": self.spot.usd if self.spot else None,
            "usd_per_million": self.on_demand.usd / work.amount * 1e6 if self.on_demand else None,
            "on_demand": priced(self.on_demand),
            "spot": priced(self.spot),
            "throughput_per_s": self.throughput,
            "latency_ms": found.latency * 1e3,
            "decode_ms": found.decode * 1e3,
            "decode_parts_ms": {k: v * 1e3 for k, v in found.parts.items()},
            "first_token_ms": found.first_token * 1e3,
            "batch": found.plan.batch,
            "largest_batch": found.largest_batch,
            "precision": found.plan.precision,
            "runtime": self.runtime,
            "spec": found.plan.spec(),
            "mfu": found.mfu,
            "memory_gib": gib(found.memory.total),
            "memory_limit_gib": None if found.memory_limit is None else gib(found.memory_limit),
            "memory_parts_gib": {k: gib(v) for k, v in found.memory.to_dict().items()},
            "headroom_gib": self.headroom_gib,
            "energy_kwh": self.energy_kwh,
            "co2_kg": self.co2_kg,
            "compatibility": {"reasons": list(self.reasons)},
        }


def usd_of(answer: ServeAnswer, needs: Needs) -> float:
    """Dollars that are ranked by; 0 for this computer."""
    price = answer.price(spot=needs.spot)
    return price.usd if price else 0.0
