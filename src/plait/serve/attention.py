"""A decoder's captured forward, read: which values lie at positions, where attention reads keys and values of earlier ones.

What mixes positions in another way than attention is refused, with the operator and the user's line. `cached.py` makes the
programs with a cache out of this.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import fx, nn

from plait.errors import ServeError

__all__ = ["VIEWS", "Decoder", "bound", "is_size"]

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
VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default}
_BETWEEN = {
    aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.masked_fill_.Scalar, aten.masked_fill_.Tensor,
    aten.softmax.int, aten._softmax.default, aten.dropout.default, aten.to.dtype, aten._to_copy.default,
    aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default,
}  # fmt: skip
_MIXING = (
    "cumsum", "cumprod", "cummax", "logcumsumexp", "conv1d", "conv2d", "convolution", "lstm", "gru", "rnn", "flip",
    "roll", "mean.dim", "sum.dim_IntList", "amax", "max.dim", "var", "fft", "unfold", "scan", "while_loop", "cat",
)  # fmt: skip


class Decoder:
    """The graph of `tokens [batch, length] -> (logits, ...)`, analysed."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
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
        value: Any = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return []
        sizes: list[Any] = list(value.shape)
        return [i for i, s in enumerate(sizes) if isinstance(s, torch.SymInt) and s.node.expr == self.length]

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
                self.refuse(node, "it pairs positions with each other")
            elif node.target in _SOFTMAX and self._over(node, _dim(node)):
                self.refuse(node, "a softmax over positions that is no attention")
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
        arguments = bound(node)
        key, value, mask = arguments["key"], arguments["value"], arguments["attn_mask"]
        if not self.dims(key):
            return  # attends to something else than positions
        if mask is None and not arguments["is_causal"]:
            self.refuse(node, "it attends to later positions (neither causal nor masked)")
        if mask in self.data:
            self.refuse(node, "its mask depends on the tokens")
        self.reads[node] = [1, 2]
        for argument in (key, value):
            self._cache(argument)

    def _product(self, node: fx.Node) -> None:
        target: Any = node.target
        first = _PRODUCTS[target]
        left, right = node.args[first], node.args[first + 1]
        assert isinstance(left, fx.Node)
        assert isinstance(right, fx.Node)
        rank = node.meta["val"].dim()
        if left in self.pairs:
            if right not in self.data or self.dims(right) != [right.meta["val"].dim() - 2]:
                self.refuse(node, "it multiplies attention scores with something else than values")
            self._cache(right)
            self.reads[node] = [first + 1]
        elif len(self.dims(node)) == 2:
            if self.dims(node) != [rank - 2, rank - 1] or right not in self.data:
                self.refuse(node, "it pairs positions in an order that is not queries by keys")
            self._cache(right)
            self.reads[node] = [first + 1]
            self.pairs.add(node)
        elif self.dims(left) and self.dims(left)[-1] == left.meta["val"].dim() - 1:
            self.refuse(node, "it sums over positions")

    def _between(self, node: fx.Node) -> None:
        rank = node.meta["val"].dim() if isinstance(node.meta["val"], torch.Tensor) else 0
        is_fine = node.target in _BETWEEN | VIEWS or torch.Tag.pointwise in getattr(node.target, "tags", ())
        if node.target in _SOFTMAX:
            is_fine = _dim(node) % rank == rank - 1
        if not is_fine or self.dims(node)[-2:] != [rank - 2, rank - 1]:
            self.refuse(node, "it changes attention scores in a way that mixes positions")
        if any(
            p in self.data and p not in self.pairs and rank - 1 in self.right(p, rank) for p in node.all_input_nodes
        ):
            self.refuse(node, "a mask that depends on the tokens")
        self.pairs.add(node)

    def right(self, node: fx.Node, rank: int) -> list[int]:
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
            if self._is_plain(at) and (not self._is_plain(best) or _size(at) < _size(best)):
                best = at
        if not self._is_plain(best):
            self.refuse(node, "its keys or values have no shape of batch, positions and fixed sizes")
        self.points[best] = self.dims(best)[0]

    def _is_plain(self, node: fx.Node) -> bool:
        """Whether a tensor has one dim of positions, and beside it the batch and fixed sizes only."""
        sizes: list[Any] = list(node.meta["val"].shape)
        others = [s for s in sizes if isinstance(s, torch.SymInt) and s.node.expr not in (self.length, self.batch)]
        return len(self.dims(node)) == 1 and not others

    def refuse(self, node: fx.Node, why: str) -> NoReturn:
        """Say which operator it is that cannot run at one position, and where it stands."""
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

    @property
    def logits(self) -> fx.Node:
        """The first output with a value for each position and token."""
        leaves: Any = self.graph.output_node().args[0]
        for leaf in leaves if isinstance(leaves, tuple | list) else [leaves]:
            if not isinstance(leaf, fx.Node):
                continue
            value = leaf.meta.get("val")
            if (
                isinstance(value, torch.Tensor)
                and value.dim() == 3
                and value.is_floating_point()
                and self.dims(leaf) == [1]
            ):
                return leaf
        raise ServeError("decode: the model has no output [batch, length, vocabulary]")


def is_size(node: fx.Node) -> bool:
    """Whether a value is a size, not a tensor."""
    return isinstance(node.meta.get("val"), torch.SymInt)


def bound(node: fx.Node) -> dict[str, Any]:
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
    return node.target is aten.slice.Tensor and _dim(node) == dim


def _dim(node: fx.Node) -> int:
    """The dim of a softmax or a slice."""
    found: Any = node.args[1] if len(node.args) > 1 else 0
    return int(found)


def _line(node: fx.Node) -> str:
    lines = [line.strip() for line in (node.stack_trace or "").splitlines()]
    frames = [i for i, line in enumerate(lines) if line.startswith('File "') and "/torch/" not in line]
    return " ".join(lines[frames[-1] : frames[-1] + 2]) if frames else f"at {node.name}"
