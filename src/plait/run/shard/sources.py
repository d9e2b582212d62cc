"""The operators at which sharding can begin, and which of them look alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import fx

from plait.run.shard.operation import Op, packet_of, shape_of, tensor_operands
from plait.run.shard.rules.contraction import letters_of

if TYPE_CHECKING:
    from plait.run.shard.dataflow import Dataflow

__all__ = ["Source", "classes_of", "sources_of"]

_DEPTH = 4  # readers of readers that count when two sources are compared: past a view, a transpose and a rotation


@dataclass(frozen=True, slots=True)
class Source:
    """A product with a parameter, or a look-up in a table."""

    node: fx.Node
    weight: fx.Node

    def why_whole(self, tp: int) -> str:
        """A reason, when no operator refused it."""
        shape = shape_of(self.weight)
        if all(size % tp for size in shape):
            return f"none of its sizes {list(shape)} divides by {tp}"
        return "splitting it would send more than it saves"


def weight_of(node: fx.Node, derived: dict[fx.Node, Any] | set[fx.Node]) -> fx.Node | None:
    """The one operand of a source that is made of parameters only; None if the node is no source."""
    if node.op != "call_function" or node in derived:
        return None
    packet = packet_of(node)
    if packet == "embedding":
        table = node.args[0]
        return table if isinstance(table, fx.Node) and table in derived else None
    if not (packet.startswith("conv") or letters_of(Op(node, 1, {}))):
        return None
    others = [n for n in tensor_operands(node) if n not in derived]
    name = "weight" if "weight" in Op(node, 1, {}).args else None
    if name:
        weight = Op(node, 1, {})[name]
        return weight if isinstance(weight, fx.Node) and weight in derived and others else None
    letters = letters_of(Op(node, 1, {}))
    assert letters is not None
    found = [n for n, _ in letters.operands if n in derived]
    return found[0] if len(found) == 1 and others else None


def sources_of(graph: Dataflow) -> list[Source]:
    """All of them, in graph order."""
    return [Source(node, weight) for node, weight in graph.sources.items()]


def _signature(node: fx.Node, depth: int) -> str:
    shape = shape_of(node) if hasattr(node.meta.get("val"), "shape") else ()
    if depth == 0:
        return f"{node.target}{shape}"
    readers = sorted(_signature(user, depth - 1) for user in node.users)
    return f"{node.target}{shape}({','.join(readers)})"


def classes_of(sources: list[Source]) -> list[frozenset[fx.Node]]:
    """Sources grouped by operator, shapes and readers; a decision is made for each group as a whole."""
    groups: dict[str, list[fx.Node]] = {}
    for source in sources:
        # A value with very many readers would make the text explode: depth 1 is enough to tell those apart.
        depth = _DEPTH if len(source.node.users) < 8 else 1
        groups.setdefault(f"{shape_of(source.weight)}{_signature(source.node, depth)}", []).append(source.node)
    return [frozenset(nodes) for nodes in groups.values()]
