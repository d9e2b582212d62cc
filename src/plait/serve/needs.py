"""What an operator takes of its inputs to give its result at one position: the rules by which a decoder's graph is cut down.

`need(source, node, view)` answers for one operator and one view of its result (`positions.View`: which dims hold one
position, the rest hold all). None means that the operator mixes positions along such a dim: then its result is
computed at all positions and the row taken. Every rule follows from the operator's definition; an operator
without one is taken to mix whatever positions it sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from plait.serve.positions import (
    ALL,
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

__all__ = ["Need", "need"]


@dataclass(frozen=True)
class Need:
    """What a result takes."""

    views: dict[Path, View]
    """Of the tensors among the arguments."""
    is_one: bool = False
    """Whether numbers among the arguments that follow from the length are those of one position, or of all."""
    sizes: dict[Path, bool] = field(default_factory=dict)
    """The same for single arguments."""


_Rule = Callable[[Positions, fx.Node, View], "Need | None"]


def need(source: Positions, node: fx.Node, view: View) -> Need | None:
    """The views of a node's inputs that give `view` of it; None: only all positions at once give it."""
    if view == ALL:
        return Need(dict.fromkeys((path for path, _ in _tensors(source, node)), ALL))
    rule = _RULES.get(kind_of(node).rstrip("_")) or _RULES.get(kind_of(node))
    if rule is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
        rule = _aligned
    return (rule or _unknown)(source, node, view)


def _tensors(source: Positions, node: fx.Node) -> list[tuple[Path, fx.Node]]:
    return [(p, leaf) for p, leaf in leaves(node) if isinstance(leaf, fx.Node) and not source.is_size(leaf)]


def _mapped(source: Positions, view: View, parent: fx.Node, place: Callable[[int], int | None]) -> View | None:
    """The view of an input whose dim i becomes dim place(i) of the result (None: it is summed over, or searched).

    Positions flattened with others (rows that are given to experts) are taken to be searched for those of one position.
    """
    dims = source.dims(parent)
    ones = frozenset(i for i, kind in dims.items() if place(i) in view or (kind == FLAT and place(i) is None))
    if any(dims[i] == ODD for i in ones):
        return None
    return ones if dims else frozenset({-1})


def _all_mapped(
    source: Positions, node: fx.Node, view: View, place: Callable[[fx.Node, int], int | None], **options: Any
) -> Need | None:
    views: dict[Path, View] = {}
    for path, parent in _tensors(source, node):
        found = _mapped(source, view, parent, lambda i, parent=parent: place(parent, i))  # type: ignore[misc]
        if found is None:
            return None
        views[path] = found
    return Need(views, **options)


def _aligned(source: Positions, node: fx.Node, view: View) -> Need | None:
    """Element by element, broadcast: dims are counted from the last."""
    rank = source.rank(node)
    return _all_mapped(source, node, view, lambda parent, i: i + rank - source.rank(parent))


def _repeated(source: Positions, node: fx.Node, view: View) -> Need | None:
    """expand and repeat: as _aligned, with the result's sizes given."""
    found = _aligned(source, node, view)
    return found and Need(found.views, False, _shape(node, view, 0))


def _shape(node: fx.Node, view: View, first: int) -> dict[Path, bool]:
    """Sizes of the result from its dim `first` on, wherever they stand among the arguments: one where the view has one."""
    lists = {path[0] for path, _ in leaves(node) if len(path) == 2}
    return {p: p[1] + first in view for p, _ in leaves(node) if len(p) == 2 and p[0] in lists}


def _laid_out(source: Positions, node: fx.Node, view: View) -> Need | None:
    """reshape and its kind keep the order of elements, so dims of positions come out in the order they went in."""
    (path, parent), *_ = _tensors(source, node)
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


def _permuted(source: Positions, node: fx.Node, view: View) -> Need | None:
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
    return _all_mapped(source, node, view, lambda _, i: order.index(i))


def _along(source: Positions, node: fx.Node, view: View) -> Need | None:
    """Along one dim (or a few) anything may happen; the others are as they were."""
    given = arguments_of(node)
    dims: Any = given.get("dim", given.get("dims", 0))
    rank, kind = source.rank(node), kind_of(node)
    removed, added = kind in ("unbind", "select"), kind == "stack"
    if dims is None:
        return None
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
        j = i + 1 if added and i >= taken[0] else i
        if j in taken and not (optimistic and j in view) and not added:
            return None
        return j - 1 if removed and taken and j > taken[0] else j

    return _all_mapped(source, node, view, place, is_one=optimistic)


def _is_joined(source: Positions, node: fx.Node, d: int) -> bool:
    """Whether a dim holds positions beside others: of all samples, or several tensors' joined to one, or taken apart again."""
    if source.dims(node)[d] == FLAT:
        return True
    kinds = {source.dims(parent).get(d) for _, parent in _tensors(source, node)}
    kind = kind_of(node)
    return kind in ("cat", "chunk", "split", "split_with_sizes") and not {*kinds, source.dims(node)[d]} - {EXACT, MANY}


def _takes_all(source: Positions, node: fx.Node, given: dict[str, Any], taken: list[int]) -> bool:
    """Whether a slice leaves nothing out, or what is joined to a tensor is empty."""
    if (kind_of(node) != "slice" or given["step"] != 1) and kind_of(node) != "cat":
        return False
    parents = [parent.meta["val"].shape for _, parent in _tensors(source, node) if source.rank(parent) > taken[0]]
    after = size_of(node.meta["val"].shape[taken[0]])
    return taken[0] in source.dims(node) and any(size_of(shape[taken[0]]) == after for shape in parents)


def _padded(source: Positions, node: fx.Node, view: View) -> Need | None:
    pads: Any = node.args[1]
    rank = source.rank(node)
    moved = {rank - 1 - i // 2 for i, size in enumerate(pads) if not isinstance(size, int) or size}
    return None if moved & view else _all_mapped(source, node, view, lambda _, i: i)


def _reduced(source: Positions, node: fx.Node, view: View) -> Need | None:
    (path, parent), *others = _tensors(source, node)
    if others:  # the larger of two
        return _aligned(source, node, view)
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


def _product(source: Positions, node: fx.Node, view: View) -> Need | None:
    """[..., m, k] x [..., k, n] -> [..., m, n], with a summand before the factors in addmm and baddbmm."""
    parents = _tensors(source, node)
    rank = source.rank(node)
    (left_path, left), (right_path, right) = parents[-2:]
    if min(source.rank(left), source.rank(right)) < 2:
        return _unknown(source, node, view)

    def place(parent: fx.Node, i: int, contracted: int) -> int | None:
        behind = i - source.rank(parent)
        return None if behind == contracted else behind + rank

    views = {
        left_path: _mapped(source, view, left, lambda i: place(left, i, -1)),
        right_path: _mapped(source, view, right, lambda i: place(right, i, -2)),
    }
    for path, parent in parents[:-2]:
        views[path] = _mapped(source, view, parent, lambda i, parent=parent: i + rank - source.rank(parent))  # type: ignore[misc]
    return _checked(views)


def _checked(views: dict[Path, View | None], **options: Any) -> Need | None:
    found = {path: view for path, view in views.items() if view is not None}
    return Need(found, **options) if len(found) == len(views) else None


def _linear(source: Positions, node: fx.Node, view: View) -> Need | None:
    last = source.rank(node) - 1
    first: Any = node.args[0]
    return _all_mapped(source, node, view, lambda parent, i: i if parent is first and i != last else None)


def _convolved(source: Positions, node: fx.Node, view: View) -> Need | None:
    """A kernel of size 1 acts on each position by itself; a larger one sees its neighbours."""
    given = arguments_of(node)
    first: Any = node.args[0]
    kernel = given["weight"].meta["val"].shape[2:]
    steps = [number for name in ("stride", "padding") for number in _list(given[name])]
    if set(kernel) != {1} or set(steps) - {1, 0} or 1 in _list(given["padding"]):
        return None
    return _all_mapped(
        source, node, view, lambda parent, i: i if parent is first and i != source.rank(first) - 2 else None
    )


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _einsum(source: Positions, node: fx.Node, view: View) -> Need | None:
    equation: Any = node.args[0]
    sides = equation.replace(" ", "").split("->")
    if len(sides) != 2 or "." in equation:
        return _unknown(source, node, view)
    terms, result = sides[0].split(","), sides[1]
    views: dict[Path, View | None] = {}
    for (path, parent), term in zip(_tensors(source, node), terms, strict=True):
        views[path] = _mapped(source, view, parent, lambda i, term=term: result.find(term[i]))  # type: ignore[misc]
    return _checked(views)


def _attention(source: Positions, node: fx.Node, view: View) -> Need | None:
    """[..., queries, e], keys and values [..., keys, e], a mask that broadcasts to [..., queries, keys]."""
    given, rank = arguments_of(node), source.rank(node)
    key, mask = given["key"], given["attn_mask"]
    if rank - 2 in view and source.rank(key) - 2 in source.dims(key) and mask is None and not given["is_causal"]:
        source.refuse(node, "it attends to later positions (neither causal nor masked)")
    views: dict[Path, View | None] = {}
    for path, parent in _tensors(source, node):
        own = source.rank(parent)
        consumed = {"query": own - 1, "mask": own - 1}.get("mask" if parent is mask else "query")
        if parent is not mask and path != (0,):
            consumed = own - 2
        views[path] = _mapped(
            source,
            view,
            parent,
            lambda i, own=own, gone=consumed: None if i == gone else i + rank - own,  # type: ignore[misc]
        )
    return _checked(views)


def _embedding(source: Positions, node: fx.Node, view: View) -> Need | None:
    table: Any = node.args[0]
    return _all_mapped(source, node, view, lambda parent, i: None if parent is table else i)


def _index(source: Positions, node: fx.Node, view: View) -> Need | None:
    """x[a, b] with tensors from the first dim on: the result has their dims, broadcast, and then the rest of x's."""
    table, indices = node.args[:2]
    if not isinstance(indices, list | tuple) or not all(isinstance(i, fx.Node) for i in indices):
        return _unknown(source, node, view)
    rank = max(source.rank(i) for i in indices)  # type: ignore[arg-type]
    first = len(indices)

    def place(parent: fx.Node, i: int) -> int | None:
        if parent is table:
            return None if i < first else i - first + rank
        return i + rank - source.rank(parent)

    return _all_mapped(source, node, view, place)


def _index_select(source: Positions, node: fx.Node, view: View) -> Need | None:
    _, dim, index = node.args[:3]
    where = int(dim) % source.rank(node)  # type: ignore[arg-type]
    return _all_mapped(source, node, view, lambda parent, i: where if parent is index else None if i == where else i)


def _filled(source: Positions, node: fx.Node, view: View) -> Need | None:
    """One value everywhere: any size of it will do."""
    parents = _tensors(source, node)
    return Need({path: source.one(parent) for path, parent in parents}, False, _shape(node, view, 0))


def _item(source: Positions, node: fx.Node, view: View) -> Need | None:
    """One of several results."""
    parent: Any = node.args[0]
    if source.dims(parent) == source.dims(node):
        return Need({(0,): view}) if need(source, parent, view) is not None else None
    return Need({(0,): source.one(parent)}) if view == source.one(node) else None


def _unknown(source: Positions, node: fx.Node, view: View) -> Need | None:
    """What sees positions may mix them; what sees them flattened with others (rows given to experts) does not."""
    parents = _tensors(source, node)
    kinds = {kind for _, parent in parents for kind in source.dims(parent).values()} | set(source.dims(node).values())
    if kinds & {EXACT, MANY, ODD} or view != source.one(node):
        return None
    return Need({path: source.one(parent) for path, parent in parents}, True)


def _table(*entries: tuple[_Rule, str]) -> dict[str, _Rule]:
    return {name: rule for rule, names in entries for name in _names(names)}


def _names(text: str) -> Iterable[str]:
    return text.split()


_RULES = _table(
    (
        _aligned,
        (
            "where masked_fill to _to_copy clone contiguous alias detach dropout type_as zeros_like ones_like full_like "
            "empty_like lift_fresh_copy complex polar conj _conj resolve_conj prelu layer_norm rms_norm _fused_rms_norm "
            "native_layer_norm batch_norm native_dropout alpha_dropout feature_dropout hardswish log_sigmoid floor_divide "
            "fill bucketize __and__ __or__ __xor__ special_expit subtract multiply divide true_divide negative absolute "
            "clip greater greater_equal less less_equal not_equal"
        ),
    ),
    (_repeated, "expand repeat broadcast_to expand_as"),
    (_laid_out, "reshape view _unsafe_view flatten unflatten unsqueeze squeeze view_as_complex view_as_real one_hot"),
    (_permuted, "permute transpose swapaxes swapdims t mT numpy_T adjoint movedim"),
    (
        _along,
        (
            "softmax _softmax log_softmax _log_softmax cumsum cumprod logcumsumexp cummax cummin topk sort argsort gather "
            "scatter scatter_add scatter_reduce index_add index_copy index_fill cat flip roll slice narrow split "
            "split_with_sizes chunk unbind select glu repeat_interleave slice_scatter select_scatter take_along_dim stack "
            "unsafe_split unsafe_chunk tensor_split diff"
        ),
    ),
    (_padded, "constant_pad_nd pad"),
    (
        _reduced,
        (
            "sum mean amax amin max min argmax argmin var std logsumexp norm any all prod var_mean std_mean "
            "linalg_vector_norm median nansum count_nonzero"
        ),
    ),
    (_product, "matmul mm bmm addmm baddbmm"),
    (_linear, "linear"),
    (_convolved, "conv1d"),
    (_einsum, "einsum"),
    (_attention, "scaled_dot_product_attention"),
    (_embedding, "embedding"),
    (_index, "index"),
    (_index_select, "index_select"),
    (_filled, "full zeros ones empty new_full new_zeros new_ones new_empty"),
    (_item, "getitem"),
)
"""Operator -> its rule; those that act element by element carry torch's own mark."""
