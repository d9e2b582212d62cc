"""The whole step: estimate(graph, cluster, plan, batch) puts the terms together.

step = pipeline of microbatches (compute, recomputation, collectives that show)
     + gradient reduction that the backward does not hide + optimizer + host time of a step,
times 1 + spread x log2(nodes) for waiting on the slowest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from plait.cost.bubble import StageTimes, simulate
from plait.cost.calibration import Calibration, Software, load_calibration
from plait.cost.comms import Hop, all_gather, all_reduce, all_to_all, hops, send
from plait.cost.compute import Rates, host_seconds, pass_seconds, rates, recompute_seconds
from plait.cost.memory import rank_memory, state_bytes
from plait.cost.money import joules, usd
from plait.cost.optimizer import accumulate_seconds, optimizer_seconds
from plait.cost.overlap import hide
from plait.cost.partition import default_cuts, stage_bounds
from plait.cost.work import Pass, Split, Work, parameter_specs, segment_work
from plait.errors import PlanError
from plait.schema.cluster import Cluster, Device
from plait.schema.estimate import Breakdown, Estimate, MemoryParts, Span
from plait.schema.graph import Graph, ParameterSpec
from plait.schema.plan import Plan

__all__ = [
    "USABLE",
    "Cache",
    "Model",
    "SegmentTimes",
    "default_cuts",
    "default_software",
    "estimate",
    "finish",
    "place",
]

USABLE = 0.94  # of stated memory: drivers, contexts and the allocator hold 6 to 10 % (data/README.md, traps)


@dataclass(slots=True)
class Cache:
    """Work of one graph's segments by (segment class, split); hand the same one to calls on the same graph."""

    works: dict[tuple[int, Split], Work] = field(default_factory=dict)
    specs: dict[str, ParameterSpec] = field(default_factory=dict)
    tied: dict[str, list[int]] | None = None

    def work(self, graph: Graph, index: int, split: Split) -> Work:
        """The work of the class of segment `index`."""
        key = (graph.segments[index].equals, split)
        found = self.works.get(key)
        if found is None:
            self.specs = self.specs or parameter_specs(graph)
            found = self.works[key] = segment_work(graph, graph.segments[key[0]], split, self.specs)
        return found


@dataclass(frozen=True, slots=True)
class SegmentTimes:
    """Seconds of one segment and microbatch on one device."""

    forward: float
    backward: float
    again: float
    """Forward work done again."""
    exposed: float
    """Of communication, both directions, recomputation's included."""
    exposed_forward: float
    hidden: float

    @property
    def total(self) -> float:
        """Seconds that the segment takes of its rank."""
        return self.forward + self.backward + self.again + self.exposed


class Model:
    """One plan on one cluster: everything that the terms need, looked up once."""

    def __init__(self, graph: Graph, cluster: Cluster, plan: Plan, batch: int, software: Software,
                 calibration: Calibration, cache: Cache) -> None:  # fmt: skip
        self.graph, self.cluster, self.plan, self.batch = graph, cluster, plan, batch
        self.software, self.cache = software, cache
        self.samples = batch / plan.replicas / plan.microbatches
        self.devices = _pipeline_devices(cluster, plan)
        self.parameters = [calibration.resolve(device, software) for device in self.devices]
        self.rates = _each(self.devices, plan.precision, self.parameters)
        self.efficiency, self.latency = calibration.link_factors(cluster, self.parameters[0])
        self.split = Split(
            samples=self.samples,
            tp=plan.tp,
            sequence_parallel=plan.tp > 1 and (software.sequence_parallel or plan.sequence_parallel == "yes"),
            cp=plan.cp,
            ep=plan.ep,
            precision=plan.precision,
            category=self.devices[0].category,
            keeps_gathered=software.keeps_gathered,
        )
        self.groups = {
            "tp": self.group(plan.tp, 1, {"site": self.parameters[0]["tp_crossing"]}),
            "cp": self.group(plan.cp, plan.tp),
            "ep": self.group(plan.ep, plan.tp * plan.cp),
            "fsdp": self.group(plan.fsdp * plan.cp, plan.tp),
            "dp": self.group(plan.dp, plan.tp * plan.cp * plan.fsdp),
            "expert_fsdp": self.group(max(1, plan.fsdp * plan.cp // plan.ep), plan.tp * plan.ep),
        }
        self.bytes = state_bytes(plan, software)
        self.seen: dict[tuple[int, str, str], SegmentTimes] = {}
        self.works: dict[int, Work] = {}
        nodes = plan.devices / cluster.node_size
        self.spread = self.parameters[0]["spread"] * math.log2(nodes) if nodes > 1 else 0.0

    def group(self, size: int, stride: int, slower: Mapping[str, float] | None = None) -> tuple[Hop, ...]:
        """The network as `size` ranks, `stride` apart, use it; `slower` are further factors by level."""
        efficiency = {level: value * (slower or {}).get(level, 1.0) for level, value in self.efficiency.items()}
        return hops(self.cluster, size=size, stride=stride, efficiency=efficiency, latency=self.latency)

    def work(self, index: int) -> Work:
        """The work of segment `index` under this plan."""
        owner = self.graph.segments[index].equals
        found = self.works.get(owner)
        if found is None:
            found = self.works[owner] = self.cache.work(self.graph, index, self.split)
        return found

    def times(self, index: int, rank: int, choice: str) -> SegmentTimes:
        """Seconds of segment `index` on pipeline rank `rank` under a recompute choice."""
        key = (self.graph.segments[index].equals, self.devices[rank].name, choice)
        found = self.seen.get(key)
        if found is None:
            found = self.seen[key] = self.fresh_times(index, rank, choice)
        return found

    def hop(self, nbytes: float) -> float:
        """Seconds between one stage's end and the next one's start."""
        plan, p = self.plan, self.parameters[0]
        if plan.pp == 1:
            return 0.0
        seconds = send(nbytes, self.cluster, stride=plan.devices // plan.pp, count=plan.pp, efficiency=self.efficiency,
                       latency=self.latency)  # fmt: skip
        return (seconds + p["pp_seconds"]) * (1 - p["pp_overlap"])

    def fresh_times(self, index: int, rank: int, choice: str) -> SegmentTimes:
        """As `times`, computed."""
        work, at, p = self.work(index), self.rates[rank], self.parameters[rank]
        low = p["low_bytes"] * work.forward.matmul_bytes if self.plan.precision in ("fp8", "fp4") else 0.0
        forward = pass_seconds(work.forward, at, low_bytes=low)
        backward = pass_seconds(work.backward, at, backward=True, low_bytes=2 * low)
        again = recompute_seconds(work, choice, at)
        shown_f = shown_b = hidden = 0.0
        for shown, hid, is_forward in self.communication(work, forward, backward, choice, p):
            hidden += hid
            shown_f += shown if is_forward else 0.0
            shown_b += 0.0 if is_forward else shown
        # The host starts operators and collectives ahead of the device; where it is the slower, the device waits.
        sharded = 1 if self.plan.fsdp > 1 and self.plan.zero == 3 else 0
        first, second = len(work.tp_forward) + sharded, len(work.tp_backward) + 2 * sharded
        redo = work.forward if choice == "full" else work.again_selective if choice == "selective" else Pass()
        # Where a pipeline's sends run as well, ring steps of several communicators hold one another up.
        stall = p["stall"] * (self.plan.tp - 1) if self.plan.pp > 1 else 0.0
        host_f = host_seconds(work.forward, at, first) + stall * len(work.tp_forward)
        host_b = host_seconds(work.backward + redo, at, second) + stall * len(work.tp_backward)
        forward = max(forward, host_f - shown_f)
        backward = max(backward, host_b - shown_b - again)
        if self.plan.microbatches > 1 or self.plan.precision != "fp32":
            # adding this microbatch's gradients to the others'
            held = work.dense_parameters + work.expert_parameters
            backward += accumulate_seconds(
                held if self.plan.zero < 2 else held / self.plan.fsdp,
                new_bytes=self.bytes.gathered,
                kept_bytes=self.bytes.gradient,
                bandwidth=at.optimizer_bandwidth,
            )
        return SegmentTimes(forward, backward, again, shown_f + shown_b, shown_f, hidden)

    def communication(self, work: Work, forward: float, backward: float, choice: str,
                      p: Mapping[str, float]) -> list[tuple[float, float, bool]]:  # fmt: skip
        """(exposed, hidden, whether in the forward) of each collective of a segment."""
        found: list[tuple[float, float, bool]] = []
        plan, groups, slow = self.plan, self.groups, p["slowdown"]

        def add(seconds: float, beside: float, kind: str, *, is_forward: bool) -> None:
            if seconds > 0:
                shown = hide(seconds, beside=beside, fraction=p[f"{kind}_overlap"], slowdown=slow)
                found.append((shown.exposed, shown.hidden, is_forward))

        if plan.tp > 1:
            first = sum(all_reduce(x, groups["tp"]) for x in work.tp_forward)
            first += all_gather(work.tp_gathered, groups["tp"])
            second = sum(all_reduce(x, groups["tp"]) for x in work.tp_backward)
            second += all_gather(work.tp_gathered, groups["tp"])
            if (
                self.split.sequence_parallel and not self.split.keeps_gathered
            ):  # the gathered input is not kept: gathered again for the weight gradient
                second += sum(all_gather(x, groups["tp"]) for x in work.tp_backward)
            crossings = max(0, math.ceil(plan.tp / self.cluster.node_size) - 1)
            first += len(work.tp_forward) * crossings * p["tp_hop"]
            second += len(work.tp_backward) * crossings * p["tp_hop"]
            add(first, forward, "tp", is_forward=True)
            add(second + (first if choice == "full" else 0.0), backward, "tp", is_forward=False)
        if plan.ep > 1 and work.ep_bytes:
            each = all_to_all(work.ep_bytes, groups["ep"])
            add(2 * each, forward, "ep", is_forward=True)
            add(2 * each * (2 if choice == "full" else 1), backward, "ep", is_forward=False)
        if plan.cp > 1 and work.cp_bytes:
            ring = work.cp_bytes / _slowest(groups["cp"]) + (plan.cp - 1) * _latency(groups["cp"])
            add(ring, forward, "cp", is_forward=True)
            add(2 * ring, backward, "cp", is_forward=False)
        if plan.fsdp > 1 and plan.zero == 3:
            gather = self.gather(work, self.bytes.gathered)
            reduce = self.gather(work, self.bytes.wire)
            add(gather, forward, "dp", is_forward=True)
            add(gather + reduce, backward, "dp", is_forward=False)
        elif plan.fsdp > 1 and plan.zero == 2:
            add(self.gather(work, self.bytes.wire), backward, "dp", is_forward=False)
        return found

    def gather(self, work: Work, each: float) -> float:
        """Seconds to gather, or to reduce and scatter, a segment's parameters at `each` bytes over fsdp."""
        seconds = all_gather(work.dense_parameters * each, self.groups["fsdp"])
        if work.expert_parameters:
            seconds += all_gather(work.expert_parameters * each, self.groups["expert_fsdp"])
        return seconds


def _each(devices: tuple[Device, ...], precision: str, parameters: list[dict[str, float]]) -> list[Rates]:
    found: dict[str, Rates] = {}
    for device, values in zip(devices, parameters, strict=True):
        if device.name not in found:
            found[device.name] = rates(device, precision, values)
    return [found[device.name] for device in devices]


def _slowest(group: tuple[Hop, ...]) -> float:
    return min((hop.bandwidth for hop in group), default=math.inf)


def _latency(group: tuple[Hop, ...]) -> float:
    return max((hop.latency for hop in group), default=0.0)


def _pipeline_devices(cluster: Cluster, plan: Plan) -> tuple[Device, ...]:
    """The slowest device of each pipeline rank's block of ranks."""
    if cluster.is_uniform:
        return (cluster.groups[0].device,) * plan.pp
    block = plan.devices // plan.pp
    chosen = []
    edges = []
    start = 0
    for group in cluster.groups:
        edges.append((start, start + group.count, group.device))
        start += group.count
    for rank in range(plan.pp):
        first, last = rank * block, (rank + 1) * block
        inside = [device for low, high, device in edges if low < last and first < high]
        chosen.append(min(inside, key=lambda d: d.peak_flops.get(plan.precision, d.peak_flops.get("fp32", 0.0))))
    return tuple(chosen)


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


@dataclass(frozen=True, slots=True)
class _Placed:
    """A model cut into stages: what each pipeline rank holds."""

    bounds: list[tuple[int, int]]
    """(first, last + 1) segment of each stage."""
    dense: list[float]
    """Parameters by pipeline rank, tied ones once, experts not counted; before fsdp."""
    expert: list[float]
    memory: tuple[MemoryParts, ...]


def place(model: Model, plan: Plan) -> _Placed:
    """Stages and memory of `plan`, which states its cuts."""
    graph = model.graph
    bounds = stage_bounds(plan.cuts, len(graph.segments))
    dense, expert = [0.0] * plan.pp, [0.0] * plan.pp
    if model.cache.tied is None:
        model.cache.tied = _tied(graph)
    tied = model.cache.tied
    for number, (first, last) in enumerate(bounds):
        rank = number % plan.pp
        for index in range(first, last):
            work = model.work(index)
            dense[rank] += work.dense_parameters
            expert[rank] += work.expert_parameters
        dense[rank] -= _counted_twice(tied, graph, bounds, number, plan.pp) / plan.tp
    return _Placed(bounds, dense, expert, _memory(model, plan, bounds, dense, expert))


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


def finish(model: Model, plan: Plan, placed: _Placed, keep: int = 0) -> Estimate:
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


def _memory(model: Model, plan: Plan, bounds: list[tuple[int, int]], dense: list[float],
            expert: list[float]) -> tuple[MemoryParts, ...]:  # fmt: skip
    parts = []
    for rank in range(plan.pp):
        own = [(first, last) for number, (first, last) in enumerate(bounds) if number % plan.pp == rank]
        segments = [(model.work(i), plan.recompute_of(i)) for first, last in own for i in range(first, last)]
        received = max((model.work(last - 1).live_out for _, last in own), default=0.0)
        parts.append(
            rank_memory(
                plan,
                model.software,
                model.parameters[rank],
                rank,
                segments,
                dense=dense[rank],
                expert=expert[rank],
                received=received,
            )
        )
    return tuple(parts)


def _tied(graph: Graph) -> dict[str, list[int]]:
    """Segments by the name of each parameter that several of them use."""
    users: dict[str, list[int]] = {}
    for segment in graph.segments:
        for name in segment.parameters:
            users.setdefault(name, []).append(segment.index)
    return {name: where for name, where in users.items() if len(where) > 1}


def _counted_twice(
    tied: dict[str, list[int]], graph: Graph, bounds: list[tuple[int, int]], number: int, pp: int
) -> float:
    """Parameters of stage `number` that an earlier segment of the same rank holds already."""
    if not tied:
        return 0.0
    rank = number % pp
    owner = {i: n for n, (first, last) in enumerate(bounds) for i in range(first, last)}
    total = 0.0
    for name, where in tied.items():
        here = [i for i in where if owner[i] % pp == rank]
        in_stage = [i for i in here if owner[i] == number]
        if in_stage and len(here) > 1:
            extra = len(in_stage) - (1 if here[0] in in_stage else 0)
            total += extra * graph.parameter(name).numel
    return total


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
