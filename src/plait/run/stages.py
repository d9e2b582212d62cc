"""The flat graph cut into this process's pipeline stages, and each stage into units.

A unit is a run of segments that FSDP gathers and recomputation repeats as one. Parameters belong to units and are
passed to the unit's graph as arguments at every call, so that FSDP may swap them and a second capture (another batch
size) may share them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from plait.capture.program import Placeholder
from plait.schema import Graph, Plan

__all__ = ["Border", "StageModule", "Unit", "balanced_cuts", "borders", "build_stage", "stage_bounds"]


def balanced_cuts(graph: Graph, stages: int) -> tuple[int, ...]:
    """First segments of stages 1, 2, ... such that the slowest stage is fastest, by FLOP and bytes.

    Bytes count as five FLOP each, about a machine's balance. Dynamic programming over (segments, stages).
    """
    cost = [
        s.flops + s.backward_flops + 15.0 * sum(op.read_bytes + op.write_bytes for op in s.operators) + 1.0
        for s in graph.segments
    ]
    prefix = [0.0]
    for value in cost:
        prefix.append(prefix[-1] + value)
    count = len(cost)
    best = [prefix[i] for i in range(count + 1)]
    back: list[list[int]] = []
    for _ in range(stages - 1):
        now, origin = [float("inf")] * (count + 1), [0] * (count + 1)
        for end in range(1, count + 1):
            for cut in range(1, end):
                worst = max(best[cut], prefix[end] - prefix[cut])
                if worst < now[end]:
                    now[end], origin[end] = worst, cut
        best, back = now, [*back, origin]
    cuts, end = [], count
    for origin in reversed(back):
        end = origin[end]
        cuts.append(end)
    return tuple(reversed(cuts))


def stage_bounds(graph: Graph, plan: Plan) -> list[tuple[int, int]]:
    """(first segment, end) of every stage."""
    cuts = plan.cuts or balanced_cuts(graph, plan.stages)
    edges = [0, *cuts, len(graph.segments)]
    return list(zip(edges, edges[1:], strict=False))


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


class Unit(nn.Module):
    """Segments run as one, with their own parameters and buffers."""

    def __init__(self, graph: fx.GraphModule, values: list[str], outputs: list[str], first: int) -> None:
        super().__init__()
        object.__setattr__(self, "graph_module", graph)  # not a submodule: it owns nothing
        self.values = values
        """Names of the tensors it takes."""
        self.outputs = outputs
        self.first_segment = first
        self.slots: list[tuple[str, str, str]] = []
        """(attribute, kind, the user's name) of parameters and buffers, in the order the graph takes them."""
        self.around: Callable[..., Any] | None = None
        """Wraps the call: recomputation."""
        self.repeating = False
        """True while a recomputation runs, when buffers must not be written again."""

    def forward(self, *values: Any) -> Any:
        """The unit's outputs, a tuple."""
        if self.around is not None:
            return self.around(self.call, *values)
        return self.call(*values)

    def call(self, *values: Any) -> Any:
        """Run the graph on values and on the tensors this unit owns as they are now."""
        tensors = [getattr(self, attribute) for attribute, _, _ in self.slots]
        if self.repeating:
            tensors = [t if isinstance(t, nn.Parameter) else t.clone() for t in tensors]
        return self.graph_module.forward(*values, *tensors)


class StageModule(nn.Module):
    """One pipeline stage: `forward(*live_in, **inputs) -> live_out` (or the loss, or the outputs' tensors)."""

    def __init__(
        self, prelude: Unit, units: list[Unit], takes: list[str], gives: list[str], dtypes: list[torch.dtype | None]
    ) -> None:
        super().__init__()
        self.prelude = prelude
        self.units = nn.ModuleList(units)
        self.takes = takes
        self.gives = gives
        self._dtypes = dtypes
        self._steps = self._plan_steps(units)

    def _plan_steps(self, units: list[Unit]) -> list[tuple[Unit, list[str], list[str]]]:
        """Each unit with what may be dropped once its arguments are gathered."""
        kept = set(self.gives)
        steps: list[tuple[Unit, list[str], list[str]]] = []
        for unit in reversed(units):
            drop = [name for name in dict.fromkeys(unit.values) if name not in kept]
            kept |= set(unit.values)
            steps.append((unit, unit.outputs, drop))
        return steps[::-1]

    def forward(self, *live: torch.Tensor, **inputs: Any) -> tuple[torch.Tensor, ...]:
        """Runs prelude and units; every value is dropped after its last use."""
        known: dict[str, Any] = {**inputs, **dict(zip(self.takes, live, strict=True))}
        if self.prelude.outputs:
            with torch.no_grad():
                results = self.prelude(*[inputs[name] for name in self.prelude.values])
            known.update(zip(self.prelude.outputs, results, strict=True))
        for unit, outputs, drop in self._steps:
            arguments = [known[name] for name in unit.values]
            for name in drop:
                del known[name]
            known.update(zip(outputs, unit(*arguments), strict=True))
            del arguments
        return tuple(_as(known[name], dtype) for name, dtype in zip(self.gives, self._dtypes, strict=True))


def _as(value: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """What is sent has the captured dtype and is contiguous; the loss (dtype None) is left alone."""
    return value if dtype is None else value.to(dtype).contiguous()


def build_stage(
    module: fx.GraphModule,
    placeholders: dict[str, Placeholder],
    bounds: tuple[int, int],
    groups: list[tuple[int, int]],
    *,
    is_last: bool,
    rewrite: Callable[[fx.Node], None] | None = None,
) -> StageModule:
    """The stage of segments `bounds`, its units the segment ranges `groups`; parameters are still to be given.

    `rewrite` is applied to every node copied (precision, synchronised normalisation).
    """
    first, end = bounds
    nodes = list(module.graph.nodes)
    output = nodes[-1]
    wanted = [b.name for b in borders(module, end)] if not is_last else [n.name for n in output.args[0]]
    takes = [] if first == 0 else [b.name for b in borders(module, first)]
    parts = [[n for n in nodes if low <= _segment(n) < high] for low, high in groups]
    preludes = _needed_preludes(parts, output if is_last else None)
    prelude = _make_unit(module, placeholders, preludes, _shown(preludes, parts, output if is_last else None), -1)
    units = []
    for i, (part, (low, _)) in enumerate(zip(parts, groups, strict=True)):
        later = {p.name for other in parts[i + 1 :] for n in other for p in n.all_input_nodes} | set(wanted)
        outputs = [n for n in part if n.name in later]
        units.append(_make_unit(module, placeholders, part, outputs, low))
        if rewrite is not None:
            for node in list(units[-1].graph_module.graph.nodes):
                rewrite(node)
            units[-1].graph_module.recompile()
    by_name = {n.name: n for n in nodes}
    dtypes = [None if is_last else by_name[name].meta["val"].dtype for name in wanted]
    return StageModule(prelude, units, takes, wanted, dtypes)


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
    first: int,
) -> Unit:
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

    for node in part:
        if node.op == "get_attr":
            mapped(node)
        else:
            made[node] = graph.node_copy(node, mapped)
    graph.output(tuple(made[n] for n in outputs))
    unit = Unit(fx.GraphModule(root, graph), [n.name for n in values], [n.name for n in outputs], first)
    unit.slots = [(f"t{i}", placeholders[n.name].kind, placeholders[n.name].name) for i, n in enumerate(owned)]
    return unit


def _attribute(module: nn.Module, path: str) -> Any:
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value
