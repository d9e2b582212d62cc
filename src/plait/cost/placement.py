"""A model cut into stages: parameters and memory of each pipeline rank."""

from __future__ import annotations

import math
from dataclasses import dataclass

from plait.cost.memory import rank_memory
from plait.cost.model import Model
from plait.cost.partition import stage_bounds
from plait.schema.estimate import MemoryParts
from plait.schema.graph import Graph
from plait.schema.plan import Plan

__all__ = ["USABLE", "Placed", "limits", "place"]

USABLE = 0.94  # of stated memory: drivers, contexts and the allocator hold 6 to 10 % (data/README.md, traps)


@dataclass(frozen=True, slots=True)
class Placed:
    """A model cut into stages: what each pipeline rank holds."""

    bounds: list[tuple[int, int]]
    """(first, last + 1) segment of each stage."""
    dense: list[float]
    """Parameters by pipeline rank, tied ones once, experts not counted; before fsdp."""
    expert: list[float]
    memory: tuple[MemoryParts, ...]
    frozen: list[tuple[float, float]]
    """(dense, expert) of these that are not trained."""

    def trained(self, rank: int) -> tuple[float, float]:
        """(dense, expert) parameters of `rank` that get a gradient."""
        return self.dense[rank] - self.frozen[rank][0], self.expert[rank] - self.frozen[rank][1]


def place(model: Model, plan: Plan) -> Placed:
    """Stages and memory of `plan`, which states its cuts."""
    graph = model.graph
    bounds = stage_bounds(plan.cuts, len(graph.segments))
    dense, expert = [0.0] * plan.pp, [0.0] * plan.pp
    still = [(0.0, 0.0)] * plan.pp
    if model.cache.tied is None:
        model.cache.tied = _tied(graph)
    tied = model.cache.tied
    for number, (first, last) in enumerate(bounds):
        rank = number % plan.pp
        for index in range(first, last):
            work = model.work(index)
            dense[rank] += work.dense_parameters
            expert[rank] += work.expert_parameters
            still[rank] = still[rank][0] + work.frozen_dense, still[rank][1] + work.frozen_expert
        dense[rank] -= _counted_twice(tied, graph, bounds, number, plan.pp) / plan.tp
    frozen = [(min(dense[r], still[r][0]), min(expert[r], still[r][1])) for r in range(plan.pp)]
    return Placed(bounds, dense, expert, _memory(model, plan, bounds, dense, expert), frozen)


def limits(model: Model) -> list[float]:
    """Bytes that a device of each pipeline rank may use; infinite where its memory is not known."""
    return [USABLE * d.memory_bytes if d.memory_bytes is not None else math.inf for d in model.devices]


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
