"""What a pass over the graph is told, and what it found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import fx

from plait.run.shard.cost import Tally
from plait.run.shard.operation import Placements, Step
from plait.run.shard.placement import Placement, Sharded
from plait.run.shard.pull import early_sums, worthwhile_pulls

if TYPE_CHECKING:
    from plait.run.shard.dataflow import Dataflow

__all__ = ["Choice", "Pass"]


@dataclass
class Pass:
    """What one pass found."""

    choice: Choice
    stored: dict[fx.Node, Sharded]
    placed: dict[fx.Node, Placements] = field(default_factory=dict)
    steps: dict[fx.Node, Step] = field(default_factory=dict)
    origins: dict[fx.Node, frozenset[fx.Node]] = field(default_factory=dict)
    begun: set[fx.Node] = field(default_factory=set)
    """Sources at which sharding begins."""
    split: set[fx.Node] = field(default_factory=set)
    """Sources that run on a slice of their weight."""
    reasons: dict[fx.Node, str] = field(default_factory=dict)
    wishes: dict[fx.Node, list[Sharded]] = field(default_factory=dict)
    """Splits that refusing operators asked of a source."""
    votes: dict[fx.Node, dict[Placement, int]] = field(default_factory=dict)
    refusals: dict[fx.Node, str] = field(default_factory=dict)
    """Operators that need whole operands though some arrive sharded, and why."""
    spoiled: set[fx.Node] = field(default_factory=set)
    """Pulled nodes that could not be as they were wanted, or have another reader now."""
    broken: set[fx.Node] = field(default_factory=set)
    """In-place operators whose operand would have to be converted first."""
    tally: Tally = field(default_factory=Tally)


@dataclass
class Choice:
    """What a pass is told; revised by what it finds."""

    banned: frozenset[fx.Node] = frozenset()
    patterns: dict[fx.Node, Sharded] = field(default_factory=dict)
    tried: dict[fx.Node, list[Sharded]] = field(default_factory=dict)
    waiting: dict[fx.Node, list[Sharded]] = field(default_factory=dict)
    stored: dict[fx.Node, Sharded] = field(default_factory=dict)
    pulled: dict[fx.Node, Placement] = field(default_factory=dict)
    """Nodes that run as their readers want their value, so that a conversion moves above them."""
    unpulled: set[fx.Node] = field(default_factory=set)
    summed: set[fx.Node] = field(default_factory=set)
    """Parts of sums that are summed up at once, because they would be summed piece by piece later."""
    whole: set[fx.Node] = field(default_factory=set)
    """Nodes that must not be split: they share memory with something written in place."""

    def revise(self, result: Pass, graph: Dataflow) -> bool:
        """Take up what a pass asked for; whether anything changed."""
        changed = False
        for node in sorted(result.broken, key=lambda n: n.name):
            if not graph.make_functional(node):
                self.whole |= graph.sharing_memory(node)
            changed = True
        for source, wishes in result.wishes.items():
            # The newest wishes first; older ones that were not taken up wait for their turn.
            tried, waiting = self.tried.setdefault(source, []), self.waiting.get(source, [])
            fresh = [w for w in dict.fromkeys([*wishes, *waiting]) if w not in tried]
            if fresh:
                self.patterns[source] = fresh[0]
                tried.append(fresh[0])
                self.waiting[source] = fresh[1:]
                changed = True
        stored = {}
        for node, votes in result.votes.items():
            best = max(votes, key=lambda p: (votes[p], isinstance(p, Sharded)))
            if isinstance(best, Sharded):
                stored.update(dict.fromkeys(graph.tied(node), best))
        if stored != self.stored:
            self.stored = stored
            changed = True
        for node in result.spoiled:
            self.pulled.pop(node)
            self.unpulled.add(node)
            changed = True
        if not changed:
            early = early_sums(graph, result) - self.summed
            self.summed |= early
            changed = bool(early)
        if not changed:
            pulls = {n: p for n, p in worthwhile_pulls(graph, result).items() if n not in self.unpulled}
            self.pulled |= pulls
            changed = bool(pulls)
        return changed
