"""What a search found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from plait.plan.space import unsupported
from plait.schema.estimate import Estimate
from plait.schema.plan import Plan

__all__ = ["Refusal", "SearchResult", "dominates"]


@dataclass(frozen=True, slots=True)
class Refusal:
    """A reason why plans were left out."""

    reason: str
    count: int
    example: str


@dataclass(frozen=True, slots=True)
class SearchResult:
    """What a search found."""

    plans: tuple[Estimate, ...]
    """Best first, each with its plan."""
    pareto: tuple[Estimate, ...]
    """No other plan that was tried is at once faster, smaller in memory and cheaper."""
    refused: tuple[Refusal, ...]
    groups: int
    """Combinations that were bounded."""
    tried: int
    """Plans that were estimated in full."""
    seconds: float

    @property
    def best(self) -> Plan:
        """The fastest plan that fits."""
        return self.plans[0].plan

    @property
    def estimate(self) -> Estimate:
        """The best plan's estimate."""
        return self.plans[0]

    def to_dict(self) -> dict[str, Any]:
        """The object that `plait plan --json` prints."""

        def shown(found: Estimate) -> dict[str, Any]:
            reasons = unsupported(found.plan)
            more = {"not_executable": list(reasons)} if reasons else {}
            return {"spec": found.plan.spec(), "plan": found.plan.to_dict(), "estimate": found.summary(), **more}

        return {
            "plans": [shown(found) for found in self.plans],
            "pareto": [shown(found) for found in self.pareto],
            "refused": [{"reason": r.reason, "count": r.count, "example": r.example} for r in self.refused],
            "groups": self.groups,
            "tried": self.tried,
            "seconds": self.seconds,
        }


def dominates(a: Estimate, b: Estimate) -> bool:
    """Whether `a` is at least as good as `b` in time, memory and dollars (equal counts: the first one found stays)."""
    if a.step_time_s > b.step_time_s or a.peak_memory > b.peak_memory:
        return False
    return a.usd_per_step is None or b.usd_per_step is None or a.usd_per_step <= b.usd_per_step
