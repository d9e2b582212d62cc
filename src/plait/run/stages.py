"""The flat graph cut into this process's pipeline stages, and each stage into units.

A unit is a run of segments that FSDP gathers and recomputation repeats as one. Parameters belong to units and are
passed to the unit's graph as arguments at every call, so that FSDP may swap them and a second capture (another batch
size) may share them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import fx, nn

from plait.capture.prelude import written_by
from plait.capture.program import Placeholder
from plait.cost.partition import default_cuts
from plait.schema import Graph, Plan

__all__ = [
    "Border",
    "StageGraph",
    "StageModule",
    "Unit",
    "UnitGraph",
    "borders",
    "stage_bounds",
    "stage_graph",
]


def stage_bounds(graph: Graph, plan: Plan) -> list[tuple[int, int]]:
    """(first segment, end) of every stage."""
    cuts = plan.cuts or default_cuts(graph, plan.stages)
    edges = [0, *cuts, len(graph.segments)]
    return list(pairwise(edges))


@dataclass(frozen=True)
class Border:
    """A tensor that crosses from one stage to the next."""

    name: str
    value: torch.Tensor
    """Fake, with the batch dimension symbolic."""
    requires_grad: bool

    def shape(self, batch: int) -> tuple[int, ...]:
        """Sizes for a microbatch of `batch` samples."""
        return tuple(_at(size, batch) for size in self.value.shape)


def _at(size: Any, batch: int) -> int:
    if isinstance(size, torch.SymInt):
        expression = size.node.expr
        return int(expression.subs(dict.fromkeys(expression.free_symbols, batch)))
    return int(size)


def _segment(node: fx.Node) -> int:
    return int(node.meta.get("segment", -1))


def borders(module: fx.GraphModule, first: int) -> list[Border]:
    """What crosses in front of segment `first`: made before it, used in it or later."""
    last: dict[fx.Node, int] = {}
    for node in module.graph.nodes:
        here = 2**31 if node.op == "output" else _segment(node)
        for parent in node.all_input_nodes:
            if 0 <= _segment(parent) < first:
                last[parent] = max(last.get(parent, -1), here)
    return [
        Border(node.name, node.meta["val"], bool(node.meta.get("requires_grad")))
        for node in module.graph.nodes
        if last.get(node, -1) >= first
    ]


@dataclass
class UnitGraph:
    """What a unit computes, from one capture."""

    module: fx.GraphModule
    values: list[str]
    """Names of the tensors it takes."""
    outputs: list[str]
    owned: list[tuple[str, str]]
    """(kind, name) of the parameters, buffers and constants that it takes after the values."""
    writes: list[tuple[str, str]] = field(default_factory=list)
    """Those of them that it writes into, parameters not counted."""
    attributes: list[str] = field(default_factory=list)
    """Where its unit keeps what is owned."""
    written: list[str] = field(default_factory=list)
    """Where its unit keeps what is written."""


@dataclass
class StageGraph:
    """What a stage computes, from one capture: its prelude, and its units in order."""

    prelude: UnitGraph
    units: list[UnitGraph]
    firsts: list[int]
    """Each unit's first segment."""
    takes: list[str]
    gives: list[str]
    dtypes: list[torch.dtype | None]
    """Of what it gives; None for the loss, which is left alone."""

    def drops(self) -> list[list[str]]:
        """For each unit, what may be dropped once its arguments are gathered."""
        kept = set(self.gives)
        steps: list[list[str]] = []
        for unit in reversed(self.units):
            steps.append([name for name in dict.fromkeys(unit.values) if name not in kept])
            kept |= set(unit.values)
        return steps[::-1]


class Unit(nn.Module):
    """Segments run as one, with their own parameters and buffers."""

    def __init__(self, graph: UnitGraph, first: int) -> None:
        super().__init__()
        self.first_segment = first
        self.slots: list[tuple[str, str, str]] = []
        """(attribute, kind, the user's name) of what it owns."""
        self.graphs: list[UnitGraph] = []  # no submodules: they own nothing
        self.around: Callable[..., Any] | None = None
        """Wraps the call: recomputation."""
        self.instead: dict[str, torch.Tensor] = {}
        """Buffers to read and write instead of the own ones, by attribute: while a recomputation or an evaluation runs."""
        self.add(graph)

    def written(self) -> dict[str, torch.Tensor]:
        """Copies of the buffers that the forward writes, as they are now."""
        names = {name for graph in self.graphs for name in graph.written}
        return {name: getattr(self, name).clone() for name in names}

    def add(self, graph: UnitGraph) -> list[tuple[str, str, str]]:
        """Take one more capture's graph; returns the slots that it needs and no earlier one had."""
        known = {(kind, name): attribute for attribute, kind, name in self.slots}
        fresh = [(f"t{len(self.slots) + i}", *key) for i, key in enumerate(k for k in graph.owned if k not in known)]
        known |= {(kind, name): attribute for attribute, kind, name in fresh}
        graph.attributes = [known[key] for key in graph.owned]
        graph.written = [known[key] for key in graph.writes]
        self.slots += fresh
        self.graphs.append(graph)
        return fresh

    def forward(self, which: int, *values: Any) -> Any:
        """The outputs of its graph `which`, a tuple."""
        if self.around is not None:
            return self.around(self.call, which, *values)
        return self.call(which, *values)

    def call(self, which: int, *values: Any) -> Any:
        """Run a graph on values and on the tensors this unit owns as they are now."""
        graph = self.graphs[which]
        tensors = [self.instead[name] if name in self.instead else getattr(self, name) for name in graph.attributes]
        return graph.module.forward(*values, *tensors)


class StageModule(nn.Module):
    """One pipeline stage: `forward(*live_in, **inputs) -> live_out` (or the loss, or the outputs' tensors)."""

    def __init__(self, graph: StageGraph) -> None:
        super().__init__()
        self.prelude = Unit(graph.prelude, -1)
        self.units = nn.ModuleList(Unit(g, first) for g, first in zip(graph.units, graph.firsts, strict=True))
        self.graphs = [graph]
        self._drops = [graph.drops()]
        self._which: dict[int, int] = {}

    def add(self, graph: StageGraph) -> list[tuple[Unit, tuple[str, str, str]]]:
        """Take one more capture's graphs; returns what they need and the units do not own yet."""
        fresh = [(self.prelude, slot) for slot in self.prelude.add(graph.prelude)]
        for unit, own in zip(self.units, graph.units, strict=True):
            assert isinstance(unit, Unit)
            fresh += [(unit, slot) for slot in unit.add(own)]
        self.graphs.append(graph)
        self._drops.append(graph.drops())
        return fresh

    def use(self, samples: int, which: int) -> None:
        """Microbatches of so many samples go through graph `which` (the first where nothing was said)."""
        self._which[samples] = which

    def forward(self, *live: torch.Tensor, samples: int = 0, **inputs: Any) -> tuple[torch.Tensor, ...]:
        """Runs prelude and units on a microbatch of `samples`; every value is dropped after its last use."""
        which = self._which.get(samples, 0)
        graph = self.graphs[which]
        known: dict[str, Any] = {**inputs, **dict(zip(graph.takes, live, strict=True))}
        if graph.prelude.outputs:
            with torch.no_grad():
                results = self.prelude(which, *[inputs[name] for name in graph.prelude.values])
            known.update(zip(graph.prelude.outputs, results, strict=True))
        for unit, own, drop in zip(self.units, graph.units, self._drops[which], strict=True):
            arguments = [known[name] for name in own.values]
            for name in drop:
                del known[name]
            known.update(zip(own.outputs, unit(which, *arguments), strict=True))
            del arguments
        return tuple(_as(known[name], dtype) for name, dtype in zip(graph.gives, graph.dtypes, strict=True))


def _as(value: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """What is sent has the captured dtype and is contiguous; the loss (dtype None) is left alone."""
    return value if dtype is None else value.to(dtype).contiguous()


def stage_graph(
    module: fx.GraphModule,
    placeholders: dict[str, Placeholder],
    bounds: tuple[int, int],
    groups: list[tuple[int, int]],
    *,
    is_last: bool,
    rewrite: Callable[[fx.Node], None] | None = None,
) -> StageGraph:
    """The stage of segments `bounds`, its units the segment ranges `groups`.

    `rewrite` is applied to every node copied (precision, synchronised normalisation).
    """
    first, end = bounds
    nodes = list(module.graph.nodes)
    output = nodes[-1]
    wanted = [b.name for b in borders(module, end)] if not is_last else [n.name for n in output.args[0]]
    takes = [] if first == 0 else [b.name for b in borders(module, first)]
    parts = [[n for n in nodes if low <= _segment(n) < high and n is not output] for low, high in groups]
    preludes = _needed_preludes(parts, output if is_last else None)
    prelude = _make_unit(module, placeholders, preludes, _shown(preludes, parts, output if is_last else None))
    units = []
    for i, part in enumerate(parts):
        later = {p.name for other in parts[i + 1 :] for n in other for p in n.all_input_nodes} | set(wanted)
        outputs = [n for n in (*_overwritten(part), *part) if n.name in later]
        units.append(_make_unit(module, placeholders, part, outputs))
        if rewrite is not None:
            for node in list(units[-1].module.graph.nodes):
                rewrite(node)
            units[-1].module.recompile()
    by_name = {n.name: n for n in nodes}
    dtypes = [None if is_last else by_name[name].meta["val"].dtype for name in wanted]
    return StageGraph(prelude, units, [low for low, _ in groups], takes, wanted, dtypes)


def _overwritten(part: list[fx.Node]) -> list[fx.Node]:
    """Values from before a part that are written into in it."""
    inside = set(part)
    written = {s for n in part for argument in written_by(n) for s in argument.meta.get("storages", ())}
    outside = dict.fromkeys(p for n in part for p in n.all_input_nodes if p not in inside and _segment(p) >= 0)
    return [n for n in outside if written & n.meta.get("storages", frozenset())]


def _needed_preludes(parts: list[list[fx.Node]], output: fx.Node | None) -> list[fx.Node]:
    """Prelude nodes that the parts need, directly or not, in graph order; placeholders that are no inputs excluded."""
    needed: set[fx.Node] = set()
    stack = [p for part in parts for n in part for p in n.all_input_nodes]
    stack += list(output.all_input_nodes) if output is not None else []
    while stack:
        node = stack.pop()
        if node in needed or _segment(node) >= 0 or node.op in ("placeholder", "get_attr"):
            continue
        needed.add(node)
        stack += node.all_input_nodes
    return sorted(needed)


def _shown(preludes: list[fx.Node], parts: list[list[fx.Node]], output: fx.Node | None) -> list[fx.Node]:
    """What of the prelude the units (or the output) read."""
    used = {p for part in parts for n in part for p in n.all_input_nodes}
    used |= set(output.all_input_nodes) if output is not None else set()
    return [n for n in preludes if n in used]


def _make_unit(
    module: fx.GraphModule,
    placeholders: dict[str, Placeholder],
    part: list[fx.Node],
    outputs: list[fx.Node],
) -> UnitGraph:
    graph = fx.Graph()
    inside = set(part)
    outside = dict.fromkeys(p for n in part for p in n.all_input_nodes if p not in inside and p.op != "get_attr")
    outside |= dict.fromkeys(n for n in outputs if n not in inside)
    owned = [n for n in outside if n.op == "placeholder" and placeholders[n.name].kind != "input"]
    values = [n for n in outside if n not in owned]
    made: dict[fx.Node, fx.Node] = {}
    for node in (*values, *owned):
        made[node] = graph.placeholder(node.name)
        made[node].meta = dict(node.meta)
    root = nn.Module()

    def mapped(node: fx.Node) -> fx.Node:
        if node not in made and node.op == "get_attr":
            name = str(node.target).replace(".", "_")
            setattr(root, name, _attribute(module, str(node.target)))
            made[node] = graph.get_attr(name)
        return made[node]

    # What arrives and is written into here is copied first and, where it is needed later, given on as it is then: the
    # sender's memory, a leaf that autograd waits at, and a recomputation from the same values need it as it came.
    written = {s for n in part for argument in written_by(n) for s in argument.meta.get("storages", ())}
    for node in values:
        if written & node.meta.get("storages", frozenset()):
            made[node] = graph.call_function(torch.ops.aten.clone.default, (made[node],))
            made[node].meta = dict(node.meta)
    for node in part:
        if node.op == "get_attr":
            mapped(node)
        else:
            made[node] = graph.node_copy(node, mapped)
    graph.output(tuple(made[n] for n in outputs))
    keys = {n: (placeholders[n.name].kind, placeholders[n.name].name) for n in owned}
    return UnitGraph(
        fx.GraphModule(root, graph),
        [n.name for n in values],
        [n.name for n in outputs],
        list(keys.values()),
        [key for n, key in keys.items() if key[0] != "parameter" and written & n.meta.get("storages", frozenset())],
    )


def _attribute(module: nn.Module, path: str) -> Any:
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value
