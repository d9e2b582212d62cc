"""The fastest plan that fits, by branch and bound.

Choices are grouped by what decides a device's work (degrees, microbatch, schedule, recompute, sequence parallelism).
Each group gets a lower bound on its step time from the work of the model's segment classes alone (identical segments
are solved once), groups are taken in the order of their bounds, and the search ends when the next bound is not below
the last plan that is kept. Within a group, sharding (dp x fsdp, ZeRO) and pipeline cuts are tried one by one.

The bound. With m microbatches, p ranks with work w_r for each microbatch and sum W, rank r cannot start before the
first microbatch has passed the ranks before it, nor end before these have finished the last one:
T >= max_r (m w_r + c sum_{i<r} w_i), which whatever the cuts is at least c W / (1 - (1 - c/m)^p), c = 1 for GPipe and
1F1B, the forward's share of the work for zero-bubble (weight gradients fill the end), 0 (T >= m W / p) for
interleaved schedules.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from plait.cost.bubble import least_seconds
from plait.cost.calibration import Calibration, Software, load_calibration
from plait.cost.lanes import Lane, device_runs, lanes
from plait.cost.model import Cache, Model
from plait.cost.placement import limits, place
from plait.cost.step import default_software, finish, stage_times
from plait.errors import HardwareError, PlanError
from plait.plan.cutting import all_cuts, balanced, mixed_recompute
from plait.plan.result import Refusal, SearchResult, dominates
from plait.plan.shares import all_divisions, by_speed, neighbours
from plait.plan.shortfall import Shortfall, shortfall_error
from plait.plan.space import Degrees, Space, degrees, facts_of, microbatch_counts, unsupported
from plait.schema.cluster import Cluster, Device
from plait.schema.estimate import Estimate
from plait.schema.graph import Graph
from plait.schema.plan import Plan

__all__ = ["Refusal", "SearchResult", "search"]


@dataclass(frozen=True, slots=True)
class _LeastWork:
    """Of one replica for one microbatch, every segment on its fastest device and as little recomputed as can be."""

    total: float
    """Seconds of all segments."""
    longest: float
    """Of the longest segment."""
    forward: float
    """Least share of a segment's forward in its time."""


@dataclass(slots=True)
class _Search:
    """One search under way."""

    graph: Graph
    cluster: Cluster
    batch: int
    precision: str
    space: Space
    software: Software
    calibration: Calibration
    top: int
    cache: Cache = field(default_factory=Cache)
    refused: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    kept: list[tuple[float, int, Estimate]] = field(default_factory=list)
    """A heap of the best so far, worst first."""
    front: list[Estimate] = field(default_factory=list)
    smallest: Shortfall | None = None
    """Of the plans that do not fit, the one with the least excess."""
    tried: int = 0
    groups: int = 0
    cuts: dict[tuple[Any, ...], tuple[int, ...]] = field(default_factory=dict)
    paces: dict[tuple[Any, ...], float] = field(default_factory=dict)
    classes: dict[int, int] = field(default_factory=dict)
    """Segments by class (index of the first of its structure)."""

    def refuse(self, reason: str, example: str) -> None:
        self.refused[reason] += 1
        self.examples.setdefault(reason, example)

    def models(self, plan: Plan) -> list[Model]:
        """One for each kind of replica."""
        return [self.model(plan, lane) for lane in lanes(self.cluster, plan, self.batch)]

    def model(self, plan: Plan, lane: Lane) -> Model:
        return Model(self.graph, self.cluster, plan, self.batch, self.software, self.calibration, self.cache, lane)

    def threshold(self) -> float:
        """Step time that a plan must beat to be kept."""
        return -self.kept[0][0] if len(self.kept) >= self.top else math.inf

    def branches(self) -> Iterator[tuple[float, Plan]]:
        """(lower bound, plan without sharding and cuts) of every legal group."""
        facts = facts_of(self.graph)
        self.classes = dict(Counter(segment.equals for segment in self.graph.segments))
        works: dict[tuple[Any, ...], list[_LeastWork]] = {}
        divided: dict[tuple[Any, ...], list[tuple[int, ...]]] = {}
        for d, reason in degrees(facts, self.cluster, self.batch, self.space):
            if reason:
                self.refuse(reason, _text(d))
                continue
            for m in microbatch_counts(self.batch, d.replicas, self.cluster, self.space):
                for (schedule, chunks), recompute, sequence in itertools.product(
                    self.schedules(d, m, facts.segments),
                    self.space.recompute,
                    self.space.sequence_parallel if d.tp > 1 else ("no",),
                ):
                    values: dict[str, Any] = {
                        "dp": d.replicas, "tp": d.tp, "cp": d.cp, "pp": d.pp, "ep": d.ep, "microbatches": m,
                        "schedule": schedule, "interleave": chunks, "recompute": recompute,
                        "precision": self.precision, "sequence_parallel": sequence, "zero": 1,
                    }  # fmt: skip
                    plan = Plan(**values)
                    if self.space.executable and (reasons := unsupported(plan)):
                        self.refuse(reasons[0].partition(":")[0] + " cannot be executed yet", plan.spec())
                        continue
                    chosen = (d, m, recompute, sequence)
                    if chosen not in divided:
                        divided[chosen] = list(self.share_options(plan))
                    for shares in divided[chosen]:
                        # On one kind of device neither the pipeline nor the number of replicas changes a segment.
                        mixed = () if self.cluster.is_uniform else (d.pp, d.replicas)
                        key = (d.tp, d.cp, d.ep, m * d.replicas, recompute, sequence, shares, mixed)
                        uneven = replace(plan, batch_shares=shares) if shares else plan
                        if key not in works:
                            works[key] = self.work_of(uneven)
                        yield max(self.bound(plan, least) for least in works[key]), uneven

    def share_options(self, plan: Plan) -> Iterator[tuple[int, ...]]:
        """Ways to divide the samples over the replicas: evenly, and by the speed of their devices."""
        whole = self.batch // plan.microbatches
        if self.cluster.is_uniform or whole % plan.replicas == 0:
            yield ()
        if self.cluster.is_uniform:
            return
        runs = list(device_runs(self.cluster, plan))
        counts: Counter[tuple[str, ...]] = Counter()
        devices: dict[tuple[str, ...], tuple[Device, ...]] = {}
        for first, last, those in runs:
            counts[_names(those)] += last - first
            devices.setdefault(_names(those), those)
        kinds = list(counts)
        numbers = list(counts.values())
        options = all_divisions(whole, numbers, self.space.all_shares)
        if options is None:
            held = by_speed(whole, numbers, lambda kind, n: self.pace(plan, devices[kinds[kind]], n))
            options = iter([held, *neighbours(held, numbers)])
        for held in options:
            each = {
                kind: iter([total // counts[kind] + (i < total % counts[kind]) for i in range(counts[kind])])
                for kind, total in zip(kinds, held, strict=True)
            }
            shares = tuple(plan.microbatches * next(each[_names(those)]) for a, b, those in runs for _ in range(a, b))
            if len(set(shares)) > 1:
                yield shares

    def pace(self, plan: Plan, devices: tuple[Device, ...], samples: int) -> float:
        """Seconds of a microbatch of so many samples on a replica whose stages are as long as one another."""
        key = (_names(devices), samples, plan.tp, plan.cp, plan.ep, plan.recompute, plan.sequence_parallel)
        if key not in self.paces:
            model = self.model(plan, Lane(devices, float(samples), (0,)))
            speed = 0.0
            for rank in range(plan.pp):
                whole = sum(n * model.times(c, rank, plan.recompute).total for c, n in self.classes.items())
                speed += 1 / max(whole, 1e-30)
            self.paces[key] = 1 / speed
        return self.paces[key]

    def schedules(self, d: Degrees, m: int, segments: int) -> Iterator[tuple[str, int]]:
        if d.pp == 1:
            yield "1f1b", 1
            return
        for schedule in self.space.schedules:
            if schedule != "interleaved":
                yield schedule, 1
                continue
            for chunks in self.space.interleave:
                if d.pp * chunks <= segments and m % d.pp == 0 and chunks > 1:
                    yield schedule, chunks

    def work_of(self, plan: Plan) -> list[_LeastWork]:
        """The least that each kind of replica has to do for one microbatch, dp and fsdp aside."""
        found = []
        for model in self.models(plan):
            ranks = range(plan.pp) if not self.cluster.is_uniform else (0,)
            choices = ("none", plan.recompute)
            total = longest = 0.0
            share = 1.0
            for index, count in self.classes.items():
                options = [model.times(index, rank, choice) for rank in ranks for choice in choices]
                least = min(times.total for times in options)
                share = min(share, *((t.forward + t.exposed_forward) / max(t.total, 1e-30) for t in options))
                total += count * least
                longest = max(longest, least)
            found.append(_LeastWork(total, longest, share))
        return found

    def bound(self, plan: Plan, work: _LeastWork) -> float:
        """A step time that no sharding and no cuts of `plan` can beat on replicas with `work`."""
        m, p = plan.microbatches, plan.pp
        share = {"gpipe": 1.0, "1f1b": 1.0, "zerobubble": work.forward, "interleaved": 0.0}[plan.schedule]
        best = max(
            m * work.total / p, m * work.longest, work.total * (work.forward if plan.schedule == "zerobubble" else 1.0)
        )
        if share and p > 1:
            best = max(best, share * work.total / (1 - (1 - share / m) ** p))
        return best

    def shardings(self, plan: Plan) -> Iterator[Plan]:
        """Ways to spread parameters over the replicas."""
        replicas = plan.dp
        yield plan
        options = [replicas] if replicas > 1 else []
        within = self.cluster.node_size // (plan.tp * plan.cp)
        if self.space.shard_within and 1 < within < replicas and replicas % within == 0:
            options.append(within)
        for fsdp in options:
            if plan.ep > 1 and (fsdp % plan.ep and plan.ep % fsdp):
                continue
            for zero in self.space.zero:
                yield replace(plan, dp=replicas // fsdp, fsdp=fsdp, zero=zero)

    def expand(self, plan: Plan) -> None:
        """Tries every sharding of a group."""
        for candidate in self.shardings(plan):
            models = self.models(candidate)
            options = all_cuts(len(self.graph.segments), candidate.stages, self.space.all_cuts)
            if options is None:
                options = iter([self.balanced_cuts(models, candidate)])
            for cuts in options:
                self.evaluate(models, replace(candidate, cuts=cuts))

    def balanced_cuts(self, models: list[Model], plan: Plan) -> tuple[int, ...]:
        if not self.cluster.is_uniform or plan.stages == 1:
            return balanced(models, plan)
        key = (plan.stages, plan.recompute, *(models[0].times(c, 0, plan.recompute).total for c in self.classes))
        if key not in self.cuts:
            self.cuts[key] = balanced(models, plan)
        return self.cuts[key]

    def evaluate(self, models: list[Model], plan: Plan) -> None:
        """Estimates one complete plan and keeps it if it is good."""
        if len(self.kept) >= self.top and not self.space.all_cuts:
            late = 0.0 if plan.schedule == "zerobubble" else 1.0
            least = max(
                least_seconds(stage_times(model, plan), ranks=plan.pp, microbatches=plan.microbatches, late=late)
                for model in models
            )
            if least >= self.threshold():
                return
        placed = [place(model, plan) for model in models]
        worst = max(
            (
                Shortfall(parts.total - limit, plan, parts, rank, model.devices[rank].name)
                for model, where in zip(models, placed, strict=True)
                for rank, (parts, limit) in enumerate(zip(where.memory, limits(model), strict=True))
            ),
            key=lambda found: found.excess,
        )
        if worst.excess > 0:
            if self.smallest is None or worst.excess < self.smallest.excess:
                self.smallest = worst
            self.refuse("needs more memory than a device has", plan.spec())
            if not (self.space.mixed and plan.recompute == "none"):
                return
            found = mixed_recompute(models, plan)
            if found is None:
                return
            plan, placed = found, [place(model, found) for model in models]
        self.tried += 1
        self.keep(finish(list(zip(models, placed, strict=True)), plan))

    def keep(self, found: Estimate) -> None:
        """Adds an estimate to the best and to the front."""
        seconds = found.step_time_s
        if seconds < self.threshold():
            item = (-seconds, self.tried, found)
            if len(self.kept) < self.top:
                heapq.heappush(self.kept, item)
            else:
                heapq.heapreplace(self.kept, item)
        if any(dominates(other, found) for other in self.front):
            return
        self.front = [other for other in self.front if not dominates(found, other)] + [found]

    def run(self) -> None:
        branches = []
        for number, (bound, plan) in enumerate(self.branches()):
            branches.append((bound, number, plan))
        self.groups = len(branches)
        branches.sort()
        spare: dict[tuple[int, str], Plan] = {}
        for position, (bound, _, plan) in enumerate(branches):
            if bound >= self.threshold():
                # What is left is slower; a few of it, one for each pipeline length and recompute choice, may need less
                # memory and so belong to the front.
                for _, _, other in branches[position:]:
                    spare.setdefault((other.pp, other.recompute), other)
                break
            self.expand(plan)
        for plan in list(spare.values())[:24]:
            self.expand(plan)


def _names(devices: tuple[Device, ...]) -> tuple[str, ...]:
    return tuple(device.name for device in devices)


def _text(d: Degrees) -> str:
    return f"tp={d.tp},cp={d.cp},pp={d.pp},ep={d.ep}"


def search(
    graph: Graph,
    cluster: Cluster,
    *,
    batch: int | None = None,
    precision: str | None = None,
    top: int = 5,
    space: Space | None = None,
    software: Software | None = None,
    calibration: Calibration | None = None,
) -> SearchResult:
    """The `top` fastest plans that fit, the Pareto front, and why everything else was refused.

    `batch` is the global batch in samples (by default eight for each device); `precision` is fp32 on CPUs and bf16
    elsewhere unless it is given.

    Raises:
        PlanError: no plan fits, or none is legal.
        HardwareError: a figure of the cluster that every plan needs is not known.
    """
    began = time.perf_counter()
    if batch is not None and batch < 1:
        raise PlanError(f"batch={batch} must be at least 1")
    if top < 1:
        raise PlanError(f"top={top} must be at least 1")
    for group in cluster.groups:
        if not group.device.trains:
            raise HardwareError(f"{group.device.name} runs compiled inference graphs only and cannot train")
    calibration = calibration or load_calibration()
    category = cluster.groups[0].device.category
    run = _Search(
        graph=graph,
        cluster=cluster,
        batch=batch or 8 * cluster.devices,
        precision=precision or ("fp32" if category == "cpu" else "bf16"),
        space=space or Space(),
        software=software or default_software(cluster, calibration),
        calibration=calibration,
        top=top,
    )
    run.run()
    refused = tuple(Refusal(r, n, run.examples[r]) for r, n in run.refused.most_common())
    if not run.kept:
        raise _nothing(run)
    plans = tuple(item[2] for item in sorted(run.kept, key=lambda item: (-item[0], item[1])))
    front = tuple(sorted(run.front, key=lambda found: found.step_time_s))
    return SearchResult(plans, front, refused, run.groups, run.tried, time.perf_counter() - began)


def _nothing(run: _Search) -> PlanError:
    """The error when no plan fits: the smallest shortfall, its parts, and what would help."""
    if run.smallest is None:
        why = "; ".join(f"{run.examples[reason]}: {reason}" for reason, _ in run.refused.most_common(3))
        return PlanError(
            f"no plan is legal on {run.cluster.name} for a batch of {run.batch}: {why or 'nothing to try'}",
            hint="change --batch to a multiple of more device counts, or the number of devices",
        )
    return shortfall_error(run.smallest, run.cluster)
