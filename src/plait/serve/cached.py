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

from plait.errors import ServeError

__all__ = ["CacheSpec", "Derived", "derive"]

aten = torch.ops.aten
_CHAIN = {
    aten.unsqueeze.default, aten.expand.default, aten.reshape.default, aten.view.default, aten.clone.default,
    aten.contiguous.default, aten.transpose.int, aten.permute.default, aten.to.dtype, aten.flatten.using_ints,
    aten._to_copy.default, aten.repeat_interleave.self_int, aten.alias.default, aten.slice.Tensor, aten.unflatten.int,
    aten.squeeze.dim, aten.repeat.default,
}  # fmt: skip
_SOFTMAX = {aten.softmax.int, aten._softmax.default}
_PRODUCTS = {aten.matmul.default: 0, aten.bmm.default: 0, aten.baddbmm.default: 1}
"""Operator -> where its two factors begin among the arguments."""
_VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default}
_BETWEEN = {
    aten.softmax.int, aten._softmax.default, aten.dropout.default, aten.to.dtype, aten._to_copy.default,
    aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default,
}  # fmt: skip
_MIXING = (
    "cumsum", "cumprod", "cummax", "logcumsumexp", "conv1d", "conv2d", "convolution", "lstm", "gru", "rnn", "flip",
    "roll", "mean.dim", "sum.dim_IntList", "amax", "max.dim", "var", "fft", "unfold", "scan", "while_loop", "cat",
)  # fmt: skip


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
    return _Derivation(module, capacity).derived()


class _Derivation:
    def __init__(self, module: fx.GraphModule, capacity: int) -> None:
        self.module, self.capacity = module, capacity
        self.graph: fx.Graph = module.graph
        self.graph.eliminate_dead_code()
        self.nodes = list(self.graph.nodes)
        inputs = [n for n in self.nodes if n.op == "placeholder"]
        if len(inputs) != 1 or inputs[0].meta["val"].dim() != 2:
            raise ServeError(
                f"decode: a decoder takes tokens [batch, length] alone, this one takes {len(inputs)} inputs"
            )
        self.tokens = inputs[0]
        batch, length = self.tokens.meta["val"].shape
        if not isinstance(length, torch.SymInt):
            raise ServeError(
                f"decode: torch.export fixed the model's length to {length}",
                hint="its Python reads the length somewhere",
            )
        self.length = length.node.expr
        self.batch = batch.node.expr if isinstance(batch, torch.SymInt) else None
        self.parameters = {n for n in self.nodes if n.op == "get_attr" and self._is_parameter(n)}
        self.data = self._data()
        self.points: dict[fx.Node, int] = {}
        """Cached node -> dim of the positions."""
        self.reads: dict[fx.Node, list[int]] = {}
        """Attention node -> which of its arguments are read from the cache."""
        self.pairs: set[fx.Node] = set()
        """Values with a dim of queries and a last one of keys."""

    # -- what is what

    def _is_parameter(self, node: fx.Node) -> bool:
        value: Any = self.module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        return isinstance(value, nn.Parameter)

    def _data(self) -> set[fx.Node]:
        """Tensors that depend on the tokens, or on parameters at single positions: computed at length 1.

        The rest of what has a length depends on positions alone.
        """
        found = {self.tokens}
        for node in self.nodes:
            if not isinstance(node.meta.get("val"), torch.Tensor | tuple | list) or node.op != "call_function":
                continue
            parents = node.all_input_nodes
            from_data = any(p in found for p in parents)
            # A table looked up at positions: the row of one position is enough. A slice of it is no lookup.
            looked_up = any(p in self.parameters for p in parents) and any(len(self.dims(p)) == 1 for p in parents)
            if from_data or looked_up:
                found.add(node)
        return found

    def dims(self, node: fx.Node) -> list[int]:
        """The dims of a node's tensor whose size is the length."""
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return []
        return [i for i, s in enumerate(value.shape) if isinstance(s, torch.SymInt) and s.node.expr == self.length]

    # -- analysis

    def analyse(self) -> None:
        """Find attention, and refuse what mixes positions in another way."""
        for node in self.nodes:
            if node not in self.data or node.op != "call_function":
                continue
            if node.target is aten.scaled_dot_product_attention.default:
                self._attention(node)
            elif node.target in _PRODUCTS:
                self._product(node)
            elif any(p in self.pairs for p in node.all_input_nodes):
                self._between(node)
            elif len(self.dims(node)) > 1:
                self._refuse(node, "it pairs positions with each other")
            elif node.target in _SOFTMAX and self._over(node, int(node.args[1])):  # type: ignore[call-overload]
                self._refuse(node, "a softmax over positions that is no attention")
        if not self.points:
            raise ServeError(
                "decode: no attention was found in the graph, so there is nothing to cache"
                + (f"; {self._mixing()}" if self._mixing() else ""),
                hint="generate with the exported forward, which recomputes the prefix",
            )

    def _over(self, node: fx.Node, dim: int) -> bool:
        value = node.meta["val"]
        return dim % value.dim() in self.dims(node)

    def _attention(self, node: fx.Node) -> None:
        arguments = _bound(node)
        key, value, mask = arguments["key"], arguments["value"], arguments["attn_mask"]
        if not self.dims(key):
            return  # attends to something else than positions
        if mask is None and not arguments["is_causal"]:
            self._refuse(node, "it attends to later positions (neither causal nor masked)")
        if mask in self.data:
            self._refuse(node, "its mask depends on the tokens")
        self.reads[node] = [1, 2]
        for argument in (key, value):
            self._cache(argument)

    def _product(self, node: fx.Node) -> None:
        first = _PRODUCTS[node.target]  # type: ignore[index]
        left, right = node.args[first], node.args[first + 1]
        assert isinstance(left, fx.Node)
        assert isinstance(right, fx.Node)
        rank = node.meta["val"].dim()
        if left in self.pairs:
            if right not in self.data or self.dims(right) != [right.meta["val"].dim() - 2]:
                self._refuse(node, "it multiplies attention scores with something else than values")
            self._cache(right)
            self.reads[node] = [first + 1]
        elif len(self.dims(node)) == 2:
            if self.dims(node) != [rank - 2, rank - 1] or right not in self.data:
                self._refuse(node, "it pairs positions in an order that is not queries by keys")
            self._cache(right)
            self.reads[node] = [first + 1]
            self.pairs.add(node)
        elif self.dims(left) and self.dims(left)[-1] == left.meta["val"].dim() - 1:
            self._refuse(node, "it sums over positions")

    def _between(self, node: fx.Node) -> None:
        rank = node.meta["val"].dim() if isinstance(node.meta["val"], torch.Tensor) else 0
        is_fine = node.target in _BETWEEN | _VIEWS or torch.Tag.pointwise in getattr(node.target, "tags", ())
        if node.target in _SOFTMAX:
            is_fine = int(node.args[1]) % rank == rank - 1  # type: ignore[call-overload]
        if not is_fine or self.dims(node)[-2:] != [rank - 2, rank - 1]:
            self._refuse(node, "it changes attention scores in a way that mixes positions")
        if any(
            p in self.data and p not in self.pairs and rank - 1 in self._right(p, rank) for p in node.all_input_nodes
        ):
            self._refuse(node, "a mask that depends on the tokens")
        self.pairs.add(node)

    def _right(self, node: fx.Node, rank: int) -> list[int]:
        """The length's dims of a node as those of a result of `rank` dims that it is broadcast to."""
        value = node.meta.get("val")
        return [i + rank - value.dim() for i in self.dims(node)] if isinstance(value, torch.Tensor) else []

    def _cache(self, node: fx.Node) -> None:
        best, at = node, node
        while at.target in _CHAIN:
            parents = [p for p in at.all_input_nodes if isinstance(p.meta.get("val"), torch.Tensor)]
            if len(parents) != 1 or parents[0] not in self.data or len(self.dims(parents[0])) != 1:
                break
            if _is_cut(at, self.dims(parents[0])[0]):
                break
            at = parents[0]
            if _size(at) < _size(best):
                best = at
        if len(self.dims(best)) != 1:
            self._refuse(node, "its keys or values have no single dim of positions")
        self.points[best] = self.dims(best)[0]

    def _refuse(self, node: fx.Node, why: str) -> None:
        raise ServeError(
            f"decode: {node.target} cannot run position by position: {why}\n\n  {_line(node)}",
            hint="generate with the exported forward, which recomputes the prefix",
        )

    def _mixing(self) -> str:
        for node in self.nodes:
            words = str(node.target).removeprefix("aten.")
            if node in self.data and any(words.startswith(word) for word in _MIXING):
                return f"{node.target} carries information between positions: {_line(node)}"
        return ""

    # -- the two programs

    def derived(self) -> Derived:
        self.analyse()
        order = [n for n in self.nodes if n in self.points]
        caches = []
        for index, node in enumerate(order):
            value = node.meta["val"]
            shape: list[int | str] = []
            for i, size in enumerate(value.shape):
                is_batch = isinstance(size, torch.SymInt) and size.node.expr == self.batch
                if i != self.points[node] and isinstance(size, torch.SymInt) and not is_batch:
                    self._refuse(node, "a cached tensor has a size that depends on the inputs in another way")
                shape.append(self.capacity if i == self.points[node] else "batch" if is_batch else int(size))
            caches.append(CacheSpec(f"cache_{index}", tuple(shape), self.points[node], value.dtype))
        decode = _Decode(self, order, caches).module()
        return Derived(self._prefill(order), decode, caches)

    def _prefill(self, order: list[fx.Node]) -> fx.GraphModule:
        graph = fx.Graph()
        made: dict[fx.Node, fx.Node] = {}
        for node in self.nodes:
            if node.op != "output":
                made[node] = graph.node_copy(node, lambda n: made[n])
        length = graph.call_function(aten.sym_size.int, (made[self.tokens], 1))
        rest = graph.call_function(operator.sub, (self.capacity, length))
        outputs = [_last(graph, made[self.logits])]
        for node in order:
            behind = node.meta["val"].dim() - 1 - self.points[node]
            padding = [0, 0] * behind + [0, rest]
            outputs.append(graph.call_function(aten.constant_pad_nd.default, (made[node], padding, 0)))
        graph.output(tuple(outputs))
        return _as_module(self.module, graph)

    @property
    def logits(self) -> fx.Node:
        """The first output with a value for each position and token."""
        leaves = self.graph.output_node().args[0]
        for leaf in leaves if isinstance(leaves, tuple | list) else [leaves]:
            value = leaf.meta.get("val") if isinstance(leaf, fx.Node) else None
            if (
                isinstance(value, torch.Tensor)
                and value.dim() == 3
                and value.is_floating_point()
                and self.dims(leaf) == [1]
            ):
                return leaf
        raise ServeError("decode: the model has no output [batch, length, vocabulary]")


class _Decode:
    """The graph at length 1, with what attention reads at full capacity."""

    def __init__(self, source: _Derivation, order: list[fx.Node], caches: list[CacheSpec]) -> None:
        self.source, self.graph = source, fx.Graph()
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
            self.every = self._call(aten.arange.default, self.source.capacity)
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
            if node in source.pairs and node.target in _VIEWS:
                return self._view_of_pairs(node)
            new = [
                fx.map_arg(a, self._at_all if i in read else lambda n, node=node: self._argument(n, node))
                for i, a in enumerate(node.args)
            ]
            kwargs = fx.map_arg(dict(node.kwargs), lambda n: self._argument(n, node))
            made = self.graph.create_node(node.op, node.target, tuple(new), kwargs, name=None)  # type: ignore[arg-type]
        self.one[node] = made
        if node in source.points:
            self._update(node, made)
        return made

    def _view_of_pairs(self, node: fx.Node) -> Any:
        """Attention scores in another shape: queries at one position, keys, the last dim, at all."""
        scores, (*front, last) = node.args[0], node.args[1]  # type: ignore[misc]
        new = fx.map_arg(front, lambda n: self._number(n, 1))
        keys = fx.map_arg(last, lambda n: self._number(n, self.source.capacity))
        self.one[node] = self._call(node.target, self._at_one(scores), [*new, keys])  # type: ignore[arg-type]
        return self.one[node]

    def _argument(self, node: fx.Node, user: fx.Node) -> Any:
        """What a computation at one position takes of `node`."""
        source = self.source
        if node in source.data:
            return self._at_one(node)
        if _is_size(node):
            return self._number(node, 1)
        dims = source.dims(node)
        if not dims:
            return self._static_at_one(node)
        whole = self._at_all(node)
        if user in source.pairs:
            rank = user.meta["val"].dim()
            dims = [d for d, right in zip(dims, source._right(node, rank), strict=True) if right == rank - 2]
        elif len(dims) > 1:
            source._refuse(user, "it takes a table of positions by positions")
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
                    if _is_size(n)
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
            source._refuse(node, f"a size of {expression}")
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
        if _is_size(node):
            return self._number(node, source.capacity)
        if node is source.tokens:
            source._refuse(node, "something depends on all tokens at once")
        self.all[node] = self.graph.node_copy(node, self._at_all)
        return self.all[node]

    def _update(self, node: fx.Node, new: Any) -> None:
        value = node.meta["val"]
        dim = self.source.points[node]
        if self.every is None:
            self.every = self._call(aten.arange.default, self.source.capacity)
        here = self._call(aten.eq.Tensor, self.every, self.position)
        shape = [1] * value.dim()
        shape[dim] = self.source.capacity
        mask = self._call(aten.reshape.default, here, shape)
        self.updated[node] = self._call(aten.where.self, mask, new, self.held[node])

    def _attention(self, node: fx.Node) -> Any:
        source, arguments = self.source, _bound(node)
        query = self._at_one(arguments["query"])
        key, value = self._at_all(arguments["key"]), self._at_all(arguments["value"])
        mask = arguments["attn_mask"]
        if mask is None:
            row = self._call(aten.reshape.default, self._is_earlier(), [1, source.capacity])
        else:
            row = self._at_all(mask)
            rank = mask.meta["val"].dim()
            if rank - 2 in source.dims(mask):
                row = self._row(mask, row, rank - 2)
        options = {"attn_mask": row, "dropout_p": 0.0, "is_causal": False}
        options |= {k: arguments[k] for k in ("scale", "enable_gqa") if k in arguments}
        return self._call(aten.scaled_dot_product_attention.default, query, key, value, **options)


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.SymInt)


def _bound(node: fx.Node) -> dict[str, Any]:
    """An operator's arguments by the names of its schema."""
    found: dict[str, Any] = {}
    for i, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if i < len(node.args):
            found[argument.name] = node.args[i]
        else:
            found[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return found


def _size(node: fx.Node) -> int:
    """Elements of a tensor, its open sizes counted as 1."""
    count = 1
    for size in node.meta["val"].shape:
        count *= 1 if isinstance(size, torch.SymInt) else int(size)
    return count


def _is_cut(node: fx.Node, dim: int) -> bool:
    """Whether a slice takes only some of the positions."""
    return node.target is aten.slice.Tensor and (node.args[1] if len(node.args) > 1 else 0) == dim


def _line(node: fx.Node) -> str:
    lines = [line.strip() for line in (node.stack_trace or "").splitlines()]
    frames = [i for i, line in enumerate(lines) if line.startswith('File "') and "/torch/" not in line]
    return " ".join(lines[frames[-1] : frames[-1] + 2]) if frames else f"at {node.name}"


def _last(graph: fx.Graph, logits: Any) -> fx.Node:
    return graph.call_function(aten.select.int, (logits, 1, -1))


def _as_module(owner: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    graph.lint()
    module = fx.GraphModule(owner, graph)
    module.eval()
    return module
