"""Which split of a parameter makes a value computed from it arrive as an operator wants it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from plait.run.shard.operation import GETITEM, Op, Placements, Step, has_tensor, shape_of
from plait.run.shard.placement import REPLICATED, Placement, Sharded, sharded
from plait.run.shard.rules import ask

if TYPE_CHECKING:
    from plait.run.shard.dataflow import Dataflow

__all__ = ["Weights"]

_LONGEST_CHAIN = 64  # operators between a parameter and its reader; more are no preparation of a weight


class Weights:
    """Answers by trying: each dim of each parameter is split, and the rules carry that to the value."""

    def __init__(self, graph: Dataflow) -> None:
        self.graph = graph
        self._pushed: dict[tuple[fx.Node, Placement], dict[fx.Node, Sharded] | None] = {}

    def push(self, node: fx.Node, required: Sharded) -> dict[fx.Node, Sharded] | None:
        """Placements of parameters under which a value made of them arrives as required."""
        if node.op == "placeholder":
            return {node: required}
        key = (node, required)
        if key not in self._pushed:
            self._pushed[key] = self._search(node, required)
        return self._pushed[key]

    def _search(self, node: fx.Node, required: Sharded) -> dict[fx.Node, Sharded] | None:
        chain = self.graph.chain(node)
        roots = sorted(self.graph.roots(node), key=lambda n: (-self.graph.elements[n], n.name))
        if len(chain) > _LONGEST_CHAIN:
            return None
        for root in roots:
            for dim, size in enumerate(shape_of(root)):
                for parts, unit in {(size,): 1, required.parts: required.unit}.items():
                    guess = sharded(dim, parts, self.graph.tp, unit)
                    if not size or size % guess.period or not guess.fits(self.graph.tp):
                        continue
                    found = self._simulate(chain, {root: guess})
                    if found is not None and found[0][node] == required:
                        return {root: guess, **found[1]}
        return None

    def _simulate(
        self, chain: list[fx.Node], stored: dict[fx.Node, Sharded]
    ) -> tuple[dict[fx.Node, Placements], dict[fx.Node, Sharded]] | None:
        placed: dict[fx.Node, Placements] = {}
        more: dict[fx.Node, Sharded] = {}
        for node in chain:
            for operand in node.all_input_nodes:
                placed.setdefault(operand, stored.get(operand, REPLICATED))
            if node.target is GETITEM:
                whole = placed[node.args[0]]  # type: ignore[index]
                placed[node] = whole[node.args[1]] if isinstance(whole, tuple) else whole  # type: ignore[index]
                continue
            op = Op(node, self.graph.tp, placed)
            if not op.split_operands() or not has_tensor(node):
                placed[node] = op.replicated().outputs
                continue
            answer = ask(op)
            if not isinstance(answer, Step):
                return None
            placed[node] = answer.outputs
            more |= {
                operand: required
                for operand, required in zip(op.operands, answer.inputs, strict=True)
                if isinstance(required, Sharded) and operand.op == "placeholder" and operand not in stored
            }
        return placed, more
