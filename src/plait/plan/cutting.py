"""Where to cut the pipeline and what to recompute, for given degrees."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from plait.cost.memory import saved_bytes
from plait.cost.model import Model
from plait.cost.placement import place
from plait.schema.plan import Plan

__all__ = ["all_cuts", "balanced", "mixed_recompute"]


def all_cuts(segments: int, stages: int, most: int) -> Iterator[tuple[int, ...]] | None:
    """Every way to cut, or None where there are more than `most`."""
    if stages == 1 or math.comb(segments - 1, stages - 1) > most:
        return None
    return itertools.combinations(range(1, segments), stages - 1)


def balanced(model: Model, plan: Plan) -> tuple[int, ...]:
    """Cuts with the smallest possible slowest stage; a stage's time is counted on the device that will run it.

    Bisection on the slowest stage with one greedy pass a try, exact to 1e-6 of it. Later stages are filled first,
    so that the first ranks, which hold most activations, get what is left.
    """
    if plan.stages == 1:
        return ()
    count, stages = len(model.graph.segments), plan.stages
    costs = [
        [model.times(i, stage % plan.pp, plan.recompute_of(i)).total for i in range(count)]
        if stage < plan.pp and not model.cluster.is_uniform
        else []
        for stage in range(stages)
    ]
    if model.cluster.is_uniform:
        row = [model.times(i, 0, plan.recompute_of(i)).total for i in range(count)]
        costs = [row] * stages
    else:
        costs = [costs[stage % plan.pp] for stage in range(stages)]
    longest = max(max(row) for row in costs)
    low = max(min(sum(row) for row in costs) / stages, 0.0)
    high = max(sum(row) for row in costs) / stages + longest
    best = _fill(costs, high)
    if best is None:  # devices of very different speed
        high = sum(max(column) for column in zip(*costs, strict=True))
        best = _fill(costs, high)
    assert best is not None, "one stage may hold everything"
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        found = _fill(costs, middle)
        if found is None:
            low = middle
        else:
            best, high = found, middle
    return best


def _fill(costs: Sequence[Sequence[float]], limit: float) -> tuple[int, ...] | None:
    """Cuts with no stage above `limit`, filled from the last stage; None: impossible."""
    stages, count = len(costs), len(costs[0])
    cuts: list[int] = []
    last = count
    for stage in range(stages - 1, -1, -1):
        total, first = 0.0, last
        while first > stage and (total + costs[stage][first - 1] <= limit or first == last):
            if total + costs[stage][first - 1] > limit * (1 + 1e-12):
                return None
            first -= 1
            total += costs[stage][first]
        if stage == 0:
            return tuple(reversed(cuts)) if first == 0 else None
        cuts.append(first)
        last = first
    return None


def mixed_recompute(model: Model, plan: Plan, limits: Sequence[float]) -> Plan | None:
    """`plan` with as little recomputed as fits, segment by segment; None: even recomputing all does not fit.

    On each rank, segments are changed in the order of bytes freed for each second added until the rank fits.
    """
    placed = place(model, plan)
    chosen: dict[int, str] = {}
    for rank, (parts, limit) in enumerate(zip(placed.memory, limits, strict=True)):
        excess = parts.total - limit
        if excess <= 0:
            continue
        own = [i for n, (a, b) in enumerate(placed.bounds) if n % plan.pp == rank for i in range(a, b)]
        in_flight = parts.activations / max(
            1.0, sum(saved_bytes(model.work(i), plan.recompute_of(i), model.software) for i in own)
        )
        options = []
        for i in own:
            for choice in ("selective", "full"):
                freed = (
                    saved_bytes(model.work(i), "none", model.software)
                    - saved_bytes(model.work(i), choice, model.software)
                ) * in_flight
                added = model.times(i, rank, choice).again
                if freed > 0:
                    options.append((-freed / max(added, 1e-12), i, choice, freed))
        got: dict[int, float] = {}
        margin = excess * 1.02 + max((model.work(i).saved for i in own), default=0.0)
        for _, i, choice, freed in sorted(options):
            if sum(got.values()) >= margin:
                break
            if freed > got.get(i, 0.0):
                got[i] = freed
                chosen[i] = choice
    if not chosen:
        return None
    found = replace(plan, recompute_segments={str(i): choice for i, choice in sorted(chosen.items())})
    fits = all(p.total <= limit for p, limit in zip(place(model, found).memory, limits, strict=True))
    return found if fits else None
