"""One pass over the graph: placements for every value under one set of choices."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from plait.run.shard.aliases import functional_form, mutated_values, shares_memory, working_copy, written_operands
from plait.run.shard.cost import Tally
from plait.run.shard.operation import GETITEM, Op, Placements, Refusal, Step, is_tensor, shape_of, tensor_operands
from plait.run.shard.placement import COPIED, PARTIAL, REPLICATED, Placement, Sharded, refined, sharded
from plait.run.shard.pull import early_sums, pull, readings, worthwhile_pulls
from plait.run.shard.rules import rule_for
from plait.run.shard.sources import weight_of
from plait.run.shard.work import elements_of, flops_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from plait.capture.program import Placeholder

__all__ = ["Choice", "Pass", "Propagation"]

_LONGEST_CHAIN = 64
_VIEWS = {"view", "reshape", "transpose", "permute", "unsqueeze", "squeeze", "expand", "slice", "select", "split", "chunk"}


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

    def revise(self, result: Pass, graph: Propagation) -> bool:
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
            fresh = {n: p for n, p in worthwhile_pulls(graph, result).items() if n not in self.unpulled}
            self.pulled |= fresh
            changed = bool(fresh)
        return changed


class Propagation:
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
        self.sources = {n: w for n in self.nodes if (w := weight_of(n, self.derived)) is not None and self._is_parameter(w)}
        self.flops = {n: f for n in self.nodes if (f := flops_of(n))}
        self.elements = {n: elements_of(n) for n in self.nodes}
        self.first_reasons: dict[fx.Node, str] = {}
        """Why an operator refused what came from a source, in the first pass that it happened."""
        self._pushed: dict[tuple[fx.Node, Placement], dict[fx.Node, Sharded] | None] = {}

    def tied(self, node: fx.Node) -> list[fx.Node]:
        """The placeholders of the same parameter or buffer."""
        return self._tied[self.placeholders[node.name].kind, self.placeholders[node.name].name]

    def user_name(self, node: fx.Node) -> str:
        """The user's name of a parameter, or of the first one that a value is made of."""
        for each in [node, *sorted(self._roots(node), key=lambda n: n.name)]:
            if each.name in self.placeholders:
                return self.placeholders[each.name].name
        return node.name

    def make_functional(self, node: fx.Node) -> bool:
        """Let an in-place operator write to new memory, if nobody reads the old afterwards; whether that is so."""
        target = functional_form(node)
        if target is None:
            return False
        written = written_operands(node)[0]
        later = {n for n in self.nodes[self.nodes.index(node) + 1 :]}
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
        return any(self.placeholders[root.name].kind == "parameter" for root in self._roots(node))

    def _roots(self, node: fx.Node) -> set[fx.Node]:
        if node not in self._known_roots:
            self._known_roots[node] = self._find_roots(node)
        return self._known_roots[node]

    def _find_roots(self, node: fx.Node) -> set[fx.Node]:
        return {n for n in [node, *self._chain(node)] if n.op == "placeholder"} | {
            o for n in self._chain(node) for o in tensor_operands(n) if o.op == "placeholder"
        }

    def _derived(self) -> dict[fx.Node, None]:
        """Values made of parameters and buffers only, in order."""
        derived: dict[fx.Node, None] = {}
        constant = self._constants()
        for node in self.nodes:
            if node.op == "placeholder" and self.placeholders[node.name].kind in ("parameter", "buffer"):
                derived[node] = None
            elif node.op == "call_function" and node not in self.mutated and node not in constant:
                if all(n in derived or n in constant or n.op == "get_attr" for n in node.all_input_nodes):
                    derived[node] = None
        return derived

    def _constants(self) -> set[fx.Node]:
        """Values that depend on nothing that is fed, such as positions."""
        constant: set[fx.Node] = set()
        for node in self.nodes:
            if node.op == "placeholder" and self.placeholders[node.name].kind == "constant":
                constant.add(node)
            elif node.op == "call_function" and all(n in constant for n in node.all_input_nodes):
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
                if node.target is torch.ops.aten.detach.default or _packet(node).startswith("new_") or _packet(node).endswith("_like"):
                    continue
                if getattr(node.target, "name", lambda: "")() == "wrap_with_set_grad_enabled" and node.args[0] is False:
                    continue
                value = node.meta.get("val")
                values = value if isinstance(value, tuple | list) else [value]
                if any(isinstance(v, torch.Tensor) and (v.is_floating_point() or v.is_complex()) for v in values):
                    found.add(node)
        return found

    def run(self, choice: Choice) -> Pass:
        """One pass."""
        result = Pass(choice, dict(choice.stored))
        for node in self.nodes:
            if node.op == "placeholder":
                result.placed[node] = choice.stored.get(node, REPLICATED)
            elif node.op == "call_function":
                self._place(node, result)
            elif node.op == "get_attr":
                result.placed[node] = REPLICATED
            elif node.op == "output":
                result.steps[node] = Op(node, self.tp, result.placed).step(REPLICATED)
        for node in result.choice.pulled:
            wanted = result.choice.pulled[node]
            if any(p != wanted and not (wanted is COPIED and isinstance(p, Sharded)) for p in readings(node, result.steps)):
                result.spoiled.add(node)
        self._count(result)
        for source, reason in result.reasons.items():
            self.first_reasons.setdefault(source, reason)
        return result

    def _place(self, node: fx.Node, result: Pass) -> None:
        if node.target is GETITEM and isinstance(node.args[0], fx.Node):
            whole = result.placed[node.args[0]]
            result.placed[node] = whole[node.args[1]] if isinstance(whole, tuple) else whole  # type: ignore[index]
            result.origins[node] = result.origins.get(node.args[0], frozenset())
            return
        if not tensor_operands(node) or not _has_tensor(node):
            result.placed[node] = REPLICATED
            if tensor_operands(node):
                result.steps[node] = self._measure(node, result)
            return
        chained = node in self.derived
        op = Op(
            node,
            self.tp,
            result.placed,
            frozenset() if chained else frozenset(n for n in tensor_operands(node) if n in self.derived),
        )
        enabled = node in self.sources and node not in result.choice.banned
        op.may_split = enabled
        op.summed = result.choice.summed
        op.pattern = result.choice.patterns.get(node)
        pulled = self._pulled_step(op, result) if node in result.choice.pulled else None
        if node in result.choice.whole:
            step = op.replicated()
        elif pulled is not None:
            step = pulled
        else:
            step = self._ask(op, enabled, result)
        result.steps[node], result.placed[node] = step, step.outputs
        outputs = step.outputs if isinstance(step.outputs, tuple) else (step.outputs,)
        if any(isinstance(p, Sharded) for p in outputs):
            origins: set[fx.Node] = set()
            for operand, required in zip(op.operands, step.inputs, strict=True):
                if isinstance(required, Sharded):
                    origins |= result.origins.get(operand, frozenset())
            if node in self.sources and not origins:
                origins.add(node)
            result.origins[node] = frozenset(origins)
        if node in self.sources and any(
            isinstance(p, Sharded) for n, p in zip(op.operands, step.inputs, strict=True) if n is self.sources[node]
        ):
            result.split.add(node)
            if not op.split_operands():
                result.begun.add(node)
        self._vote(op, step, chained, result)
        if node in self.mutated:
            self._check_memory(op, step, result)

    def _check_memory(self, op: Op, step: Step, result: Pass) -> None:
        """What writes to memory, or is a view of what is written to, must not get a converted copy instead."""
        inputs = dict(zip(op.operands, step.inputs, strict=True))
        for shared in {*written_operands(op.node), *shares_memory(op.node)}:
            if shared in inputs and (inputs[shared] != result.placed[shared] or step.target is not None):
                result.broken.add(op.node)

    def _pulled_step(self, op: Op, result: Pass) -> Step | None:
        wanted = result.choice.pulled[op.node]
        step = pull(op, wanted, self.gradients)
        # A copy of what has become sharded, or a sum, is another operator than the one that was to be pulled.
        changed = wanted is COPIED and any(op.at(n) not in (REPLICATED, COPIED) for n in op.operands)
        if step is None or changed:
            result.spoiled.add(op.node)
            return None
        return step

    def _ask(self, op: Op, enabled: bool, result: Pass) -> Step:
        if not enabled and not op.split_operands() and not op.has_partial():
            return op.replicated()
        rule = rule_for(op.node.target)
        answer = rule(op) if rule else Refusal(f"{op.node.target} has no rule")
        if isinstance(answer, Refusal) and op.has_partial() and rule:
            op.summed = set(op.operands)
            answer = rule(op) if op.split_operands() or enabled else op.replicated()
        if isinstance(answer, Step):
            return answer
        result.refusals[op.node] = answer.reason
        for operand, placement in op.split_operands():
            if answer.culprit is not None and operand is not answer.culprit:
                continue
            for origin in result.origins.get(operand, frozenset()):
                result.reasons.setdefault(origin, f"{answer.reason} ({op.node.name})")
                own = result.placed[origin]
                assert isinstance(own, Sharded)
                wishes = result.wishes.setdefault(origin, [])
                inner = sharded(0, (max(own.period // placement.period, 1),), self.tp)
                if answer.finer and inner.fits(self.tp):
                    wishes.append(inner)
                for wish in answer.wanted:
                    scaled = refined(own, placement, wish, self.tp)
                    if scaled is not None and scaled.fits(self.tp):
                        wishes.append(scaled.moved(0))
        return op.replicated()

    def _measure(self, node: fx.Node, result: Pass) -> Step:
        """A size of a tensor: as it is, unless the dim is the sharded one."""
        inputs: list[Placement] = []
        for operand in tensor_operands(node):
            placement = result.placed[operand]
            is_size = node.target is torch.ops.aten.sym_size.int
            if is_size and isinstance(placement, Sharded) and node.args[1] % len(shape_of(operand)) == placement.dim:  # type: ignore[operator]
                placement = REPLICATED
            inputs.append(placement if is_size and not isinstance(placement, tuple) else REPLICATED)
        return Step(tuple(inputs), REPLICATED)

    def _vote(self, op: Op, step: Step, chained: bool, result: Pass) -> None:
        for operand, required in zip(op.operands, step.inputs, strict=True):
            if operand not in self.derived or (chained and result.placed[operand] == required):
                continue
            if isinstance(required, Sharded):
                for root, placement in (self._push(operand, required) or {}).items():
                    votes = result.votes.setdefault(self.tied(root)[0], {})
                    votes[placement] = votes.get(placement, 0) + 1
            else:
                for root in self._roots(operand):
                    votes = result.votes.setdefault(self.tied(root)[0], {})
                    votes[REPLICATED] = votes.get(REPLICATED, 0) + 1

    def _chain(self, node: fx.Node) -> list[fx.Node]:
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

    def _push(self, node: fx.Node, required: Sharded) -> dict[fx.Node, Sharded] | None:
        """Placements of parameters under which a value made of them arrives as required."""
        if node.op == "placeholder":
            return {node: required}
        key = (node, required)
        if key not in self._pushed:
            self._pushed[key] = self._search(node, required)
        return self._pushed[key]

    def _search(self, node: fx.Node, required: Sharded) -> dict[fx.Node, Sharded] | None:
        chain = self._chain(node)
        roots = sorted(self._roots(node), key=lambda n: (-self.elements[n], n.name))
        if len(chain) > _LONGEST_CHAIN:
            return None
        for root in roots:
            for dim, size in enumerate(shape_of(root)):
                for parts, unit in {(size,): 1, required.parts: required.unit}.items():
                    guess = sharded(dim, parts, self.tp, unit)
                    if not size or size % guess.period or not guess.fits(self.tp):
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
            op = Op(node, self.tp, placed)
            if not op.split_operands() or not _has_tensor(node):
                placed[node] = op.replicated().outputs
                continue
            rule = rule_for(node.target)
            answer = rule(op) if rule else None
            if not isinstance(answer, Step):
                return None
            placed[node] = answer.outputs
            for operand, required in zip(op.operands, answer.inputs, strict=True):
                if isinstance(required, Sharded) and operand.op == "placeholder" and operand not in stored:
                    more[operand] = required
        return placed, more

    def _count(self, result: Pass) -> None:
        tally = result.tally
        for node, elements in self.elements.items():
            if node.op == "placeholder":
                if self.placeholders[node.name].kind == "parameter":
                    tally.all_storage += elements
                    tally.storage += elements / (self.tp if node in result.stored else 1)
                continue
            step = result.steps.get(node)
            if step is None or node.op != "call_function":
                continue
            outputs = step.outputs if isinstance(step.outputs, tuple) else (step.outputs,)
            is_split = any(isinstance(p, Sharded) for p in (*step.inputs, *outputs))
            flops = self.flops.get(node, 0.0)
            tally.all_flops += flops
            tally.flops += flops / (self.tp if is_split else 1)
            if node in self.sources:
                tally.matmul_output += elements
                tally.matmuls += 1
            if _packet(node) not in _VIEWS:
                tally.all_activations += elements
                tally.activations += elements / (self.tp if isinstance(outputs[0], Sharded) else 1)
        done: set[tuple[fx.Node, Placement]] = set()
        for node, step in result.steps.items():
            for operand, required in zip(tensor_operands(node), step.inputs, strict=True):
                actual = result.placed[operand]
                if actual != required and (operand, required) not in done and not isinstance(actual, tuple):
                    self._convert(tally, operand, actual, required, (operand, REPLICATED) in done)
                    done.add((operand, required))
                    if actual is PARTIAL or isinstance(actual, Sharded):
                        done.add((operand, REPLICATED))

    def _convert(self, tally: Tally, node: fx.Node, actual: Placement, required: Placement, is_whole: bool) -> None:
        elements = self.elements[node]
        if actual is COPIED:
            return  # each rank cuts out its slice; the gradient is a part of a sum anyway
        if not is_whole and actual is PARTIAL:
            tally.send("all_reduce", node.name, elements)
        elif not is_whole and isinstance(actual, Sharded):
            tally.send("all_gather", node.name, elements)
        if node in self.gradients and required is COPIED:
            tally.send("all_reduce", node.name, elements, backward=True)
        elif node in self.gradients and isinstance(required, Sharded):
            tally.send("all_gather", node.name, elements, backward=True)


def _has_tensor(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return is_tensor(node) or (isinstance(value, tuple | list) and any(isinstance(v, torch.Tensor) for v in value))


def _packet(node: fx.Node) -> str:
    return str(getattr(getattr(node.target, "overloadpacket", None), "__name__", ""))
