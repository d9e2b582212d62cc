"""The whole step: estimate(graph, cluster, plan, batch) puts the terms together.

step = pipeline of microbatches (compute, recomputation, collectives that show)
     + gradient reduction that the backward does not hide + optimizer + host time of a step,
times 1 + spread x log2(nodes) for waiting on the slowest.
"""

from __future__ import annotations

from dataclasses import replace

from plait.cost.bubble import StageTimes, simulate
from plait.cost.calibration import Calibration, Software, load_calibration
from plait.cost.comms import all_gather, all_reduce
from plait.cost.model import Cache, Model
from plait.cost.money import joules, usd
from plait.cost.optimizer import optimizer_seconds
from plait.cost.overlap import hide
from plait.cost.partition import default_cuts, stage_bounds
from plait.cost.placement import USABLE, Placed, place
from plait.errors import PlanError
from plait.schema.cluster import Cluster
from plait.schema.estimate import Breakdown, Estimate, MemoryParts, Span
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
    model = Model(graph, cluster, plan, batch, software, calibration, cache if cache is not None else Cache())
    if plan.stages > 1 and not plan.cuts:
        plan = replace(plan, cuts=default_cuts(graph, plan.stages))
    return finish(model, plan, place(model, plan), timeline)


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


def finish(model: Model, plan: Plan, placed: Placed, keep: int = 0) -> Estimate:
    """The estimate of a placed model; `keep` spans of each pipeline rank are recorded."""
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
    other = model.parameters[0]["step"] + model.spread * end
    busy = plan.microbatches * (compute[slow] + again[slow] + exposed[slow])
    bubble = max(0.0, end - shown - optimizer - busy)
    cores = model.cluster.shared_cores
    sharing = 0.0
    if cores is not None and plan.devices > cores:
        # Processes share cores: all of them together cannot be faster than the cores.
        total = sum(plan.microbatches * (compute[r] + again[r]) + tails[r][2] for r in range(plan.pp))
        sharing = max(0.0, total * (plan.devices / plan.pp) / cores - end)
    breakdown = Breakdown(
        compute=plan.microbatches * compute[slow] + sharing,
        recompute=plan.microbatches * again[slow],
        communication_exposed=plan.microbatches * exposed[slow] + shown,
        communication_hidden=plan.microbatches * hidden[slow] + hid,
        bubble=bubble,
        optimizer=optimizer,
        other=other,
    )
    return _estimate(model, plan, breakdown, placed.memory, run.spans)


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


def _estimate(model: Model, plan: Plan, breakdown: Breakdown, memory: tuple[MemoryParts, ...],
              spans: tuple[Span, ...]) -> Estimate:  # fmt: skip
    graph, cluster, batch = model.graph, model.cluster, model.batch
    seconds = breakdown.total
    flops = sum(model.work(s.index).model_flops for s in graph.segments) * plan.microbatches * plan.replicas
    peak = sum(device.peak(plan.precision) for device in model.devices) * plan.devices / plan.pp
    limits = [device.memory_bytes for device in model.devices]
    known = all(limit is not None for limit in limits)
    fits = known and all(parts.total <= USABLE * (limit or 0.0) for parts, limit in zip(memory, limits, strict=True))
    notes = list(cluster.notes)
    if not known:
        notes.append("the device's memory is not known: whether the plan fits is not checked")
    return Estimate(
        plan=plan,
        cluster=cluster.name,
        batch=batch,
        step_time_s=seconds,
        tokens_per_s=batch * graph.tokens_per_sample / seconds,
        mfu=flops / seconds / peak,
        breakdown=breakdown,
        memory=memory,
        memory_limit=USABLE * min(limit for limit in limits if limit is not None) if known else None,
        fits=fits if known else True,
        timeline=spans,
        usd_per_step=usd(cluster, plan.devices, seconds),
        joule_per_step=joules(cluster, plan.devices, seconds, breakdown.compute + breakdown.recompute),
        notes=tuple(notes),
    )
