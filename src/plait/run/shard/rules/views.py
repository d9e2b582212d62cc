"""Operators that rearrange elements: views, permutations, repetitions."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch

from plait.run.shard.operation import Op, Refusal, Step, Where, dims_of, shape_of
from plait.run.shard.placement import PARTIAL, Sharded, sharded
from plait.run.shard.rules.table import rule

__all__: list[str] = []

aten: Any = torch.ops.aten


@rule(
    "view.default", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as"
)
def view(op: Op) -> Step | Refusal:
    """Views that keep the order of elements: only the shapes before and after matter."""
    source = op.operands[0]
    sizes = "size" if "size" in op.args else "shape" if "shape" in op.args else "sizes" if "sizes" in op.args else None
    placement = op.at(source)
    if placement is PARTIAL:
        return op.step(PARTIAL, {source: PARTIAL, op.args.get("other"): op.at(op.args.get("other"))})
    if not isinstance(placement, Sharded):
        return op.replicated()
    other = op.args.get("other")  # of view_as and reshape_as
    before, after = shape_of(source), op.shape
    inner = math.prod(before[placement.dim + 1 :])
    for dim, size in enumerate(after):
        moved = placement.scaled(inner, math.prod(after[dim + 1 :]), op.tp)
        if moved is not None and size % moved.period == 0:
            out = moved.moved(dim)
            if other is not None:
                return op.step(out, {source: placement, other: out})
            if op.node.target is aten.unflatten.int:
                axis = op["dim"] % len(before)
                if out.dim < axis or out.dim >= axis + len(after) - len(before) + 1:
                    return op.step(out, {source: placement})
                return op.step(out, {source: placement}, patch=partial(_local_sizes, op, out, axis))
            return op.step(out, {source: placement}, sizes=sizes)
    tail = "x".join(map(str, after[placement.dim :])) if len(after) > placement.dim else "1"
    reason = f"{before[placement.dim]} viewed as {tail} can't be shared by {op.tp} in whole elements"
    return Refusal(reason, source, tuple(_view_wishes(placement, before, after, op.tp)))


def _local_sizes(op: Op, out: Sharded, axis: int, where: Where) -> dict[str, Any]:
    sizes = list(op["sizes"])
    size = op.shape[out.dim]
    sizes[out.dim - axis] = size // out.period * out.local_period(where.tp, where.rank)
    return {"sizes": sizes}


def _view_wishes(placement: Sharded, before: tuple[int, ...], after: tuple[int, ...], tp: int) -> list[Sharded]:
    inner = math.prod(before[placement.dim + 1 :])
    found: list[tuple[bool, Sharded]] = []
    for dim, size in enumerate(after):
        grain = math.prod(after[dim + 1 :])
        if grain % inner or size < tp:
            continue
        period = size * grain // inner
        if period <= before[placement.dim] and before[placement.dim] % period == 0:
            wish = sharded(placement.dim, (period,), tp, grain // inner)
            found.append((size % tp != 0, wish))
    return [wish for _, wish in sorted(found, key=lambda item: item[0])]


@rule("permute", "transpose.int", "t", "mT", "numpy_T", "movedim", "swapaxes", "swapdims", "transpose_")
def permute(op: Op) -> Step | Refusal:
    """Permutations of dims."""
    source = op.operands[0]
    placement = op.at(source)
    if placement is PARTIAL:
        return op.step(PARTIAL, {source: PARTIAL})
    if not isinstance(placement, Sharded):
        return op.replicated()
    return op.step(placement.moved(_order(op, len(op.shape)).index(placement.dim)), {source: placement})


def _order(op: Op, rank: int) -> list[int]:
    name = op.node.target.overloadpacket.__name__  # type: ignore[union-attr]
    order = list(range(rank))
    if name == "permute":
        return list(dims_of(op["dims"], rank))
    if name in ("t", "numpy_T"):
        return order[::-1]
    if name == "movedim":
        sources, targets = (dims_of(list(op.args.values())[i], rank) for i in (1, 2))
        kept = [d for d in order if d not in sources]
        for target, source in sorted(zip(targets, sources, strict=True)):
            kept.insert(target, source)
        return kept
    a, b = (-2, -1) if name == "mT" else [list(op.args.values())[i] for i in (1, 2)]
    order[a], order[b] = order[b], order[a]
    return order


@rule("expand")
def expand(op: Op) -> Step | Refusal:
    """Repetition along dims of size 1, and new leading dims."""
    source = op.operands[0]
    placement = op.at(source)
    if not isinstance(placement, Sharded):
        return op.step(PARTIAL, {source: PARTIAL}) if placement is PARTIAL else op.replicated()
    return op.step(
        placement.moved(placement.dim + len(op.shape) - len(shape_of(source))), {source: placement}, sizes="size"
    )


@rule("repeat", "tile")
def repeat(op: Op) -> Step | Refusal:
    """Repetition of the whole tensor along its dims."""
    source = op.operands[0]
    placement = op.at(source)
    if not isinstance(placement, Sharded):
        return Refusal("repeat")
    # Along the sharded dim, every repetition is a block of its own: the period stays.
    return op.step(placement.moved(placement.dim + len(op.shape) - len(shape_of(source))), {source: placement})


@rule("repeat_interleave.self_int")
def repeat_interleave(op: Op) -> Step | Refusal:
    """Repetition of each element, such as key heads for grouped queries."""
    source = op.operands[0]
    placement = op.at(source)
    if not isinstance(placement, Sharded) or op["dim"] is None:
        return Refusal("repeat_interleave of everything", source)
    if op["dim"] % len(op.shape) != placement.dim:
        return op.step(placement, {source: placement})
    wider = placement.scaled(op["repeats"], 1, op.tp)
    assert wider is not None
    return op.step(wider, {source: placement}, patch=lambda _: {"output_size": None})


@rule("flip", "roll", "cumsum", "sort", "pad", "constant_pad_nd", "diff", "argsort", "logcumsumexp", "cumprod")
def along_dims(op: Op) -> Step | Refusal:
    """Operators that work along some dims and leave the others alone."""
    source = op.operands[0]
    placement = op.at(source)
    rank = len(shape_of(source))
    if not isinstance(placement, Sharded) or len(op.operands) > 1:
        return Refusal("along dims")
    name = op.node.target.overloadpacket.__name__  # type: ignore[union-attr]
    if name in ("pad", "constant_pad_nd"):
        pads = op["pad"]
        used = {rank - 1 - i // 2 for i, pad in enumerate(pads) if pad != 0}
    else:
        used = set(dims_of(op.args.get("dims", op.args.get("dim")), rank))
        if name == "roll" and not op["dims"]:
            used = set(range(rank))
    if placement.dim in used:
        return Refusal(f"{name} along the sharded dim", source)
    value = op.node.meta["val"]
    outputs = (placement,) * len(value) if isinstance(value, tuple | list) else placement
    return op.step(outputs, {source: placement})
