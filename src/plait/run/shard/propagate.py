"""One pass over the graph: placements for every value under one set of choices."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import fx

from plait.run.shard.aliases import shares_memory, written_operands
from plait.run.shard.choice import Choice, Pass
from plait.run.shard.cost import Tally
from plait.run.shard.dataflow import Dataflow
from plait.run.shard.operation import GETITEM, Op, Refusal, Step, has_tensor, packet_of, shape_of, tensor_operands
from plait.run.shard.placement import COPIED, PARTIAL, REPLICATED, Placement, Sharded, refined, sharded
from plait.run.shard.pull import pull, readings
from plait.run.shard.rules import ask, rule_for
from plait.run.shard.weights import Weights

if TYPE_CHECKING:
    from collections.abc import Mapping

    from plait.capture.program import Placeholder

__all__ = ["Propagation"]

_VIEWS = {
    "view",
    "reshape",
    "transpose",
    "permute",
    "unsqueeze",
    "squeeze",
    "expand",
    "slice",
    "select",
    "split",
    "chunk",
}


class Propagation(Dataflow):
    """A graph over which passes run."""

    def __init__(self, module: fx.GraphModule, placeholders: Mapping[str, Placeholder], tp: int) -> None:
        super().__init__(module, placeholders, tp)
        self.weights = Weights(self)

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
            if any(
                p != wanted and not (wanted is COPIED and isinstance(p, Sharded)) for p in readings(node, result.steps)
            ):
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
        if not tensor_operands(node) or not has_tensor(node):
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
        answer = ask(op)
        if isinstance(answer, Refusal) and op.has_partial() and rule_for(op.node.target):
            op.summed = set(op.operands)
            answer = ask(op) if op.split_operands() or enabled else op.replicated()
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
                for root, placement in (self.weights.push(operand, required) or {}).items():
                    votes = result.votes.setdefault(self.tied(root)[0], {})
                    votes[placement] = votes.get(placement, 0) + 1
            else:
                for root in self.roots(operand):
                    votes = result.votes.setdefault(self.tied(root)[0], {})
                    votes[REPLICATED] = votes.get(REPLICATED, 0) + 1

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
            if packet_of(node) not in _VIEWS:
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
