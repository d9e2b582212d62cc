"""Decide how every value of a captured graph is placed on the ranks of a tensor-parallel group.

By dataflow alone, without names:

    1. In graph order, a matmul of a whole value with a parameter is split by columns, and one whose summed dim
       arrives sharded by rows; rules (`rules/`) carry the sharded dim through everything between.
    2. Where an operator needs another split (heads; each part of a fused projection), the matmul it came from is
       asked for that split and the pass repeats. Where it can't be had, the value is gathered.
    3. Classes of matmuls that look alike are made whole, one class after the other, where that is cheaper (`cost.py`).

The result depends on the graph and the size of the group only, so all ranks decide alike.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from plait.run.shard.choice import Choice, Pass
from plait.run.shard.propagate import Propagation
from plait.run.shard.sources import classes_of, sources_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import fx

    from plait.capture.program import Placeholder
    from plait.run.shard.operation import Placements, Step
    from plait.run.shard.placement import Sharded

__all__ = ["Decisions", "WholeMatmul", "decide"]

_MOST_PASSES = 40


@dataclass(frozen=True, slots=True)
class WholeMatmul:
    """A product that every rank computes in full, and why."""

    node: str
    parameter: str
    """The user's name of its weight."""
    reason: str


@dataclass(frozen=True, slots=True)
class Collective:
    """One collective of forward or backward."""

    kind: str
    """all_reduce or all_gather."""
    node: str
    """The node at which it happens."""
    elements: float
    """Of the whole value."""
    backward: bool


@dataclass(frozen=True)
class Decisions:
    """Placements for one graph and group size; the same on every rank."""

    tp: int
    steps: dict[str, Step]
    """By node name: how the operator runs on local values."""
    placements: dict[str, Placements]
    """By node name."""
    stored: dict[str, Sharded]
    """By placeholder name: the parameters and buffers of which each rank holds a slice."""
    whole: tuple[WholeMatmul, ...]
    collectives: tuple[Collective, ...]
    gradients: frozenset[str] = field(default_factory=frozenset)
    """Names of the nodes through which gradients flow."""
    mutated: frozenset[str] = field(default_factory=frozenset)
    """Names of the nodes whose memory is written to in place."""
    functional: dict[str, Any] = field(default_factory=dict)
    """In-place operators that have to write to new memory: node name to the operator that does."""
    refusals: dict[str, str] = field(default_factory=dict)
    """Node name to the reason why it got whole operands though some arrived sharded."""
    cost: float = 0.0

    def explain(self) -> str:
        """What is sharded and what is not, a line each."""
        lines = [f"{name}: {placement!r}" for name, placement in self.stored.items()]
        lines += [f"{each.parameter} stays whole: {each.reason}" for each in self.whole]
        return "\n".join(lines)


def decide(module: fx.GraphModule, placeholders: Mapping[str, Placeholder], tp: int) -> Decisions:
    """Placements for all values of a flat training-level graph.

    `node.meta["val"]` must hold fake tensors. Deterministic, and independent of the rank.
    """
    graph = Propagation(module, placeholders, tp)
    choice = Choice()
    best = _settle(graph, choice)
    classes = classes_of(sources_of(graph))
    unchanged, position = 0, 0
    while classes and unchanged < len(classes):
        group = classes[position % len(classes)]
        position += 1
        unchanged += 1
        if not group & (best.begun | choice.banned):
            continue  # sharding does not begin there: a ban would change nothing
        other = Choice(banned=choice.banned ^ group, whole=set(choice.whole), stored=dict(best.stored))
        result = _settle(graph, other)
        if result.tally.cost < best.tally.cost - 1e-9:
            choice, best, unchanged = other, result, 0
    return _record(graph, best)


def _settle(graph: Propagation, choice: Choice) -> Pass:
    """Repeat the pass until nothing asks for another split and parameters lie as their readers want."""
    result = graph.run(choice)
    for _ in range(_MOST_PASSES):
        if not choice.revise(result, graph):
            break
        result = graph.run(choice)
    return result


def _record(graph: Propagation, result: Pass) -> Decisions:
    whole = []
    for source in sources_of(graph):
        if source.node not in result.split:
            reason = graph.first_reasons.get(source.node) or source.why_whole(graph.tp)
            whole.append(WholeMatmul(source.node.name, graph.user_name(source.weight), reason))
    return Decisions(
        tp=graph.tp,
        steps={node.name: step for node, step in result.steps.items()},
        placements={node.name: placement for node, placement in result.placed.items()},
        stored={node.name: placement for node, placement in result.stored.items()},
        whole=tuple(whole),
        collectives=tuple(Collective(kind, node, n, backward) for kind, node, n, backward in result.tally.log),
        gradients=frozenset(node.name for node in graph.gradients),
        mutated=frozenset(node.name for node in graph.mutated),
        functional=dict(graph.functional),
        refusals={node.name: reason for node, reason in result.refusals.items()},
        cost=result.tally.cost,
    )
