"""One operator of the captured graph as the rules see it, and what a rule answers."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from plait.run.shard.placement import PARTIAL, REPLICATED, Placement, Sharded

__all__ = [
    "Op",
    "Placements",
    "Refusal",
    "Rule",
    "Step",
    "Where",
    "arguments",
    "dims_of",
    "forget",
    "has_tensor",
    "is_tensor",
    "packet_of",
    "shape_of",
    "tensor_operands",
]

Placements = Placement | tuple[Placement, ...]
"""Of a node: one per output where it has several."""

_FIRST_PRIME = 10007
"""Symbolic sizes are read as large primes, so that no view confuses the batch with a size that happens to be equal."""


@dataclass(frozen=True, slots=True)
class Where:
    """The place in the group for which a graph is lowered."""

    rank: int
    tp: int
    group: str
    """Name under which `collectives.group` finds the process group."""


@dataclass(frozen=True, slots=True)
class Step:
    """How one operator runs on local values."""

    inputs: tuple[Placement, ...]
    """What each tensor operand has to be, in the order of `Op.operands`."""
    outputs: Placements
    target: Callable[..., Any] | None = None
    """What to call instead of the operator, with those of its arguments (by name) that the target knows too."""
    patch: Callable[[Where], dict[str, Any]] | None = None
    """Arguments to change, by their name in the schema; other names are added as keyword arguments."""
    sizes: str | None = None
    """The argument that lists the output's sizes, if there is one."""
    leading: tuple[Any, ...] | None = None
    """Positional arguments to put in front of the operator's own (all of them are passed on then)."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why an operator can't run on sharded values, and which split of one of them it would accept."""

    reason: str
    culprit: fx.Node | None = None
    wanted: tuple[Sharded, ...] = ()
    """Splits of `culprit` that would work, best first."""
    finer: bool = False
    """Whether a split within each element of the sharded dim would work."""


Rule = Callable[["Op"], "Step | Refusal"]


def is_tensor(node: object) -> bool:
    """Whether the node's value is one tensor."""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)


def has_tensor(node: fx.Node) -> bool:
    """Whether the node's value is a tensor or has one."""
    value = node.meta.get("val")
    return is_tensor(node) or (isinstance(value, tuple | list) and any(isinstance(v, torch.Tensor) for v in value))


def packet_of(node: fx.Node) -> str:
    """Name of the node's operator without library and overload; '' where it is none."""
    return str(getattr(getattr(node.target, "overloadpacket", None), "__name__", ""))


def tensor_operands(node: fx.Node) -> list[fx.Node]:
    """The tensors among the arguments, in order, repeated as often as they occur."""
    known: list[fx.Node] | None = node.meta.get("plait_operands")
    if known is not None:
        return known
    found: list[fx.Node] = []

    def visit(arg: fx.Node) -> fx.Node:
        if is_tensor(arg):
            found.append(arg)
        return arg

    fx.node.map_arg((node.args, node.kwargs), visit)
    node.meta["plait_operands"] = found
    return found


def forget(graph: fx.Graph) -> None:
    """Drop what this module remembers of a graph's nodes, before or after somebody changes them."""
    for node in graph.nodes:
        for key in ("plait_shape", "plait_operands", "plait_arguments"):
            node.meta.pop(key, None)


def _integer(size: Any) -> int:
    if isinstance(size, int):
        return size
    expression = size.node.expr
    symbols = sorted(expression.free_symbols, key=str)
    value = expression.subs({symbol: _FIRST_PRIME + 2 * _number(str(symbol)) for symbol in symbols})
    return int(value) if value.is_integer else int(size.node.hint)


def _number(name: str) -> int:
    digits = "".join(c for c in name if c.isdigit())
    return int(digits) if digits else sum(map(ord, name))


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Shape of a tensor node; symbolic sizes as large odd numbers that stand for themselves."""
    shape: tuple[int, ...] | None = node.meta.get("plait_shape")
    if shape is None:
        shape = node.meta["plait_shape"] = tuple(_integer(size) for size in node.meta["val"].shape)
    return shape


@dataclass
class Op:
    """An operator with its arguments by name and its operands' placements."""

    node: fx.Node
    tp: int
    placed: Mapping[fx.Node, Placements]
    weights: frozenset[fx.Node] | set[fx.Node] = frozenset()
    """Operands that are parameters, or made of parameters only: their placement can be chosen freely."""
    pattern: Sharded | None = None
    """The split that a matmul was asked to give its output (its `dim` means nothing)."""
    may_split: bool = False
    """Whether sharding may begin here: a matmul may be split by columns, a table by rows."""
    summed: set[fx.Node] = field(default_factory=set)
    """Parts of sums that are to be taken as summed up before the operator."""
    operands: list[fx.Node] = field(init=False)
    args: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.operands = tensor_operands(self.node)
        self.args = arguments(self.node)

    def __getitem__(self, name: str) -> Any:
        return self.args[name]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the (only) output."""
        return shape_of(self.node)

    def at(self, node: object) -> Placement:
        """Placement of an operand; weights count as replicated."""
        if not is_tensor(node) or node in self.weights:
            return REPLICATED
        placement = self.placed[node]  # type: ignore[index]
        assert not isinstance(placement, tuple)
        return REPLICATED if placement is PARTIAL and node in self.summed else placement

    def split_operands(self) -> list[tuple[fx.Node, Sharded]]:
        """The operands that arrive sharded, once each."""
        return [(n, p) for n in dict.fromkeys(self.operands) if isinstance(p := self.at(n), Sharded)]

    def has_partial(self) -> bool:
        """Whether an operand arrives as parts of a sum."""
        return any(self.at(n) is PARTIAL for n in self.operands)

    def step(
        self,
        outputs: Placements,
        wanted: Mapping[fx.Node | None, Placement] | None = None,
        rest: Placement = REPLICATED,
        **more: Any,
    ) -> Step:
        """A step in which the operands are as in `wanted`, all others as `rest`."""
        wanted = wanted or {}
        return Step(tuple(wanted.get(n, rest) for n in self.operands), outputs, **more)

    def replicated(self) -> Step:
        """The operator on whole values."""
        value = self.node.meta.get("val")
        if isinstance(value, tuple | list):
            return self.step((REPLICATED,) * len(value))
        return self.step(REPLICATED)


def arguments(node: fx.Node) -> dict[str, Any]:
    """A node's arguments by their schema's names, defaults filled in; by position where there is no schema."""
    known: dict[str, Any] | None = node.meta.get("plait_arguments")
    if known is None:
        known = node.meta["plait_arguments"] = _arguments(node)
    return known


def _arguments(node: fx.Node) -> dict[str, Any]:
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {**{str(i): a for i, a in enumerate(node.args)}, **node.kwargs}
    values: dict[str, Any] = {}
    for index, argument in enumerate(schema.arguments):
        if index < len(node.args):
            values[argument.name] = node.args[index]
        elif argument.name in node.kwargs:
            values[argument.name] = node.kwargs[argument.name]
        else:
            values[argument.name] = argument.default_value if argument.has_default_value() else None
    return values


def dims_of(dims: Any, rank: int) -> tuple[int, ...]:
    """Dims as non-negative numbers; None or an empty list is all of them."""
    if dims is None or dims in ([], ()):
        return tuple(range(rank))
    listed: list[int] = list(dims) if isinstance(dims, list | tuple) else [dims]
    return tuple(d % max(rank, 1) for d in listed)


GETITEM = operator.getitem
