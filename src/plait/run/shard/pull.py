"""Move conversions up: an operator whose readers all want its value converted can run on a converted operand instead.

Sixteen slices of one value, each copied to sharded computation, would be sixteen all-reduces in the backward; copied
before they are cut, it is one. A bias by head computed whole and then cut costs a gather in the backward; computed
from a sharded table it costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import fx

from plait.run.shard.operation import GETITEM, Op, Step, shape_of, tensor_operands
from plait.run.shard.placement import COPIED, PARTIAL, REPLICATED, Placement, Sharded, sharded
from plait.run.shard.rules import ask

if TYPE_CHECKING:
    from plait.run.shard.choice import Pass
    from plait.run.shard.dataflow import Dataflow

__all__ = ["early_sums", "pull", "readings", "worthwhile_pulls"]


def readings(node: fx.Node, steps: Mapping[fx.Node, Step]) -> list[Placement]:
    """As what each reader wants a node's value (or the parts of it)."""
    found: list[Placement] = []
    for user in node.users:
        if user.target is GETITEM:
            found += readings(user, steps)
        elif user in steps:
            operands = tensor_operands(user)
            found += [p for n, p in zip(operands, steps[user].inputs, strict=True) if n is node]
        else:
            found.append(REPLICATED)
    return found


def pull(op: Op, wanted: Placement, gradients: Iterable[fx.Node]) -> Step | None:
    """The operator with its result as `wanted`, from one converted operand; None if it can't be."""
    known = gradients if isinstance(gradients, set) else set(gradients)
    if wanted is COPIED:
        value = op.node.meta["val"]
        many = len(value) if isinstance(value, tuple | list) else 0
        return op.step((COPIED,) * many if many else COPIED, {n: COPIED for n in op.operands if n in known})
    assert isinstance(wanted, Sharded)
    if op.node.target is torch.ops.aten.expand.default:
        source = op.operands[0]
        own = wanted.dim - (len(op.shape) - len(shape_of(source)))
        if own < 0 or shape_of(source)[own] == 1:
            return op.step(wanted, {source: COPIED}, sizes="size")
    for operand in dict.fromkeys(op.operands):
        for dim, size in enumerate(shape_of(operand)):
            for guess in {sharded(dim, (size,), op.tp), Sharded(dim, wanted.parts, wanted.unit)}:
                if not size or size % guess.period or not guess.fits(op.tp):
                    continue
                placed = dict.fromkeys(op.operands, REPLICATED) | {operand: guess}
                answer = ask(Op(op.node, op.tp, placed))
                if isinstance(answer, Step) and answer.outputs == wanted and answer.target is None:
                    return answer
    return None


def worthwhile_pulls(graph: Dataflow, result: Pass) -> dict[fx.Node, Placement]:
    """Nodes to pull in the next pass, with what their readers want."""
    pulls: dict[fx.Node, Placement] = {}
    for node, step in result.steps.items():
        if not _is_candidate(node, step, graph, result) or isinstance(result.placed[node], tuple):
            continue
        wanted = set(readings(node, result.steps))
        placement = next(iter(wanted)) if len(wanted) == 1 else None
        if isinstance(placement, Sharded):
            op = Op(node, graph.tp, dict.fromkeys(tensor_operands(node), REPLICATED))
            pulled = pull(op, placement, graph.gradients)
            if pulled is not None and _is_cheaper(graph, node, op, pulled):
                pulls[node] = placement
    # What can be computed as a slice need not be copied.
    return pulls or dict.fromkeys(_copies(graph, result), COPIED)


def _readers(node: fx.Node) -> list[fx.Node]:
    """The operators that read a node's value or a part of it."""
    return [each for user in node.users for each in (_readers(user) if user.target is GETITEM else [user])]


def _copies(graph: Dataflow, result: Pass) -> list[fx.Node]:
    """Nodes that are cheaper to run on a copied operand than to copy: whole trees of them, below one value."""
    call = result.tally.call
    costs: dict[fx.Node, float] = {}
    """Of copying at the leaves of the tree below a node that could be pulled."""
    for node in reversed(graph.nodes):
        step = result.steps.get(node)
        if step is None or not _is_candidate(node, step, graph, result):
            continue
        if sum(n in graph.gradients for n in dict.fromkeys(tensor_operands(node))) != 1:
            continue
        readers = _readers(node)
        direct = readings(node, result.steps)
        below = [r for r in readers if r in costs]
        direct = [p for p in direct if p is COPIED or isinstance(p, Sharded)]
        if not readers or len(direct) + len(below) < len(readers):
            continue
        costs[node] = sum(costs[r] for r in dict.fromkeys(below))
        costs[node] += graph.elements[node] + call if COPIED in direct else 0.0
        # A slice of a whole value gathers its gradient, half of what summing it would move.
        costs[node] += sum(graph.elements[node] / 2 + call for p in set(direct) if isinstance(p, Sharded))
    found: dict[fx.Node, None] = {}
    for node in graph.nodes:
        below = [r for r in dict.fromkeys(node.users) if r in costs and r not in found]
        if node not in graph.gradients or not below or node in found:
            continue
        paid = COPIED in readings(node, result.steps)
        if paid or sum(costs[r] for r in below) > graph.elements[node] + call:
            while below:
                each = below.pop()
                found[each] = None
                below += [r for r in _readers(each) if r in costs and r not in found]
    return list(found)


def _is_candidate(node: fx.Node, step: Step, graph: Dataflow, result: Pass) -> bool:
    if node.op != "call_function" or node not in graph.gradients or node in graph.sources or node in graph.mutated:
        return False
    if node in result.choice.pulled or node in result.choice.whole or node in graph.derived or step.target is not None:
        return False
    outputs = step.outputs if isinstance(step.outputs, tuple) else (step.outputs,)
    is_whole = all(p is REPLICATED for p in (*step.inputs, *outputs))
    return is_whole and torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ())


def _is_cheaper(graph: Dataflow, node: fx.Node, op: Op, pulled: Step) -> bool:
    """Whether the operands' conversions move less than the result's; weights can be stored as they are wanted."""
    moved = 0.0
    for operand, placement in dict(zip(op.operands, pulled.inputs, strict=True)).items():
        if operand in graph.gradients and operand not in graph.derived and placement is not REPLICATED:
            moved += graph.elements[operand]
    return moved <= graph.elements[node]


def early_sums(graph: Dataflow, result: Pass) -> set[fx.Node]:
    """Parts of a sum that cost less to sum up at once than where their pieces are read."""
    call = result.tally.call
    costs: dict[fx.Node, float] = {}
    for node in reversed(graph.nodes):
        placement = result.placed.get(node)
        if placement is not PARTIAL and not (isinstance(placement, tuple) and PARTIAL in placement):
            continue
        own = any(p is not PARTIAL for p in readings(node, result.steps)) and not isinstance(placement, tuple)
        costs[node] = graph.elements[node] + call if own else 0.0
        for user in node.users:
            if user in costs:
                # What joins several parts is paid for by all of them together.
                parts = sum(result.placed.get(n) is PARTIAL for n in dict.fromkeys(tensor_operands(user)))
                costs[node] += costs[user] / max(parts, 1)
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node in costs and result.placed[node] is PARTIAL and node not in result.choice.summed:
            above = any(n in found for n in node.all_input_nodes)
            if not above and costs[node] > 1.001 * (graph.elements[node] + call):
                found.add(node)
    return found
