"""Where to cut the pipeline and what to recompute, for given degrees."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from plait.cost.memory import saved_bytes
from plait.cost.model import Model
from plait.cost.placement import limits, place
from plait.schema.plan import RECOMPUTE, Plan

__all__ = ["all_cuts", "balanced", "mixed_recompute"]


def all_cuts(segments: int, stages: int, most: int) -> Iterator[tuple[int, ...]] | None:
    """Every way to cut, or None where there are more than `most`."""
    if stages == 1 or math.comb(segments - 1, stages - 1) > most:
        return None
    return itertools.combinations(range(1, segments), stages - 1)


def balanced(models: Sequence[Model], plan: Plan) -> tuple[int, ...]:
    """Cuts with the smallest possible slowest stage; a stage's time is counted on the device that will run it.

    `models` are the plan's lanes; of these the slower counts. Bisection on the slowest stage with one greedy pass a try,
    exact to 1e-6 of it. Later stages are filled first, so that the first ranks, which hold most activations, get what
    is left.
    """
    if plan.stages == 1:
        return ()
    stages = plan.stages
    rows: dict[tuple[str, ...], list[float]] = {}
    costs = []
    for stage in range(stages):
        rank = stage % plan.pp
        devices = tuple(model.devices[rank].name for model in models)
        if devices not in rows:
            rows[devices] = _costs(models, plan, rank)
        costs.append(rows[devices])
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


def _costs(models: Sequence[Model], plan: Plan, rank: int) -> list[float]:
    """Seconds of each segment on a pipeline rank; identical segments are looked up once."""
    known: dict[tuple[int, str], float] = {}
    found = []
    for segment in models[0].graph.segments:
        key = (segment.equals, plan.recompute_of(segment.index))
        if key not in known:
            known[key] = max(model.times(key[0], rank, key[1]).total for model in models)
        found.append(known[key])
    return found


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


def mixed_recompute(models: Sequence[Model], plan: Plan) -> Plan | None:
    """`plan` with as little recomputed as fits, segment by segment; None: even recomputing all does not fit.

    On each rank, segments are changed in the order of bytes freed for each second added until the rank fits.
    """
    chosen: dict[int, str] = {}
    for model in models:
        for i, choice in _changes(model, plan).items():
            if RECOMPUTE.index(choice) > RECOMPUTE.index(chosen.get(i, "none")):
                chosen[i] = choice
    if not chosen:
        return None
    found = replace(plan, recompute_segments={str(i): choice for i, choice in sorted(chosen.items())})
    fits = all(
        parts.total <= limit
        for model in models
        for parts, limit in zip(place(model, found).memory, limits(model), strict=True)
    )
    return found if fits else None


def _changes(model: Model, plan: Plan) -> dict[int, str]:
    """Segments and their new recompute choices, with which one lane should fit."""
    placed = place(model, plan)
    chosen: dict[int, str] = {}
    for rank, (parts, limit) in enumerate(zip(placed.memory, limits(model), strict=True)):
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
    return chosen
