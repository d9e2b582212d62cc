"""One answer: this many of that part, from whom, for how long, for how much."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Any

from plait.advice.compatibility import Compatibility
from plait.advice.interruptions import expected_hours
from plait.advice.needs import Needs
from plait.advice.prices import age_days, price_warning
from plait.advice.security import security_notes
from plait.advice.shapes import Shape
from plait.advice.work import Work
from plait.hardware.catalogue import load_accelerators
from plait.hardware.offers import Offer
from plait.plan.space import unsupported
from plait.schema.estimate import Estimate
from plait.schema.graph import Graph
from plait.schema.records import Record
from plait.units import gib

__all__ = ["Answer", "Price", "answer_of", "length", "local_answer"]


def length(hours: float) -> str:
    """Text such as `40 s`, `12 min`, `5.2 h`, `3.1 days`."""
    if hours < 1 / 60:
        return f"{hours * 3600:.2g} s"
    if hours < 1:
        return f"{hours * 60:.1f} min"
    return f"{hours:.1f} h" if hours < 72 else f"{hours / 24:.1f} days"


@dataclass(frozen=True, kw_only=True, slots=True)
class Price(Record):
    """What the whole run costs from one seller. Dollars and hours."""

    offer: Offer
    usd_per_hour: float
    """Of all instances."""
    hours: float
    """With expected interruptions, where the price is a spot price."""
    usd: float
    age_days: int | None
    warning: str

    def summary(self, accelerator: str, instances: int) -> dict[str, Any]:
        """The fields of `plait advise --json`, with what this seller gives of security."""
        return {
            "cloud": self.offer.cloud,
            "instance_type": self.offer.instance_type,
            "instances": instances,
            "region": self.offer.region,
            "usd_per_hour": self.usd_per_hour,
            "hours": self.hours,
            "usd": self.usd,
            "as_of": self.offer.as_of,
            "age_days": self.age_days,
            "source": self.offer.source,
            "warning": self.warning,
            "security": security_notes(load_accelerators()[accelerator], self.offer, instances),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer(Record):
    """One way to do the work."""

    accelerator: str
    count: int
    instances: int
    hours: float
    """Without interruptions."""
    on_demand: Price | None
    spot: Price | None
    energy_kwh: float | None
    """Accelerators alone."""
    co2_kg: float | None
    estimate: Estimate
    headroom_gib: float | None
    """Between the fullest rank and what a rank may use."""
    compatibility: Compatibility | None
    not_executable: tuple[str, ...] = ()

    def price(self, *, spot: bool) -> Price | None:
        """The price that is ranked by."""
        return self.spot if spot else self.on_demand

    @property
    def name(self) -> str:
        """COUNTxPART."""
        return f"{self.count}x{self.accelerator}"

    def summary(self) -> dict[str, Any]:
        """The fields of `plait advise --json`."""
        found = self.estimate

        return {
            "accelerator": self.accelerator,
            "count": self.count,
            "hours": self.hours,
            "usd": self.on_demand.usd if self.on_demand else None,
            "usd_spot": self.spot.usd if self.spot else None,
            "on_demand": self.on_demand and self.on_demand.summary(self.accelerator, self.instances),
            "spot": self.spot and self.spot.summary(self.accelerator, self.instances),
            "energy_kwh": self.energy_kwh,
            "co2_kg": self.co2_kg,
            "mfu": found.mfu,
            "step_time_s": found.step_time_s,
            "tokens_per_s": found.tokens_per_s,
            "peak_memory_gib": gib(found.peak_memory),
            "memory_limit_gib": None if found.memory_limit is None else gib(found.memory_limit),
            "memory_parts_gib": {k: gib(v) for k, v in found.memory[found.fullest].to_dict().items()},
            "headroom_gib": self.headroom_gib,
            "spec": found.plan.spec(),
            "plan_devices": found.plan.devices,
            "plan": found.plan.to_dict(),
            "not_executable": list(self.not_executable),
            "compatibility": self.compatibility.to_dict() if self.compatibility else None,
            "notes": list(found.notes),
        }


def answer_of(
    shape: Shape,
    found: Estimate,
    graph: Graph,
    work: Work,
    needs: Needs,
    compatibility: Compatibility,
    today: datetime.date,
) -> Answer:
    """The answer that an estimate of one step makes."""
    hours = work.tokens / found.tokens_per_s / 3600

    def price(*, spot: bool) -> Price | None:
        best = shape.hourly(spot=spot)
        if best is None:
            return None
        hourly, offer = best
        billed = hours
        if spot:
            billed = expected_hours(
                hours,
                instances=shape.instances,
                per_day=needs.interruptions_per_day,
                checkpoint_minutes=needs.checkpoint_minutes,
                restart_minutes=needs.restart_minutes,
            )
        return Price(
            offer=offer,
            usd_per_hour=hourly,
            hours=billed,
            usd=hourly * billed,
            age_days=age_days(offer, today),
            warning=price_warning(offer, today),
        )

    kwh = _kwh(found, graph, work)
    return Answer(
        accelerator=shape.part.name,
        count=shape.count,
        instances=shape.instances,
        hours=hours,
        on_demand=price(spot=False),
        spot=price(spot=True),
        energy_kwh=kwh,
        co2_kg=None if kwh is None or needs.grid_kg_per_kwh is None else kwh * needs.grid_kg_per_kwh,
        estimate=found,
        headroom_gib=_headroom(found),
        compatibility=compatibility,
        not_executable=unsupported(found.plan),
    )


def local_answer(found: Estimate, graph: Graph, work: Work) -> Answer:
    """This computer: nothing is paid (its electricity is not counted)."""
    return Answer(
        accelerator="this computer's CPU",
        count=found.plan.devices,
        instances=1,
        hours=work.tokens / found.tokens_per_s / 3600,
        on_demand=None,
        spot=None,
        energy_kwh=_kwh(found, graph, work),
        co2_kg=None,
        estimate=found,
        headroom_gib=_headroom(found),
        compatibility=None,
    )


def _kwh(found: Estimate, graph: Graph, work: Work) -> float | None:
    steps = work.tokens / (found.batch * graph.tokens_per_sample)
    return None if found.joule_per_step is None else found.joule_per_step * steps / 3.6e6


def _headroom(found: Estimate) -> float | None:
    return None if found.memory_limit is None else gib(found.memory_limit - found.peak_memory)
