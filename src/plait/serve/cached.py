"""Prefill and decode with a key-value cache, derived from a decoder's captured forward by dataflow alone.

No cache interface is asked of the model. In a decoder everything but attention acts on each position by itself; attention
reads the keys and values of earlier positions. So, from the graph of `forward(tokens [batch, length]) -> logits`:

    decode   the same graph at length 1. What depends on the position alone (indices, rotary tables, masks) is
             computed for all `capacity` positions and its row at `position` taken; where attention reads keys and values,
             the new ones are put into the cache at `position` and the whole cache is read, later positions masked.
    prefill  the graph as it is, which also gives out the keys and values, padded to `capacity`.

Attention is `scaled_dot_product_attention` (causal or with a mask), or two matrix products with whatever acts element by
element and a softmax in between. The cache holds what lies furthest up the chain of reshapes in front of the
attention and is smallest: key heads before they are repeated. A graph that mixes positions in another way is refused
with the operator and the user's line; what is derived is compared with the model itself (`decode.py`).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from plait.serve.attention import VIEWS, Decoder, bound, is_size

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


def derive(program: torch.export.ExportedProgram, capacity: int) -> Derived:
    """From a program `tokens [batch, length] -> (logits [batch, length, vocabulary], ...)` with both dims open.

    Raises:
        ServeError: the graph is not a decoder's, as far as this can tell; with the operator and the user's line.
    """
    module: Any = program.module(check_guards=False)
    source = Decoder(module)
    source.analyse()
    order = [n for n in source.nodes if n in source.points]
    caches = [_spec(source, node, f"cache_{i}", capacity) for i, node in enumerate(order)]
    return Derived(_prefill(source, order, capacity), _Decode(source, order, caches, capacity).module(), caches)


def _spec(source: Decoder, node: fx.Node, name: str, capacity: int) -> CacheSpec:
    value = node.meta["val"]
    shape: list[int | str] = []
    for i, size in enumerate(value.shape):
        is_batch = isinstance(size, torch.SymInt) and size.node.expr == source.batch
        shape.append(capacity if i == source.points[node] else "batch" if is_batch else int(size))
    return CacheSpec(name, tuple(shape), source.points[node], value.dtype)


def _prefill(source: Decoder, order: list[fx.Node], capacity: int) -> fx.GraphModule:
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for node in source.nodes:
        if node.op != "output":
            made[node] = graph.node_copy(node, lambda n: made[n])
    length = graph.call_function(aten.sym_size.int, (made[source.tokens], 1))
    rest = graph.call_function(operator.sub, (capacity, length))
    outputs = [_last(graph, made[source.logits])]
    for node in order:
        behind = node.meta["val"].dim() - 1 - source.points[node]
        padding: Any = [*([0, 0] * behind), 0, rest]
        outputs.append(graph.call_function(aten.constant_pad_nd.default, (made[node], padding, 0)))
    graph.output(tuple(outputs))
    return _as_module(source.module, graph)


class _Decode:
    """The graph at length 1, with what attention reads at full capacity."""

    def __init__(self, source: Decoder, order: list[fx.Node], caches: list[CacheSpec], capacity: int) -> None:
        self.source, self.graph, self.capacity = source, fx.Graph(), capacity
        self.one: dict[fx.Node, Any] = {}
        """Nodes at length 1."""
        self.all: dict[fx.Node, Any] = {}
        """Nodes at full capacity."""
        self.tokens = self.graph.placeholder("tokens")
        self.position = self.graph.placeholder("position")
        self.held = {n: self.graph.placeholder(c.name) for n, c in zip(order, caches, strict=True)}
        self.updated: dict[fx.Node, Any] = {}
        self.rows: dict[tuple[fx.Node, int], Any] = {}
        self.every: Any = None
        self.batch: Any = None

    def module(self) -> fx.GraphModule:
        """The decode step."""
        source = self.source
        self.one[source.tokens] = self.tokens
        logits = source.logits
        for node in source.nodes:
            if node in source.data and node is not source.tokens:
                self._at_one(node)
        outputs = [_last(self.graph, self.one[logits]), *(self.updated[n] for n in self.held)]
        self.graph.output(tuple(outputs))
        self.graph.eliminate_dead_code()
        return _as_module(source.module, self.graph)

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(target, args, kwargs)

    def _is_earlier(self) -> Any:
        """[capacity] bool: positions up to this one."""
        if self.every is None:
            self.every = self._call(aten.arange.default, self.capacity)
        return self._call(aten.le.Tensor, self.every, self.position)

    def _at_one(self, node: fx.Node) -> Any:
        """A value of the data path, at this position."""
        if node in self.one:
            return self.one[node]
        source = self.source
        if node.target is aten.scaled_dot_product_attention.default and node in source.reads:
            made = self._attention(node)
        else:
            read = source.reads.get(node, [])
            if node in source.pairs and node.target in VIEWS:
                return self._view_of_pairs(node)

            def at_one(n: fx.Node) -> Any:
                return self._argument(n, node)

            new: list[Any] = [fx.map_arg(a, self._at_all if i in read else at_one) for i, a in enumerate(node.args)]
            kwargs: Any = fx.map_arg(dict(node.kwargs), at_one)
            made = self.graph.create_node(node.op, node.target, tuple(new), kwargs)
            made.meta.update({k: v for k, v in node.meta.items() if k != "val"})
        self.one[node] = made
        if node in source.points:
            self._update(node, made)
        return made

    def _view_of_pairs(self, node: fx.Node) -> Any:
        """Attention scores in another shape: queries at one position, keys, the last dim, at all."""
        arguments: Any = node.args
        scores, (*front, last) = arguments
        new: Any = fx.map_arg(front, lambda n: self._number(n, 1))
        keys = fx.map_arg(last, lambda n: self._number(n, self.capacity))
        self.one[node] = self._call(node.target, self._at_one(scores), [*new, keys])
        return self.one[node]

    def _argument(self, node: fx.Node, user: fx.Node) -> Any:
        """What a computation at one position takes of `node`."""
        source = self.source
        if node in source.data:
            return self._at_one(node)
        if is_size(node):
            return self._number(node, 1)
        dims = source.dims(node)
        if not dims:
            return self._static_at_one(node)
        whole = self._at_all(node)
        if user in source.pairs:
            rank = user.meta["val"].dim()
            dims = [d for d, right in zip(dims, source.right(node, rank), strict=True) if right == rank - 2]
        elif len(dims) > 1:
            source.refuse(user, "it takes a table of positions by positions")
        for dim in dims:
            whole = self._row(node, whole, dim)
        return whole

    def _static_at_one(self, node: fx.Node) -> Any:
        """What depends on no position, with its sizes at length 1."""
        if node not in self.one:
            self.one[node] = self.graph.node_copy(
                node,
                lambda n: (
                    self._number(n, 1)
                    if is_size(n)
                    else self._at_one(n)
                    if n in self.source.data
                    else self._static_at_one(n)
                ),
            )
        return self.one[node]

    def _row(self, node: fx.Node, whole: Any, dim: int) -> Any:
        if (node, dim) not in self.rows:
            self.rows[node, dim] = self._call(aten.index_select.default, whole, dim, self.position)
        return self.rows[node, dim]

    def _number(self, node: fx.Node, length: int) -> Any:
        """A size, for this length: a number, or so many times the batch."""
        source, expression = self.source, node.meta["val"].node.expr
        value = expression.subs({source.length: length})
        if not value.free_symbols:
            return int(value)
        count = value.subs({source.batch: 1})
        if source.batch is None or count.free_symbols or value != count * source.batch:
            source.refuse(node, f"a size of {expression}")
        if self.batch is None:
            self.batch = self._call(aten.sym_size.int, self.tokens, 0)
        return self.batch if count == 1 else self._call(operator.mul, self.batch, int(count))

    def _at_all(self, node: fx.Node) -> Any:
        """A value at all positions of the capacity: a cache, or what depends on positions alone."""
        source = self.source
        if node in self.all:
            return self.all[node]
        if node in source.points:
            self._at_one(node)
            return self.updated[node]
        if is_size(node):
            return self._number(node, self.capacity)
        if node is source.tokens:
            source.refuse(node, "something depends on all tokens at once")
        self.all[node] = self.graph.node_copy(node, self._at_all)
        return self.all[node]

    def _update(self, node: fx.Node, new: Any) -> None:
        value = node.meta["val"]
        dim = self.source.points[node]
        if self.every is None:
            self.every = self._call(aten.arange.default, self.capacity)
        here = self._call(aten.eq.Tensor, self.every, self.position)
        shape = [1] * value.dim()
        shape[dim] = self.capacity
        mask = self._call(aten.reshape.default, here, shape)
        self.updated[node] = self._call(aten.where.self, mask, new, self.held[node])

    def _attention(self, node: fx.Node) -> Any:
        source, arguments = self.source, bound(node)
        query = self._at_one(arguments["query"])
        key, value = self._at_all(arguments["key"]), self._at_all(arguments["value"])
        mask = arguments["attn_mask"]
        if mask is None:
            row = self._call(aten.reshape.default, self._is_earlier(), [1, self.capacity])
        else:
            row = self._at_all(mask)
            rank = mask.meta["val"].dim()
            if rank - 2 in source.dims(mask):
                row = self._row(mask, row, rank - 2)
        options = {"attn_mask": row, "dropout_p": 0.0, "is_causal": False}
        options |= {k: arguments[k] for k in ("scale", "enable_gqa") if k in arguments}
        return self._call(aten.scaled_dot_product_attention.default, query, key, value, **options)


def _last(graph: fx.Graph, logits: Any) -> fx.Node:
    return graph.call_function(aten.select.int, (logits, 1, -1))


def _as_module(owner: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    graph.lint()
    module = fx.GraphModule(owner, graph)
    module.eval()
    return module
