"""Where a pipeline is cut when a plan does not say: the largest stage as small as possible."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from plait.errors import PlanError
from plait.schema import Graph

__all__ = ["balanced_cuts", "default_cuts", "stage_bounds"]


def balanced_cuts(costs: Sequence[float], stages: int) -> tuple[int, ...]:
    """First segment of stages 1, 2, ...; the maximum sum of `costs` in a stage is the least possible.

    Bisection on that maximum, each try one greedy pass: the result is exact to 1e-12 of the total.

    Raises:
        PlanError: there are fewer segments than stages.
    """
    count = len(costs)
    if stages > count:
        raise PlanError(
            f"plan: {stages} pipeline stages need at least {stages} segments, the model has {count}",
            hint="lower pp or interleave",
        )
    low, high = max(costs), sum(costs)
    best = _greedy(costs, stages, high)
    while high - low > 1e-12 * max(high, 1e-30):
        middle = (low + high) / 2
        cuts = _greedy(costs, stages, middle)
        if cuts is None:
            low = middle
        else:
            best, high = cuts, middle
        if middle in (low, high) and low >= high:
            break
    assert best is not None, "one stage for everything always fits"
    return best


def default_cuts(graph: Graph, stages: int) -> tuple[int, ...]:
    """First segments of stages 1, 2, ... of a plan that does not say: the slowest stage as fast as possible.

    By FLOP and bytes, a byte counting as five FLOP (about a machine's balance): the same on every cluster, so that a
    plan that leaves its cuts open means the same everywhere.
    """
    costs = [
        s.flops + s.backward_flops + 15.0 * sum(op.read_bytes + op.write_bytes for op in s.operators) + 1.0
        for s in graph.segments
    ]
    return balanced_cuts(costs, stages)


def _greedy(costs: Sequence[float], stages: int, limit: float) -> tuple[int, ...] | None:
    """Cuts with no stage above `limit`, each stage as full as it can be and none empty; None: impossible."""
    cuts: list[int] = []
    total = 0.0
    count = len(costs)
    for index, cost in enumerate(costs):
        must = stages - 1 - len(cuts)  # stages still to open
        full = total + cost > limit * (1 + 1e-15)
        if index and must and (full or count - index <= must):
            cuts.append(index)
            total = 0.0
        total += cost
        if total > limit * (1 + 1e-12):
            return None
    return tuple(cuts) if len(cuts) == stages - 1 else None


def stage_bounds(cuts: Sequence[int], segments: int) -> list[tuple[int, int]]:
    """(first, last + 1) of each stage.

    Raises:
        PlanError: a cut lies outside the model.
    """
    if cuts and cuts[-1] >= segments:
        raise PlanError(f"plan: the cut at segment {cuts[-1]} is outside the model, which has {segments} segments")
    edges = [0, *cuts, segments]
    return list(itertools.pairwise(edges))
