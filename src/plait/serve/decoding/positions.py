"""A decoder's captured forward, read: which dims of its values are positions, and which values are worth a cache.

A size of the graph is, as a function of the length:

    exact   the length itself                            one row of it is one position
    flat    batch x length, or a multiple of that        positions of all samples in one dim, as rows of experts are
    many    another multiple of it (heads x length)
    odd     anything else (length + 1, length // 8)      no single row is a position
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from pathlib import Path as FilePath
from typing import Any, NoReturn

import torch
from torch import fx

from plait.errors import ServeError

__all__ = [
    "ALL",
    "EXACT",
    "FLAT",
    "MANY",
    "ODD",
    "VIEWS",
    "Path",
    "Positions",
    "View",
    "arguments_of",
    "is_users",
    "kind_of",
    "leaves",
    "line_of",
    "size_of",
]

aten = torch.ops.aten

View = frozenset[int]
"""Dims of a value that hold one position alone; its other dims of positions hold all. -1: a value without such dims,
made of one position."""
ALL: View = frozenset()
Path = tuple[Any, ...]
"""Of an argument: (number or name,), or (number or name, place in its list)."""

EXACT, FLAT, MANY, ODD = "exact", "flat", "many", "odd"

_PLAIT = f"{FilePath(__file__).resolve().parents[2]}/"

VIEWS = {
    "unsqueeze", "expand", "reshape", "view", "clone", "contiguous", "transpose", "permute", "to", "flatten", "_to_copy",
    "repeat_interleave", "alias", "slice", "unflatten", "squeeze", "repeat", "_unsafe_view", "detach",
}  # fmt: skip
"""Operators that give the values of their one input, in another layout or more than once."""


class Positions:
    """The graph of `tokens [batch, length] -> (logits, ...)`, for lengths from `shortest` to `capacity`."""

    def __init__(self, module: fx.GraphModule, capacity: int, shortest: int = 2) -> None:
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
        batch, self.length = (size_of(size) for size in self.tokens.meta["val"].shape)
        self.batch = None if isinstance(batch, int) else batch
        self.data = {self.tokens}
        """What depends on the tokens' values."""
        self.long = {self.tokens}
        """What depends on the length, or on positions."""
        wanted = (shortest, shortest + 1, capacity // 3, capacity - 1, capacity)
        self._lengths = sorted({min(capacity, max(shortest, length)) for length in wanted})
        self._kinds: dict[Any, str] = {}
        self._dims: dict[fx.Node, dict[int, str]] = {}
        for node in self.nodes:
            if self.is_size(node):
                continue
            parents = node.all_input_nodes
            if any(p in self.data for p in parents):
                self.data.add(node)
            if self.dims(node) or any(p in self.long or (self.is_size(p) and self._has_length(p)) for p in parents):
                self.long.add(node)

    def _has_length(self, node: fx.Node) -> bool:
        return self.length in node.meta["val"].node.expr.free_symbols

    def is_size(self, node: fx.Node) -> bool:
        """Whether a value is a number that follows from the sizes of the inputs."""
        value = node.meta.get("val")
        if not isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            return False
        return all(symbol in (self.length, self.batch) for symbol in value.node.expr.free_symbols)

    def takes_last(self, node: fx.Node) -> bool:
        """Whether an operator takes the last position alone: x[:, -1], x[:, -1:], x[:, [-1]]."""
        kind, parent = kind_of(node), node.args[0] if node.args else None
        if kind not in ("select", "slice", "index") or not isinstance(parent, fx.Node) or self.dims(node):
            return False
        if list(self.dims(parent).values()) != [EXACT]:
            return False
        where, given = next(iter(self.dims(parent))), arguments_of(node)
        if kind == "index":
            index = given["indices"][where] if len(given["indices"]) > where else None
            return isinstance(index, fx.Node) and self.constant(index) in (-1, [-1])
        begin = given["index"] if kind == "select" else given["start"]
        if isinstance(begin, fx.Node):
            begin = begin.meta["val"].node.expr - self.length if self.is_size(begin) else None
        return int(given["dim"]) % self.rank(parent) == where and begin == -1

    def constant(self, node: fx.Node) -> Any:
        """The values of a tensor that the forward wrote down, as a list; None: it is none."""
        while kind_of(node) in ("lift_fresh_copy", "detach", "clone", "alias"):
            node = node.all_input_nodes[0]
        value = operator.attrgetter(str(node.target))(self.module) if node.op == "get_attr" else None
        return value.tolist() if isinstance(value, torch.Tensor) and value.numel() == 1 else None

    def dims(self, node: fx.Node) -> dict[int, str]:
        """The dims of a node's tensor (of the first, where it gives several) whose size follows from the length."""
        if node not in self._dims:
            value = value_of(node)
            sizes: list[Any] = [] if value is None else list(value.shape)
            found = {i: self._kind(size) for i, size in enumerate(sizes) if isinstance(size, torch.SymInt)}
            self._dims[node] = {i: kind for i, kind in found.items() if kind}
        return self._dims[node]

    def _kind(self, size: torch.SymInt) -> str:
        expression = size.node.expr
        if self.length not in expression.free_symbols:
            return ""
        if expression not in self._kinds:
            self._kinds[expression] = self._kind_of(expression)
        return self._kinds[expression]

    def _kind_of(self, expression: Any) -> str:
        # By its values: Max(0, length - 1) - length + 2 is a way to write 1.
        per_batch = [
            [
                expression.subs({self.length: length} | ({self.batch: b} if self.batch else {}))
                for length in self._lengths
            ]
            for b in (2, 3)
        ]
        first = per_batch[0]
        if len(set(first)) == 1:
            return ""
        if first == self._lengths:
            return EXACT
        factors = [[value / length for value, length in zip(v, self._lengths, strict=True)] for v in per_batch]
        if len(set(factors[0])) > 1:
            return ODD
        return FLAT if self.batch is None or factors[0] != factors[1] else MANY

    def one(self, node: fx.Node) -> View:
        """The view of one position alone."""
        return frozenset(self.dims(node) or {-1})

    def normal(self, node: fx.Node, view: View) -> View:
        """The view, or ALL where nothing in the value is of any position."""
        return view if node in self.long else ALL

    def rank(self, node: fx.Node) -> int:
        """Dims of a node's tensor."""
        value = value_of(node)
        return 0 if value is None else value.dim()

    def cut(self, node: fx.Node) -> fx.Node | None:
        """The smallest tensor of positions up the chain of layouts in front of `node` (itself, too); None: there is none.

        Key heads before they are repeated for groups of queries, for example.
        """
        best, at = (node if self._is_plain(node) else None), node
        while kind_of(at) in VIEWS:
            parents = [p for p in at.all_input_nodes if not self.is_size(p)]
            if len(parents) != 1 or parents[0] not in self.data or list(self.dims(parents[0]).values()) != [EXACT]:
                break
            if kind_of(at) == "slice" and self.dims(at).keys() != self.dims(parents[0]).keys():
                break
            at = parents[0]
            if self._is_plain(at) and (best is None or _size(at) < _size(best)):
                best = at
        return best

    def _is_plain(self, node: fx.Node) -> bool:
        """Whether a tensor of data has one dim of positions, and beside it the batch and fixed sizes only."""
        value = node.meta.get("val")
        if node is self.tokens:
            return True
        # Whole and truth values come from the tokens by little work, and not every runtime pads them.
        if node not in self.data or not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return False
        sizes = [size_of(size) for size in value.shape]
        others = [size for size in sizes if not isinstance(size, int) and size not in (self.length, self.batch)]
        return list(self.dims(node).values()) == [EXACT] and not others

    def refuse(self, node: fx.Node, why: str) -> NoReturn:
        """Say which operator it is that cannot run at one position, and where it stands."""
        raise ServeError(
            f"decode: {node.target} cannot run position by position: {why}\n\n  {line_of(node)}",
            hint="generate with the exported forward, which recomputes the prefix",
        )

    @property
    def logits(self) -> fx.Node:
        """The first output with a value for each position and token, or for each token after the last position."""
        outputs: Any = self.graph.output_node().args[0]
        for leaf in outputs if isinstance(outputs, tuple | list) else [outputs]:
            if not isinstance(leaf, fx.Node):
                continue
            value = leaf.meta.get("val")
            if not isinstance(value, torch.Tensor) or value.dim() != 3 or not value.is_floating_point():
                continue
            if self.dims(leaf) == {1: EXACT} or (not self.dims(leaf) and value.shape[1] == 1):
                return leaf
        raise ServeError("decode: the model has no output [batch, length, vocabulary]")


def value_of(node: fx.Node) -> torch.Tensor | None:
    """A node's tensor, or the first of its tensors."""
    value = node.meta.get("val")
    if isinstance(value, tuple | list):
        value = next((v for v in value if isinstance(v, torch.Tensor)), None)
    return value if isinstance(value, torch.Tensor) else None


def kind_of(node: fx.Node) -> str:
    """An operator's name without namespace, overload and the sign of writing in place: matmul, softmax, getitem."""
    if node.target is operator.getitem:
        return "getitem"
    words = str(node.target).split(".")
    return words[1] if len(words) > 1 and node.op == "call_function" else words[0]


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """An operator's arguments by the names of its schema."""
    found: dict[str, Any] = {}
    for i, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if i < len(node.args):
            found[argument.name] = node.args[i]
        else:
            found[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return found


def leaves(node: fx.Node) -> Iterator[tuple[Path, Any]]:
    """An operator's arguments and what is in their lists, each with its path."""
    for key, argument in [*enumerate(node.args), *node.kwargs.items()]:
        if isinstance(argument, list | tuple):
            yield from (((key, i), item) for i, item in enumerate(argument))
        else:
            yield (key,), argument


def size_of(size: Any) -> Any:
    """A size that can be compared with others: a number, or an expression of open sizes."""
    if not isinstance(size, torch.SymInt):
        return size
    expression = size.node.expr
    return int(expression) if expression.is_number else expression


def line_of(node: fx.Node) -> str:
    """The user's line of an operator."""
    lines = [line.strip() for line in (node.stack_trace or "").splitlines()]
    frames = [i for i, line in enumerate(lines) if line.startswith('File "') and is_users(line)]
    return " ".join(lines[frames[-1] : frames[-1] + 2]) if frames else f"at {node.name}"


def is_users(path: str) -> bool:
    """Whether a file, or a line that names one, is neither torch's nor plait's nor of code that torch wrote."""
    return "/torch/" not in path and _PLAIT not in path and "<eval_with_key>" not in path


def _size(node: fx.Node) -> int:
    """Elements of a tensor, its open sizes counted as 1."""
    count = 1
    for size in node.meta["val"].shape:
        count *= 1 if isinstance(size, torch.SymInt) else int(size)
    return count
