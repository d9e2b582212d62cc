"""Look-ups: embeddings, gathers, indexed reads and writes."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from plait.run.shard.local import sharded_embedding
from plait.run.shard.operation import Op, Refusal, Step, Where, shape_of
from plait.run.shard.placement import COPIED, PARTIAL, REPLICATED, Placement, Sharded, sharded
from plait.run.shard.rules.table import rule

__all__: list[str] = []

aten: Any = torch.ops.aten


@rule("embedding")
def embedding(op: Op) -> Step | Refusal:
    """A table of rows: split by rows when it was asked for, otherwise as its weight arrives."""
    table, indices = op["weight"], op["indices"]
    placement = op.at(table)
    rows, width = shape_of(table)
    if isinstance(op.at(indices), Sharded):
        arriving = op.at(indices)
        assert isinstance(arriving, Sharded)
        return op.step(arriving, {table: COPIED, indices: arriving})
    if isinstance(placement, Sharded) and placement.dim == 1:
        return op.step(placement.moved(len(op.shape) - 1), {table: placement})
    if isinstance(placement, Sharded):
        if placement.period != rows or len(placement.parts) > 1:
            return Refusal("a table in several blocks", table)
    elif table in op.weights and op.may_split:
        placement = sharded(0, (rows,), op.tp)
    else:
        return op.replicated()
    if op["sparse"] or op["scale_grad_by_freq"] or not placement.fits(op.tp):
        return op.replicated()

    def local(where: Where) -> dict[str, Any]:
        ((start, stop),) = placement.ranges(where.tp, where.rank)
        return {"start": start, "stop": stop, "padding": op["padding_idx"]}

    split: Placement = placement
    wanted: dict[fx.Node | None, Placement] = {table: split, indices: REPLICATED}
    return op.step(PARTIAL, wanted, target=sharded_embedding, patch=local) if width else op.replicated()


@rule("gather", "index_select", "take_along_dim")
def gather(op: Op) -> Step | Refusal:
    """Reads by index along a dim: other dims may be sharded."""
    source, index = op["self"], op["index"] if "index" in op.args else op["indices"]
    placement = op.at(source)
    dim = op["dim"]
    if placement is PARTIAL:
        return op.step(PARTIAL, {source: PARTIAL})
    if dim is None or not isinstance(placement, Sharded):
        return Refusal("gather from parts of a sum")
    dim %= len(shape_of(source))
    if placement.dim == dim:
        return Refusal("gather along the sharded dim", source)
    if op.node.target is aten.index_select.default:
        return op.step(placement, {source: placement, index: REPLICATED})
    if shape_of(index)[placement.dim] != shape_of(source)[placement.dim]:
        return Refusal("gather of a part", source)
    return op.step(placement, {source: placement, index: placement})


@rule("index.Tensor", "_unsafe_index.Tensor")
def index(op: Op) -> Step | Refusal:
    """Indexed reads `x[i, j]` along leading or neighbouring dims: dims that are not indexed may be sharded."""
    source, indices = op["self"], list(op["indices"])
    placement = op.at(source)
    used = [i for i, each in enumerate(indices) if each is not None]
    if placement is PARTIAL:
        return op.step(PARTIAL, {source: PARTIAL})
    if not isinstance(placement, Sharded) or any(isinstance(op.at(n), Sharded) for n in indices if n is not None):
        return Refusal("index by sharded positions")
    if placement.dim in used or used != list(range(used[0], used[-1] + 1)):
        return Refusal("index along the sharded dim", source)
    if any(indices[i].meta["val"].dtype == torch.bool for i in used):
        return Refusal("index by a mask", source)
    spread = max(len(shape_of(indices[i])) for i in used)
    dim = placement.dim if placement.dim < used[0] else placement.dim - len(used) + spread
    return op.step(placement.moved(dim), {source: placement})


@rule("index_add", "scatter", "scatter_add", "index_copy", "index_add_", "scatter_", "scatter_add_", "index_copy_")
def scatter(op: Op) -> Step | Refusal:
    """Writes by index along a dim: other dims may be sharded, in all operands alike."""
    split = op.split_operands()
    source = op["self"]
    if not split or op.has_partial():
        return Refusal("scatter of parts of a sum")
    dim = op["dim"] % len(shape_of(source))
    node, placement = split[0]
    if placement.dim == dim:
        return Refusal("scatter along the sharded dim", node)
    wanted: dict[fx.Node | None, Placement] = {}
    for operand in op.operands:
        shape = shape_of(operand)
        if len(shape) == 1 and len(shape_of(source)) > 1:
            wanted[operand] = COPIED
        elif len(shape) != len(shape_of(source)) or shape[placement.dim] != shape_of(source)[placement.dim]:
            return Refusal("scatter of a part", node)
        else:
            wanted[operand] = placement
    return op.step(placement, wanted)
