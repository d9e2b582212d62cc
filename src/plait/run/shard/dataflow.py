"""A captured graph with the facts that no choice of placements changes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from plait.run.shard.aliases import functional_form, mutated_values, working_copy, written_operands
from plait.run.shard.operation import packet_of, tensor_operands
from plait.run.shard.sources import weight_of
from plait.run.shard.work import elements_of, flops_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from plait.capture.program import Placeholder

__all__ = ["Dataflow"]


class Dataflow:
    """A graph with what does not change between passes."""

    def __init__(self, module: fx.GraphModule, placeholders: Mapping[str, Placeholder], tp: int) -> None:
        self.tp = tp
        self.placeholders = placeholders
        self.graph = working_copy(module.graph)
        self.nodes = list(self.graph.nodes)
        self.functional: dict[str, Any] = {}
        """In-place operators that run out of place, by node name."""
        self.mutated = mutated_values(self.graph)
        self._known_roots: dict[fx.Node, set[fx.Node]] = {}
        self._tied: dict[tuple[str, str], list[fx.Node]] = {}
        for node in self.nodes:
            if node.op == "placeholder":
                self._tied.setdefault((placeholders[node.name].kind, placeholders[node.name].name), []).append(node)
        self.derived = self._derived()
        self.gradients = self._gradients()
        self.sources = {
            n: w for n in self.nodes if (w := weight_of(n, self.derived)) is not None and self._is_parameter(w)
        }
        self.flops = {n: f for n in self.nodes if (f := flops_of(n))}
        self.elements = {n: elements_of(n) for n in self.nodes}
        self.first_reasons: dict[fx.Node, str] = {}
        """Why an operator refused what came from a source, in the first pass that it happened."""

    def tied(self, node: fx.Node) -> list[fx.Node]:
        """The placeholders of the same parameter or buffer."""
        return self._tied[self.placeholders[node.name].kind, self.placeholders[node.name].name]

    def user_name(self, node: fx.Node) -> str:
        """The user's name of a parameter, or of the first one that a value is made of."""
        for each in [node, *sorted(self.roots(node), key=lambda n: n.name)]:
            if each.name in self.placeholders:
                return self.placeholders[each.name].name
        return node.name

    def make_functional(self, node: fx.Node) -> bool:
        """Let an in-place operator write to new memory, if nobody reads the old afterwards; whether that is so."""
        target = functional_form(node)
        if target is None:
            return False
        written = written_operands(node)[0]
        later = set(self.nodes[self.nodes.index(node) + 1 :])
        sharing = self.sharing_memory(written) - self._after(node)
        if any(user in later for each in sharing for user in each.users if user is not node):
            return False
        node.target = target
        self.functional[node.name] = target
        self.mutated = mutated_values(self.graph)
        return True

    def _after(self, node: fx.Node) -> set[fx.Node]:
        found, queue = {node}, [node]
        while queue:
            for user in queue.pop().users:
                if user not in found:
                    found.add(user)
                    queue.append(user)
        return found

    def sharing_memory(self, node: fx.Node) -> set[fx.Node]:
        """The nodes in a written node's group."""
        number = self.mutated.get(node)
        return {n for n, m in self.mutated.items() if m == number} if number is not None else {node}

    def _is_parameter(self, node: fx.Node) -> bool:
        return any(self.placeholders[root.name].kind == "parameter" for root in self.roots(node))

    def roots(self, node: fx.Node) -> set[fx.Node]:
        """The placeholders that a derived value is made of."""
        if node not in self._known_roots:
            self._known_roots[node] = self._find_roots(node)
        return self._known_roots[node]

    def _find_roots(self, node: fx.Node) -> set[fx.Node]:
        return {n for n in [node, *self.chain(node)] if n.op == "placeholder"} | {
            o for n in self.chain(node) for o in tensor_operands(n) if o.op == "placeholder"
        }

    def _derived(self) -> dict[fx.Node, None]:
        """Values made of parameters and buffers only, in order."""
        derived: dict[fx.Node, None] = {}
        constant = self._constants()
        for node in self.nodes:
            if node.op == "placeholder" and self.placeholders[node.name].kind in ("parameter", "buffer"):
                derived[node] = None
            elif node.op == "call_function" and node not in self.mutated and node not in constant:
                made_of = [n for n in node.all_input_nodes if n.op != "get_attr"]
                derived |= {node: None} if all(n in derived or n in constant for n in made_of) else {}
        return derived

    def _constants(self) -> set[fx.Node]:
        """Values that depend on nothing that is fed, such as positions."""
        constant: set[fx.Node] = set()
        for node in self.nodes:
            if (node.op == "placeholder" and self.placeholders[node.name].kind == "constant") or (
                node.op == "call_function" and all(n in constant for n in node.all_input_nodes)
            ):
                constant.add(node)
        # Memory into which something else is written does not stay constant.
        filled = {number for node, number in self.mutated.items() if node not in constant}
        return {node for node in constant if self.mutated.get(node) not in filled}

    def _gradients(self) -> set[fx.Node]:
        found: set[fx.Node] = set()
        for node in self.nodes:
            if node.op == "placeholder":
                place = self.placeholders[node.name]
                if place.kind == "parameter" and place.trainable:
                    found.add(node)
            elif node.op == "call_function" and any(n in found for n in node.all_input_nodes):
                if (
                    node.target is torch.ops.aten.detach.default
                    or packet_of(node).startswith("new_")
                    or packet_of(node).endswith("_like")
                ):
                    continue
                if getattr(node.target, "name", lambda: "")() == "wrap_with_set_grad_enabled" and node.args[0] is False:
                    continue
                value = node.meta.get("val")
                values = value if isinstance(value, tuple | list) else [value]
                if any(isinstance(v, torch.Tensor) and (v.is_floating_point() or v.is_complex()) for v in values):
                    found.add(node)
        return found

    def chain(self, node: fx.Node) -> list[fx.Node]:
        """The operators that make a derived value, in order."""
        if node.op == "placeholder":
            return []
        found: set[fx.Node] = set()
        queue = [node]
        while queue:
            each = queue.pop()
            if each in found or each not in self.derived or each.op == "placeholder":
                continue
            found.add(each)
            queue += each.all_input_nodes
        return [n for n in self.derived if n in found]
