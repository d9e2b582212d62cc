"""The whole step: estimate(graph, cluster, plan, batch) puts the terms together.

step = pipeline of microbatches (compute, recomputation, collectives that show)
     + gradient reduction that the backward does not hide + optimizer + host time of a step,
times 1 + spread x log2(nodes) for waiting on the slowest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from plait.cost.bubble import StageTimes, simulate
from plait.cost.calibration import Calibration, Software, load_calibration
from plait.cost.comms import all_gather, all_reduce
from plait.cost.lanes import lanes
from plait.cost.model import Cache, Model
from plait.cost.money import joules, usd
from plait.cost.optimizer import optimizer_seconds
from plait.cost.overlap import hide
from plait.cost.partition import default_cuts, stage_bounds
from plait.cost.placement import Placed, limits, place
from plait.errors import PlanError
from plait.schema.cluster import Cluster
from plait.schema.estimate import Breakdown, Estimate, LaneEstimate, Span
from plait.schema.graph import Graph
from plait.schema.plan import Plan

__all__ = ["default_software", "estimate", "finish", "stage_times"]


def estimate(
    graph: Graph,
    cluster: Cluster,
    plan: Plan,
    batch: int,
    *,
    software: Software | None = None,
    calibration: Calibration | None = None,
    cache: Cache | None = None,
    timeline: int = 0,
) -> Estimate:
    """The predicted cost of one step of `plan` on `cluster` with a global batch of `batch` samples.

    `timeline` spans of each pipeline rank are kept for showing.

    Raises:
        PlanError: the plan does not fit devices, batch or model.
        HardwareError: a figure of the cluster that the plan needs is not known.
    """
    calibration = calibration or load_calibration()
    software = software or default_software(cluster, calibration)
    plan = plan.bound(batch=batch)
    if plan.devices > cluster.devices:
        raise PlanError(
            f"plan: {plan.spec()} needs {plan.devices} devices, {cluster.name} has {cluster.devices}",
            hint="lower a degree, or take a larger cluster",
        )
    if plan.ep > 1 and plan.replicas % plan.ep:
        raise PlanError(f"plan: ep={plan.ep} does not divide dp x fsdp = {plan.replicas}")
    cache = cache if cache is not None else Cache()
    models = [
        Model(graph, cluster, plan, batch, software, calibration, cache, lane) for lane in lanes(cluster, plan, batch)
    ]
    if plan.stages > 1 and not plan.cuts:
        plan = replace(plan, cuts=default_cuts(graph, plan.stages))
    return finish([(model, place(model, plan)) for model in models], plan, timeline)


def default_software(cluster: Cluster, calibration: Calibration) -> Software:
    """The software that plans are costed for when none is named: plait's own runtime."""
    kind = cluster.groups[0].device.category
    return calibration.software_named("xla" if kind == "tpu" else "plait")


def stage_times(model: Model, plan: Plan) -> list[StageTimes]:
    """Seconds of one microbatch on each stage."""
    stages = []
    for number, (first, last) in enumerate(stage_bounds(plan.cuts, len(model.graph.segments))):
        forward = backward = weight = 0.0
        for index in range(first, last):
            t = model.times(index, number % plan.pp, plan.recompute_of(index))
            forward += t.forward + t.exposed_forward
            backward += t.backward + t.again + (t.exposed - t.exposed_forward)
            weight += t.backward / 2
        stages.append(StageTimes(forward, backward, weight))
    return stages


@dataclass(frozen=True, slots=True)
class _Walk:
    """One lane's step."""

    end: float
    """Seconds until its last rank is done, host time of a step and stragglers aside."""
    breakdown: Breakdown
    work: float
    """Seconds of arithmetic on all devices of the lane."""
    spans: tuple[Span, ...]


def finish(placed: Sequence[tuple[Model, Placed]], plan: Plan, keep: int = 0) -> Estimate:
    """The estimate of a plan, each lane of which is placed; `keep` spans of each pipeline rank are recorded."""
    walks = [_walk(model, plan, where, keep) for model, where in placed]
    slow = max(range(len(walks)), key=lambda i: walks[i].breakdown.total)
    cores = placed[0][0].cluster.shared_cores
    breakdown = walks[slow].breakdown
    if cores is not None and plan.devices > cores:
        # Processes share cores: all of them together cannot be faster than the cores.
        sharing = max(0.0, sum(walk.work for walk in walks) / cores - walks[slow].end)
        breakdown = replace(breakdown, compute=breakdown.compute + sharing)
    return _estimate(placed, plan, breakdown, walks, slow)


def _walk(model: Model, plan: Plan, placed: Placed, keep: int) -> _Walk:
    bounds = placed.bounds
    stages = stage_times(model, plan)
    compute, again, exposed, hidden = ([0.0] * plan.pp for _ in range(4))
    for number, (first, last) in enumerate(bounds):
        rank = number % plan.pp
        for index in range(first, last):
            t = model.times(index, rank, plan.recompute_of(index))
            compute[rank] += t.forward + t.backward
            again[rank] += t.again
            exposed[rank] += t.exposed
            hidden[rank] += t.hidden
    hop = model.hop(max((model.work(last - 1).live_out for _, last in bounds[:-1]), default=0.0))
    run = simulate(plan.schedule, stages, ranks=plan.pp, microbatches=plan.microbatches, delay=hop, keep=keep)
    end, slow = 0.0, 0
    tails = []
    for rank in range(plan.pp):
        own = stages[rank :: plan.pp]
        shown, hid, optimizer = _after_backward(model, plan, rank, placed.dense[rank], placed.expert[rank], own)
        tails.append((shown, hid, optimizer))
        if run.last_backward[rank] + shown + optimizer >= end:
            end, slow = run.last_backward[rank] + shown + optimizer, rank
    shown, hid, optimizer = tails[slow]
    busy = plan.microbatches * (compute[slow] + again[slow] + exposed[slow])
    breakdown = Breakdown(
        compute=plan.microbatches * compute[slow],
        recompute=plan.microbatches * again[slow],
        communication_exposed=plan.microbatches * exposed[slow] + shown,
        communication_hidden=plan.microbatches * hidden[slow] + hid,
        bubble=max(0.0, end - shown - optimizer - busy),
        optimizer=optimizer,
        other=model.parameters[0]["step"] + model.spread * end,
    )
    work = sum(plan.microbatches * (compute[r] + again[r]) + tails[r][2] for r in range(plan.pp))
    return _Walk(end, breakdown, work * len(model.lane.replicas) * plan.tp * plan.cp, run.spans)


def _after_backward(model: Model, plan: Plan, rank: int, dense: float, expert: float,
                    stages: list[StageTimes]) -> tuple[float, float, float]:  # fmt: skip
    """(exposed, hidden, optimizer) seconds of a rank after its last backward."""
    p, per, groups = model.parameters[rank], model.bytes, model.groups
    beside = sum(stage.backward for stage in stages)
    seconds = 0.0
    shard = max(1, plan.fsdp)
    messages = p["messages"] * len(model.graph.segments) / plan.pp
    if plan.fsdp > 1 and plan.zero < 2:
        seconds += all_gather(dense * per.wire, groups["fsdp"], messages) + all_gather(
            expert * per.wire, groups["expert_fsdp"]
        )
    elif plan.fsdp == 1 and plan.cp > 1:
        seconds += all_reduce(dense * per.wire, groups["fsdp"], messages)
    if plan.dp > 1:
        seconds += all_reduce(dense / shard * per.wire, groups["dp"], messages)
        share = shard if plan.ep <= plan.fsdp else max(1, plan.fsdp)
        replicas = plan.dp * plan.fsdp / plan.ep
        if expert and replicas > 1:
            seconds += all_reduce(expert / share * per.wire, groups["dp"])
    hidden_part = hide(seconds, beside=beside, fraction=p["dp_overlap"], slowdown=p["slowdown"])
    shown, hidden = hidden_part.exposed, hidden_part.hidden
    if plan.fsdp > 1 and plan.zero < 3:
        # updated weights travel back; the next forward can hide them as well as a backward hides gradients
        back = all_gather(dense * per.gathered, groups["fsdp"], messages) + all_gather(
            expert * per.gathered, groups["expert_fsdp"]
        )
        part = hide(back, beside=sum(s.forward for s in stages), fraction=p["dp_overlap"], slowdown=p["slowdown"])
        shown, hidden = shown + part.exposed, hidden + part.hidden
    owned = dense / shard + expert / max(1.0, plan.fsdp / plan.ep)
    optimizer = optimizer_seconds(
        owned, state_bytes=per.state, weight_bytes=per.gathered, bandwidth=model.rates[rank].optimizer_bandwidth
    )
    return shown, hidden, optimizer


def _estimate(placed: Sequence[tuple[Model, Placed]], plan: Plan, breakdown: Breakdown,
              walks: Sequence[_Walk], slow: int) -> Estimate:  # fmt: skip
    first = placed[0][0]
    graph, cluster, batch = first.graph, first.cluster, first.batch
    seconds = breakdown.total
    flops = peak = 0.0
    for model, _ in placed:
        alike = len(model.lane.replicas)
        flops += sum(model.work(s.index).model_flops for s in graph.segments) * plan.microbatches * alike
        peak += sum(device.peak(plan.precision) for device in model.devices) * alike * plan.tp * plan.cp
    known = all(device.memory_bytes is not None for model, _ in placed for device in model.devices)
    fits = all(
        parts.total <= limit
        for model, where in placed
        for parts, limit in zip(where.memory, limits(model), strict=True)
    )
    notes = list(cluster.notes)
    if not known:
        notes.append("the device's memory is not known: whether the plan fits is not checked")
    # Of the replicas, the one that holds most speaks for its pipeline rank.
    fullest = [max(placed, key=lambda item: item[1].memory[rank].total) for rank in range(plan.pp)]
    memory = tuple(where.memory[rank] for rank, (_, where) in enumerate(fullest))
    worst = max(range(plan.pp), key=lambda rank: memory[rank].total)
    return Estimate(
        plan=plan,
        cluster=cluster.name,
        batch=batch,
        step_time_s=seconds,
        tokens_per_s=batch * graph.tokens_per_sample / seconds,
        mfu=flops / seconds / peak,
        breakdown=breakdown,
        memory=memory,
        memory_limit=limits(fullest[worst][0])[worst] if known else None,
        fits=fits,
        timeline=walks[slow].spans,
        usd_per_step=usd(cluster, plan.devices, seconds),
        joule_per_step=joules(cluster, plan.devices, seconds, breakdown.compute + breakdown.recompute),
        notes=tuple(notes),
        lanes=_lane_estimates(placed, plan, walks) if len(placed) > 1 else (),
    )


def _lane_estimates(
    placed: Sequence[tuple[Model, Placed]], plan: Plan, walks: Sequence[_Walk]
) -> tuple[LaneEstimate, ...]:
    return tuple(
        LaneEstimate(
            devices=tuple(device.name for device in model.devices),
            replicas=model.lane.replicas,
            samples=model.lane.samples * plan.microbatches,
            step_time_s=walk.breakdown.total,
            memory=where.memory,
            memory_limits=tuple(None if math.isinf(limit) else limit for limit in limits(model)),
        )
        for (model, where), walk in zip(placed, walks, strict=True)
    )
