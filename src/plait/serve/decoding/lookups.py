"""Rules of operators that look values of a tensor up at the indices in another: see `rules.py`."""

from __future__ import annotations

from typing import Any

from torch import fx

from plait.serve.decoding.positions import Positions, View
from plait.serve.decoding.rules import Need, all_mapped, tensors_in, unknown

__all__ = ["embedded", "indexed", "selected"]


def embedded(source: Positions, node: fx.Node, view: View) -> Need | None:
    """A table is looked up at every index."""
    table: Any = node.args[0]
    return all_mapped(source, node, view, lambda parent, i: None if parent is table else i)


def indexed(source: Positions, node: fx.Node, view: View) -> Need | None:
    """x[:, a, b] with tensors side by side: the result has their dims, broadcast, where theirs were in x."""
    table, indices = node.args[:2]
    if source.takes_last(node):
        return Need({path: source.one(parent) for path, parent in tensors_in(source, node)}, True)
    places = [i for i, index in enumerate(indices) if index is not None]  # type: ignore[arg-type]
    if places != list(range(places[0], places[-1] + 1)):
        return unknown(source, node, view)
    first, count = places[0], len(places)
    rank = max(source.rank(indices[i]) for i in places)  # type: ignore[index, arg-type]

    def place(parent: fx.Node, i: int) -> int | None:
        if parent is table:
            return i if i < first else None if i < first + count else i - count + rank
        return first + i + rank - source.rank(parent)

    return all_mapped(source, node, view, place)


def selected(source: Positions, node: fx.Node, view: View) -> Need | None:
    """index_select: one dim of the table is searched."""
    _, dim, index = node.args[:3]
    where = int(dim) % source.rank(node)  # type: ignore[arg-type]
    return all_mapped(source, node, view, lambda parent, i: where if parent is index else None if i == where else i)
