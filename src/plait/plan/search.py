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
import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from plait.cost.bubble import least_seconds
from plait.cost.calibration import Calibration, Software, load_calibration
from plait.cost.model import Cache, Model
from plait.cost.placement import USABLE, place
from plait.cost.step import default_software, finish, stage_times
from plait.errors import HardwareError, PlanError
from plait.plan.cutting import all_cuts, balanced, mixed_recompute
from plait.plan.space import Degrees, Space, degrees, facts_of, microbatch_sizes, unsupported
from plait.schema.cluster import Cluster
from plait.schema.estimate import Estimate, MemoryParts
from plait.schema.graph import Graph
from plait.schema.plan import Plan
from plait.units import gib

__all__ = ["Refusal", "SearchResult", "search"]


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
    smallest: tuple[float, Plan, MemoryParts, int] | None = None
    """Of the plans that do not fit, the one with the least excess: (excess, plan, parts, rank)."""
    tried: int = 0
    groups: int = 0
    cuts: dict[tuple[Any, ...], tuple[int, ...]] = field(default_factory=dict)
    classes: dict[int, int] = field(default_factory=dict)
    """Segments by class (index of the first of its structure)."""

    def refuse(self, reason: str, example: str) -> None:
        self.refused[reason] += 1
        self.examples.setdefault(reason, example)

    def model(self, plan: Plan) -> Model:
        return Model(self.graph, self.cluster, plan, self.batch, self.software, self.calibration, self.cache)

    def threshold(self) -> float:
        """Step time that a plan must beat to be kept."""
        return -self.kept[0][0] if len(self.kept) >= self.top else math.inf

    def branches(self) -> Iterator[tuple[float, Plan]]:
        """(lower bound, plan without sharding and cuts) of every legal group."""
        facts = facts_of(self.graph)
        self.classes = dict(Counter(segment.equals for segment in self.graph.segments))
        works: dict[tuple[Any, ...], tuple[float, float, float]] = {}
        for d, reason in degrees(facts, self.cluster, self.batch, self.space):
            if reason:
                self.refuse(reason, _text(d))
                continue
            samples = self.batch // d.replicas
            for size in microbatch_sizes(samples, d.pp, self.space):
                m = samples // size
                for schedule, chunks in self.schedules(d, m, facts.segments):
                    for recompute in self.space.recompute:
                        for sequence in self.space.sequence_parallel if d.tp > 1 else ("no",):
                            values: dict[str, Any] = {
                                "dp": d.replicas, "tp": d.tp, "cp": d.cp, "pp": d.pp, "ep": d.ep, "microbatches": m,
                                "schedule": schedule, "interleave": chunks, "recompute": recompute,
                                "precision": self.precision, "sequence_parallel": sequence, "zero": 1,
                            }  # fmt: skip
                            plan = Plan(**values)
                            if self.space.executable and (reasons := unsupported(plan)):
                                self.refuse(reasons[0].partition(":")[0] + " cannot be executed yet", plan.spec())
                                continue
                            key = (d.tp, d.cp, d.ep, size, recompute, sequence, d.devices // max(1, d.replicas * d.pp))
                            if key not in works:
                                works[key] = self.work_of(plan)
                            yield self.bound(plan, *works[key]), plan

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

    def work_of(self, plan: Plan) -> tuple[float, float, float]:
        """(seconds of all segments, of the longest, least share of the forward) for one microbatch.

        dp and fsdp aside, on the fastest device.
        """
        model = self.model(plan)
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
        return total, longest, share

    def bound(self, plan: Plan, total: float, longest: float, forward: float) -> float:
        """A step time that no sharding and no cuts of `plan` can beat."""
        m, p = plan.microbatches, plan.pp
        share = {"gpipe": 1.0, "1f1b": 1.0, "zerobubble": forward, "interleaved": 0.0}[plan.schedule]
        best = max(m * total / p, m * longest, total * (forward if plan.schedule == "zerobubble" else 1.0))
        if share and p > 1:
            best = max(best, share * total / (1 - (1 - share / m) ** p))
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
            model = self.model(candidate)
            options = all_cuts(len(self.graph.segments), candidate.stages, self.space.all_cuts)
            if options is None:
                options = iter([self.balanced_cuts(model, candidate)])
            for cuts in options:
                self.evaluate(model, replace(candidate, cuts=cuts))

    def balanced_cuts(self, model: Model, plan: Plan) -> tuple[int, ...]:
        if not self.cluster.is_uniform or plan.stages == 1:
            return balanced(model, plan)
        key = (plan.stages, plan.recompute, *(model.times(c, 0, plan.recompute).total for c in self.classes))
        if key not in self.cuts:
            self.cuts[key] = balanced(model, plan)
        return self.cuts[key]

    def limits(self, model: Model) -> list[float]:
        return [USABLE * d.memory_bytes if d.memory_bytes is not None else math.inf for d in model.devices]

    def evaluate(self, model: Model, plan: Plan) -> None:
        """Estimates one complete plan and keeps it if it is good."""
        if len(self.kept) >= self.top and not self.space.all_cuts:
            late = 0.0 if plan.schedule == "zerobubble" else 1.0
            least = least_seconds(stage_times(model, plan), ranks=plan.pp, microbatches=plan.microbatches, late=late)
            if least >= self.threshold():
                return
        limits = self.limits(model)
        placed = place(model, plan)
        excess = [parts.total - limit for parts, limit in zip(placed.memory, limits, strict=True)]
        worst = max(range(plan.pp), key=excess.__getitem__)
        if excess[worst] > 0:
            if self.smallest is None or excess[worst] < self.smallest[0]:
                self.smallest = (excess[worst], plan, placed.memory[worst], worst)
            self.refuse("needs more memory than a device has", plan.spec())
            if not (self.space.mixed and plan.recompute == "none"):
                return
            found = mixed_recompute(model, plan, limits)
            if found is None:
                return
            plan, placed = found, place(model, found)
        self.tried += 1
        self.keep(finish(model, plan, placed))

    def keep(self, found: Estimate) -> None:
        """Adds an estimate to the best and to the front."""
        seconds = found.step_time_s
        if seconds < self.threshold():
            item = (-seconds, self.tried, found)
            if len(self.kept) < self.top:
                heapq.heappush(self.kept, item)
            else:
                heapq.heapreplace(self.kept, item)
        if any(_dominates(other, found) for other in self.front):
            return
        self.front = [other for other in self.front if not _dominates(found, other)] + [found]

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


def _dominates(a: Estimate, b: Estimate) -> bool:
    """Whether `a` is at least as good as `b` in time, memory and dollars (equal counts: the first one found stays)."""
    if a.step_time_s > b.step_time_s or a.peak_memory > b.peak_memory:
        return False
    return a.usd_per_step is None or b.usd_per_step is None or a.usd_per_step <= b.usd_per_step


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
    excess, plan, parts, rank = run.smallest
    limit = parts.total - excess
    shown = ", ".join(
        f"{name} {gib(value):.1f}" for name, value in parts.to_dict().items() if value > 0.005 * parts.total
    )
    factor = parts.total / limit
    return PlanError(
        f"no plan fits: the smallest needs {gib(parts.total):.1f} GiB on pipeline rank {rank}, "
        f"each device of {run.cluster.name} may use {gib(limit):.1f} GiB ({gib(excess):.1f} GiB short, {plan.spec()})\n\n"
        f"  in GiB: {shown}",
        hint=f"take devices with {math.ceil(factor * 10) / 10:g} times the memory, about "
        f"{math.ceil(run.cluster.devices * factor)} devices of this kind, a smaller batch, or a smaller model",
    )
