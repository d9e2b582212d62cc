"""Rules: what the operators of a decoder's graph take of their inputs to give their result at one position.

Every rule follows from the operator's definition. It is given a view of the result (`positions.View`: which dims hold one position, the
rest hold all) and answers with the views of the inputs; None means that the operator mixes positions along such a dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from plait.serve.decoding.positions import (
    EXACT,
    FLAT,
    MANY,
    ODD,
    Path,
    Positions,
    View,
    arguments_of,
    kind_of,
    leaves,
    size_of,
)

__all__ = [
    "Need",
    "Rule",
    "aligned",
    "all_mapped",
    "along",
    "attention",
    "convolved",
    "einsum",
    "filled",
    "laid_out",
    "linear",
    "padded",
    "permuted",
    "product",
    "reduced",
    "repeated",
    "tensors_in",
    "unknown",
]


@dataclass(frozen=True)
class Need:
    """What a result takes."""

    views: dict[Path, View]
    """Of the tensors among the arguments."""
    is_one: bool = False
    """Whether numbers among the arguments that follow from the length are those of one position, or of all."""
    sizes: dict[Path, bool] = field(default_factory=dict)
    """The same for single arguments."""


Rule = Callable[[Positions, fx.Node, View], "Need | None"]


def tensors_in(source: Positions, node: fx.Node) -> list[tuple[Path, fx.Node]]:
    """An operator's tensors with their paths; sizes are numbers."""
    return [(p, leaf) for p, leaf in leaves(node) if isinstance(leaf, fx.Node) and not source.is_size(leaf)]


def _mapped(
    source: Positions, node: fx.Node, view: View, parent: fx.Node, place: Callable[[int], int | None]
) -> View | None:
    """The view of an input whose dim i becomes dim place(i) of the result (None: it is summed over, or searched).

    Positions flattened with others (rows that are given to experts) are taken to be searched for those of one position, and
    to be as many as the result's rows where their number is not known beforehand.
    """
    dims, after = source.dims(parent), source.dims(node)
    ones = frozenset(i for i, kind in dims.items() if place(i) in view or (kind == FLAT and place(i) not in after))
    if any(dims[i] == ODD for i in ones):
        return None
    return ones if dims else frozenset({-1})


def all_mapped(
    source: Positions, node: fx.Node, view: View, place: Callable[[fx.Node, int], int | None], **options: Any
) -> Need | None:
    """What inputs give whose dim i becomes dim place(input, i) of the result, or is gone (None)."""
    views: dict[Path, View] = {}
    for path, parent in tensors_in(source, node):
        found = _mapped(source, node, view, parent, lambda i, parent=parent: place(parent, i))  # type: ignore[misc]
        if found is None:
            return None
        views[path] = found
    return Need(views, **options)


def aligned(source: Positions, node: fx.Node, view: View) -> Need | None:
    """Element by element, broadcast: dims are counted from the last."""
    rank = source.rank(node)
    return all_mapped(source, node, view, lambda parent, i: i + rank - source.rank(parent))


def repeated(source: Positions, node: fx.Node, view: View) -> Need | None:
    """expand and repeat: as aligned, with the result's sizes given."""
    found = aligned(source, node, view)
    return found and Need(found.views, False, _shape(node, view, 0))


def _shape(node: fx.Node, view: View, first: int) -> dict[Path, bool]:
    """Sizes of the result from its dim `first` on, wherever they stand among the arguments: one where the view has one."""
    lists = {path[0] for path, _ in leaves(node) if len(path) == 2}
    return {p: p[1] + first in view for p, _ in leaves(node) if len(p) == 2 and p[0] in lists}


def laid_out(source: Positions, node: fx.Node, view: View) -> Need | None:
    """reshape and its kind keep the order of elements, so dims of positions come out in the order they went in."""
    (path, parent), *_ = tensors_in(source, node)
    before, after = source.dims(parent), source.dims(node)
    if len(before) != len(after) or ODD in {*before.values(), *after.values()}:
        return None
    pairs = list(zip(before, after, strict=True))
    value, result = parent.meta["val"], node.meta["val"]
    unequal = [1 for i, j in pairs if size_of(value.shape[i]) != size_of(result.shape[j])]
    if len(unequal) > 1:
        return None
    first = int(arguments_of(node)["dim"]) % source.rank(parent) if kind_of(node) == "unflatten" else 0
    views = {path: frozenset(i for i, j in pairs if j in view) if pairs else frozenset({-1})}
    return Need(views, view == source.one(node), _shape(node, view, first))


def permuted(source: Positions, node: fx.Node, view: View) -> Need | None:
    """Dims in another order."""
    parent: Any = node.args[0]
    rank, kind, rest = source.rank(parent), kind_of(node), list(node.args[1:])
    order = list(range(rank))
    if kind == "permute":
        order = [int(d) % rank for d in rest[0]]  # type: ignore[union-attr, arg-type]
    elif kind in ("transpose", "swapaxes", "swapdims"):
        a, b = (int(d) % rank for d in rest)  # type: ignore[arg-type]
        order[a], order[b] = order[b], order[a]
    elif kind == "movedim":
        return None
    elif kind == "numpy_T":
        order.reverse()
    else:  # t, mT, adjoint
        order[-2:] = order[-2:][::-1]
    return all_mapped(source, node, view, lambda _, i: order.index(i))


def along(source: Positions, node: fx.Node, view: View) -> Need | None:
    """Along one dim (or a few) anything may happen; the others are as they were."""
    given = arguments_of(node)
    dims: Any = given.get("dim", given.get("dims", 0))
    rank, kind = source.rank(node), kind_of(node)
    removed, added = kind in ("unbind", "select"), kind == "stack"
    if dims is None:
        return None
    if source.takes_last(node):
        return Need({(0,): source.one(node.args[0])}, True)  # type: ignore[arg-type]
    taken = [int(d) % (rank + removed) for d in (dims if isinstance(dims, list | tuple) else [dims])]
    if _takes_all(source, node, given, taken):
        taken = []
    optimistic = False
    if not removed:
        for d in taken:
            if d in view and not _is_joined(source, node, d):
                return None
            optimistic = optimistic or d in view

    def place(parent: fx.Node, i: int) -> int | None:
        if source.rank(parent) == 1 < rank:  # the index of index_add and its kind
            return taken[0] if taken and optimistic else None
        put_in = added or (kind == "select_scatter" and parent is node.args[1])
        j = i + 1 if put_in and i >= taken[0] else i
        if j in taken and not (optimistic and j in view) and not added:
            return None
        return j - 1 if removed and taken and j > taken[0] else j

    return all_mapped(source, node, view, place, is_one=optimistic)


def _is_joined(source: Positions, node: fx.Node, d: int) -> bool:
    """Whether a dim holds positions beside others: of all samples, or several tensors' joined to one, or taken apart again."""
    if source.dims(node)[d] == FLAT:
        return True
    kinds = {source.dims(parent).get(d) for _, parent in tensors_in(source, node)}
    kind = kind_of(node)
    return kind in ("cat", "chunk", "split", "split_with_sizes") and not {*kinds, source.dims(node)[d]} - {EXACT, MANY}


def _takes_all(source: Positions, node: fx.Node, given: dict[str, Any], taken: list[int]) -> bool:
    """Whether a slice leaves nothing out, or what is joined to a tensor is empty."""
    if (kind_of(node) != "slice" or given["step"] != 1) and kind_of(node) != "cat":
        return False
    parents = [parent.meta["val"].shape for _, parent in tensors_in(source, node) if source.rank(parent) > taken[0]]
    after = size_of(node.meta["val"].shape[taken[0]])
    return taken[0] in source.dims(node) and any(size_of(shape[taken[0]]) == after for shape in parents)


def padded(source: Positions, node: fx.Node, view: View) -> Need | None:
    """Dims that get nothing added are as they were."""
    pads: Any = node.args[1]
    rank = source.rank(node)
    moved = {rank - 1 - i // 2 for i, size in enumerate(pads) if not isinstance(size, int) or size}
    return None if moved & view else all_mapped(source, node, view, lambda _, i: i)


def reduced(source: Positions, node: fx.Node, view: View) -> Need | None:
    """Some dims are summed over, or searched for the largest."""
    (path, parent), *others = tensors_in(source, node)
    if others:  # the larger of two
        return aligned(source, node, view)
    given, rank = arguments_of(node), source.rank(parent)
    dims: Any = given.get("dim")
    if isinstance(dims, int):
        dims = [dims]
    gone = sorted(int(d) % rank for d in dims) if dims else list(range(rank))
    kept = {i: i if given.get("keepdim") else i - sum(d < i for d in gone) for i in range(rank) if i not in gone}
    # Rows of experts and the like are summed over; what is asked for one position is made of one position's rows.
    flat = {i for i in gone if source.dims(parent).get(i) == FLAT}
    dims_of = source.dims(parent)
    ones = frozenset(i for i in dims_of if i in flat or kept.get(i) in view)
    if any(dims_of[i] == ODD for i in ones):
        return None
    return Need({path: ones if dims_of else frozenset({-1})})


def product(source: Positions, node: fx.Node, view: View) -> Need | None:
    """[..., m, k] x [..., k, n] -> [..., m, n], with a summand before the factors in addmm and baddbmm."""
    parents = tensors_in(source, node)
    rank = source.rank(node)
    (left_path, left), (right_path, right) = parents[-2:]
    if min(source.rank(left), source.rank(right)) < 2:
        return unknown(source, node, view)

    def place(parent: fx.Node, i: int, contracted: int) -> int | None:
        behind = i - source.rank(parent)
        return None if behind == contracted else behind + rank

    views = {
        left_path: _mapped(source, node, view, left, lambda i: place(left, i, -1)),
        right_path: _mapped(source, node, view, right, lambda i: place(right, i, -2)),
    }
    for path, parent in parents[:-2]:
        views[path] = _mapped(source, node, view, parent, lambda i, parent=parent: i + rank - source.rank(parent))  # type: ignore[misc]
    return _checked(views)


def _checked(views: dict[Path, View | None], **options: Any) -> Need | None:
    found = {path: view for path, view in views.items() if view is not None}
    return Need(found, **options) if len(found) == len(views) else None


def linear(source: Positions, node: fx.Node, view: View) -> Need | None:
    """Its last dim is contracted with a weight."""
    last = source.rank(node) - 1
    first: Any = node.args[0]
    return all_mapped(source, node, view, lambda parent, i: i if parent is first and i != last else None)


def convolved(source: Positions, node: fx.Node, view: View) -> Need | None:
    """A kernel of size 1 acts on each position by itself; a larger one sees its neighbours."""
    given = arguments_of(node)
    first: Any = node.args[0]
    kernel = given["weight"].meta["val"].shape[2:]
    steps = [number for name in ("stride", "padding") for number in _list(given[name])]
    if set(kernel) != {1} or set(steps) - {1, 0} or 1 in _list(given["padding"]):
        return None
    return all_mapped(
        source, node, view, lambda parent, i: i if parent is first and i != source.rank(first) - 2 else None
    )


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def einsum(source: Positions, node: fx.Node, view: View) -> Need | None:
    """Every letter of an input is a dim of the result, or summed over."""
    parents = tensors_in(source, node)
    terms, result = _letters(str(node.args[0]), [source.rank(parent) for _, parent in parents])
    views: dict[Path, View | None] = {}
    for (path, parent), term in zip(parents, terms, strict=True):
        views[path] = _mapped(source, node, view, parent, lambda i, term=term: result.find(term[i]))  # type: ignore[misc]
    return _checked(views)


def _letters(equation: str, ranks: list[int]) -> tuple[list[str], str]:
    """The terms and the result of an equation, its dots written as digits counted from the last, the result made explicit."""
    left, arrow, result = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    dots = [rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks, strict=True)]
    if not arrow:
        result = "..." + "".join(sorted(c for c in set(left) - {",", "."} if left.count(c) == 1))

    def spelled(term: str, count: int) -> str:
        return term.replace("...", "".join(str(i) for i in reversed(range(count))))

    most = max((n for n, term in zip(dots, terms, strict=True) if "." in term), default=0)
    return [spelled(term, n) for term, n in zip(terms, dots, strict=True)], spelled(result, most)


def attention(source: Positions, node: fx.Node, view: View) -> Need | None:
    """[..., queries, e], keys and values [..., keys, e], a mask that broadcasts to [..., queries, keys]."""
    given, rank = arguments_of(node), source.rank(node)
    key, is_masked = given["key"], given["attn_mask"] is not None or given["is_causal"]
    if rank - 2 in view and source.rank(key) - 2 in source.dims(key) and not is_masked:
        source.refuse(node, "it attends to later positions (neither causal nor masked)")
    views: dict[Path, View | None] = {}
    for path, parent in tensors_in(source, node):
        own = source.rank(parent)
        # Of keys and values all are read, of queries and masks the last dim is summed over.
        gone = own - 2 if path[0] in (1, 2, "key", "value") else own - 1

        def place(i: int, own: int = own, gone: int = gone) -> int | None:
            return None if i == gone else i + rank - own

        views[path] = _mapped(source, node, view, parent, place)
    return _checked(views)


def filled(source: Positions, node: fx.Node, view: View) -> Need | None:
    """One value everywhere: of an input its type alone is taken, so any size of it will do."""
    views: dict[Path, View] = {}
    for path, parent in tensors_in(source, node):
        dims = source.dims(parent)
        views[path] = frozenset(i for i, kind in dims.items() if kind in (EXACT, FLAT)) if dims else frozenset({-1})
    return Need(views, False, _shape(node, view, 0))


def unknown(source: Positions, node: fx.Node, view: View) -> Need | None:
    """What sees positions may mix them; what sees them flattened with others (rows given to experts) does not."""
    parents = tensors_in(source, node)
    kinds = {kind for _, parent in parents for kind in source.dims(parent).values()} | set(source.dims(node).values())
    if kinds & {EXACT, MANY, ODD} or view != source.one(node):
        return None
    return Need({path: source.one(parent) for path, parent in parents}, True)
