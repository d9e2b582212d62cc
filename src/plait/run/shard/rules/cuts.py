"""Cuts into pieces and joins of them: along other dims they carry the sharded one, along it blocks must stay whole."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch

from plait.run.shard.operation import Op, Refusal, Step, Where, shape_of
from plait.run.shard.placement import PARTIAL, Placement, Sharded, sharded
from plait.run.shard.rules.table import rule

__all__: list[str] = []

aten: Any = torch.ops.aten


@rule("chunk", "split", "split_with_sizes", "tensor_split.sections", "unsafe_chunk", "unsafe_split")
def split(op: Op) -> Step | Refusal:
    """Cuts into several pieces along a dim."""
    source = op.operands[0]
    placement = op.at(source)
    outputs = op.node.meta["val"]
    if placement is PARTIAL:
        return op.step((PARTIAL,) * len(outputs), {source: PARTIAL})
    if not isinstance(placement, Sharded):
        return op.replicated()
    dim = op["dim"] % len(shape_of(source))
    if dim != placement.dim:
        return op.step((placement,) * len(outputs), {source: placement})
    lengths = [int(piece.shape[dim]) for piece in outputs]
    edges = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    pieces = [cut(placement, shape_of(source)[dim], a, b, op.tp) for a, b in pairwise(edges)]
    if any(piece is None for piece in pieces):
        return Refusal("a split cuts a block", source, wish_edges(placement, shape_of(source)[dim], edges, op.tp))
    known = [piece for piece in pieces if piece is not None]

    def local(where: Where) -> dict[str, Any]:
        pairs = zip(known, lengths, strict=True)
        sizes = [length // piece.period * piece.local_period(where.tp, where.rank) for piece, length in pairs]
        return {"split_sizes": sizes, "dim": dim}

    return op.step(
        tuple(known),
        {source: placement},
        target=aten.split_with_sizes.default,
        patch=local,
    )


def cut(placement: Sharded, size: int, start: int, stop: int, tp: int) -> Sharded | None:
    """Placement of the piece `start:stop` of the sharded dim; None if it does not begin and end between blocks."""
    blocks, edge, inside = placement.blocks(size), 0, []
    for block in blocks:
        if start <= edge and edge + block <= stop:
            inside.append(block)
        elif edge < stop and edge + block > start:
            return None
        edge += block
    return sharded(placement.dim, tuple(inside), tp, placement.unit) if inside else None


def wish_edges(placement: Sharded, size: int, edges: list[int], tp: int) -> tuple[Sharded, ...]:
    """The split whose blocks end at all of `edges` too, if every block can be shared."""
    own, edge = {0}, 0
    for block in placement.blocks(size):
        edge += block
        own.add(edge)
    marks = sorted(own | {e for e in edges if 0 <= e <= size})
    wish = sharded(placement.dim, tuple(b - a for a, b in pairwise(marks)), tp, placement.unit)
    return (wish,) if wish.fits(tp) else ()


@rule("slice.Tensor", "narrow")
def slice_(op: Op) -> Step | Refusal:
    """One piece along a dim."""
    source = op.operands[0]
    placement = op.at(source)
    if placement is PARTIAL:
        return op.step(PARTIAL, {source: PARTIAL})
    if not isinstance(placement, Sharded):
        return op.replicated()
    shape = shape_of(source)
    dim = op["dim"] % len(shape)
    if dim != placement.dim:
        return op.step(placement, {source: placement})
    size = shape[dim]
    if "length" in op.args:
        start, stop, step = op["start"], None, 1
        if isinstance(start, int) and isinstance(op["length"], int):
            start = start + size if start < 0 else start
            stop = start + op["length"]
    else:
        start, stop, step = op["start"] or 0, size if op["end"] is None else op["end"], op["step"]
        if isinstance(start, int) and isinstance(stop, int):
            start, stop, _ = slice(start, stop).indices(size)
    if isinstance(start, int) and start < step and step > 1 and stop == size:
        thinner = placement.scaled(1, step, op.tp)
        if thinner is not None and (placement.is_even(op.tp) or placement.unit % step == 0):
            return op.step(thinner, {source: placement})
    if not isinstance(start, int) or not isinstance(stop, int) or step != 1:
        return Refusal("a slice with steps or open ends", source)
    if (start, stop) == (0, size):
        return op.step(placement, {source: placement}, target=aten.alias.default)
    piece = cut(placement, size, start, stop, op.tp)
    if piece is None:
        return Refusal("a slice cuts a block", source, wish_edges(placement, size, [start, stop], op.tp))

    def local(where: Where) -> dict[str, Any]:
        before = cut(placement, size, 0, start, op.tp) if start else None
        begin = start // before.period * before.local_period(where.tp, where.rank) if before else 0
        length = (stop - start) // piece.period * piece.local_period(where.tp, where.rank)
        return {"dim": dim, "start": begin, "length": length}

    return op.step(piece, {source: placement}, target=aten.narrow.default, patch=local)


@rule("slice_scatter", "select_scatter")
def scatter_piece(op: Op) -> Step | Refusal:
    """A value with one piece replaced: fine along other dims than the sharded one."""
    whole, piece = op["self"], op["src"]
    split = op.split_operands()
    if op.has_partial() or not split:
        return Refusal("piece of a sum")
    rank = len(op.shape)
    dim = op["dim"] % rank
    is_select = op.node.target is aten.select_scatter.default
    node, placement = split[0]
    own = placement.dim
    if node is piece and node is not whole and is_select:
        own += placement.dim >= dim
    if own == dim:
        return Refusal("a piece along the sharded dim", node)
    small = placement.moved(own - (is_select and own > dim))
    return op.step(placement.moved(own), {whole: placement.moved(own), piece: small})


@rule("select.int", "unbind.int")
def select(op: Op) -> Step | Refusal:
    """One index, or every index, of a dim."""
    source = op.operands[0]
    placement = op.at(source)
    value = op.node.meta["val"]
    many = len(value) if isinstance(value, tuple | list) else 0
    if placement is PARTIAL:
        return op.step((PARTIAL,) * many if many else PARTIAL, {source: PARTIAL})
    if not isinstance(placement, Sharded):
        return op.replicated()
    dim = op["dim"] % len(shape_of(source))
    if dim == placement.dim:
        return Refusal("selects from the sharded dim", source, finer=True)
    out = placement.moved(placement.dim - (dim < placement.dim))
    return op.step((out,) * many if many else out, {source: placement})


@rule("cat", "stack", "concat")
def join(op: Op) -> Step | Refusal:
    """Joins along a dim; along the sharded one, every piece keeps its own blocks."""
    split_ones = op.split_operands()
    rank = len(op.shape)
    dim = op["dim"] % rank
    is_stack = op.node.target is aten.stack.default
    if not split_ones:
        if op.operands and all(op.at(n) is PARTIAL for n in op.operands):
            return op.step(PARTIAL, {}, rest=PARTIAL)
        return Refusal("join of parts of sums")
    node, placement = max(split_ones, key=lambda item: math.prod(shape_of(item[0])))
    if is_stack:
        out = placement.moved(placement.dim + (dim <= placement.dim))
        return op.step(out, {}, rest=placement)
    if placement.dim != dim:
        if any(len(shape_of(n)) != rank for n in op.operands):
            return Refusal("join with an empty tensor", node)
        return op.step(placement, {}, rest=placement)
    known = [op.at(n) for n in op.operands]
    if not all(isinstance(p, Sharded) and p.dim == dim for p in known):
        return Refusal("join along the sharded dim", node, finer=True)
    blocks: tuple[int, ...] = ()
    for operand, each in zip(op.operands, known, strict=True):
        assert isinstance(each, Sharded)
        blocks += each.blocks(shape_of(operand)[dim])
    units = {each.unit for each in known if isinstance(each, Sharded)}
    if len(units) > 1:
        return Refusal("join of different grains", node)
    wanted: dict[Any, Placement] = dict(zip(op.operands, known, strict=True))
    return op.step(sharded(dim, blocks, op.tp, units.pop()), wanted)
