"""What a plan is predicted to cost on a cluster: time and its parts, memory and its parts, money and energy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from plait.schema.plan import Plan
from plait.schema.records import Record
from plait.units import gib

__all__ = ["Breakdown", "Estimate", "LaneEstimate", "MemoryParts", "Span"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Breakdown(Record):
    """Seconds of one step on the rank that works longest; the shown parts add up to the step."""

    compute: float
    """Forward and backward of all microbatches."""
    recompute: float
    """Forward work done again in the backward."""
    communication_exposed: float
    """Collectives and sends that compute waits for."""
    communication_hidden: float
    """The rest of them: takes no time of its own, and is not part of the sum."""
    bubble: float
    """Waiting for other pipeline stages."""
    optimizer: float
    other: float = 0.0
    """Per-step work outside the model: launch of the step, gradient norm, slowest-rank effects."""

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return self.compute + self.recompute + self.communication_exposed + self.bubble + self.optimizer + self.other


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryParts(Record):
    """Bytes on one rank at its peak, part by part."""

    parameters: float
    gradients: float
    optimizer: float
    """Moments and fp32 master weights."""
    activations: float
    """Saved for the backward of the microbatches in flight."""
    transient: float
    """The largest working set beside them: logits in fp32, a recomputed segment, gathered parameters."""
    buffers: float
    """Communication buckets and pipeline receive buffers."""
    overhead: float
    """What the allocator and the libraries hold beyond."""

    @property
    def total(self) -> float:
        """Bytes at the peak."""
        return (
            self.parameters
            + self.gradients
            + self.optimizer
            + self.activations
            + self.transient
            + self.buffers
            + self.overhead
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Span(Record):
    """One piece of work on the pipeline's timeline."""

    rank: int
    """Pipeline rank."""
    kind: str
    """forward, backward, weight (the weight-gradient half of a split backward), communication or optimizer."""
    stage: int
    microbatch: int
    start: float
    end: float


@dataclass(frozen=True, kw_only=True, slots=True)
class LaneEstimate(Record):
    """Replicas with the same devices and the same share of the samples, where a plan's replicas differ."""

    devices: tuple[str, ...]
    """The slowest device of each pipeline rank."""
    replicas: tuple[int, ...]
    """Which of the dp x fsdp replicas they are."""
    samples: float
    """Of each replica in one step."""
    step_time_s: float
    """Seconds until such a replica is done; the longest one's is the step."""
    memory: tuple[MemoryParts, ...]
    """By pipeline rank."""
    memory_limits: tuple[float | None, ...]
    """Bytes that a device of each pipeline rank may use."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate(Record):
    """A prediction for one step of `plan` on `cluster`."""

    plan: Plan
    cluster: str
    batch: int
    """Global batch in samples."""
    step_time_s: float
    tokens_per_s: float
    mfu: float
    """Matmul and attention FLOP of forward and backward (attention in full, nothing recomputed) over peak."""
    breakdown: Breakdown
    memory: tuple[MemoryParts, ...]
    """By pipeline rank; ranks of one pipeline position hold the same (the most of them, where `lanes` differ)."""
    memory_limit: float | None
    """Bytes that the fullest rank's device may use; None where its memory is not known."""
    fits: bool
    timeline: tuple[Span, ...] = ()
    """First spans of the simulated schedule, for showing; long runs are cut."""
    usd_per_step: float | None = None
    joule_per_step: float | None = None
    notes: tuple[str, ...] = ()
    """Assumptions a reader should know: unverified figures, terms that were left out."""
    lanes: tuple[LaneEstimate, ...] = ()
    """Where replicas differ in devices or share of the samples; empty where all are alike."""

    @property
    def peak_memory(self) -> float:
        """Bytes on the fullest rank."""
        return max(parts.total for parts in self.memory)

    @property
    def fullest(self) -> int:
        """Pipeline rank that holds most."""
        return max(range(len(self.memory)), key=lambda i: self.memory[i].total)

    def memory_by_rank(self) -> list[float]:
        """Bytes at the peak of every rank, tp fastest and pp slowest; by pipeline rank alone above 4,096 devices."""
        if self.plan.devices > 4096:
            return [parts.total for parts in self.memory]
        plan = self.plan
        found = []
        for rank in range(plan.pp):
            totals = [self.memory[rank].total] * plan.replicas
            for lane in self.lanes:
                for replica in lane.replicas:
                    totals[replica] = lane.memory[rank].total
            found += [total for total in totals for _ in range(plan.tp * plan.cp)]
        return found

    def summary(self) -> dict[str, Any]:
        """The fields of `plait estimate --json`."""
        found = {
            "spec": self.plan.spec(),
            "cluster": self.cluster,
            "batch": self.batch,
            "step_time_s": self.step_time_s,
            "tokens_per_s": self.tokens_per_s,
            "mfu": self.mfu,
            "peak_memory_gib": gib(self.peak_memory),
            "peak_memory_gib_by_rank": [gib(value) for value in self.memory_by_rank()],
            "memory_limit_gib": None if self.memory_limit is None else gib(self.memory_limit),
            "memory_parts_gib": {k: gib(v) for k, v in self.memory[self.fullest].to_dict().items()},
            "breakdown": self.breakdown.to_dict(),
            "fits": self.fits,
            "usd_per_step": self.usd_per_step,
            "joule_per_step": self.joule_per_step,
            "notes": list(self.notes),
        }
        if self.lanes:
            found["lanes"] = [_lane_summary(lane) for lane in self.lanes]
        return found


def _lane_summary(lane: LaneEstimate) -> dict[str, Any]:
    return {
        "devices": list(dict.fromkeys(lane.devices)),
        "replicas": len(lane.replicas),
        "samples": lane.samples,
        "step_time_s": lane.step_time_s,
        "peak_memory_gib": gib(max(parts.total for parts in lane.memory)),
        "fits": all(
            limit is None or parts.total <= limit for parts, limit in zip(lane.memory, lane.memory_limits, strict=True)
        ),
    }
