"""Prefill and decode with a key-value cache, derived from a decoder's captured forward by dataflow alone.

No cache interface is asked of the model. From the graph of `forward(tokens [batch, length]) -> logits`, backwards from the
logits at one position:

    decode   every operator says what it takes of its inputs to give its result there (`needs.py`). Most act on each
             position by itself, and run at length 1. Attention takes its query at this position and its keys
             and values at all: these are cached, the new ones put in at `position`. What depends on positions alone
             (indices, rotary tables, masks, biases) takes the row at `position` of all `capacity` ones. An operator that mixes
             positions in another way (a running sum, a convolution) is computed over the cache of its inputs, and its row taken.
    prefill  the graph as it is, which also gives out what is cached, padded to `capacity`. A graph that is not right for
             short prompts (blocks of positions that Python counts) gets the prompt padded instead.

The cache holds what lies furthest up the chain of layouts in front of the attention and is smallest: key heads before they
are repeated. Later positions of a cache are zero; a decoder does not look at them, and that it does not is proven by comparing
with the model itself (`decode.py`).
"""

from __future__ import annotations

import operator
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from plait.capture.inline import inline_regions
from plait.serve.decoding.needs import Need, need
from plait.serve.decoding.positions import (
    ALL,
    EXACT,
    FLAT,
    Path,
    Positions,
    View,
    arguments_of,
    kind_of,
    leaves,
    line_of,
    size_of,
)

__all__ = ["CacheSpec", "Derived", "derive"]

aten = torch.ops.aten


@dataclass(frozen=True)
class CacheSpec:
    """One cached tensor."""

    name: str
    shape: tuple[int | str, ...]
    """`batch` where the batch is, the capacity where the positions are."""
    dim: int
    """Of the positions."""
    dtype: torch.dtype


@dataclass
class Derived:
    """The two programs as modules that own the model's tensors."""

    prefill: fx.GraphModule
    """(tokens [batch, length]) -> (logits of the last position [batch, vocabulary], *caches)"""
    decode: fx.GraphModule
    """(tokens [batch, 1], position [1], *caches) -> (logits [batch, vocabulary], *caches)"""
    caches: list[CacheSpec] = field(default_factory=list)
    recomputed: tuple[str, ...] = ()
    """Operators that every step computes at all positions of the capacity, each with the user's line."""


def derive(program: torch.export.ExportedProgram, capacity: int, shortest: int = 2) -> Derived:
    """From a program `tokens [batch, length] -> (logits [batch, length or 1, vocabulary], ...)` with an open length.

    It is right for lengths from `shortest` to `capacity`.

    Raises:
        ServeError: the graph is not a decoder's, as far as this can tell; with the operator and the user's line.
    """
    if any(_writes(node) for node in program.graph.nodes):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about its own use of pytrees
            program = program.run_decompositions({})
    module: Any = program.module(check_guards=False)
    inline_regions(module)
    source = Positions(module, capacity, shortest)
    for node in source.nodes:
        if node.meta.get("autocast"):
            source.refuse(node, "autocast is switched on around it, which a program with a cache does not do")
    cut = _Cut(source)
    order = [n for n in source.nodes if n in cut.points]
    caches = [_spec(source, node, f"cache_{i}", capacity) for i, node in enumerate(order)]
    decode = _Decode(cut, order, caches, capacity).module()
    return Derived(_prefill(source, order, capacity, shortest), decode, caches, cut.recomputed())


def _writes(node: fx.Node) -> bool:
    """Whether an operator writes into its argument, so that it cannot be left out or run twice."""
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and bool(schema.is_mutable)


def _spec(source: Positions, node: fx.Node, name: str, capacity: int) -> CacheSpec:
    value, dim = node.meta["val"], _dim(source, node)
    shape: list[int | str] = []
    for i, size in enumerate(value.shape):
        is_batch = isinstance(size, torch.SymInt) and size.node.expr == source.batch
        shape.append(capacity if i == dim else "batch" if is_batch else int(size))
    return CacheSpec(name, tuple(shape), dim, value.dtype)


def _dim(source: Positions, node: fx.Node) -> int:
    """The dim of the positions of a cached tensor."""
    return next(iter(source.dims(node)))


def _prefill(source: Positions, order: list[fx.Node], capacity: int, shortest: int) -> fx.GraphModule:
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for node in source.nodes:
        if node.op != "output":
            made[node] = graph.node_copy(node, lambda n: made[n])
        if node is source.tokens:
            length = graph.call_function(aten.sym_size.int, (made[node], 1))
            rest = graph.call_function(operator.sub, (capacity, length))
            if shortest > 2:
                made[node] = graph.call_function(aten.constant_pad_nd.default, (made[node], [0, rest], 0))
    if shortest > 2:
        if not source.dims(source.logits):
            source.refuse(source.logits, f"it gives the last position alone, and takes {shortest} positions or more")
        first = graph.call_function(operator.sub, (length, 1))
        row = graph.call_function(aten.slice.Tensor, (made[source.logits], 1, first, length))
        outputs = [_last(graph, row), *(made[node] for node in order)]
    else:
        outputs = [_last(graph, _head(source, graph, made))]
        for node in order:
            behind = node.meta["val"].dim() - 1 - _dim(source, node)
            padding: Any = [*([0, 0] * behind), 0, rest]
            outputs.append(graph.call_function(aten.constant_pad_nd.default, (made[node], padding, 0)))
    graph.output(tuple(outputs))
    graph.eliminate_dead_code()
    return _as_module(source.module, graph)


def _head(source: Positions, graph: fx.Graph, made: dict[fx.Node, fx.Node]) -> fx.Node:
    """The logits of the last position alone, [batch, 1, vocabulary]: all of them may be more than everything else in memory."""
    chain: list[fx.Node] = []
    at = source.logits
    while (before := _alone(source, at)) is not None:
        chain.append(at)
        at = before
    row = made[at]
    if chain:
        row = graph.call_function(aten.unsqueeze.default, (_last(graph, row), 1))
    own = {**made, at: row}
    for node in reversed(chain):
        own[node] = graph.node_copy(node, lambda n: own[n])
    return own[source.logits]


def _alone(source: Positions, node: fx.Node) -> fx.Node | None:
    """The one input [batch, length, ...] that an operator acts on position by position; None: it is not of that kind."""
    inputs = [n for _, n in leaves(node) if isinstance(n, fx.Node)]
    long = [n for n in inputs if n in source.long or source.is_size(n)]
    if len(long) != 1 or long[0] not in source.data or source.dims(long[0]) != {1: EXACT}:
        return None
    found = need(source, node, source.one(node))
    if found is None or source.dims(node) != {1: EXACT} or source.one(long[0]) not in found.views.values():
        return None
    return long[0]


class _Cut:
    """Which views of which values one position's logits take, and what of it is cached."""

    def __init__(self, source: Positions) -> None:
        self.source = source
        self.points: set[fx.Node] = set()
        """Cached values."""
        self.wanted: dict[fx.Node, set[View]] = {source.logits: {source.one(source.logits)}}
        self.needs: dict[tuple[fx.Node, View], Need] = {}
        """What a view is computed from; a view that is not here is read from the cache, or is a row of ALL."""
        for node in reversed(source.nodes):
            for view in list(self.wanted.get(node, ())):
                self._take(node, view)
        if not self.points:
            source.refuse(source.logits, "no position's result depends on another's, so there is nothing to cache")

    def recomputed(self) -> tuple[str, ...]:
        """Operators on data that one position alone does not do for, with the user's lines."""
        source = self.source
        found = [
            f"{kind_of(node)}: {line_of(node)}"
            for node in source.nodes
            if (node, ALL) in self.needs and node in source.data and need(source, node, source.one(node)) is None
        ]
        return tuple(dict.fromkeys(found))

    def _take(self, node: fx.Node, view: View) -> None:
        source = self.source
        if node.op == "placeholder":
            if view == ALL:
                self.points.add(node)
            return
        if view == ALL and node in source.data and source.cut(node) is node:
            found = need(source, node, source.one(node))
            if found is not None:
                self.points.add(node)
                self._want(node, source.one(node), found)
                return
        found = need(source, node, view)
        if found is None:
            kinds = {source.dims(node)[d] for d in view if d >= 0}
            if kinds - {EXACT, FLAT} or (FLAT in kinds and view != source.one(node)):
                source.refuse(node, "it mixes positions that it has together with other dims")
            if FLAT in kinds or -1 in view:  # rows of several positions, of which there is one
                parents = [(p, n) for p, n in leaves(node) if isinstance(n, fx.Node) and not source.is_size(n)]
                found = Need({path: source.one(parent) for path, parent in parents}, True)
            else:
                self._want(node, ALL, need(source, node, ALL))
                self.wanted[node].add(view)
                return
        self._want(node, view, found)

    def _want(self, node: fx.Node, view: View, found: Need | None) -> None:
        assert found is not None
        self.wanted[node].add(view)
        self.needs[node, view] = found
        for path, parent in leaves(node):
            if isinstance(parent, fx.Node) and not self.source.is_size(parent):
                self.wanted.setdefault(parent, set()).add(self.source.normal(parent, found.views[path]))


class _Decode:
    """The graph at one position, with what attention reads at full capacity."""

    def __init__(self, cut: _Cut, order: list[fx.Node], caches: list[CacheSpec], capacity: int) -> None:
        self.cut, self.source, self.graph, self.capacity = cut, cut.source, fx.Graph(), capacity
        self.made: dict[tuple[fx.Node, View], Any] = {}
        self.tokens = self.graph.placeholder("tokens")
        self.position = self.graph.placeholder("position")
        self.held = {n: self.graph.placeholder(c.name) for n, c in zip(order, caches, strict=True)}
        self.every: Any = None
        self.batch: Any = None

    def module(self) -> fx.GraphModule:
        """The decode step."""
        source = self.source
        self.made[source.tokens, source.one(source.tokens)] = self.tokens
        for node in source.nodes:
            # All positions first: a row may be taken of them. Where they are cached, the new one comes first.
            for view in sorted(self.cut.wanted.get(node, ()), key=len, reverse=node in self.cut.points):
                self._make(node, view)
        logits = self.made[source.logits, source.one(source.logits)]
        outputs = [_last(self.graph, logits), *(self.made[n, ALL] for n in self.held)]
        self.graph.output(tuple(outputs))
        self.graph.eliminate_dead_code()
        return _as_module(source.module, self.graph)

    def _make(self, node: fx.Node, view: View) -> None:
        if (node, view) in self.made:
            return
        found = self.cut.needs.get((node, view))
        if found is None:
            self.made[node, view] = self._updated(node) if view == ALL else self._rows(node, view)
        elif kind_of(node) == "scaled_dot_product_attention" and self.source.rank(node) - 2 in view:
            self.made[node, view] = self._attention(node, found)
        else:
            self.made[node, view] = self._copied(node, found)

    def _copied(self, node: fx.Node, found: Need) -> fx.Node:
        args: list[Any] = [list(a) if isinstance(a, list | tuple) else a for a in node.args]
        kwargs: dict[str, Any] = {k: list(a) if isinstance(a, list | tuple) else a for k, a in node.kwargs.items()}
        for path, leaf in leaves(node):
            holder: Any = args if isinstance(path[0], int) else kwargs
            *outer, last = path
            for key in outer:
                holder = holder[key]
            if isinstance(leaf, fx.Node):
                holder[last] = self._argument(path, leaf, found)
            elif leaf == -1 and len(path) == 2 and kind_of(node) in ("view", "reshape", "_unsafe_view"):
                # OpenVINO works a size that is left to it out wrongly where the dims after it hold one position.
                size = size_of(node.meta["val"].shape[path[1]])
                holder[last] = size if isinstance(size, int) else leaf
        for i, argument in enumerate(node.args):
            if isinstance(argument, tuple):  # operators of a higher order tell them from lists
                args[i] = tuple(args[i])
        new = self.graph.create_node(node.op, node.target, tuple(args), kwargs)
        new.meta.update({k: v for k, v in node.meta.items() if k != "val"})
        return new

    def _argument(self, path: Path, leaf: fx.Node, found: Need) -> Any:
        if self.source.is_size(leaf):
            return self._number(leaf, 1 if found.sizes.get(path, found.is_one) else self.capacity)
        return self.made[leaf, self.source.normal(leaf, found.views[path])]

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(target, args, kwargs)

    def _positions(self) -> Any:
        if self.every is None:
            self.every = self._call(aten.arange.default, self.capacity)
        return self.every

    def _rows(self, node: fx.Node, view: View) -> Any:
        rows = self.made[node, ALL]
        for dim in sorted(view):
            rows = self._call(aten.index_select.default, rows, dim, self.position)
        return rows

    def _updated(self, node: fx.Node) -> Any:
        """The cache with the new value in it."""
        here = self._call(aten.eq.Tensor, self._positions(), self.position)
        shape = [1] * self.source.rank(node)
        shape[_dim(self.source, node)] = self.capacity
        mask = self._call(aten.reshape.default, here, shape)
        return self._call(aten.where.self, mask, self.made[node, self.source.one(node)], self.held[node])

    def _attention(self, node: fx.Node, found: Need) -> Any:
        """One query; where the operator is causal by itself, keys up to this position."""
        given = arguments_of(node)
        new = self._copied(node, found)
        if given["is_causal"] and self.source.dims(given["key"]):
            earlier = self._call(aten.le.Tensor, self._positions(), self.position)
            row = self._call(aten.reshape.default, earlier, [1, self.capacity])
            options = {k: v for k, v in given.items() if k in ("scale", "enable_gqa")}
            query, key, value = new.args[:3]
            self.graph.erase_node(new)
            options |= {"attn_mask": row, "dropout_p": 0.0, "is_causal": False}
            new = self._call(node.target, query, key, value, **options)
        return new

    def _number(self, node: fx.Node, length: int) -> Any:
        """A size, for this length: a number, or so many times the batch."""
        source, expression = self.source, node.meta["val"].node.expr
        value = expression.subs({source.length: length})
        if not value.free_symbols:
            return bool(value) if value.is_Boolean else int(value) if value.is_integer else float(value)
        count = value.subs({source.batch: 1})
        if source.batch is None or count.free_symbols or value != count * source.batch:
            source.refuse(node, f"a size of {expression}")
        if self.batch is None:
            self.batch = self._call(aten.sym_size.int, self.tokens, 0)
        return self.batch if count == 1 else self._call(operator.mul, self.batch, int(count))


def _last(graph: fx.Graph, logits: Any) -> fx.Node:
    return graph.call_function(aten.select.int, (logits, 1, -1))


def _as_module(owner: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    graph.lint()
    module = fx.GraphModule(owner, graph)
    # fx makes every buffer one that is saved; a rotary table that is none must not be moved with the weights.
    parts = dict(module.named_modules())
    for name, part in owner.named_modules():
        if name in parts:
            parts[name]._non_persistent_buffers_set |= part._non_persistent_buffers_set & parts[name]._buffers.keys()
    module.eval()
    return module
