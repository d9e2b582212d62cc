"""The whole step: estimate(graph, cluster, plan, batch) puts the terms together.

step = pipeline of microbatches (compute, recomputation, collectives that show)
     + gradient reduction that the backward does not hide + optimizer + host time of a step,
times 1 + spread x log2(nodes) for waiting on the slowest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from plait.cost.bubble import Result, StageTimes, simulate
from plait.cost.calibration import Calibration, Software, load_calibration
from plait.cost.comms import all_gather, all_reduce, core_seconds, reduce_scatter
from plait.cost.cores import Tail, simulate_shared
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
        waits = 0.0, 0.0
        for index in range(first, last):
            t = model.times(index, number % plan.pp, plan.recompute_of(index))
            forward += t.forward + t.exposed_forward
            backward += t.backward + t.again + (t.exposed - t.exposed_forward)
            weight += t.backward / 2
            waits = waits[0] + t.wait_forward, waits[1] + t.wait_backward
        stages.append(StageTimes(forward, backward, weight, *waits))
    return stages


@dataclass(frozen=True, slots=True)
class _Walk:
    """One lane's step."""

    end: float
    """Seconds until its last rank is done, host time of a step and stragglers aside."""
    breakdown: Breakdown
    spans: tuple[Span, ...]


def finish(placed: Sequence[tuple[Model, Placed]], plan: Plan, keep: int = 0) -> Estimate:
    """The estimate of a plan, each lane of which is placed; `keep` spans of each pipeline rank are recorded."""
    walks = [_walk(model, plan, where, keep) for model, where in placed]
    slow = max(range(len(walks)), key=lambda i: walks[i].breakdown.total)
    return _estimate(placed, plan, walks[slow].breakdown, walks, slow)


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
    sent = max((model.work(last - 1).live_out for _, last in bounds[:-1]), default=0.0)
    tails = [
        _after_backward(model, plan, rank, *placed.trained(rank), stages[rank :: plan.pp]) for rank in range(plan.pp)
    ]
    run, slow, end, stretch = _timeline(model, plan, stages, tails, sent, keep)
    tail = tails[slow]
    busy = plan.microbatches * (compute[slow] + again[slow] + exposed[slow])
    breakdown = Breakdown(
        compute=stretch * plan.microbatches * compute[slow],
        recompute=stretch * plan.microbatches * again[slow],
        communication_exposed=stretch * (plan.microbatches * exposed[slow] + tail.shown),
        communication_hidden=plan.microbatches * hidden[slow] + tail.hidden,
        bubble=max(0.0, end - stretch * (tail.shown + tail.optimizer + busy)),
        optimizer=stretch * tail.optimizer,
        other=model.parameters[0]["step"] + model.spread * end,
    )
    return _Walk(end, breakdown, run.spans)


@dataclass(frozen=True, slots=True)
class _After:
    """Seconds of a rank after its last backward."""

    shown: float
    """Of communication that is exposed."""
    hidden: float
    wait: float
    """The part of `shown` in which no core is used."""
    optimizer: float


def _timeline(model: Model, plan: Plan, stages: list[StageTimes], tails: list[_After], sent: float,
              keep: int) -> tuple[Result, int, float, float]:  # fmt: skip
    """(the schedule, the rank that decides, when the step ends, how much longer that rank's seconds take on shared cores)."""
    cores, many = model.cluster.shared_cores, plan.microbatches
    delay = model.hop(sent)
    if cores is None:
        run = simulate(plan.schedule, stages, ranks=plan.pp, microbatches=many, delay=delay, keep=keep)
        ends = [end + tail.shown + tail.optimizer for end, tail in zip(run.last_backward, tails, strict=True)]
        slow = max(range(plan.pp), key=lambda rank: (ends[rank], rank))
        return run, slow, ends[slow], 1.0
    run = simulate_shared(
        plan.schedule, stages, [Tail(t.shown - t.wait + t.optimizer, t.wait) for t in tails],
        microbatches=many, cores=cores, processes=plan.devices / plan.pp, delay=delay, handling=model.handling(sent),
        keep=keep,
    )  # fmt: skip
    slow = max(range(plan.pp), key=lambda rank: run.busy[rank])
    alone = (
        many * sum(s.forward + s.backward for s in stages[slow :: plan.pp]) + tails[slow].shown + tails[slow].optimizer
    )
    return run, slow, run.end, run.busy[slow] / alone


def _after_backward(model: Model, plan: Plan, rank: int, dense: float, expert: float,
                    stages: list[StageTimes]) -> _After:  # fmt: skip
    p, per, groups = model.parameters[rank], model.bytes, model.groups
    seconds = core = 0.0
    shard = max(1, plan.fsdp)
    messages = p["messages"] * len(model.graph.segments) / plan.pp
    if plan.fsdp > 1 and plan.zero < 2:
        seconds += reduce_scatter(dense * per.wire, groups["fsdp"], messages) + reduce_scatter(
            expert * per.wire, groups["expert_fsdp"]
        )
        core += core_seconds("reduce_scatter", dense * per.wire, groups["fsdp"], messages)
    elif plan.fsdp == 1 and plan.cp > 1:
        seconds += all_reduce(dense * per.wire, groups["fsdp"], messages)
    if plan.dp > 1:
        seconds += all_reduce(dense / shard * per.wire, groups["dp"], messages)
        core += core_seconds("all_reduce", dense / shard * per.wire, groups["dp"], messages)
        share = shard if plan.ep <= plan.fsdp else max(1, plan.fsdp)
        replicas = plan.dp * plan.fsdp / plan.ep
        if expert and replicas > 1:
            seconds += all_reduce(expert / share * per.wire, groups["dp"])
    shown, hidden, wait = _hide_replicas(seconds, core, p, sum(stage.backward for stage in stages))
    if plan.fsdp > 1 and plan.zero < 3:
        # updated weights travel back; the next forward can hide them as well as a backward hides gradients
        back = all_gather(dense * per.gathered, groups["fsdp"], messages) + all_gather(
            expert * per.gathered, groups["expert_fsdp"]
        )
        core = core_seconds("all_gather", dense * per.gathered, groups["fsdp"], messages)
        more = _hide_replicas(back, core, p, sum(s.forward for s in stages))
        shown, hidden, wait = shown + more[0], hidden + more[1], wait + more[2]
    owned = dense / shard + expert / max(1.0, plan.fsdp / plan.ep)
    optimizer = optimizer_seconds(
        owned, state_bytes=per.state, weight_bytes=per.gathered, bandwidth=model.rates[rank].optimizer_bandwidth
    )
    return _After(shown, hidden, wait, optimizer)


def _hide_replicas(seconds: float, core: float, p: Mapping[str, float], beside: float) -> tuple[float, float, float]:
    """(exposed, hidden, part of exposed without a core) of what replicas exchange beside `beside` seconds of compute."""
    loss = core / seconds if core else p["slowdown"]  # time of a core is never hidden, only the wait beside it
    part = hide(seconds, beside=beside, fraction=p["dp_overlap"], slowdown=loss)
    return part.exposed, part.hidden, max(0.0, part.exposed - core) if core else 0.0


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
