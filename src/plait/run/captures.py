"""One model captured at several microbatch sizes, run by the same units on the same parameters.

A capture with an open batch dimension serves every size from two up; one with a fixed size, or of a single sample
(sizes of one are special to torch), serves that size only. The last batch of an epoch, or one that does not divide,
then brings a second capture, which is cut like the first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from plait.capture.program import Program
from plait.capture.trace import trace
from plait.errors import CaptureError, PlanError
from plait.run.batchnorm import synchronise_batch_norm
from plait.run.layout import Layout
from plait.run.precision import leave_to_autocast
from plait.run.stages import Border, StageGraph, borders, stage_bounds, stage_graph
from plait.run.world import World
from plait.schema import Graph, Plan

if TYPE_CHECKING:
    from plait.run.apply import Applied

__all__ = ["Capture", "cut", "prepare", "unit_groups"]


BLOCK_SHARE = 0.25
"""Of the model's parameters, the most that a unit of several segments may hold."""


SMALL_SHARE = 0.02
"""Segments with less of the parameters than this (a norm, a small table) join their neighbour."""


@dataclass
class Capture:
    """A program cut for this process under the plan."""

    program: Program
    module: fx.GraphModule
    """The whole graph, lowered to this process's share under tensor parallelism."""
    layouts: dict[str, Layout]
    """Shares of the parameters that tensor parallelism splits."""
    bounds: list[tuple[int, int]]
    """(first segment, end) of every stage."""
    groups: list[list[tuple[int, int]]]
    """Each stage's units as ranges of segments."""
    edges: list[list[Border]]
    """What crosses in front of each stage (and after the last)."""
    stages: dict[int, StageGraph]
    """This process's."""


def cut(program: Program, plan: Plan, world: World, like: Capture | None = None) -> Capture:
    """Lower, cut into stages and units, rewrite; the way `like` was cut where the graphs match."""
    assert program.graph is not None
    matches = like is not None and _mark_like(program.module.graph, like.program.module.graph)
    module: fx.GraphModule = program.module
    layouts: dict[str, Layout] = {}
    if plan.tp > 1:
        from plait.run.shard import decide, lower

        decisions = decide(module, program.placeholders, plan.tp)
        group = world.group("tp")
        assert group is not None
        module, by_node = lower(module, decisions, program.placeholders, plan.tp, world.index("tp"), group)
        layouts = {program.placeholders[node].name: layout for node, layout in by_node.items()}
    if like is not None and matches:
        bounds, groups = like.bounds, like.groups
    else:
        bounds = stage_bounds(program.graph, plan)
        groups = [unit_groups(program.graph, bound, plan) for bound in bounds]
    edges = [borders(module, first) if first else [] for first, _ in bounds] + [[]]
    _check_borders(edges)
    synchronise, precision = synchronise_batch_norm(world.samples), leave_to_autocast(plan)

    def rewrite(node: fx.Node) -> None:
        synchronise(node)
        precision(node)
        if plan.recompute_of(node.meta.get("segment", -1)) == "selective":
            _sum_apart(node)

    stages = {
        index: stage_graph(
            module,
            program.placeholders,
            bounds[index],
            groups[index],
            is_last=index == plan.stages - 1,
            rewrite=rewrite,
        )
        for index in range(world.index("pp"), plan.stages, plan.pp)
    }
    return Capture(program, module, layouts, bounds, groups, edges, stages)


def _sum_apart(node: fx.Node) -> None:
    """Selective recomputation keeps what a product gave: the group's sum of it goes elsewhere, not into the same memory."""
    if node.op == "call_function" and getattr(node.target, "__name__", "") == "reduce" and len(node.args) == 3:
        node.args = (*node.args[:2], False)


def unit_groups(graph: Graph, bounds: tuple[int, int], plan: Plan) -> list[tuple[int, int]]:
    """A stage's segments as units: one in all, or one a block where FSDP or recomputation works block by block.

    A block is a run of segments of one and the same user module (the halves of a layer) and what is small beside it, as
    long as it holds at most BLOCK_SHARE of the parameters: every unit costs messages of its own.
    """
    first, end = bounds
    choices = [plan.recompute_of(i) for i in range(first, end)]
    if plan.fsdp == 1 and set(choices) == {"none"}:
        return [bounds]
    groups: list[tuple[int, int]] = []
    sizes = {spec.name: spec.nbytes for spec in graph.parameters}
    limit = BLOCK_SHARE * sum(sizes.values())
    for i in range(first, end):
        if (
            groups
            and plan.recompute_of(i) == plan.recompute_of(groups[-1][0])
            and _belongs(graph, groups[-1], i, sizes, limit)
        ):
            groups[-1] = (groups[-1][0], i + 1)
        else:
            groups.append((i, i + 1))
    return groups


def _belongs(graph: Graph, group: tuple[int, int], i: int, sizes: dict[str, int], limit: float) -> bool:
    """Whether segment i joins the unit before it."""
    segment = graph.segments[i]
    if not segment.parameters:
        return True
    before = {name for j in range(*group) for name in graph.segments[j].parameters}
    here = set(segment.parameters)
    if sum(sizes[name] for name in before | here) > limit:
        return False
    small = min(sum(sizes[name] for name in part) for part in (before, here)) < SMALL_SHARE * sum(sizes.values())
    return small or segment.name == graph.segments[i - 1].name


def _check_borders(edges: list[list[Border]]) -> None:
    """A receiver must know shapes beforehand.

    Raises:
        PlanError: a tensor whose size depends on data crosses between stages.
    """
    for border in (b for edge in edges for b in edge):
        sizes: list[Any] = list(border.value.shape)
        free = [symbol for size in sizes if isinstance(size, torch.SymInt) for symbol in size.node.expr.free_symbols]
        if any(str(symbol).startswith("u") for symbol in free):
            raise PlanError(
                f"plan: {border.name}, whose size depends on data, would cross between pipeline stages",
                hint="use pp=1, or other cuts in a plan file",
            )


def _operators(graph: fx.Graph) -> list[fx.Node]:
    """Nodes that make tensors: a capture with an open batch has others besides, which compute sizes."""
    return [n for n in graph.nodes if n.op == "call_function" and n.meta.get("specs")]


def _mark_like(graph: fx.Graph, other: fx.Graph) -> bool:
    """Take over the other graph's segments, operator by operator, if both have the same operators in the same order."""
    mine, theirs = _operators(graph), _operators(other)
    if [n.target for n in mine] != [n.target for n in theirs]:
        return False
    segment_of: dict[fx.Node, int] = {a: b.meta["segment"] for a, b in zip(mine, theirs, strict=True)}
    last = 0
    for node in graph.nodes:
        if node in segment_of:
            node.meta["segment"] = segment_of[node]
            last = max(last, segment_of[node])
        elif node.meta.get("segment", -1) >= 0:
            node.meta["segment"] = last
    return True


def prepare(applied: Applied, samples: int) -> Capture:
    """The capture for microbatches of `samples`, made if there is none yet.

    Raises:
        PlanError: the model cannot be captured at this size, or differs there too much from how it was cut.
    """
    first = applied.captures[0]
    if samples in applied.capture_of:
        return applied.captures[applied.capture_of[samples]]
    index = next((i for i, c in enumerate(applied.captures) if c.program.accepts(samples)), None)
    if index is None:
        try:
            program = trace(first.program.job, module=applied.module, batch=samples, train=first.program.train)
            capture = cut(program, applied.plan, applied.world, like=first)
        except CaptureError as problem:
            raise _refused(first.program, samples, problem.message) from None
        _join(applied, capture, samples)
        index = len(applied.captures) - 1
    applied.capture_of[samples] = index
    for stage in applied.stages.values():
        stage.use(samples, index)
    return applied.captures[index]


def _refused(program: Program, samples: int, reason: str) -> PlanError:
    return PlanError(
        f"plan: this batch has microbatches of {samples} and of {program.batch} samples, and {reason}",
        hint="use a batch that dp x fsdp x microbatches divides",
    )


def _join(applied: Applied, capture: Capture, samples: int) -> None:
    first = applied.captures[0]
    if capture.program.has_loss != first.program.has_loss:
        raise _refused(first.program, samples, "the loss can be captured for one of them only")
    if any(first.layouts.get(name) != layout for name, layout in capture.layouts.items()):
        raise _refused(first.program, samples, "tensor parallelism would split the parameters in another way")
    for index, graph in capture.stages.items():
        ours = first.stages[index]
        same = len(graph.units) == len(ours.units) and all(
            set(_stored(a)) <= set(_stored(b))
            for a, b in zip([graph.prelude, *graph.units], [ours.prelude, *ours.units], strict=False)
        )
        if not same:
            raise _refused(first.program, samples, "the model's operators differ between them")
    for index, graph in capture.stages.items():
        for unit, (attribute, _, name) in applied.stages[index].add(graph):
            unit.register_buffer(attribute, capture.program.constants[name].to(applied.world.device))
    applied.captures.append(capture)


def _stored(graph: Any) -> list[tuple[str, str]]:
    return [(kind, name) for kind, name in graph.owned if kind != "constant"]
