"""Bytes on one rank at its peak, part by part.

    weights       held whole by zero < 3, sharded over fsdp by zero = 3
                  those that are not trained: in the precision of compute, no gradient, no optimizer state
    gradients     held whole by zero < 2, sharded over fsdp from zero = 2 on
    optimizer     fp32 master and two moments, sharded over fsdp by any zero
    activations   saved bytes of each microbatch in flight at this pipeline position
    transient     the largest of: one segment's activations while it is recomputed, with the loss's own working copies
                  of the logits (half precision, its gradient, the gradient in fp32); an operator's inputs and outputs;
                  with zero = 3 two segments' gathered weights and one's whole gradients beside it
    buffers       what pipeline neighbours send, twice
    overhead      allocator and libraries, fitted

Source: Rajbhandari et al. (2020), arXiv 1910.02054, section 5; Korthikanti et al. (2022), arXiv 2205.05198, section 4.
Known error: the allocator's fragmentation varies by 5 % between runs of one configuration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from plait.cost.bubble import warmup
from plait.cost.calibration import Software
from plait.cost.work import Work
from plait.schema.estimate import MemoryParts
from plait.schema.plan import Plan

__all__ = ["StateBytes", "rank_memory", "saved_bytes", "state_bytes"]


@dataclass(frozen=True, slots=True)
class StateBytes:
    """Bytes for each parameter."""

    weight: float
    gradient: float
    state: float
    wire: float
    """Of a gradient on the network."""
    gathered: float
    """Of a weight as compute uses it."""


def state_bytes(plan: Plan, software: Software) -> StateBytes:
    """What `software` keeps for each parameter under `plan`."""
    if plan.precision == "fp32":
        return StateBytes(4.0, 4.0, 8.0, 4.0, 4.0)
    if plan.zero == 3 and plan.fsdp > 1:
        return StateBytes(
            software.sharded_weight_bytes,
            software.sharded_gradient_bytes,
            software.sharded_state_bytes,
            software.reduce_bytes,
            2.0,
        )
    return StateBytes(software.weight_bytes, software.gradient_bytes, software.state_bytes, software.reduce_bytes, 2.0)


def saved_bytes(work: Work, choice: str, software: Software) -> float:
    """Bytes that one microbatch keeps of a segment."""
    lost = work.loss_kept if software.fused_loss else 0.0
    if choice == "none":
        return work.saved - lost
    if choice == "full":
        return min(work.saved_full, work.saved - lost)
    kept = work.saved_full + (work.saved_selective - work.saved_full) * software.selective_keeps
    return min(kept, work.saved - lost)


def _in_flight(plan: Plan, rank: int) -> float:
    """Microbatches whose activations a rank holds at its peak, counted in whole ranks' worth."""
    schedule = "1f1b" if plan.schedule == "zerobubble" else plan.schedule
    count = warmup(schedule, rank, plan.pp, plan.interleave, max(1, plan.microbatches))
    return max(1.0, count / plan.interleave)


def rank_memory(
    plan: Plan,
    software: Software,
    parameters: Mapping[str, float],
    rank: int,
    segments: Sequence[tuple[Work, str]],
    *,
    dense: float,
    expert: float,
    received: float,
) -> MemoryParts:
    """The parts on pipeline rank `rank`.

    `segments` are its (work, recompute choice); `dense` and `expert` its parameters before fsdp, tied ones once;
    `received` the bytes that one neighbour sends it.
    """
    per = state_bytes(plan, software)
    shards = max(1.0, plan.fsdp / plan.ep)
    still_dense = min(dense, sum(work.frozen_dense for work, _ in segments))
    still_expert = min(expert, sum(work.frozen_expert for work, _ in segments))
    still = still_dense / plan.fsdp + still_expert / shards if plan.zero == 3 else still_dense + still_expert
    dense, expert = dense - still_dense, expert - still_expert
    own = dense / plan.fsdp + expert / shards
    held = dense + expert
    weights = per.weight * (own if plan.zero == 3 else held) + per.gathered * still
    gradients = per.gradient * (own if plan.zero >= 2 else held)
    state = per.state * own
    saved = sum(saved_bytes(work, choice, software) for work, choice in segments)
    activations = saved * _in_flight(plan, rank)
    working = 0.0
    gathered = 0.0
    for work, choice in segments:
        again = saved_bytes(work, "none", software) - saved_bytes(work, choice, software)
        loss = work.logits * (0.5 if software.fused_loss else 1.0)  # a fused loss has no gradient in fp32
        working = max(working, again + loss, work.transient / 2)
        gathered = max(gathered, work.dense_parameters + work.expert_parameters)
    transient = working
    if plan.fsdp > 1 and plan.zero == 3:
        transient += gathered * (2 * per.gathered + per.gathered)
    buffers = 2 * received if plan.pp > 1 else 0.0
    total = weights + gradients + state + activations + transient + buffers
    return MemoryParts(
        parameters=weights,
        gradients=gradients,
        optimizer=state,
        activations=activations,
        transient=transient,
        buffers=buffers,
        overhead=parameters["overhead"] * total + parameters["overhead_bytes"],
    )
