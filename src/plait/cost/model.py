"""One plan on one cluster, looked up once: seconds of each segment and microbatch on each pipeline rank."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from plait.cost.calibration import Calibration, Software
from plait.cost.comms import (
    Hop,
    all_gather,
    all_reduce,
    all_to_all,
    core_seconds,
    hops,
    reduce_scatter,
    send,
    send_core,
)
from plait.cost.compute import Rates, host_seconds, pass_seconds, rates, recompute_seconds
from plait.cost.lanes import Lane
from plait.cost.memory import state_bytes
from plait.cost.optimizer import accumulate_seconds
from plait.cost.overlap import hide
from plait.cost.work import Pass, Split, Work, parameter_specs, segment_work
from plait.schema.cluster import Cluster, Device
from plait.schema.graph import Graph, ParameterSpec
from plait.schema.plan import Plan

__all__ = ["Cache", "Model", "SegmentTimes"]


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
    wait_forward: float = 0.0
    """The part of what is exposed in which no core is used; known where the network was measured."""
    wait_backward: float = 0.0

    @property
    def total(self) -> float:
        """Seconds that the segment takes of its rank."""
        return self.forward + self.backward + self.again + self.exposed


class Model:
    """One lane of a plan on one cluster: everything that the terms need, looked up once."""

    def __init__(self, graph: Graph, cluster: Cluster, plan: Plan, batch: int, software: Software,
                 calibration: Calibration, cache: Cache, lane: Lane) -> None:  # fmt: skip
        self.graph, self.cluster, self.plan, self.batch = graph, cluster, plan, batch
        self.software, self.cache, self.lane = software, cache, lane
        self.samples, self.devices = lane.samples, lane.devices
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

    def handling(self, nbytes: float) -> float:
        """Seconds of a core that a message between stages takes on either side, where the network was measured."""
        return send_core(nbytes, self.cluster, self.efficiency) if self.plan.pp > 1 else 0.0

    def fresh_times(self, index: int, rank: int, choice: str) -> SegmentTimes:
        """As `times`, computed."""
        work, at, p = self.work(index), self.rates[rank], self.parameters[rank]
        low = p["low_bytes"] * work.forward.matmul_bytes if self.plan.precision in ("fp8", "fp4") else 0.0
        forward = pass_seconds(work.forward, at, low_bytes=low)
        backward = pass_seconds(work.backward, at, backward=True, low_bytes=2 * low)
        again = recompute_seconds(work, choice, at)
        shown_f = shown_b = hidden = wait_f = wait_b = 0.0
        for shown, hid, wait, is_forward in self.communication(work, forward, backward, choice, p):
            hidden += hid
            wait_f += wait if is_forward else 0.0
            wait_b += 0.0 if is_forward else wait
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
            held = work.trained_dense + work.trained_expert
            backward += accumulate_seconds(
                held if self.plan.zero < 2 else held / self.plan.fsdp,
                new_bytes=self.bytes.gathered,
                kept_bytes=self.bytes.gradient,
                bandwidth=at.optimizer_bandwidth,
            )
        return SegmentTimes(forward, backward, again, shown_f + shown_b, shown_f, hidden, wait_f, wait_b)

    def communication(self, work: Work, forward: float, backward: float, choice: str,
                      p: Mapping[str, float]) -> list[tuple[float, float, float, bool]]:  # fmt: skip
        """(exposed, hidden, part of exposed without a core, whether in the forward) of each collective of a segment."""
        found: list[tuple[float, float, float, bool]] = []
        plan, groups, slow = self.plan, self.groups, p["slowdown"]

        def add(seconds: float, beside: float, kind: str, *, is_forward: bool, core: float = 0.0) -> None:
            if seconds > 0:
                # Time of a core is never hidden, only the wait beside it.
                loss = core / seconds if core else slow
                shown = hide(seconds, beside=beside, fraction=p[f"{kind}_overlap"], slowdown=loss)
                found.append((shown.exposed, shown.hidden, max(0.0, shown.exposed - core) if core else 0.0, is_forward))

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
            whole = core_seconds("all_gather", work.tp_gathered, groups["tp"])
            core_f = whole + sum(core_seconds("all_reduce", x, groups["tp"]) for x in work.tp_forward)
            core_b = whole + sum(core_seconds("all_reduce", x, groups["tp"]) for x in work.tp_backward)
            add(first, forward, "tp", is_forward=True, core=core_f)
            redone, core_redone = (first, core_f) if choice == "full" else (0.0, 0.0)
            add(second + redone, backward, "tp", is_forward=False, core=core_b + core_redone)
        if plan.ep > 1 and work.ep_bytes:
            each = all_to_all(work.ep_bytes, groups["ep"])
            add(2 * each, forward, "ep", is_forward=True)
            add(2 * each * (2 if choice == "full" else 1), backward, "ep", is_forward=False)
        if plan.cp > 1 and work.cp_bytes:
            ring = work.cp_bytes / _slowest(groups["cp"]) + (plan.cp - 1) * _latency(groups["cp"])
            add(ring, forward, "cp", is_forward=True)
            add(2 * ring, backward, "cp", is_forward=False)
        if plan.fsdp > 1 and plan.zero == 3:
            gather, core = self.gather(work, self.bytes.gathered)
            reduce, core_reduce = self.scatter(work, self.bytes.wire)
            add(gather, forward, "dp", is_forward=True, core=core)
            add(gather + reduce, backward, "dp", is_forward=False, core=core + core_reduce)
        elif plan.fsdp > 1 and plan.zero == 2:
            reduce, core = self.scatter(work, self.bytes.wire)
            add(reduce, backward, "dp", is_forward=False, core=core)
        return found

    def gather(self, work: Work, each: float) -> tuple[float, float]:
        """Seconds, and those of a core, to gather a segment's parameters at `each` bytes over fsdp."""
        seconds = all_gather(work.dense_parameters * each, self.groups["fsdp"])
        core = core_seconds("all_gather", work.dense_parameters * each, self.groups["fsdp"])
        if work.expert_parameters:
            seconds += all_gather(work.expert_parameters * each, self.groups["expert_fsdp"])
        return seconds, core

    def scatter(self, work: Work, each: float) -> tuple[float, float]:
        """As `gather`, to reduce and scatter a segment's gradients."""
        seconds = reduce_scatter(work.trained_dense * each, self.groups["fsdp"])
        core = core_seconds("reduce_scatter", work.trained_dense * each, self.groups["fsdp"])
        if work.trained_expert:
            seconds += reduce_scatter(work.trained_expert * each, self.groups["expert_fsdp"])
        return seconds, core


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
