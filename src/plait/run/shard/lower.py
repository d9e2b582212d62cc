"""Rewrite a captured graph into the local operators of one rank, with explicit collectives between them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from plait.run.layout import Layout
from plait.run.shard import collectives
from plait.run.shard.aliases import working_copy
from plait.run.shard.operation import Op, Placements, Step, Where, shape_of
from plait.run.shard.placement import COPIED, PARTIAL, REPLICATED, Placement, Sharded
from plait.run.shard.rules.contraction import is_matmul

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from plait.capture.program import Placeholder
    from plait.run.shard.decide import Decisions

__all__ = ["lower"]

aten: Any = torch.ops.aten
_UNNEEDED = {aten._assert_tensor_metadata.default}


def lower(
    module: fx.GraphModule,
    decisions: Decisions,
    placeholders: Mapping[str, Placeholder],
    tp: int,
    rank: int,
    group: ProcessGroup | None = None,
) -> tuple[fx.GraphModule, dict[str, Layout]]:
    """The graph of one rank, and the share of each parameter, buffer and constant that its placeholder expects.

    `module` is left as it is. Without a group the graph can be read but not run. Node names and `meta` are kept;
    new nodes get the segment of the node they are made for. Assertions on tensor metadata are dropped.
    """
    assert decisions.tp == tp
    name = "tp"
    if group is not None:
        name = f"tp:{group.group_name}"
        collectives.register(name, group)
    return _Lowering(module, decisions, placeholders, Where(rank, tp, name)).build()


class _Lowering:
    def __init__(
        self, module: fx.GraphModule, decisions: Decisions, placeholders: Mapping[str, Placeholder], where: Where
    ) -> None:
        self.module, self.decisions, self.placeholders, self.where = module, decisions, placeholders, where
        self.graph = fx.Graph()
        self.local: dict[fx.Node, fx.Node] = {}
        self.converted: dict[tuple[fx.Node, Placement], fx.Node] = {}
        self.copies: dict[fx.Node, bool] = {}

    def build(self) -> tuple[fx.GraphModule, dict[str, Layout]]:
        layouts: dict[str, Layout] = {}
        for node in working_copy(self.module.graph).nodes:
            if node.target in _UNNEEDED:
                continue
            step = self.decisions.steps.get(node.name)
            if node.op == "placeholder":
                self.local[node] = self.graph.node_copy(node, lambda n: n)
                stored = self.decisions.stored.get(node.name)
                if stored is not None:
                    layouts[node.name] = stored.layout(shape_of(node), self.where.tp, self.where.rank)
                elif self.placeholders[node.name].kind != "input" and isinstance(node.meta.get("val"), torch.Tensor):
                    layouts[node.name] = Layout.full(shape_of(node))
            elif step is None:
                self.local[node] = self.graph.node_copy(node, self.local.__getitem__)
            else:
                self.local[node] = self._emit(node, step)
            self._describe(node)
        self._mark_fresh()
        self.graph.lint()
        lowered = fx.GraphModule(self.module, self.graph)
        return lowered, layouts

    def _emit(self, node: fx.Node, step: Step) -> fx.Node:
        op = Op(node, self.where.tp, {})
        inputs = dict(zip(op.operands, step.inputs, strict=True))
        operand = {n: self._as(n, placement, node) for n, placement in inputs.items()}

        def local(n: fx.Node) -> fx.Node:
            return operand[n] if n in operand else self.local[n]

        changes = dict(step.patch(self.where)) if step.patch else {}
        if step.sizes is not None:
            changes[step.sizes] = self._sizes(op, step, node)
        target = step.target or self.decisions.functional.get(node.name)
        if node.target is aten.view.default and node.name not in self.decisions.mutated:
            # A slice may lie in memory otherwise than the whole value did; where it does not, this is a view too.
            target = aten.reshape.default
            changes = {"shape": changes.get("size", op["size"])}
        if node.op == "output" or (target is None and not changes):
            return self.graph.node_copy(node, local)
        args, kwargs = _call(op, target, step.leading, changes)
        mapped = fx.node.map_arg((args, kwargs), local)
        return self._create(target or node.target, *mapped, name=node.name)

    def _create(self, target: Any, args: Any, kwargs: Any, name: str | None = None) -> fx.Node:
        return self.graph.create_node("call_function", target, tuple(args), dict(kwargs), name=name)

    def _sizes(self, op: Op, step: Step, node: fx.Node) -> list[Any]:
        assert step.sizes is not None
        assert isinstance(step.outputs, Sharded)
        sizes = list(op[step.sizes])
        out = step.outputs
        position = out.dim - (len(op.shape) - len(sizes))
        size = sizes[position]
        if isinstance(size, int):
            if size != -1:
                sizes[position] = self._local_size(size, out)
        elif -1 not in sizes:
            sizes[position] = -1
        else:
            times = self._create(_times, (self.local[size], *self._ratio(out)), {})
            times.meta = {"val": self._local_size(size.meta["val"], out), **_kept(node)}
            self.local[times] = times
            sizes[position] = times
        return sizes

    def _ratio(self, placement: Sharded) -> tuple[int, int]:
        return placement.local_period(self.where.tp, self.where.rank), placement.period

    def _local_size(self, size: Any, placement: Sharded) -> Any:
        local, period = self._ratio(placement)
        return size * local // period

    def _as(self, node: fx.Node, required: Placement, reader: fx.Node) -> fx.Node:
        """The local node of `node`'s value, converted for one reader; conversions are shared between readers."""
        actual = self.decisions.placements[node.name]
        if actual == required or isinstance(actual, tuple):
            return self.local[node]
        key = (node, required)
        # What is written to in place may have changed since it was converted.
        if key in self.converted and node.name not in self.decisions.mutated:
            return self.converted[key]
        made = self._convert(node, actual, required, reader)
        self.converted[key] = made
        return made

    def _convert(self, node: fx.Node, actual: Placement, required: Placement, reader: fx.Node) -> fx.Node:
        source = self.local[node]
        name, tp = self.where.group, self.where.tp
        has_gradient = node.name in self.decisions.gradients
        if actual is REPLICATED:
            if required is COPIED:
                if not has_gradient:
                    return source
                made = self._create(collectives.copy, (source, name), {})
                self.copies[made] = True
                return self._note(made, node, required, reader)
            if required is PARTIAL:
                return self._note(self._create(collectives.share, (source, tp), {}), node, required, reader)
            assert isinstance(required, Sharded)
            return self._note(self._take(source, node, required, has_gradient), node, required, reader)
        if actual is COPIED and isinstance(required, Sharded):
            return self._note(self._take(source, node, required, has_gradient=False), node, required, reader)
        if isinstance(actual, Sharded) or actual is PARTIAL:
            whole = self.converted.get((node, REPLICATED)) if node.name not in self.decisions.mutated else None
            if whole is None:
                if actual is PARTIAL:
                    fresh = is_matmul(node) and len(node.users) == 1
                    whole = self._create(collectives.reduce, (source, name, fresh), {})
                    home = node  # the sum is part of its making: whole values cross to other segments and stages
                else:
                    assert isinstance(actual, Sharded)
                    whole = self._create(collectives.gather, (source, self._split(actual), name), {})
                    home = reader
                self._note(whole, node, REPLICATED, home)
                self.converted[node, REPLICATED] = whole
            if required is REPLICATED:
                return whole
            before, self.local[node] = self.local[node], whole
            made = self._convert(node, REPLICATED, required, reader)
            self.local[node] = before
            return made
        raise AssertionError((node, actual, required))

    def _split(self, placement: Sharded) -> collectives.Split:
        return placement.dim, placement.parts, placement.unit, self.where.tp, self.where.rank

    def _take(self, source: fx.Node, node: fx.Node, required: Sharded, has_gradient: bool) -> fx.Node:
        ranges = required.ranges(self.where.tp, self.where.rank)
        plain = len(ranges) == 1 and shape_of(node)[required.dim] == required.period
        if has_gradient or not plain:
            function: Callable[..., Any] = collectives.take if has_gradient else _cut
            rest = (self.where.group,) if has_gradient else ()
            return self._create(function, (source, self._split(required), *rest), {})
        start, stop = ranges[0]
        return self._create(aten.narrow.default, (source, required.dim, start, stop - start), {})

    def _note(self, made: fx.Node, node: fx.Node, placement: Placement, reader: fx.Node) -> fx.Node:
        made.meta = {"val": self._value(node.meta["val"], placement), **_kept(reader)}
        made.meta["requires_grad"] = node.meta.get("requires_grad", False)  # pipelines send gradients of what has one
        return made

    def _value(self, value: Any, placement: Placements) -> Any:
        """The fake local tensor of a fake whole one."""
        if isinstance(value, tuple | list) and isinstance(placement, tuple):
            return type(value)(self._value(v, p) for v, p in zip(value, placement, strict=True))
        if not isinstance(placement, Sharded) or not isinstance(value, torch.Tensor):
            return value
        shape = list(value.shape)
        shape[placement.dim] = self._local_size(shape[placement.dim], placement)
        with value.fake_mode if hasattr(value, "fake_mode") else torch.no_grad():
            return torch.empty(shape, dtype=value.dtype, device=value.device)

    def _describe(self, node: fx.Node) -> None:
        made = self.local[node]
        made.meta = {k: v for k, v in node.meta.items() if not k.startswith("plait_")}
        if "val" in node.meta and node.name in self.decisions.placements:
            made.meta["val"] = self._value(node.meta["val"], self.decisions.placements[node.name])

    def _mark_fresh(self) -> None:
        """Let gradients be summed in place where they come straight out of matrix products."""
        for made in self.copies:
            if all(is_matmul(user) for user in made.users):
                made.args = (*made.args, True)


def _times(size: int, local: int, period: int) -> int:
    """A local size from a whole one."""
    return size * local // period


def _cut(x: torch.Tensor, split: collectives.Split) -> torch.Tensor:
    """The rank's slice of a value without gradient."""
    return collectives.cut_out(x, split)


def _kept(node: fx.Node) -> dict[str, Any]:
    return {k: node.meta[k] for k in ("segment", "nn_module_stack", "stack_trace") if k in node.meta}


def _call(
    op: Op, target: Callable[..., Any] | None, leading: tuple[Any, ...] | None, changes: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments for the operator with `changes`, or for another target that takes some of them by name."""
    if leading is not None:
        return (*leading, *op.node.args), {**op.node.kwargs, **changes}
    schema = getattr(target or op.node.target, "_schema", None)
    if schema is None:
        assert target is not None
        known = inspect.signature(target).parameters
        return (), {k: v for k, v in {**op.args, **changes}.items() if k in known}
    values = {**op.args, **changes}
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for argument in schema.arguments:
        if argument.name not in values:
            continue
        if argument.kwarg_only:
            if not (argument.has_default_value() and values[argument.name] == argument.default_value):
                kwargs[argument.name] = values[argument.name]
        else:
            args.append(values[argument.name])
    while args and len(args) > 1 and _is_default(schema.arguments[len(args) - 1], args[-1]):
        args.pop()
    return tuple(args), kwargs


def _is_default(argument: Any, value: Any) -> bool:
    return bool(argument.has_default_value()) and not isinstance(value, fx.Node) and value == argument.default_value
